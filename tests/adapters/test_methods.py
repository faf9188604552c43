"""One contract for every method, over every kind of base: a new method or weight format adds a row,
not a file.

What differs stands in the row: whether a fresh adapter is the base, whether it folds into dense
weights, which base it is tried on. alpha differs from rank, layers are not square, a Conv1D and
biases are among them.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import gguf
import pytest
import torch

from tests.kernels.test_tiles import limited
from tests.models.test_step import assert_same, loss_and_gradients, own_loss_and_gradients
from tests.soak.counts import rounds
from tests.support.helpers import make_examples
from tests.support.models.routed import Routed, batch_loss
from tests.support.models.tiny_gguf import tiny, write_gguf
from tests.support.tiny import save_tiny, tiny_base, tiny_model
from veneer.adapters.attach import attach, detach
from veneer.adapters.config import AdapterConfig, Bottleneck, DoRA, LoRA, Prefix
from veneer.adapters.placement.acting import TokenKeys
from veneer.adapters.placement.routing import Routing
from veneer.adapters.placement.wrapping import plain_modules
from veneer.data.batching import make_batch
from veneer.errors import RefusedError
from veneer.formats.adapter import adapter_file_bytes, manifest_for, read_adapter, write_adapter
from veneer.formats.loading import load_adapter
from veneer.linear import frozen_linear
from veneer.merge.fold.fold import weight_changes
from veneer.models.checkpointing import checkpointed
from veneer.models.frozen_base import FrozenBase
from veneer.models.load import load_base
from veneer.models.step import prepare

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 9, 139, 73, 5, 61, 2, 8, 44, 10, 11, 12]])
FOLDERS: list[TemporaryDirectory[str]] = []
SHARED: dict[tuple[str, torch.dtype, int], FrozenBase] = {}
ATTACHED: list[tuple[torch.nn.Module, Routing]] = []
FOLDED = 2e-5
"""Relative, float32: the update added to the weight first, or to the product."""


@dataclass(frozen=True, kw_only=True)
class Row:
    config: AdapterConfig
    starts_as_base: bool = True
    folds: bool = True
    drops_out: bool = True


WITH_EMBEDDING = r".*\.(\w+_proj|c_attn|c_fc|embed_tokens|wte)"
METHODS = {
    "lora": Row(config=LoRA(rank=3, alpha=5.0)),
    "rslora": Row(
        config=LoRA(rank=5, alpha=3.0, rslora=True, rank_pattern={"down_proj|c_proj": 2})
    ),
    "lora+": Row(config=LoRA(rank=3, alpha=5.0, lr_ratio=16.0)),
    "pissa": Row(config=LoRA(rank=3, alpha=5.0, init="pissa")),
    "fast pissa, rslora": Row(
        config=LoRA(rank=3, alpha=5.0, init="pissa", rslora=True, svd_iterations=2)
    ),
    "olora": Row(config=LoRA(rank=3, alpha=5.0, init="olora", rank_pattern={"o_proj|c_proj": 2})),
    "lora, embedding": Row(config=LoRA(rank=3, alpha=5.0, targets=WITH_EMBEDDING)),
    # tokens of IDS and of the prompt of make_examples
    "activation": Row(config=LoRA(rank=3, alpha=5.0, activation=[139, 73]), folds=False),
    "dora": Row(config=DoRA(rank=3, alpha=5.0)),
    "dora, embedding": Row(config=DoRA(rank=3, alpha=5.0, targets=WITH_EMBEDDING)),
    "houlsby": Row(
        config=Bottleneck(placement="houlsby", size=5, activation="gelu", norm=True), folds=False
    ),
    "pfeiffer": Row(
        config=Bottleneck(placement="pfeiffer", reduction=8, activation="tanh"), folds=False
    ),
    "parallel": Row(config=Bottleneck(size=7, activation="swish"), folds=False),
    "prefix": Row(
        config=Prefix(tokens=5, start="random"), starts_as_base=False, folds=False, drops_out=False
    ),
    "prefix, mlp": Row(
        config=Prefix(tokens=5, projection=7), starts_as_base=False, folds=False, drops_out=False
    ),
}
BASES = {
    "llama float32": ("llama", torch.float32),
    "qwen2 float32": ("qwen2", torch.float32),
    "gpt2 float32": ("gpt2", torch.float32),
    "llama bfloat16": ("llama", torch.bfloat16),
    "gpt2 bfloat16": ("gpt2", torch.bfloat16),
    "llama nf4": ("llama nf4", torch.float32),
    "gpt2 nf4": ("gpt2 nf4", torch.bfloat16),
    "llama gguf": ("llama gguf", torch.float32),
    "llama narrow": ("llama narrow", torch.float32),
    "gpt2 narrow": ("gpt2 narrow", torch.float32),
    "gemma3 narrow": ("gemma3 narrow", torch.float32),
}
EVERYWHERE = ("lora", "pissa", "dora, embedding", "houlsby", "prefix, mlp")
"""Methods on every base: what they read of a base, and where they act, differs. Others share their
code, and are tried on PLAIN and on another base in turn; on all of them by `make soak`."""
PLAIN = ("llama float32", "gpt2 bfloat16")
OTHERS = [base for base in BASES if base not in PLAIN]
CELLS = [
    (method, base)
    for number, method in enumerate(METHODS)
    for base in BASES
    if method in EVERYWHERE
    or base in (*PLAIN, OTHERS[number % len(OTHERS)])
    or rounds("methods", ci=0)
]
every_method = pytest.mark.parametrize("row", METHODS.values(), ids=METHODS)
every_cell = pytest.mark.parametrize(
    ("row", "family", "dtype"),
    [(METHODS[method], *BASES[base]) for method, base in CELLS],
    ids=map("-".join, CELLS),
)


@cache
def written(family):
    """A tiny base on disk; the folder goes when the process ends."""
    folder = TemporaryDirectory()
    FOLDERS.append(folder)
    if family == "llama gguf":
        path = Path(folder.name) / "tiny.gguf"
        return write_gguf(path, tiny("llama"), "llama", kind=gguf.GGMLQuantizationType.Q8_0)
    kind = family.split()[0]
    dtype = torch.bfloat16 if family.endswith(" narrow") else torch.float32
    return save_tiny(Path(folder.name) / "base", kind, dtype)


def base_of(family, dtype):
    """The base of a row of the table: dense, or held packed as its last word says, or in bf16 under
    products in float32; its fast paths proven."""
    if " " not in family:
        base = tiny_base(family, dtype)
    elif family.endswith("narrow"):
        with limited("avx2"):
            base = load_base(str(written(family)), dtype="float32")
        assert base.compute.narrow and base.dtype == torch.float32
    else:
        name = str(dtype).removeprefix("torch.")
        base = load_base(str(written(family)), dtype=name, quantize=family.split()[1])
    prepare(base.model)
    return base


def shared(family, dtype, number=0):
    """A base that the tests of this file share: what is attached to it is detached after each."""
    key = family, dtype, number
    if key not in SHARED:
        SHARED[key] = base_of(family, dtype)
    return SHARED[key]


@pytest.fixture(autouse=True)
def _adapters_of_one_test_alone():
    yield
    while ATTACHED:
        model, routing = ATTACHED.pop()
        routing.active = ()
        for name in [*routing.attached]:
            detach(model, name, routing=routing)


@pytest.fixture(autouse=True, scope="module")
def _bases_as_they_were():
    yield
    for (family, dtype, _), base in SHARED.items():
        fresh, left = base_of(family, dtype).model.state_dict(), base.model.state_dict()
        assert fresh.keys() == left.keys()
        assert all(torch.equal(value, left[name]) for name, value in fresh.items())
    SHARED.clear()


def put(model, config, *, name="a", seed=0, filled=False):
    routing = Routing()
    ATTACHED.append((model, routing))
    if config.through_attention:
        prepare(model)
    attachment = attach(
        model, config, name=name, routing=routing, head=model.get_output_embeddings(), seed=seed
    )
    if filled:
        move(attachment)
    routing.active = ((name, 1.0),)
    return attachment, routing


def move(attachment, *, seed=1, scale=0.15):
    """Every trained value away from its start, so that nothing hides behind a zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in attachment.parameters().values():
        parameter.data.add_(
            (scale * torch.randn(parameter.shape, generator=generator)).to(parameter.device)
        )


