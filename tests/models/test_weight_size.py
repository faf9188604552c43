"""How large a base's linear weights are, in all forms in which they are held."""

import pytest
import torch

from tests.support.helpers import filled_lora
from tests.support.tiny import save_tiny, tiny_base
from veneer.errors import ConfigError
from veneer.models.load import load_base
from veneer.training.config import RunConfig

NOT_LINEAR = ("embed", "wte", "wpe", "lm_head", "router", "mlp.gate.")


def plain_value(base):
    """Returns the root mean square of a dense model's matrices but embeddings, head and routers."""
    values = torch.cat(
        [
            parameter.detach().flatten().double()
            for path, parameter in base.model.named_parameters()
            if parameter.dim() > 1
            and not path.endswith("bias")
            and not any(part in path for part in NOT_LINEAR)
        ]
    )
    return float(values.square().mean().sqrt())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_oss", "olmoe"])
def test_it_is_the_root_mean_square_of_the_linear_weights_with_an_adapter_and_without(family):
    base = tiny_base(family)
    expected = plain_value(base)
    filled_lora(base)
    base.routing.active = (("a", 1.0),)
    assert base.weight_rms == pytest.approx(expected, rel=1e-5)


def test_a_head_that_an_adapter_wraps_counts_no_more_than_a_plain_one():
    expected = tiny_base("llama").weight_rms
    base = tiny_base("llama")
    filled_lora(base, targets=["q_proj", "lm_head"])
    assert base.weight_rms == expected


@pytest.mark.parametrize(("family", "quantize"), [("llama", "nf4"), ("olmoe", "fp4")])
def test_packed_weights_have_nearly_the_size_of_the_dense_ones(tmp_path, family, quantize):
    folder = str(save_tiny(tmp_path / "base", family))
    dense, packed = load_base(folder), load_base(folder, quantize=quantize)
    assert packed.weight_rms != dense.weight_rms
    assert packed.weight_rms == pytest.approx(dense.weight_rms, rel=0.05)


def test_a_base_without_weights_has_no_default_rate_but_takes_one():
    base = tiny_base("llama")
    with torch.no_grad():
        for parameter in base.model.parameters():
            parameter.zero_()
    config = RunConfig(base="b", data="d", out="o")
    with pytest.raises(ConfigError, match="no default learning rate: its weights give 0"):
        config.peak_learning_rate(base)
    given = config.model_copy(update={"learning_rate": 1e-3})
    assert given.peak_learning_rate(base) == 1e-3
