"""The dry run: the same bytes as the real step, at any depth; counts and file sizes of published
adapters."""

import copy
from dataclasses import replace

import pytest
import torch

from tests.support.helpers import make_examples
from tests.support.tiny import FAMILIES, tiny_model
from veneer.adapters.attach import attach
from veneer.adapters.config import Bottleneck, DoRA, Full, LoRA, Prefix
from veneer.adapters.labels import HeadSettings
from veneer.adapters.placement.routing import Routing
from veneer.bases.loading.blueprint import Blueprint
from veneer.bases.loading.from_config import blueprint, build
from veneer.data.batching import used_length
from veneer.kernels.attention import packed as attention
from veneer.kernels.bindings import library as native
from veneer.kernels.dense import loss, products
from veneer.models.step import ComputePaths, assume_paths, prepare
from veneer.plan.estimate import estimate
from veneer.plan.simulation import dry_run as module
from veneer.plan.simulation.depth import period_of
from veneer.plan.simulation.dry_run import dry_run
from veneer.plan.simulation.step_counts import GRADIENTS, MOMENTS, VALUES, Step
from veneer.plan.simulation.tracker import Tracker
from veneer.plan.workload import synthetic_rows
from veneer.training.optimizer.buffer import FlatAdamW, FlatParameters

MIXTURES = ("mixtral", "qwen3_moe")
CPU = torch.device("cpu")


def lora(rank, targets="all-linear", **others):
    return LoRA(rank=rank, alpha=2.0 * rank + 1, targets=targets, **others)


def step_of(model, method, rows, **others):
    return Step(model.config, model.dtype, method, rows, **others)


# Published adapters and models: trained values, values in all, bytes of the file (None: not
# published).
ROWS = {
    "Llama-3.2-3B, LoRA 32 on q, v": (
        "llama-3.2-3b",
        lora(32, ["q_proj", "v_proj"]),
        9_175_040,
        3_221_924_864,
        36_715_216,
    ),
    "Llama-3.2-3B, LoRA 10 on the MLP": (
        "llama-3.2-3b",
        lora(10, ["gate_proj", "up_proj", "down_proj"]),
        9_461_760,
        3_222_211_584,
        37_868_984,
    ),
    "Qwen3-14B, LoRA 32 on all": ("qwen3-14b", lora(32), 128_450_560, 14_896_757_760, None),
    "SmolLM2-135M, full": ("smollm2-135m", Full(), 134_515_008, 134_515_008, None),
}


def planned(base, method, **changes):
    found = blueprint(base)
    for name, value in changes.items():
        setattr(found.config, name, value)
    return module.attached_facts(Step(found.config, found.dtype, method, ()))


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_counts_and_file_sizes_are_those_that_were_published(row):
    base, method, trainable, total, file_bytes = row
    run = planned(base, method)
    assert run.trainable_parameters == trainable
    own = run.total_parameters + (trainable if not isinstance(method, Full) else 0)
    assert own == total
    assert file_bytes is None or run.file_bytes == file_bytes


BY_METHOD = {
    # Llama-3.2-3B, 28 layers of width 3,072, keys and values 1,024 wide
    "DoRA 32 on q, v": (
        "llama-3.2-3b",
        DoRA(rank=32, alpha=64.0, targets=["q_proj", "v_proj"]),
        9_289_728,
        3_222_039_552,
        37_181_760,
    ),
    "prefix of 200": ("llama-3.2-3b", Prefix(tokens=200), 11_468_800, 3_224_218_624, 45_875_328),
    "Pfeiffer 48 on GPT-2": (
        "gpt2",
        Bottleneck(placement="pfeiffer", size=48),
        894_528,
        None,
        None,
    ),
}


@pytest.mark.parametrize("row", BY_METHOD.values(), ids=BY_METHOD)
def test_counts_and_file_sizes_of_the_other_methods(row):
    base, method, trainable, total, file_bytes = row
    run = planned(base, method)
    assert run.trainable_parameters == trainable
    assert total is None or run.total_parameters + trainable == total
    assert file_bytes is None or run.file_bytes == file_bytes