def untie(model):
    """What changes an embedding leaves a tied head as it is."""
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


@every_cell
def test_attaching_changes_a_bit_only_where_the_row_says_so_and_detaching_restores_every_bit(
    row, family, dtype
):
    model = shared(family, dtype).model
    names, state = (
        list(dict(model.named_parameters())),
        {k: v.clone() for k, v in model.state_dict().items()},
    )
    before = logits(model)
    attachment, routing = put(model, row.config)
    assert torch.equal(logits(model), before) == row.starts_as_base
    move(attachment)
    assert not torch.allclose(logits(model), before, rtol=1e-2)
    routing.active = ()
    assert torch.equal(logits(model), before)
    detach(model, "a", routing=routing)
    assert list(dict(model.named_parameters())) == names
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert torch.equal(logits(model), before)


@every_cell
def test_the_packed_step_with_a_shared_prompt_is_the_models_own_forward_row_by_row(
    row, family, dtype
):
    """In bf16 the two round in other places: there the whole gradient agrees to 0.15 of its
    length."""
    model = shared(family, dtype).model
    paths = prepare(model)
    attachment, routing = put(model, row.config, filled=True)
    examples = make_examples(4)
    loss, gradients = own_loss_and_gradients(model, attachment, examples)
    for share in (True, False):
        ours = loss_and_gradients(model, paths, routing, attachment, examples, share=share)
        if dtype == torch.float32:
            assert_same(ours, (loss, gradients))
            continue
        assert ours[0] == pytest.approx(loss, rel=0.02)
        own, found = (
            torch.cat([g.float().flatten() for g in each]) for each in (gradients, ours[1])
        )
        assert (found - own).norm() <= 0.15 * own.norm()


