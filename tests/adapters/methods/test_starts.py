"""Factors that start from the weight, from what 4 bits lost of it, or from the rows: what they
start at, and that the base stays as it is."""

import pytest
import torch

from tests.support.helpers import make_examples
from tests.support.tiny import save_tiny, tiny_base, tiny_model
from veneer.adapters.attach import attach
from veneer.adapters.config import LoRA
from veneer.adapters.methods.initial_factors import (
    leading_directions,
    loftq_start,
    olora_start,
    pissa_start,
    randomised_svd,
)
from veneer.adapters.methods.lora import delta_weight
from veneer.adapters.placement.routing import Routing
from veneer.adapters.placement.wrapping import plain_modules
from veneer.errors import ConfigError
from veneer.linear import frozen_linear
from veneer.merge.combine.low_rank import cut_factors
from veneer.models.load import load_base
from veneer.models.starts.initial_values import begin

IDS = torch.tensor([[5, 9, 30, 7, 5, 61, 2, 8, 44, 10, 11, 12]])


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def best(weight, rank):
    """The nearest matrix of that rank."""
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    return U[:, :rank] * S[:rank] @ Vh[:rank]


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize(("shape", "rank"), [((24, 40), 3), ((40, 24), 5)])
def test_each_start_is_what_its_name_says(shape, rank):
    weight, generator = random(*shape), torch.Generator().manual_seed(1)
    A, B = pissa_start(weight, rank=rank, scaling=0.7, iterations=None, generator=generator)
    torch.testing.assert_close(0.7 * B @ A, best(weight, rank), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        (A * A).sum(1), (B * B).sum(0), rtol=1e-4, atol=1e-4
    )  # shared evenly
    A, B = pissa_start(weight, rank=rank, scaling=0.7, iterations=12, generator=generator)
    lost, least = (torch.linalg.matrix_norm(weight - m) for m in (0.7 * B @ A, best(weight, rank)))
    assert lost <= 1.01 * least
    A, B = olora_start(weight, rank=rank)
    torch.testing.assert_close(B.T @ B, torch.eye(rank), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(B @ (B.T @ weight), B @ A, rtol=1e-4, atol=1e-4)
    quantised = (weight * 2).round() / 2
    A, B = loftq_start(weight, quantised, rank=rank, scaling=0.7)
    torch.testing.assert_close(0.7 * B @ A, best(weight - quantised, rank), rtol=1e-4, atol=1e-4)


def test_a_randomised_svd_of_a_low_rank_matrix_is_its_svd():
    weight = random(30, 4) @ random(4, 50, seed=1)
    U, S, Vh = randomised_svd(
        weight, rank=4, iterations=0, generator=torch.Generator().manual_seed(2)
    )
    torch.testing.assert_close(U * S @ Vh, weight, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(S, torch.linalg.svdvals(weight)[:4], rtol=1e-4, atol=1e-4)


def test_the_trained_factors_start_there_and_the_update_at_nothing():
    model = tiny_model("llama")
    attachment = attach(
        model,
        LoRA(rank=3, alpha=5.0, init="pissa"),
        name="a",
        routing=Routing(),
        head=model.lm_head,
    )
    for path, layer in attachment.layers.items():
        weight = frozen_linear(plain_modules(model)[path]).dense_weight(torch.float32)
        A, B = layer.parts().values()
        torch.testing.assert_close(layer.scaling * B @ A, best(weight, 3), rtol=1e-3, atol=1e-4)
        assert not delta_weight(layer).any()
        assert layer.stored()["A"].shape[0] == 6


def test_a_rank_that_a_weight_does_not_have_is_refused_and_nothing_is_attached():
    model = tiny_model("llama")
    before = list(model.named_modules())
    with pytest.raises(ConfigError, match="a start of rank 16 for a layer of rank 20"):
        attach(
            model,
            LoRA(rank=20, init="olora", targets=["v_proj"]),
            name="a",
            routing=Routing(),
            head=None,
        )
    assert list(model.named_modules()) == before


@pytest.mark.parametrize("init", ["pissa", "olora", "eva"])
def test_embeddings_and_experts_are_refused_by_name(init):
    with pytest.raises(ConfigError, match=f"init {init} takes linear layers"):
        attach(
            tiny_model("mixtral"),
            LoRA(init=init),
            name="a",
            routing=Routing(),
            head=tiny_model("mixtral").lm_head,
        )


def test_eva_starts_where_the_inputs_are_largest_and_changes_no_bit():
    base = tiny_base("llama")
    examples = make_examples(3)
    before = logits(base.model)
    inputs = {}
    modules = plain_modules(base.model)
    hooks = [
        module.register_forward_pre_hook(
            lambda _m, given, path=path: inputs.setdefault(path, []).append(given[0].flatten(0, -2))
        )
        for path, module in modules.items()
        if path.endswith("_proj")
    ]
    with torch.no_grad():
        for example in examples:
            base.model(torch.as_tensor(example.ids, dtype=torch.long)[None])
    for hook in hooks:
        hook.remove()
    begun = begin(base, LoRA(rank=2, alpha=5.0, init="eva"), name="a", examples=examples)
    assert "tokens of the rows" in begun.lines[0]
    for path, layer in begun.attachment.layers.items():
        rows, A = torch.cat(inputs[path]), layer.parts()["A"].detach()
        torch.testing.assert_close(A @ A.T, torch.eye(2), rtol=1e-3, atol=1e-3)
        captured = (rows @ A.T).square().sum()
        most = torch.linalg.svdvals(rows)[:2].square().sum()
        assert 0.97 * most <= captured <= 1.0001 * most
    base.routing.active = (("a", 1.0),)
    assert torch.equal(logits(base.model), before)


def test_eva_without_rows_and_loftq_over_dense_weights_are_refused():
    base = tiny_base("llama")
    with pytest.raises(ConfigError, match="init eva needs training rows"):
        begin(base, LoRA(init="eva"), name="a")
    with pytest.raises(ConfigError, match="this base is dense: set quantize: nf4"):
        begin(base, LoRA(init="loftq"), name="a")
    assert not base.attachments


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_loftq_brings_a_4_bit_base_nearer_to_the_original_and_leaves_its_weights(family, tmp_path):
    folder = str(save_tiny(tmp_path / "base", family))
    base, whole = load_base(folder, quantize="nf4"), load_base(folder)
    packed = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    far = (logits(base.model) - logits(whole.model)).norm()
    begun = begin(base, LoRA(rank=12, alpha=5.0, init="loftq"), name="a")
    assert "of the 4-bit error" in begun.lines[0]
    originals = plain_modules(whole.model)
    for path, layer in begun.attachment.layers.items():
        original = frozen_linear(originals[path]).dense_weight(torch.float32)
        quantised = frozen_linear(plain_modules(base.model)[path]).dense_weight(torch.float32)
        left = torch.linalg.matrix_norm(original - quantised - delta_weight(layer))
        assert left < 0.8 * torch.linalg.matrix_norm(original - quantised)
    base.routing.active = (("a", 1.0),)
    assert (logits(base.model) - logits(whole.model)).norm() < 0.9 * far
    base.routing.active = ()
    base_state = {name.replace(".base.", "."): t for name, t in base.model.state_dict().items()}
    assert all(torch.equal(base_state[name], tensor) for name, tensor in packed.items())


def test_loftq_names_the_weights_that_it_does_not_find(tmp_path):
    base = load_base(str(save_tiny(tmp_path / "base", "llama")), quantize="nf4")
    base.source = str(save_tiny(tmp_path / "other", "gpt2"))
    with pytest.raises(ConfigError, match="does not find the original weight of 14 layers"):
        begin(base, LoRA(init="loftq"), name="a")
    assert not base.attachments


def test_directions_that_the_rows_do_not_have_are_zero_and_more_rows_fill_them():
    generator = torch.Generator().manual_seed(0)
    few = random(2, 12)
    found = leading_directions(few, None, rank=4, generator=generator)
    assert found.shape == (4, 12) and not found[2:].any()
    torch.testing.assert_close(found.T @ found, few.T @ few, rtol=1e-4, atol=1e-5)
    more = random(2, 12, seed=1)
    both = leading_directions(more, found, rank=4, generator=generator)
    rows = torch.cat([few, more])
    torch.testing.assert_close(both.T @ both, rows.T @ rows, rtol=1e-4, atol=1e-5)


def test_no_start_forms_a_square_of_the_weights_width(monkeypatch):
    own, seen = torch.linalg.svd, []
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: seen.append(own(*a, **k)) or seen[-1])
    weight, generator = random(24, 60), torch.Generator().manual_seed(1)
    pissa_start(weight, rank=3, scaling=2.0, iterations=None, generator=generator)
    pissa_start(weight, rank=3, scaling=2.0, iterations=1, generator=generator)
    loftq_start(weight, weight.round(), rank=3, scaling=2.0)
    cut_factors(random(3, 60), random(24, 3), 2)
    assert len(seen) == 4
    assert all(U.shape[-1] == S.shape[-1] == Vh.shape[-2] for U, S, Vh in seen)