def test_dora_costs_few_products_more_than_lora_with_and_without_compiled_kernels():
    config = copy.deepcopy(blueprint("smollm2-135m").config)
    config.num_hidden_layers = 2
    for on_cpu in (True, False):
        lora, dora = (
            dry_run(
                Step(config, torch.bfloat16, method, synthetic_rows(4, 64), on_cpu=on_cpu)
            ).work.flops
            for method in (LoRA(), DoRA())
        )
        assert lora <= dora <= 1.05 * lora


def test_counts_with_embedding_and_head_among_the_targets():
    method = lora(64, ["q_proj", "v_proj", "embed_tokens", "lm_head"])
    run = planned("mistral-7b", method, vocab_size=32027)
    assert run.trainable_parameters == 31_886_720
    assert run.total_parameters + 31_886_720 == 7_273_840_000


def test_counts_of_gemma_2_without_its_classification_head():
    run = planned("gemma-2-2b", lora(16, ["q_proj", "v_proj"]))
    assert run.trainable_parameters == 3_199_488 - 2 * 2304


@pytest.mark.parametrize(
    ("family", "method", "checkpointing"),
    [
        *((family, lora(3), False) for family in FAMILIES if family not in MIXTURES),
        *((family, Full(), True) for family in ("llama", "gemma2", "gpt2", "bloom")),
        ("llama", Full(), False),
        ("llama", lora(2, dropout=0.1), True),
    ],
)
def test_the_step_without_storage_holds_what_the_real_step_holds(
    family, method, checkpointing, monkeypatch
):
    monkeypatch.setenv(native.OFF, "1")
    native.library.cache_clear()
    rows = make_examples(3, longest=40)
    model = tiny_model(family, torch.bfloat16)
    step = step_of(model, method, rows, checkpointing=checkpointing)
    without = module._run(step, build(model.config, torch.bfloat16), 1)
    real = module._run(step, model, 1, CPU)
    native.library.cache_clear()
    assert [p.name for p in without.phases] == ["forward", "loss", "backward", "update"]
    for one, other in zip(without.phases, real.phases, strict=True):
        assert one.peak_bytes == pytest.approx(other.peak_bytes, rel=0.01), one.name
        assert one.end_bytes == pytest.approx(other.end_bytes, rel=0.01), one.name
    assert without.work.flops == real.work.flops
    assert without.packed == real.packed


@pytest.mark.parametrize("prompt", [1, 9])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_with_the_compiled_kernels_too_it_holds_what_the_real_step_holds(checkpointing, prompt):
    rows = make_examples(3, longest=40, prompt=prompt)
    model = tiny_model("llama", torch.bfloat16, head_dim=16)
    step = step_of(model, lora(3), rows, checkpointing=checkpointing)
    with native.planning():
        without = module._run(step, build(model.config, torch.bfloat16), 1)
    real = module._run(step, model, 1, CPU)
    for one, other in zip(without.phases, real.phases, strict=True):
        assert one.peak_bytes == pytest.approx(other.peak_bytes, rel=0.01), one.name
        assert one.end_bytes == pytest.approx(other.end_bytes, rel=0.01), one.name


@pytest.mark.skipif(not native.has_bf16(), reason="this processor multiplies no bf16 pairs")
@pytest.mark.parametrize(("checkpointing", "products"), [(False, 2 + 5), (True, 2 + 2 + 5)])
def test_what_compiled_attention_computes_is_counted(checkpointing, products):
    (row,) = make_examples(1, longest=40)
    model = tiny_model("llama", torch.bfloat16, head_dim=16)
    step = step_of(model, lora(3), [row], checkpointing=checkpointing)
    with native.planning():
        run = module._run(step, build(model.config, torch.bfloat16), 1)
    length, config = used_length(row), model.config
    pairs = length * (length + 1) // 2
    each = 2 * pairs * config.num_attention_heads * 16
    assert run.work.products[module.COMPILED] == products * each * config.num_hidden_layers


