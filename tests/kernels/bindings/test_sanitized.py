"""The kernels' tests once more, over a library that is built with the address and
undefined-behaviour sanitizers.

A read or write of one value too many, a shift too far or a misaligned word ends the process that
the tests run in. Tiles (AMX) are plain C there (tiles_in_c.h): their code runs on any processor
with products of bf16 pairs, and is seen.

This takes minutes, so it is left out where nothing has changed since it passed: neither a source,
nor a test of the kernels. PASSED holds what passed; a run that passes writes it.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.decoding.test_direct import FAMILIES as DIRECT_FAMILIES
from tests.kernels.layers.test_block import FAMILIES
from veneer.kernels.bindings import library as native

Ended = tuple[int, str]
PASSED = Path(__file__).with_name("sanitized.json")
"""Of each kind of processor the digest of the files of the last run that passed."""
SOURCES = Path(native.__file__).parents[1] / "native"
TESTS = Path(__file__).parents[2]
FLAGS = (
    *(
        "-std=gnu11",
        "-O1",
        "-g1",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-ffp-contract=off",
        "-fPIC",
    ),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"),
    # what these see is a read of no memory too, and they double what gcc makes of a line
    "-fno-sanitize=null,pointer-overflow,object-size,nonnull-attribute,returns-nonnull-attribute",
    # gcc 12 misplaces registers of 64 bytes in frames that outlive their function
    "--param=asan-use-after-return=0",
    *(f"-I{folder}" for folder in sorted({path.parent for path in SOURCES.rglob("*.h")})),
    *("-include", str(TESTS / "support" / "kernels" / "tiles_in_c.h")),
)
CALLED = ("-Dalways_inline=", "-Werror=psabi")
"""Loops are inlined once for each number of rows and each type, on which gcc spends minutes. Called
instead, they read and write the same; what hands vectors over must have been compiled for them."""
INLINED = ("updates.c",)
"""Its functions of vectors serve processors with and without them."""
RUN = (
    *(
        "kernels/bindings/test_native_calls.py",
        "kernels/bindings/test_native.py",
        "kernels/dense/test_rank.py",
        "kernels/dense/test_layer_norm.py",
        "kernels/test_tiles.py",
        "kernels/layers/test_states.py",
        "kernels/attention/test_attention_native.py",
    ),
    *(
        "kernels/packed/test_gguf.py",
        "quant/test_nf4.py",
        "kernels/dense/test_few_rows.py",
        "kernels/dense/test_products.py",
        "kernels/dense/test_float_products.py",
    ),
    *("kernels/attention/test_paged_attention.py", "decoding/sampling/test_sampling.py"),
    *(
        f"kernels/tape/test_recorded.py::{name}"
        for name in (
            "test_recorded_steps_give_the_same_bits[None-torch.bfloat16]",
            "test_recorded_steps_give_the_same_bits[lora-torch.bfloat16]",
            "test_recorded_steps_give_the_same_bits[prefix-torch.bfloat16]",
            "test_adapted_layers_of_one_input_are_one_call_and_give_what_each_gives",
            "test_an_answers_steps_are_one_call_from_ids_to_logits_to_the_bit",
            "test_steps_of_each_family_are_one_call_from_ids_to_logits_to_the_bit"
            "[gemma3-torch.bfloat16]",
            "test_a_recording_of_a_single_row_serves_any_number_of_rows[phi]",
            "test_one_recording_serves_prompts_and_answers_of_all_mixes_to_the_bit[torch.bfloat16]",
            "test_factors_of_adapters_that_went_are_never_read_again[torch.bfloat16]",
            "test_calls_that_read_what_the_one_before_wrote_are_the_same"
            "_with_any_number_of_threads",
            "test_calls_are_replayed_over_what_is_in_memory_now",
            "test_calls_are_made_again_of_fewer_and_more_rows_within_their_room",
            "test_products_over_blocks_that_are_made_together_give_what_each_gives",
            "test_a_product_of_4_bit_weights_is_replayed_in_its_type",
        )
    ),
    "decoding/test_direct.py::test_a_step_by_parts_gives_what_the_model_gives",
    "decoding/test_direct.py::test_what_an_adapter_does_is_done_by_parts_too",
    "kernels/layers/test_block.py::test_one_node_gives_the_bits_of_its_parts",
    "kernels/test_references.py::test_the_compiled_dropout_is_its_reference_to_the_bit",
    "kernels/test_references.py::test_the_compiled_dropout_keeps_what_is_not_finite",
    *(
        "kernels/dense/test_fused.py::test_the_norm_is_its_reference",
        "kernels/dense/test_fused.py::test_the_gate_is_its_reference",
    ),
    "kernels/dense/test_fused.py::test_the_entropy_of_logits_is_its_reference",
)
OF_BLOCKS = ("qwen2", "gpt_neox", "gpt2", "phi", "gemma3", "olmo", "falcon_groups", "modernbert")
"""Families of which each has calls that the others lack: C knows no family."""
LEFT_OUT = (
    *(
        f"kernels/layers/test_block.py::test_one_node_gives_the_bits_of_its_parts[{family}-"
        + ("{'" if family in OF_BLOCKS else "")
        for family in FAMILIES
        if family not in OF_BLOCKS[:2]
    ),
    # The same without a cap.
    "kernels/attention/test_attention_native.py::"
    "test_long_documents_and_other_head_sizes_are_their_reference[0-(810,)-(9, 3)-64-None-None",
    # The same calls but for the products, which are torch's here.
    "decoding/test_direct.py::test_a_step_by_parts_gives_what_the_model_gives[-",
    # What they call is tested in both types beside it.
    *(
        "decoding/test_direct.py::test_a_step_by_parts_gives_what_the_model_gives"
        f"[products of few rows-{family}-torch.float32]"
        for family in DIRECT_FAMILIES
        if family not in ("llama", "phi", "mixtral")
    ),
    # thousands of the same draws
    "decoding/sampling/test_sampling.py::test_every_number_has_the_ids_that_the_reference_gives_it",
    "decoding/sampling/test_sampling.py::test_what_is_drawn_follows_the_distribution_that_is_meant",
)
"""Of RUN, by how their names begin: many or large cases of calls that others make."""
OF_PAIRS = (
    "kernels/dense/test_rank.py",
    "kernels/attention/test_attention_native.py::test_the_compiled_attention_is_its_reference",
)
"""What takes tiles wherever there are some, and no test takes without: once more so."""


def sanitizer() -> str:
    """The libraries that must be loaded before all others; skips where there are none.

    The sanitizer looks for the function that throws C++ exceptions before torch has loaded it.
    """
    compiler = shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("no gcc here, whose sanitizers this uses")
    paths = []
    for name in ("libasan.so", "libstdc++.so.6"):
        done = subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        )
        paths.append(Path(done.stdout.strip()))
        if not paths[-1].is_file():
            pytest.skip(f"gcc without {name}")
    return " ".join(str(path.resolve()) for path in paths)


def gcc(*arguments: str | Path) -> None:
    done = subprocess.run(["gcc", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def digest() -> str:
    """Returns the digest of all files of the kernels and of their tests."""
    digest, root = hashlib.sha256(), TESTS.parent
    for folder in (SOURCES.parent, TESTS / "kernels", TESTS / "support" / "kernels"):
        for path in sorted(folder.rglob("*.[chp]*")):
            if path.suffix in (".c", ".h", ".py"):
                digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def kind_of_processor() -> str:
    """Returns what decides which tests run."""
    return "bf16" if native.has_bf16() else "other"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    preload = sanitizer()
    if json.loads(PASSED.read_text()).get(kind_of_processor()) == digest():
        pytest.skip("these sources and tests passed before; to repeat it remove sanitized.json")
    built = tmp_path_factory.mktemp("sanitized") / "native.so"

    def compiled(source: Path) -> Path:
        made = built.with_name(f"{source.stem}.o")
        gcc(*FLAGS, *(() if source.name in INLINED else CALLED), "-c", source, "-o", made)
        return made

    largest_first = sorted(SOURCES.rglob("*.c"), key=lambda source: -source.stat().st_size)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [*pool.map(compiled, largest_first)]
    gcc(*FLAGS, "-shared", *objects, "-o", built, "-lm")
    return {
        **os.environ,
        native.BUILT_ELSEWHERE: str(built),
        "LD_PRELOAD": preload,
        "ASAN_OPTIONS": (
            "detect_leaks=0:allocator_may_return_null=1:malloc_context_size=1"
        ),  # what Python keeps to its end is no leak of ours; who allocated is not recorded
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "2",
        "PYTHONMALLOC": "malloc",
    }


READ_PAST_THE_END = """
from veneer.kernels.bindings import library as native, packed_calls
x, y = torch.zeros(64, dtype=torch.uint8), torch.zeros(512)
native.library().veneer_gguf_dequantise(8, x.data_ptr(), 1, 512, y.data_ptr(), 0, 0)
"""
HAS_TILES = "from veneer.kernels.bindings import library as native; assert native.has_amx()\n"
FORKS = """
import json, os, sys, traceback
import pytest, torch, transformers
for name in ("AutoModelForCausalLM", "GenerationConfig", "PreTrainedTokenizerFast"):
    getattr(transformers, name)