@every_cell
def test_only_the_adapters_parameters_train_and_all_of_them_do(row, family, dtype):
    model = shared(family, dtype).model
    paths = prepare(model)
    attachment, routing = put(model, row.config, filled=True)
    loss_and_gradients(model, paths, routing, attachment, make_examples(4))
    assert all(
        p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in attachment.parameters().values()
    )
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


@every_cell
def test_checkpointing_changes_no_bit(row, family, dtype):
    config = row.config
    if row.drops_out:
        config = config.model_copy(update={"dropout": 0.3})
        assert config.drops_out
    assert_checkpointing_changes_no_bit(config, family, dtype)


@every_method
def test_checkpointing_without_dropout_does_neither(row):
    assert_checkpointing_changes_no_bit(row.config, "llama", torch.float32)


def assert_checkpointing_changes_no_bit(config, family, dtype):
    model = shared(family, dtype).model
    paths = prepare(model)
    attachment, routing = put(model, config, filled=True)
    parameters = list(attachment.parameters().values())

    def run(on):
        batch = make_batch(
            make_examples(4),
            packed=paths.packed,
            share_prompt=True,
            device=CPU,
            invocation=attachment.invocation,
        )
        with checkpointed(model, routing, on=on), routing.drawing(TokenKeys(batch.dropout_rows, 3)):
            for parameter in parameters:
                parameter.requires_grad_(True).grad = None
            loss = batch_loss(Routed(model, paths, routing), batch, total=7.0)
            loss.backward()
            return loss, [p.grad for p in parameters]

    (kept, gradients), (again, same) = run(False), run(True)
    assert torch.equal(kept, again)
    assert all(torch.equal(a, b) for a, b in zip(gradients, same, strict=True))
    if config.drops_out:
        without = loss_and_gradients(model, paths, routing, attachment, make_examples(4))[0]
        assert kept.item() != pytest.approx(without, rel=1e-3)