@pytest.mark.skipif(not native.has_bf16(), reason="this processor multiplies no bf16 pairs")
def test_products_of_kernels_of_ours_are_none_of_a_library():
    found = blueprint("smollm2-135m")
    found.config.num_hidden_layers = 2
    rows = synthetic_rows(1, 128)
    own, others = (
        dry_run(Step(found.config, dtype, lora(16), rows)).work
        for dtype in (torch.bfloat16, torch.float32)
    )
    widest = products.MAX_WIDTH_ON_TILES if native.has_amx() else 49152
    assert all(inner > widest for _, inner, _ in own.of_libraries) and own.own
    assert {shape[1:] for shape in others.of_libraries} > {
        (49152, 576),
        (576, 1536),
        (1536, 576),
        (576, 576),
    }
    frozen = {shape: flops for shape, flops in others.products.items() if shape in own.own}
    assert frozen == {shape: own.products[shape] for shape in own.own}


@pytest.mark.parametrize("count", [3, 5, 7])
def test_chunks_of_the_loss_that_are_alike_are_counted_by_one_of_them(count, monkeypatch):
    rows = synthetic_rows(1, 128 * count + 9)
    step = step_of(tiny_model("llama", torch.bfloat16, head_dim=16), lora(3), rows)
    found = dry_run(step)
    monkeypatch.setattr(loss, "chunk_starts", iter)
    assert dry_run(step) == found


def test_what_the_base_alone_says_serves_every_method():
    config = tiny_model("qwen3_moe").config
    bares = {}
    for method in (
        lora(3),
        DoRA(rank=2, alpha=2.0, targets=["q_proj"]),
        Prefix(),
        Full(),
        Bottleneck(),
        lora(3),
    ):
        for dtype in (torch.float32, torch.bfloat16):
            step = Step(config, dtype, method, ())
            assert module.attached_facts(step, bares) == module.attached_facts(step), method
    assert len(bares) == 2


@pytest.mark.parametrize(
    ("family", "method", "checkpointing"),
    [
        ("llama", lora(3), False),
        ("llama", Full(), True),
        ("gemma2", lora(3), True),
        ("qwen3_moe", lora(3), False),
    ],
)
def test_three_small_depths_tell_the_whole_depth_to_the_byte(family, method, checkpointing):
    depth = 9
    config = tiny_model(family).config
    for name in ("num_hidden_layers", "n_layer"):
        if name in config.to_dict():
            setattr(config, name, depth)
    if hasattr(config, "layer_types") and config.layer_types:
        config.layer_types = [config.layer_types[i % 2] for i in range(depth)]
    step = Step(
        config, torch.bfloat16, method, make_examples(2, longest=40), checkpointing=checkpointing
    )
    experts = module._num_experts(config)
    model = build(config, torch.bfloat16)
    with torch.device("meta"):
        _, parameters = module._install(
            model, step, Routing(), ComputePaths(False, None, 1.0, None, None)
        )
    grown = module._extrapolated(step, depth, period_of(model, parameters), experts)
    whole = module._run(step, build(config, torch.bfloat16), experts)
    assert grown is not None
    for one, other in zip(grown.phases, whole.phases, strict=True):
        assert (one.name, one.peak_bytes, one.end_bytes) == (
            other.name,
            other.peak_bytes,
            other.end_bytes,
        )
        assert {k: v for k, v in one.parts.items() if v} == other.parts
    assert grown.work == whole.work


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize(
    "method", [Full(), Prefix(tokens=3), lora(3, ["q_proj"])], ids=["full", "prefix", "lora"]
)
def test_experts_that_are_not_adapted_are_planned_in_float32_as_in_bf16(family, method):
    rows = make_examples(2)
    runs = [
        dry_run(step_of(tiny_model(family, dtype), method, rows))
        for dtype in (torch.float32, torch.bfloat16)
    ]
    shapes = [{shape for shape in run.work.products if any(shape)} for run in runs]
    assert shapes[0] >= shapes[1]
    assert all(
        3 in shape for shape in shapes[0] - shapes[1]
    )  # products with the rank, compiled for bf16


