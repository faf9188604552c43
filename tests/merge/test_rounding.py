"""Rounding of merged weights, and the arithmetic of the check."""

import pytest
import torch

from tests.parity.test_peft_files import logits
from tests.support.merging import NAME, adapted
from tests.support.tiny import tiny_base
from veneer.adapters.placement.wrapping import plain_modules
from veneer.merge.fold.fold import SourceTensor, stored_tensors
from veneer.merge.fold.folder import _common
from veneer.merge.fold.rounding import Survival, by_layer, stochastic, survival
from veneer.merge.fold.verify import in_float32

# rounding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_is_right_on_average_and_keeps_what_is_exact(dtype):
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(5000, generator=generator).to(dtype).float()
    assert torch.equal(stochastic(exact, dtype, generator).float(), exact)
    value = torch.full((200_000,), 1.0 + 0.3 * torch.finfo(dtype).eps)
    rounded = stochastic(value, dtype, generator).float()
    assert set(rounded.tolist()) == {1.0, 1.0 + torch.finfo(dtype).eps}
    assert float((rounded - 1).mean() / torch.finfo(dtype).eps) == pytest.approx(0.3, abs=0.01)
    small = torch.tensor([0.0, -0.0, 1e-30, -3e-5, 6.1e-5, -65000.0])
    assert torch.isfinite(stochastic(small, dtype, generator)).all()


def test_survival_is_the_projection_of_what_was_obtained():
    generator = torch.Generator().manual_seed(0)
    own, update = (
        torch.randn(40, 30, generator=generator),
        0.1 * torch.randn(40, 30, generator=generator),
    )
    assert survival(own, own + update, own + update).share == pytest.approx(1.0)
    assert survival(own, own + update, own).share == pytest.approx(0.0, abs=1e-6)
    assert survival(own, own + update, own).error == pytest.approx(1.0, abs=1e-6)
    half = survival(own, own + update, own + 0.5 * update)
    assert (half.share, half.error) == (pytest.approx(0.5, abs=1e-5), pytest.approx(0.5, abs=1e-5))
    assert half.relative_size == pytest.approx(float(update.norm() / own.norm()), rel=1e-5)


def test_of_a_change_of_nothing_nothing_is_lost_and_sums_are_over_a_layer():
    nothing = Survival(0.0, 0.0, 0.0, 0.0)
    assert (nothing.share, nothing.error, nothing.relative_size) == (1.0, 0.0, 0.0)
    part = Survival(1.0, 4.0, 36.0, 64.0)
    assert (part.share, part.error, part.relative_size) == (0.25, 3.0, 0.25)
    layers = by_layer(
        {"layers.3.a": part, "layers.3.b": part, "layers.10.a": part, "head": nothing}
    )
    assert layers == {"3": Survival(2.0, 8.0, 72.0, 128.0), "10": part, "head": nothing}


# the check's own arithmetic


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral"])
def test_a_bf16_model_widened_module_by_module_answers_as_its_float32_copy(family):
    narrow = tiny_base(family, torch.bfloat16)
    wide = tiny_base(family, torch.bfloat16)
    wide.model.float()
    with in_float32(narrow.model):
        found = logits(narrow.model)
    assert found.dtype == torch.float32 and torch.equal(found, logits(wide.model))
    assert all(p.dtype == torch.bfloat16 for p in narrow.model.parameters())


def test_widening_reaches_adapted_modules_and_their_trained_values():
    base = adapted(
        "phi", torch.bfloat16, settings={"bias": "lora_only", "train_modules": ["lm_head"]}
    )
    wide = adapted(
        "phi", torch.bfloat16, settings={"bias": "lora_only", "train_modules": ["lm_head"]}
    )
    wide.model.float()
    for value in wide.attachments[NAME].values.values():
        value.data = value.data.float()
    base.routing.active = wide.routing.active = ((NAME, 1.0),)
    with in_float32(base.model):
        found = logits(base.model)
    assert torch.equal(found, logits(wide.model))
    assert all(v.dtype == torch.bfloat16 for v in base.attachments[NAME].values.values())


def test_what_is_written_is_every_tensor_of_the_model():
    base = tiny_base("gpt2")
    assert list(stored_tensors(base.model)) == list(base.model.state_dict())
    adapted_base = adapted("gpt2")
    assert sorted(stored_tensors(adapted_base.model)) == sorted(base.model.state_dict())
    assert plain_modules(adapted_base.model).keys() == plain_modules(base.model).keys()


def test_the_type_of_a_merged_folder_is_that_of_most_values_and_not_of_most_tensors():
    def stored(count, dtype, **more):
        return SourceTensor(torch.Size([count]), dtype, lambda: None, **more)

    small, large = stored(3, torch.bfloat16), stored(5, torch.float16)
    assert _common({"a": small, "b": large}) is torch.float16
    assert _common({"a": small, "b": large, "c": small}) is torch.bfloat16
    ids, packed = stored(99, torch.int64), stored(99, torch.float32, quantised=True)
    assert _common({"a": small, "b": ids, "c": packed}) is torch.bfloat16
    assert _common({"b": ids, "c": packed}) is torch.float32