for log, (changes, code) in json.loads(sys.argv[1]).items():
    if (child := os.fork()) == 0:
        os.environ |= changes
        file = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, 1)
        os.dup2(file, 2)
        code, failed = compile(code, log, "exec"), 1
        try:
            exec(code)
            failed = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(failed)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""Runs code in forks of a process that has imported torch and transformers, which takes half a
minute under the sanitizers."""


def passing(tests: tuple[str, ...]) -> str:
    """Code that runs these tests."""
    command = ["-x", "-o", "addopts=", "-p", "no:cacheprovider"]
    command += [str(TESTS / name) for name in tests]
    command += [f"--deselect=tests/{name}" for name in LEFT_OUT]
    return f"assert pytest.main({command}) == 0"


@pytest.fixture(scope="module")
def ended(
    environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Ended]:
    """How each run ended: its exit code, and what it said."""
    runs = {"past the end": ({}, READ_PAST_THE_END), "all": ({}, passing(RUN))}
    if native.has_bf16():
        runs["all"] = ({}, HAS_TILES + passing(RUN))
        runs["without tiles"] = ({native.MAX_ISA: "avx512_bf16"}, passing(OF_PAIRS))
    logs = {name: tmp_path_factory.mktemp("log") / "log" for name in runs}
    code = json.dumps({str(logs[name]): run for name, run in runs.items()})
    command = [sys.executable, "-c", FORKS, code]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=TESTS.parent
    )
    assert done.returncode == 0, done.stderr[-3000:]
    codes = [*map(int, done.stdout.split())]
    if codes[0] != 0 and not any(codes[1:]):
        passed = json.loads(PASSED.read_text()) | {kind_of_processor(): digest()}
        PASSED.write_text(json.dumps(passed, indent=1, sort_keys=True) + "\n")
    return {
        name: (code, log.read_text()[-6000:])
        for (name, log), code in zip(logs.items(), codes, strict=True)
    }


def assert_passed(ended: Ended) -> None:
    code, said = ended
    assert code == 0 and "runtime error" not in said and " passed" in said, said


def test_the_sanitizers_see_a_read_past_the_end(ended):
    code, said = ended["past the end"]
    assert code != 0 and "ERROR: AddressSanitizer" in said and "READ of size" in said


def test_the_kernels_pass_their_tests_under_the_sanitizers(ended):
    assert_passed(ended["all"])


@pytest.mark.skipif(not native.has_bf16(), reason="no products of bf16 pairs here")
def test_the_kernels_without_tiles_do(ended):
    assert_passed(ended["without tiles"])
