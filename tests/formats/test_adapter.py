"""An adapter folder is written whole, read strictly, and goes only onto the base it was made
for."""

import errno
import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.files.test_atomic import WRITE_CALLS
from tests.support.adapter_files import IDS, WEIGHTS, adapted, edit_config, edit_tensors, write
from tests.support.helpers import FailAt
from tests.support.tiny import tiny_base
from veneer.errors import (
    AdapterMismatchError,
    ConfigError,
    CorruptFileError,
    DoesNotFitError,
    RefusedError,
    SourceError,
    VeneerError,
)
from veneer.files.partial import sweep
from veneer.formats.adapter import manifest_for, read_adapter, write_adapter
from veneer.formats.loading import load_adapter
from veneer.formats.manifest import MANIFEST_NAME
from veneer.formats.peft.config import CONFIG_NAME
from veneer.formats.peft.fit_check import group_by_layer
from veneer.models.frozen_base import FrozenBase


def answers(base: FrozenBase, *names: str) -> torch.Tensor:
    base.routing.active = tuple((name, 1.0) for name in names)
    with torch.no_grad():
        logits = base.model(IDS).logits
    base.routing.active = ()
    return logits


# loading


def test_a_loaded_adapter_answers_to_the_bit_like_the_one_that_was_written(written):
    base, _ = adapted()
    expected = answers(base, "x")
    fresh = tiny_base("llama_untied")
    plain = answers(fresh)
    attachment = load_adapter(fresh, written, name="y")
    assert torch.equal(answers(fresh, "y"), expected) and not torch.equal(expected, plain)
    assert torch.equal(answers(fresh), plain), "not active until it is used"
    assert fresh.attachments == {"y": attachment}


def test_16_bit_factors_are_widened_without_loss(copy):
    edit_tensors(copy, lambda t: t.update({n: v.bfloat16() for n, v in t.items()}))
    expected = load_file(copy / WEIGHTS)
    attachment = load_adapter(tiny_base("llama_untied"), copy, name="x")
    layer = attachment.layers["model.layers.0.self_attn.q_proj"]
    assert layer.A.dtype == torch.float32
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert torch.equal(layer.A, expected[name].float())


def test_a_name_that_is_taken_is_refused_and_the_first_adapter_stays(written):
    base, _ = adapted()
    before = answers(base, "x")
    with pytest.raises(ConfigError, match="'x'"):
        load_adapter(base, written, name="x")
    assert torch.equal(answers(base, "x"), before)


def test_another_base_of_the_same_shapes_is_refused_with_both_sides_and_forced_on_demand(written):
    other = tiny_base("llama_untied", seed=1)
    with pytest.raises(AdapterMismatchError) as caught:
        load_adapter(other, written, name="x")
    assert any(fault.startswith("values of the weights: ") for fault in caught.value.faults)
    assert "--force-base" in str(caught.value) and other.attachments == {}
    assert load_adapter(other, written, name="x", force_base=True).layers


def test_the_same_weights_under_another_name_are_the_same_base(written):
    renamed = tiny_base("llama_untied")
    renamed.name_or_path = renamed.source = "elsewhere"
    load_adapter(renamed, written, name="x")


def test_without_a_fingerprint_it_loads_and_does_not_claim_to_be_verified(copy):
    (copy / MANIFEST_NAME).unlink()
    stored = read_adapter(copy)
    assert stored.manifest is None
    load_adapter(tiny_base("llama_untied", seed=1), stored, name="x")


