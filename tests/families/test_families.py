"""A sample of the table of families (tests/families/__main__.py).

tests/soak/models/test_families.py has all families."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from tests.families import layers
from tests.families.declared import DECLARED, NOT_COMPARED, NOT_OURS
from tests.families.measure import measure
from tests.families.models import SAMPLE, names
from tests.families.page import LIMITS, PAGE, Result, left_of, rows_of
from veneer.kernels.bindings.library import has_bf16

pytest.importorskip("peft")


@pytest.mark.parametrize("name", SAMPLE)
def test_a_family_agrees_with_transformers_and_peft(name):
    found = measure(name)
    assert found.built is None and not found.wrong
    assert rows_of(PAGE.read_text())[name] == found.row, (
        f"python -m tests.families '{name}' writes it anew"
    )


@pytest.mark.skipif(not has_bf16(), reason="the page is of a processor with bf16 instructions")
@pytest.mark.parametrize("name", ["qwen2", "mamba", "ministral3", "olmo", "llama, dynamic"])
def test_the_layers_of_a_family_are_computed_as_the_page_says(name):
    start = layers.row_start(*layers.layer_paths(name))
    (row,) = (line for line in layers.PAGE.read_text().splitlines() if line.startswith(start))
    assert name in row.removesuffix(" |").rpartition(" | ")[2].split("; "), (
        "python -m tests.families.layers writes it anew"
    )


def test_the_page_says_yes_or_what_is_declared_and_nothing_else():
    rows, left = rows_of(PAGE.read_text()), left_of(PAGE.read_text())
    if f"transformers {transformers.__version__} " in PAGE.read_text():  # another has other ones
        assert sorted([*rows, *left]) == names()
        assert DECLARED.keys() | NOT_COMPARED.keys() <= set(names())
    for name, row in rows.items():
        if name in NOT_COMPARED:
            assert row == f"- {name}: {NOT_COMPARED[name]}"
            continue
        cells = dict(zip(LIMITS, row.removesuffix(" |").split(" | ")[2:], strict=True))
        written = cells.pop(".gguf")
        assert written in ("yes", "–") or written.startswith("refused: "), name
        assert cells == {
            cell: DECLARED.get(name, {}).get(cell, "yes") for cell in LIMITS if cell != ".gguf"
        }, name


def small(kind: str, **fields: Any) -> PreTrainedModel:
    sizes = {
        "vocab_size": 272,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "pad_token_id": 0,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**sizes, **fields})).eval()


def split_difference(model: PreTrainedModel, first: int, text: torch.Tensor) -> float:
    """Of the logits of a text that is read up to `first` and then to its end, relative."""
    with torch.no_grad():
        past = model(text[:, :first], use_cache=True).past_key_values
        rest = model(text[:, first:], past_key_values=past, use_cache=True).logits
        whole = model(text, use_cache=False).logits[:, first:]
    return float((rest - whole).abs().max() / whole.abs().max())


TEXT = torch.arange(40)[None] * 7 % 250


def minimax_differs() -> None:
    kinds = ["linear_attention", "full_attention"]
    model = small("minimax", num_local_experts=2, layer_types=kinds)
    assert split_difference(model, 20, TEXT) > 0.1
    assert split_difference(small("llama"), 20, TEXT) < 1e-4


def long_rope_differs() -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "original_max_position_embeddings": 32,
        "short_factor": [1.0, 1.3, 2.0, 4.0],
        "long_factor": [2.0, 3.0, 5.0, 9.0],
    }
    assert split_difference(small("llama", rope_parameters=rope), 30, TEXT) > 0.1


def xlstm_stops() -> None:
    model = small("xlstm", num_heads=4)
    with pytest.raises(ValueError, match="wrong shape"):
        model.generate(TEXT[:, :5], max_new_tokens=2, do_sample=False)


def routers_stop() -> None:
    for key in ("phimoe", "llama4"):
        assert "router" in DECLARED[key]["from PEFT"]


SHOWN: dict[str, Callable[[], None]] = {
    "MiniMax": minimax_differs,
    "Long RoPE (llama and others but Phi-3)": long_rope_differs,
    "xLSTM": xlstm_stops,
    "Phi-MoE, Llama 4": routers_stop,
}


@pytest.mark.parametrize("name", NOT_OURS)
def test_what_the_page_says_of_transformers_and_peft_is_so(name: str) -> None:
    SHOWN[name]()
    assert f"- {name}: {NOT_OURS[name]}." in PAGE.read_text(), (
        "python -m tests.families --left writes it"
    )


def test_a_cell_is_a_fault_unless_it_agrees_or_is_refused_as_declared():
    cells: dict[str, float | str] = {
        **dict.fromkeys(LIMITS, 0.0),
        "to PEFT": "not in PEFT: so",
        ".gguf": "not written",
    }
    assert not Result("laguna", cells=cells).wrong and Result("llama", cells=cells).wrong
    for cell, value in (
        ("to PEFT", 0.0),
        ("to PEFT", 0.5),
        ("to PEFT", "FAULT"),
        ("answers", 0.5),
        ("loss", "refused: so"),
        ("loaded", "FAULT ValueError: 2 attributes differ"),
        (".gguf", 0.5),
    ):
        assert Result("laguna", cells={**cells, cell: value}).wrong, (cell, value)
    assert not Result("laguna", cells={**cells, ".gguf": "refused: so"}).wrong
    assert Result("llama", built="not built").wrong and not Result("xlnet", built="not built").wrong