@pytest.mark.parametrize("method", [lora(3), Full()], ids=["lora", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_stays_is_what_the_flat_buffer_and_the_optimizer_hold(method, dtype):
    model, routing = tiny_model("llama_untied", dtype), Routing()
    planned = dry_run(step_of(model, method, make_examples(2)))
    weights = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    if isinstance(method, Full):
        parameters = dict(model.named_parameters())
    else:
        attachment = attach(
            model, method, name="a", routing=routing, head=model.get_output_embeddings()
        )
        parameters = attachment.parameters()
    flat = FlatParameters(parameters)
    optimizer = FlatAdamW(flat, weight_decay=0.0)
    optimizer.step(learning_rate=1e-3, clip=1.0, norm=0.5)
    state = optimizer.state()
    moved = isinstance(method, Full) and dtype == torch.float32
    assert planned.static == {
        "weights": sum(b.nbytes for b in model.buffers()) if moved else weights,
        "trained values": flat.values.nbytes,
        "gradients": flat.gradient.nbytes,
        "optimizer": state["exp_avg"].nbytes + state["exp_avg_sq"].nbytes,
    }


def test_a_layer_that_differs_from_the_others_is_run_whole(monkeypatch):
    config = tiny_model("llama", num_hidden_layers=12).config
    step = Step(config, torch.float32, lora(3, layers=[11]), make_examples(2))
    monkeypatch.setattr(
        module, "_extrapolated", lambda *_: pytest.fail("layer 11 is not like the others")
    )
    assert dry_run(step).modules_adapted == 7


def test_a_70b_step_needs_no_memory_and_a_few_seconds():
    found = blueprint("llama-70b")
    run = dry_run(Step(found.config, found.dtype, lora(16), synthetic_rows(1, 2048)))
    assert run.trainable_parameters == 207_093_760
    assert run.static["weights"] > 141e9
    assert estimate(run, device="cuda").phase in ("loss", "backward")


def test_the_paths_of_a_structure_are_those_that_running_the_model_proves():
    for family in FAMILIES:
        model = build(tiny_model(family).config, torch.bfloat16)
        with Tracker(experts=module._num_experts(model.config)):
            assumed = assume_paths(model)
        proven = prepare(tiny_model(family, torch.bfloat16))
        assert (assumed.packed, assumed.softcap) == (proven.packed, proven.softcap), family
        assert (assumed.head_reason is None) == (proven.head_reason is None), family


def test_a_blueprint_builds_what_the_config_says():
    found = blueprint("Llama-3.2-3B-Instruct")
    assert isinstance(found, Blueprint)
    assert build(found.config, found.dtype).num_parameters() == 3_212_749_824
    assert build(found.config, torch.float32).dtype == torch.float32


def test_a_plan_for_cuda_holds_no_scores_and_counts_what_flash_kernels_compute():
    (row,) = make_examples(1, longest=400)
    model = tiny_model("llama", torch.bfloat16, head_dim=16)
    step, runs = step_of(model, lora(3), [row], on_cpu=False), {}
    for place in ("flash", "plain"):
        with native.planning("cuda"), pytest.MonkeyPatch.context() as patch:
            if place == "plain":
                patch.setattr(attention, "declined", lambda *given: "not asked for")
            runs[place] = module._run(step, build(model.config, torch.bfloat16), 1)
    peaks = {place: max(phase.peak_bytes for phase in run.phases) for place, run in runs.items()}
    assert peaks["flash"] < peaks["plain"]
    length, config = used_length(row), model.config
    each = length * (length + 1) * config.num_attention_heads * 16
    assert runs["flash"].work.products[module.COMPILED] == (2 + 5) * each * config.num_hidden_layers
    assert not runs["plain"].work.products[module.COMPILED]


def test_a_head_that_trains_with_every_weight_counts():
    model = tiny_model("llama")
    step = step_of(model, Full(), synthetic_rows(2, 24))
    plain, headed = dry_run(step), dry_run(replace(step, head=HeadSettings("label", ("a", "b"))))
    values = 2 * model.config.hidden_size
    assert headed.trainable_parameters == plain.trainable_parameters + values
    for label, size in ((VALUES, 4), (GRADIENTS, 4), (MOMENTS, 8)):
        assert headed.static[label] == pytest.approx(plain.static[label] + size * values, abs=64)