def test_every_tensor_that_does_not_fit_is_told_at_once_and_grouped(copy):
    def damage(tensors) -> None:
        root = "base_model.model.model.layers"
        for layer in (0, 1):
            del tensors[f"{root}.{layer}.mlp.up_proj.lora_B.weight"]
            tensors[f"{root}.{layer}.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 40)
            tensors[f"{root}.{layer}.self_attn.x_proj.lora_A.weight"] = torch.zeros(4, 32)
        tensors[f"{root}.1.mlp.down_proj.lora_A.weight"] = torch.zeros(3, 48)
        del tensors["base_model.model.model.norm.weight"]

    edit_tensors(copy, damage)
    base = tiny_base("llama_untied")
    with pytest.raises(AdapterMismatchError) as caught:
        load_adapter(base, copy, name="support-bot")
    lines = [" ".join(line.split()) for line in caught.value.faults]
    assert lines == [
        "model.layers.1.mlp.down_proj.lora_A.weight adapter (3, 48) model (4, 48) 1 tensor",
        "model.layers.0-1.mlp.up_proj.lora_B.weight adapter missing model (48, 4) 2 tensors",
        "model.layers.0-1.self_attn.q_proj.lora_A.weight adapter (4, 40) model (4, 32) 2 tensors",
        (
            "model.layers.0-1.self_attn.x_proj.lora_A.weight adapter (4, 32) model no such tensor 2"
            " tensors"
        ),
        "model.norm.weight adapter missing model (32,) 1 tensor",
    ]
    assert "'support-bot' does not fit tiny-llama_untied, 8 of 28 tensors" in caught.value.headline
    assert base.attachments == {} and not any(
        "base" in name.split(".") for name, _ in base.model.named_modules()
    )


def test_an_adapter_of_another_base_is_told_with_that_base_first_and_in_few_lines(copy):
    with pytest.raises(AdapterMismatchError) as caught:
        load_adapter(tiny_base("llama_untied", hidden_size=64), copy, name="support-bot")
    made_for = read_adapter(copy).name_or_path
    assert (
        "'support-bot' does not fit" in caught.value.headline
        and f"made for {made_for}" in caught.value.headline
    )
    assert len(caught.value.faults) <= 13 and caught.value.faults[-1].startswith("and ")
    assert caught.value.next_step == f"Load it on {made_for}."


def test_tensors_that_differ_in_the_layer_alone_are_one_line_in_columns():
    lines = [(f"layers.{layer}.a", "x", "y") for layer in (7, 1, 0, 2, 5)]
    assert group_by_layer([*lines, ("layers.0.b", "x", "z"), ("head", "pp", "q")]) == [
        "head               adapter pp   model q   1 tensor",
        "layers.0-2,5,7.a   adapter x    model y   5 tensors",
        "layers.0.b         adapter x    model z   1 tensor",
    ]
    assert group_by_layer([]) == []


def test_transposed_factors_are_misshapen_not_silently_wrong(copy):
    edit_tensors(
        copy, lambda t: t.update({n: v.T.contiguous() for n, v in t.items() if v.dim() == 2})
    )
    with pytest.raises(AdapterMismatchError, match="28 of 29 tensors"):
        load_adapter(tiny_base("llama_untied"), copy, name="x")


def test_a_rank_that_is_not_the_tensors_is_told(copy):
    (copy / MANIFEST_NAME).unlink()
    edit_config(copy, r=5)
    with pytest.raises(AdapterMismatchError, match=r"\(4, 32\) +model \(5, 32\)"):
        load_adapter(tiny_base("llama_untied"), copy, name="x")


def test_targets_that_match_nothing_are_told(copy):
    (copy / MANIFEST_NAME).unlink()
    edit_config(copy, target_modules=["nothing"])
    with pytest.raises(AdapterMismatchError, match="match nothing"):
        load_adapter(tiny_base("llama_untied"), copy, name="x")


def test_a_trained_module_the_model_lacks_is_told(copy):
    (copy / MANIFEST_NAME).unlink()
    edit_config(copy, modules_to_save=["score"])
    with pytest.raises(AdapterMismatchError, match="'score'"):
        load_adapter(tiny_base("llama_untied"), copy, name="x")


def test_a_frozen_table_in_the_file_must_be_the_base_s(tmp_path):
    base, attachment = adapted(targets=["embed_tokens", "v_proj"])
    write(tmp_path / "a", base, attachment)
    table = base.model.get_input_embeddings().weight.detach().clone()
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    edit_tensors(tmp_path / "a", lambda t: t.update({name: table}))
    load_adapter(tiny_base("llama_untied"), tmp_path / "a", name="x")
    edit_tensors(tmp_path / "a", lambda t: t.update({name: table + 1}))
    with pytest.raises(
        AdapterMismatchError, match=r"embed_tokens\.base_layer\.weight .* own values differ"
    ):
        load_adapter(tiny_base("llama_untied"), tmp_path / "a", name="x")


def test_an_adapter_for_more_layers_is_refused(tmp_path):
    write(tmp_path / "a", *adapted())
    (tmp_path / "a" / MANIFEST_NAME).unlink()
    with pytest.raises(
        AdapterMismatchError, match=r"layers\.1\.self_attn\.q_proj\.lora_A\.weight .*no such tensor"
    ):
        load_adapter(tiny_base("llama_untied", num_hidden_layers=1), tmp_path / "a", name="x")


def test_scaling_that_disagrees_with_the_training_s_is_refused(copy):
    stored = read_adapter(copy)
    assert stored.manifest is not None
    wrong = stored.manifest.model_copy(
        update={"scaling": dict.fromkeys(stored.manifest.scaling, 1.0)}
    )
    (copy / MANIFEST_NAME).write_text(wrong.to_json())
    base = tiny_base("llama_untied")
    with pytest.raises(CorruptFileError, match="scaling does not agree"):
        load_adapter(base, copy, name="x")
    assert base.attachments == {}


def test_a_cut_tensor_file_never_attaches(copy):
    data = (copy / WEIGHTS).read_bytes()
    (header,) = struct.unpack("<Q", data[:8])
    base = tiny_base("llama_untied")
    for length in [*range(40), 8 + header - 1, 8 + header, 8 + header + 1, len(data) - 1]:
        (copy / WEIGHTS).write_bytes(data[:length])
        with pytest.raises(RefusedError):
            load_adapter(base, copy, name="x")
    assert base.attachments == {}


@pytest.mark.parametrize("old", [False, True], ids=["fresh", "replacing"])
def test_whichever_call_fails_the_adapter_is_the_old_one_or_the_new_one_never_half(tmp_path, old):
    base, attachment = adapted()
    manifest = manifest_for(base, method="lora")
    for k in range(1, 100):
        folder = tmp_path / str(k) / "a"
        if old:
            write(folder, *adapted(rank=3))
        with pytest.MonkeyPatch.context() as patch:
            injected = FailAt(patch, WRITE_CALLS, k, OSError(errno.ENOSPC, "full"))
            try:
                write_adapter(folder, attachment, manifest, model=base.model, replace=old)
            except (DoesNotFitError, SourceError):  # SourceError: the read-back met it
                assert injected.calls >= k
        if not folder.exists():
            assert not old
        elif (rank := read_adapter(folder).config.rank) != 4:
            assert old and rank == 3
        if injected.calls < k:
            assert read_adapter(folder).config.rank == 4 and k > 5
            return
        sweep(folder.parent)  # as the next write would
        assert not list(tmp_path.glob("*/.partial*"))
    pytest.fail("the writer never got through")


NAMES = st.sampled_from(
    [
        "q_proj",
        "v_proj",
        "up_proj",
        "model.layers.0.mlp.down_proj",
        "lm_head",
        "embed_tokens",
        "self_attn",
        "model",
        "norm",
        "layers",
        "0",
        ".*",
        "x",
    ]
)


LISTS = st.none() | st.lists(NAMES, max_size=4) | NAMES


PLAUSIBLE = st.fixed_dictionaries(
    {},
    optional={
        "target_modules": (
            LISTS | st.sampled_from(["all-linear", "ALL-LINEAR", r".*\.[01]\..*_proj"])
        ),
        "target_parameters": st.none() | st.lists(NAMES | st.just("q_proj.weight"), max_size=3),
        "exclude_modules": LISTS,
        "modules_to_save": st.none() | st.lists(NAMES, max_size=2),
        "layers_to_transform": (
            st.none() | st.integers(-1, 3) | st.lists(st.integers(-1, 3), max_size=2)
        ),
        "layers_pattern": LISTS,
        "bias": st.sampled_from(["none", "all", "lora_only"]),
        "rank_pattern": st.dictionaries(NAMES, st.integers(1, 5), max_size=2),
        "alpha_pattern": st.dictionaries(NAMES, st.floats(0.5, 4), max_size=2),
        "r": st.integers(1, 5),
    },
)


@settings(max_examples=150, deadline=None)
@given(fields=PLAUSIBLE, keep=st.just(set(range(29))) | st.sets(st.integers(0, 28), min_size=27))
def test_whatever_the_settings_say_all_tensors_are_used_or_nothing_is_attached(
    plain_copy, fields, keep
):
    """The settings and the tensors of a file are changed independently of each other."""
    tensors = dict(sorted(plain_copy[1].items()))
    chosen = {
        name: tensor for number, (name, tensor) in enumerate(tensors.items()) if number in keep
    }
    save_file(chosen, plain_copy[0] / WEIGHTS)
    (plain_copy[0] / CONFIG_NAME).write_text(json.dumps(plain_copy[2] | fields))
    base = tiny_base("llama_untied")
    try:
        attachment = load_adapter(base, plain_copy[0], name="x")
    except VeneerError:
        assert base.attachments == {} and len(list(base.model.named_modules())) == plain_copy[3]
        return
    event("attached")
    assert 2 * len(attachment.layers) + len(attachment.values) == len(chosen)


@pytest.fixture(scope="module")
def plain_copy(written, tmp_path_factory):
    """A PEFT folder without veneer.json, its tensors and settings, and how many modules the bare
    base has."""
    folder = Path(shutil.copytree(written, tmp_path_factory.mktemp("plain") / "a"))
    (folder / MANIFEST_NAME).unlink()
    modules = len(list(tiny_base("llama_untied").model.named_modules()))
    return (
        folder,
        load_file(folder / WEIGHTS),
        json.loads((folder / CONFIG_NAME).read_text()),
        modules,
    )