@every_cell
def test_its_files_hold_all_of_it_in_the_size_foretold(row, family, dtype, tmp_path):
    base = shared(family, dtype)
    attachment, _ = put(base.model, row.config, filled=True)
    size = adapter_file_bytes(attachment, base.model)
    expected = logits(base.model)
    manifest = manifest_for(base, method=row.config.name)
    written = write_adapter(tmp_path / "a", attachment, manifest, model=base.model)
    assert written.bytes == size == (tmp_path / "a" / "adapter_model.safetensors").stat().st_size
    assert read_adapter(tmp_path / "a").config.name == row.config.name
    fresh = shared(family, dtype, 1)
    ATTACHED.append((fresh.model, fresh.routing))
    loaded = load_adapter(fresh, tmp_path / "a", name="b")
    fresh.routing.active = (("b", 1.0),)
    assert torch.equal(logits(fresh.model), expected)
    write_adapter(tmp_path / "b", loaded, manifest, model=fresh.model)
    for file in (tmp_path / "a").iterdir():
        assert (tmp_path / "b" / file.name).read_bytes() == file.read_bytes()


@every_method
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_folded_into_the_weights_it_answers_as_beside_them_or_refuses(row, family):
    model = base_of(family, torch.float32).model
    attachment, routing = put(model, row.config, filled=True)
    expected = logits(model)
    routing.active = ()
    assert row.config.folds == row.folds
    modules = plain_modules(model)
    if not row.folds:
        assert row.config.instead_of_folding
        with pytest.raises(RefusedError, match="cannot be merged into the base's weights"):
            weight_changes(model, [(attachment, 1.0)])
        return
    untie(model)
    for path, layer in attachment.layers.items():
        linear = frozen_linear(modules[path])
        # dense_weight is the weight itself, or its transpose
        weight = modules[path].weight.data if linear is None else linear.dense_weight(torch.float32)
        weight.copy_(layer.folded(weight))
    assert (logits(model) - expected).abs().max() <= FOLDED * expected.abs().max()


@every_method
def test_beside_another_adapter_their_changes_add_up(row):
    model = base_of("llama", torch.float32).model
    first, routing = put(model, row.config, filled=True)
    second = attach(
        model,
        LoRA(rank=2, alpha=3.0, targets=["q_proj", "down_proj"]),
        name="b",
        routing=routing,
        head=model.get_output_embeddings(),
    )
    move(second, seed=2)
    modules = plain_modules(model)
    if not row.folds:
        pytest.skip("what it means together is told by the method's own tests")
    routing.active = (("a", 0.5), ("b", -2.0))
    both = logits(model)
    routing.active = ()
    untie(model)
    for attachment, weight in ((first, 0.5), (second, -2.0)):
        for path, layer in attachment.layers.items():
            own = modules[path].weight.data
            original = tiny_model("llama").get_submodule(path).weight.data
            own += weight * (layer.folded(original) - original)
    torch.testing.assert_close(logits(model), both, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("family", "dtype"), BASES.values(), ids=BASES)
def test_doras_norms_are_those_of_the_weights_that_the_base_holds(family, dtype):
    model = shared(family, dtype).model
    attachment, _ = put(model, DoRA(rank=3, alpha=5.0), filled=True)
    modules = plain_modules(model)
    close = {"rtol": 1e-4 if dtype == torch.float32 else 5e-3, "atol": 0.0}
    for path, layer in attachment.layers.items():
        frozen, lora = frozen_linear(modules[path]), layer.low_rank
        weight = frozen.dense_weight(torch.float32) + lora.scaling * lora.B @ lora.A
        torch.testing.assert_close(layer.norm(frozen), weight.norm(dim=1), **close)
