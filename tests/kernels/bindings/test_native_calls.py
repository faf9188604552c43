"""What reaches C is what C takes it for: every call is valid or refused, and nothing is written
beside its tensors."""

import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.soak.counts import rounds
from tests.support.kernels.native_cases import REFUSED, fuzz_calls, margins, tensors, valid_calls
from veneer.kernels.bindings import (
    attention_calls,
    block_calls,
    dense_calls,
    draw_calls,
    expert_calls,
    packed_calls,
    paged_calls,
    row_calls,
)
from veneer.kernels.bindings import library as native
from veneer.kernels.bindings.arguments import CallError
from veneer.kernels.bindings.checks import _expression
from veneer.kernels.packed import nf4
from veneer.kernels.tape import tape
from veneer.quant.nf4 import quantize

KERNELS = Path(native.__file__).parents[1]
CALLING = [
    path
    for folder in ("bindings", "tape")
    for path in (KERNELS / folder).glob("*.py")
    if path.name not in ("__init__.py", "pages.py")
]
"""The files that call the library."""
pytestmark = pytest.mark.skipif(native.library() is None, reason="no compiled kernels here")
needs_bf16 = pytest.mark.skipif(
    not native.has_bf16(), reason="this processor multiplies no bf16 pairs"
)


def declared_functions():
    """Returns the functions that are declared to call C."""
    modules = [
        import_module(f"veneer.kernels.bindings.{path.stem}")
        for path in (KERNELS / "bindings").glob("*_calls.py")
    ]
    functions = {f for module in modules for _, f in inspect.getmembers(module, inspect.isfunction)}
    return {f for f in functions if hasattr(f, "__wrapped__")}


def test_only_bindings_and_tapes_know_the_library():
    functions = "|".join(native.SIGNATURES)
    knows = rf"library import [^\n]*\blibrary\b|native\.library|\.({functions})\b"
    for path in set(KERNELS.parent.rglob("*.py")) - set(CALLING):
        text = path.read_text()
        assert not re.search(knows, text), path
        assert KERNELS not in path.parents or not re.search(r"^import ctypes", text, re.M), path


def test_every_function_of_the_library_has_its_signature_and_its_call():
    source = "\n".join(path.read_text() for path in (KERNELS / "native").rglob("*.c"))
    exported = set(
        re.findall(
            r"^(?!static)(?:VENEER_BF16 )?(?:void |int |int64_t |const char \*)(veneer_\w+)\(",
            source,
            re.M,
        )
    )
    inner = {
        "veneer_parallel",
        "veneer_parallel_dealt",
        "veneer_threads",
        "veneer_has_byte_permutes",
    }
    inner |= {
        "veneer_pieces",
        "veneer_tiled_pieces",
        "veneer_few_level",
        "veneer_tiled_downs",
        "veneer_tiled_ups",
    }
    inner |= {"veneer_parallel_behind", "veneer_wait", "veneer_thread"}
    inner |= {"veneer_together"}
    assert exported - inner == set(native.SIGNATURES)


def test_c_and_python_number_the_functions_of_a_tape_alike():
    source = (KERNELS / "native" / "common" / "tape.c").read_text()
    numbered = re.findall(r"^    X\((\w+), \(?(\w+)\(", source, re.M)
    assert [function for _, function in numbered] == list(tape.FUNCTIONS)
    assert all(function == f"veneer_{name.lower()}" for name, function in numbered)
    (most,) = re.findall(r"MOST_ARGUMENTS = (\d+)", source)
    assert int(most) == tape.MOST_ARGUMENTS


def test_the_most_that_a_caller_allows_is_not_kept_as_what_the_processor_has():
    """It ends the process on a processor with less (4 bits, a few rows, AVX2 alone). Kept is what
    features.c says."""
    for path in (KERNELS / "native").rglob("*.c"):
        assert not re.search(r" = \{[^;]*[ ,{](?:most|level)[,}]", path.read_text()), path


@pytest.mark.parametrize("level", [0, 2, 3])
def test_codes_that_are_none_become_some_byte(level):
    """Shifted as they are they have no meaning in C: the sanitizers end such a call."""
    packed, codes = (
        torch.zeros(48, dtype=torch.uint8),
        torch.full((16,), -(2**20), dtype=torch.int32),
    )
    limits = torch.arange(16, dtype=torch.float32)
    packed_calls.nf4_quantize(
        torch.linspace(-1, 1, 96), limits, codes, 64, packed, torch.zeros(2), level
    )


