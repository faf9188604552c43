"""Merges that lose a part of the update, overflow or answer differently are refused."""

from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.merging import NAME, adapted, plain_load, written_adapter
from tests.support.tiny import save_tiny
from veneer.errors import CorruptFileError, RefusedError
from veneer.merge.fold.fold import weight_changes
from veneer.merge.fold.folder import _refuse_lost, merge_into_folder
from veneer.merge.fold.merge_run import merge_adapters
from veneer.merge.fold.rounding import Survival


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_the_type_asked_for_is_the_type_stored(dtype, tmp_path):
    report = merge_into_folder(adapted("llama"), [(NAME, 1.0)], tmp_path / "m", dtype=dtype)
    wanted = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    assert {t.dtype for t in load_file(tmp_path / "m" / "model.safetensors").values()} == {wanted}
    assert plain_load(tmp_path / "m").dtype == wanted
    assert report.dtype == dtype


def test_an_update_that_rounding_would_lose_is_refused_and_nothing_is_left(tmp_path):
    """bf16 keeps 8 bits: on weights that lie on its grid, an update far below a step rounds
    away."""
    base = adapted("llama", torch.bfloat16, scale=0.003)
    with pytest.raises(
        RefusedError, match=r"of the update is left after rounding to bf16[\s\S]*--dtype fp16"
    ) as caught:
        merge_into_folder(base, [(NAME, 1.0)], tmp_path / "m")
    assert caught.value.exit_code == 4
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("dtype", "stochastic", "advice"),
    [
        (
            "bf16",
            False,
            (
                "Take --dtype fp16 or --dtype fp32 or --stochastic (right on average, noisier); or"
                " keep"
            ),
        ),
        ("bf16", True, "Take --dtype fp16 or --dtype fp32; or keep"),
        ("fp16", False, "Take --dtype fp32 or --stochastic (right on average, noisier); or keep"),
        ("fp32", False, "Take --dtype fp16; or keep"),
    ],
)
def test_a_refusal_for_what_is_lost_names_the_worst_layers_and_the_other_ways(
    dtype, stochastic, advice
):
    kept = {f"model.layers.{n}.q.weight": Survival(0.1 * n, 1.0, 0.0, 4.0) for n in range(4)}
    kept["lm_head.weight"] = Survival(0.15, 1.0, 0.0, 4.0)
    with pytest.raises(RefusedError) as caught:
        _refuse_lost(kept, dtype, stochastic, 0.5)
    assert caught.value.faults[0].startswith("the update is 0.5 of the weights' size; ")
    assert caught.value.faults[1:] == ["layer 0: 0%", "layer 1: 10%", "lm_head.weight: 15%"]
    assert "15% of the update is left" in str(caught.value) and "below 50%" in str(caught.value)
    assert str(caught.value.next_step).startswith(advice)


@pytest.mark.parametrize(
    ("along", "refused"), [(0.5, False), (0.49, True), (1.5, False), (1.51, True)]
)
def test_an_update_may_become_as_much_too_large_as_too_small(along, refused):
    with pytest.raises(RefusedError) if refused else nullcontext():
        _refuse_lost({"a": Survival(along, 1.0, 0.0, 1.0)}, "bf16", False, 0.5)


@pytest.mark.parametrize("choice", [{"dtype": "fp32"}, {"stochastic": True}])
def test_what_the_refusal_advises_works(choice, tmp_path):
    base = adapted("llama", torch.bfloat16, scale=0.003)
    report = merge_into_folder(base, [(NAME, 1.0)], tmp_path / "m", check_logits=False, **choice)
    assert report.total.share == pytest.approx(1.0, abs=0.1)


def test_values_that_overflow_fp16_are_refused(tmp_path):
    base = adapted("llama_untied", settings={"targets": ["v_proj"]})
    base.model.model.norm.weight.data[3] = 1e6
    with pytest.raises(RefusedError, match=r"overflow in fp16[\s\S]*model\.norm\.weight"):
        merge_into_folder(base, [(NAME, 1.0)], tmp_path / "m", dtype="fp16", check_logits=False)
    assert not (tmp_path / "m").exists()


def test_a_merge_that_loses_the_adapter_is_refused_by_its_logits(tmp_path, monkeypatch):
    """The check is of the written folder: a writer that forgets one layer is found out."""
    import veneer.merge.fold.folder as module

    def forgetful(model, applied):
        return {
            name: new for name, new in weight_changes(model, applied).items() if "layers.1" in name
        }

    monkeypatch.setattr(module, "weight_changes", forgetful)
    with pytest.raises(RefusedError, match="does not answer like the adapter on its base"):
        merge_into_folder(adapted("llama"), [(NAME, 1.0)], tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_with_nan_is_refused_before_anything_is_written(tmp_path):
    folder = save_tiny(tmp_path / "base", "llama")
    place = written_adapter(folder, adapted("llama"), tmp_path / "a")
    tensors = load_file(place / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, place / "adapter_model.safetensors", metadata={"format": "pt"})
    (place / "veneer.json").unlink()
    with pytest.raises(CorruptFileError, match="not finite"):
        merge_adapters(str(folder), [(place, 1.0)], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
