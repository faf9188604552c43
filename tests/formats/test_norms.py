"""Norms and angles from the factors alone are those of the dense updates."""

import math
from pathlib import Path

import pytest
import torch

from tests.support.adapter_files import adapted, write
from veneer.formats.adapter import read_adapter
from veneer.formats.norms import LowRankUpdate, angle, base_norms, updates

CASES = {
    "patterns": ("llama_untied", {}),
    "rslora": ("llama_untied", {"rslora": True, "rank": 5}),
    "embedding": ("llama_untied", {"targets": ["embed_tokens", "v_proj"]}),
    "conv1d": ("gpt2", {"rank_pattern": {}, "train_modules": [], "targets": ["c_attn", "c_proj"]}),
    "experts": (
        "mixtral",
        {
            "rank_pattern": {},
            "train_modules": [],
            "targets": ["experts.down_proj", "q_proj", "mlp.gate"],
        },
    ),
}


def dense(attachment) -> dict[str, torch.Tensor]:
    """Path -> the update, formed whole."""
    found = {}
    for path, layer in attachment.layers.items():
        A, B = (part.detach() for part in layer.parts().values())
        update = layer.scaling * (B @ A)
        shape = update.T if layer.kind == "embedding" else update
        zero = torch.zeros(shape.shape)
        assert torch.allclose(layer.folded(zero), shape, atol=1e-6)
        found[path] = shape
    return found


@pytest.mark.parametrize("case", CASES)
def test_norms_and_angles_are_those_of_the_dense_updates(tmp_path: Path, case):
    family, fields = CASES[case]
    base, one = adapted(family, **fields)
    write(tmp_path / "one", base, one)
    _, other = adapted(family, **{**fields, "alpha": 3})
    generator = torch.Generator().manual_seed(5)
    for parameter in other.parameters().values():
        parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    write(tmp_path / "other", base, other)
    first, rest = updates(read_adapter(tmp_path / "one"))
    second, _ = updates(read_adapter(tmp_path / "other"))
    whole, whole_other = dense(one), dense(other)
    norms = sorted(update.norm() for update in first.values())
    assert norms == pytest.approx(
        sorted(float(tensor.norm()) for tensor in whole.values()), rel=1e-5
    )
    dot = sum(float((whole[path] * whole_other[path]).sum()) for path in whole)
    sizes = [
        math.sqrt(sum(float(tensor.norm()) ** 2 for tensor in all_.values()))
        for all_ in (whole, whole_other)
    ]
    found = angle(first, second)
    assert found.total == pytest.approx(dot / (sizes[0] * sizes[1]), abs=1e-5)
    assert 0 < abs(found.total) < 0.999 and found.in_both == len(whole)
    assert len(rest) == len(one.values)
    assert set(base_norms(base, first)) == {path for path in first if "experts" not in path}
    assert angle(first, first).total == pytest.approx(1.0)


def test_an_update_that_one_lacks_counts_as_nothing(tmp_path):
    base, one = adapted(targets=["v_proj"])
    write(tmp_path / "one", base, one)
    base, both = adapted(targets=["v_proj", "q_proj"])
    write(tmp_path / "both", base, both)
    first, second = (updates(read_adapter(tmp_path / name))[0] for name in ("one", "both"))
    found = angle(first, second)
    assert found.only_one == [] and len(found.only_other) == 2 and 0 < abs(found.total) < 1
    assert angle({}, second).total is None


def test_norms_of_the_base_are_those_of_its_weights():
    base, _ = adapted()
    path = "model.layers.0.mlp.down_proj"
    expected = float(base.model.get_submodule(path).base.weight.norm())
    assert base_norms(base, [path, "nowhere"]) == {path: pytest.approx(expected)}


def update(scaling: float, *, width: int = 2, experts: int = 1) -> LowRankUpdate:
    return LowRankUpdate(
        torch.ones(experts, 1, width, dtype=torch.float64),
        torch.ones(experts, 2, 1, dtype=torch.float64),
        scaling,
    )


def test_angles_are_by_layer_in_the_order_of_the_layers_and_what_lies_outside_comes_last():
    paths = [
        "lm_head",
        "model.layers.10.q",
        "model.layers.0.q",
        "a.layers.1.q",
        "model.embed",
        "model.layers.2.q",
    ]
    one = {path: update(1.0) for path in paths}
    other = {path: update(-1.0 if ".2." in path else 2.0) for path in paths}
    found = angle(one, other).by_layer
    assert list(found) == ["layer 0", "layer 1", "layer 2", "layer 10", "lm_head", "model.embed"]
    assert found == {name: pytest.approx(-1.0 if name == "layer 2" else 1.0) for name in found}


@pytest.mark.parametrize("shape", [{"width": 3}, {"experts": 2}])
def test_updates_of_other_shapes_have_no_angle_and_one_that_either_lacks_is_named(shape):
    one = {"a": update(1.0), "b": update(1.0), "c": update(1.0)}
    other = {"a": update(1.0), "b": update(1.0, **shape), "d": update(1.0)}
    found = angle(one, other)
    assert (found.in_both, found.only_one, found.only_other) == (1, ["c"], ["d"])
    assert found.by_layer == {"a": pytest.approx(1.0), "b": 0.0, "c": None, "d": None}


def test_modules_without_a_weight_of_their_own_have_no_norm():
    base, _ = adapted()
    norm = base.model.get_submodule("model.norm").weight
    found = base_norms(base, ["model.norm", "model.layers.0", "model.embed_tokens"])
    table = base.model.get_input_embeddings().weight
    assert found == {
        "model.norm": pytest.approx(float(norm.norm())),
        "model.embed_tokens": pytest.approx(float(table.norm())),
    }