@needs_bf16
def test_there_is_a_case_for_every_call_and_each_is_valid():
    cases = valid_calls(0)
    tried = {function for function, _ in cases}
    wrapped = {packed_calls.nf4_dequantize, packed_calls.nf4_product, packed_calls._packed_rows}
    wrapped |= {paged_calls.paged_attention, dense_calls.few_rows_updated, dense_calls._lay_out}
    wrapped |= {draw_calls._draw, packed_calls.nf4_weights, block_calls._filled_factors}
    wrapped |= {dense_calls._part, dense_calls._updated_part}
    wrapped |= {expert_calls.expert_product, expert_calls.expert_sum}
    assert declared_functions() <= tried | wrapped
    for seed in range(20):
        for function, arguments in valid_calls(seed):
            function(**arguments)
            assert all(margins(t) for a in arguments.values() for t in tensors(a)), (
                function.__name__
            )


def test_a_tensor_of_another_type_or_place_or_with_one_more_axis_is_refused():
    for function, arguments in valid_calls(3):
        for name, value in arguments.items():
            if isinstance(value, Tensor):
                for other in (
                    value.to("meta"),
                    value.to(torch.float64),
                    torch.stack([value, value]),
                ):
                    with pytest.raises(REFUSED):
                        function(**{**arguments, name: other})


@pytest.mark.parametrize("number", [2**64, 2**63, 2**32, -64, 0, True, 64.0, None])
def test_a_number_that_c_would_take_for_another_is_refused(number):
    weight = quantize(torch.randn(300))
    given = {
        "packed": weight.packed,
        "scales": weight.absmax,
        "table": weight.table,
        "count": 300,
        "block": 64,
        "nested": (weight.nested.table, weight.nested.scales, 256, 0.0),
    }
    packed_calls.nf4_weights(**given)
    for name in ("count", "block"):
        with pytest.raises(CallError):
            packed_calls.nf4_weights(**{**given, name: number})
    nested = (*given["nested"][:2], number, 0.0)
    if number != 2**32:  # one block then holds all scales, and is a power of two
        with pytest.raises(CallError):
            packed_calls.nf4_weights(**{**given, "nested": nested})


@pytest.mark.parametrize("target", [-1, 40, 2**40, -(2**40)])
@needs_bf16
def test_a_target_outside_the_vocabulary_is_refused(target):
    logits, loss = torch.zeros(3, 40, dtype=torch.bfloat16), torch.empty(3)
    with pytest.raises(CallError):
        row_calls.entropy(logits, torch.tensor([0, target, 1]), loss)


def forward(starts, splits):
    """Attention of 9 rows."""
    q = torch.zeros(9, 2, 16, dtype=torch.bfloat16)
    rules = {"scale": 1.0, "window": None, "softcap": None}
    attention_calls.attention_forward(
        q, q, q, None, starts, torch.empty_like(q), torch.empty(9, 2), **rules, splits=splits
    )


def test_documents_outside_the_rows_are_refused():
    for starts in ([0, 10], [0, 2**40], [-1, 9], [0, 6, 4, 9], [0]):
        with pytest.raises(CallError):
            forward(starts=torch.tensor(starts), splits=1)


@pytest.mark.parametrize("splits", [0, 2**16, 2**40, 2**62])
def test_shares_of_a_document_that_c_would_count_for_ever_are_refused(splits):
    with pytest.raises(CallError):
        forward(starts=torch.tensor([0, 9]), splits=splits)


def test_spoiled_calls_are_refused_or_stay_within_their_tensors():
    refused = computed = 0
    for seed in rounds("calls", ci=100):
        more = fuzz_calls(seed)
        refused, computed = refused + more[0], computed + more[1]
    assert refused > computed > 0


def test_a_plan_leaves_the_kernels_as_they_were():
    """Nothing is computed while a step is planned; what was looked up then once stayed silent for
    good."""
    weight = quantize(torch.randn(640))
    expected = nf4.dequantize(weight.blocks, torch.empty(640))
    with native.planning():
        nf4.dequantize(weight.blocks, torch.full((640,), 7.0))
    assert torch.equal(nf4.dequantize(weight.blocks, torch.full((640,), 7.0)), expected)
    assert torch.equal(quantize(torch.ones(64)).packed, torch.full((32,), 255, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("text", "python"),
    [
        ("a * b / c", "_divide(a * b, c)"),
        ("a / (b * c) + T", "_divide(a, b * c) + T_number"),
        ("rows / 2 / T", "_divide(_divide(rows, 2), T_number)"),
        (" 2 * width ", "2 * width"),
    ],
)
def test_an_expression_of_a_declaration_keeps_the_order_of_its_operations(text, python):
    assert _expression(text) == python
