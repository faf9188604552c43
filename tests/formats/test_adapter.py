"""An adapter folder is written whole, read strictly, and goes only onto the base it was made
for."""

import errno
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tests.files.test_atomic import WRITE_CALLS
from tests.support.helpers import FailAt
from tests.support.tiny import tiny_base
from veneer.adapters.attach import attach
from veneer.adapters.config import LoRA
from veneer.adapters.placement.attachment import Attachment
from veneer.bases.identity.fingerprint import Fingerprint
from veneer.errors import (
    AdapterMismatchError,
    ConfigError,
    CorruptFileError,
    DoesNotFitError,
    RefusedError,
    SourceError,
    UnsafeFileError,
    VeneerError,
)
from veneer.files import strict_tensors
from veneer.files.nesting import MAX_JSON_DEPTH
from veneer.files.partial import sweep
from veneer.formats import adapter as store
from veneer.formats.adapter import manifest_for, read_adapter, write_adapter
from veneer.formats.loading import load_adapter
from veneer.formats.manifest import (
    MANIFEST_NAME,
    BaseIdentity,
    Manifest,
    content_hash_of,
    read_manifest,
)
from veneer.formats.peft.config import CONFIG_NAME, MAX_EXPRESSIONS, MAX_PATTERN
from veneer.formats.peft.fit import group_by_layer
from veneer.models.frozen_base import FrozenBase

WEIGHTS = store.WEIGHTS_NAME
SETTINGS = {"rank": 4, "alpha": 7, "rank_pattern": {"v_proj": 2}, "train_modules": ["model.norm"]}
IDS = torch.tensor([[5, 200, 17, 99, 3]])


def adapted(
    family: str = "llama_untied", *, name: str = "x", **fields
) -> tuple[FrozenBase, Attachment]:
    base = tiny_base(family)
    base.fingerprint()
    settings = LoRA(**{**SETTINGS, **fields})
    head = base.model.get_output_embeddings()
    attachment = attach(base.model, settings, name=name, routing=base.routing, head=head)
    generator = torch.Generator().manual_seed(1)
    for parameter in attachment.parameters().values():
        parameter.data.add_(
            0.2 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        )
    return base, attachment


def write(folder: Path, base: FrozenBase, attachment: Attachment, **fields):
    manifest = manifest_for(base, method="lora", **fields)
    return write_adapter(folder, attachment, manifest, model=base.model)


def answers(base: FrozenBase, *names: str) -> torch.Tensor:
    base.routing.active = tuple((name, 1.0) for name in names)
    with torch.no_grad():
        logits = base.model(IDS).logits
    base.routing.active = ()
    return logits


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("written") / "a"
    write(folder, *adapted())
    return folder


@pytest.fixture
def copy(written, tmp_path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "copy"))


def edit_config(folder: Path, **fields) -> None:
    config = json.loads((folder / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps(config | fields))


def edit_tensors(folder: Path, edit) -> None:
    """Change the tensors as PEFT would have written them: no veneer.json vouches for them."""
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)
    (folder / MANIFEST_NAME).unlink(missing_ok=True)


# writing


def test_the_folder_holds_three_files_and_says_what_it_is(tmp_path):
    base, attachment = adapted()
    result = write(
        tmp_path / "a",
        base,
        attachment,
        metrics={"loss": 1.5},
        recipe={"steps": 3},
        parents=[("p", 1.0)],
    )
    assert {p.name for p in (tmp_path / "a").iterdir()} == {CONFIG_NAME, WEIGHTS, MANIFEST_NAME}
    assert result.bytes == (tmp_path / "a" / WEIGHTS).stat().st_size
    manifest = read_manifest(tmp_path / "a" / MANIFEST_NAME)
    assert manifest.base.fingerprint == base.fingerprint().to_dict()
    assert (
        manifest.metrics == {"loss": 1.5}
        and manifest.recipe == {"steps": 3}
        and manifest.parent == "p"
    )
    assert manifest.scaling["model.layers.0.self_attn.v_proj"] == 7 / 2
    assert manifest.scaling["model.layers.0.self_attn.q_proj"] == 7 / 4


def test_written_twice_or_loaded_and_written_it_is_the_same_to_the_byte(tmp_path):
    base, attachment = adapted(bias="all", dropout=0.1)
    write(tmp_path / "one", base, attachment)
    write(tmp_path / "two", base, attachment)
    fresh = tiny_base("llama_untied")
    fresh.fingerprint()
    write(tmp_path / "three", fresh, load_adapter(fresh, tmp_path / "one", name="other"))
    for name in (CONFIG_NAME, WEIGHTS, MANIFEST_NAME):
        one = (tmp_path / "one" / name).read_bytes()
        assert (tmp_path / "two" / name).read_bytes() == one
        assert (tmp_path / "three" / name).read_bytes() == one


def test_the_bytes_do_not_depend_on_the_process(written, tmp_path):
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tests.formats.test_adapter import adapted, write\n"
        "write(Path(sys.argv[1]), *adapted())\n"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    root = Path(__file__).parents[2]
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "b")], env=environment, cwd=root, check=True
    )
    for name in (CONFIG_NAME, WEIGHTS, MANIFEST_NAME):
        assert (tmp_path / "b" / name).read_bytes() == (written / name).read_bytes()


@pytest.mark.parametrize(
    "name", ["lora", "lora_A", "weight", "q_proj", "a.b.c", "default", "ünïcode ☃", "../x", ""]
)
def test_no_name_of_an_adapter_enters_its_files(written, tmp_path, name):
    write(tmp_path / "a", *adapted(name=name))
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (written / WEIGHTS).read_bytes()
    assert (tmp_path / "a" / CONFIG_NAME).read_bytes() == (written / CONFIG_NAME).read_bytes()
    base = tiny_base("llama_untied")
    load_adapter(base, tmp_path / "a", name=name)
    assert base.attachments.keys() == {name}


def test_values_that_are_not_finite_are_not_written(tmp_path):
    base, attachment = adapted()
    attachment.layers["model.layers.1.mlp.up_proj"].B.data[0, 0] = float("nan")
    with pytest.raises(CorruptFileError, match=r"layers\.1\.mlp\.up_proj\.lora_B"):
        write(tmp_path / "a", base, attachment)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_kept_unless_replaced_on_purpose(copy, tmp_path):
    base, attachment = adapted(rank=3)
    with pytest.raises(ConfigError, match="exists"):
        write(copy, base, attachment)
    assert read_adapter(copy).config.rank == 4
    write_adapter(
        copy, attachment, manifest_for(base, method="lora"), model=base.model, replace=True
    )
    assert read_adapter(copy).config.rank == 3


def test_a_full_disk_leaves_nothing_and_says_how_much_is_needed(tmp_path, monkeypatch):
    base, attachment = adapted()

    def full(*_, **__):
        raise SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )

    monkeypatch.setattr(store, "save_file", full)
    with pytest.raises(DoesNotFitError, match=r"[\d,]+ bytes are needed, [\d,]+ are free"):
        write(tmp_path / "a", base, attachment)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["flip", "drop", "append"])
def test_what_the_disk_changes_while_writing_is_found_before_it_is_visible(
    tmp_path, monkeypatch, damage
):
    def save_and_damage(tensors, path, metadata):
        tensors = dict(tensors)
        if damage == "drop":
            tensors.popitem()
        save_file(tensors, path, metadata=metadata)
        data = bytearray(path.read_bytes())
        if damage == "flip":
            data[-1] ^= 1
        path.write_bytes(data + (b"\0" if damage == "append" else b""))

    monkeypatch.setattr(store, "save_file", save_and_damage)
    with pytest.raises(CorruptFileError):
        write(tmp_path / "a", *adapted())
    assert list(tmp_path.iterdir()) == []


# reading


def test_reading_needs_no_base(written):
    stored = read_adapter(written)
    assert (
        stored.manifest is not None
        and stored.notes == []
        and stored.name_or_path == "tiny-llama_untied"
    )
    assert (
        stored.config.rank == 4
        and stored.config.alpha == 7
        and stored.config.train_modules == ["model.norm"]
    )
    assert len(stored.tensors) == 2 * 14 + 1


def test_a_folder_changed_after_writing_is_refused_until_the_manifest_is_removed(copy):
    edit_config(copy, lora_alpha=8)
    with pytest.raises(CorruptFileError, match="changed after Veneer wrote it"):
        read_adapter(copy)
    (copy / MANIFEST_NAME).unlink()
    assert read_adapter(copy).config.alpha == 8


@pytest.mark.parametrize(
    ("prepare", "error", "words"),
    [
        (lambda f: shutil.rmtree(f), SourceError, "not a folder"),
        (lambda f: (f / CONFIG_NAME).unlink(), SourceError, f"no {CONFIG_NAME}"),
        (lambda f: (f / WEIGHTS).unlink(), SourceError, f"no {WEIGHTS}"),
        (
            lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"),
            UnsafeFileError,
            "save_pretrained",
        ),
        (lambda f: (f / WEIGHTS).rename(f / "adapter.pt"), UnsafeFileError, "adapter.pt"),
        (lambda f: (f / MANIFEST_NAME).write_text("{"), CorruptFileError, "not valid JSON"),
        (
            lambda f: (f / MANIFEST_NAME).write_text('{"format_version": 2}'),
            CorruptFileError,
            "newer one",
        ),
        (
            lambda f: (f / MANIFEST_NAME).write_text('{"format_version": 1, "x": 1}'),
            CorruptFileError,
            "x: ",
        ),
    ],
)
def test_a_folder_that_is_no_adapter_is_told_with_the_way_out(copy, prepare, error, words):
    prepare(copy)
    with pytest.raises(error, match=words):
        read_adapter(copy)


def test_the_adapters_inside_a_folder_are_named(copy, tmp_path):
    (tmp_path / "outer").mkdir()
    copy.rename(tmp_path / "outer" / "sql")
    with pytest.raises(SourceError, match=r"Use .*outer/sql"):
        read_adapter(tmp_path / "outer")


def test_tensor_names_that_hold_an_adapter_s_name_are_repaired_and_told(copy):
    def rename(tensors) -> None:
        for name in list(tensors):
            if name.endswith(("lora_A.weight", "lora_B.weight")):
                tensors[name.removesuffix("weight") + "sql.weight"] = tensors.pop(name)

    edit_tensors(copy, rename)
    stored = read_adapter(copy)
    assert stored.notes == ["28 tensor names held an adapter's name, which was removed"]
    load_adapter(tiny_base("llama_untied"), stored, name="x")


def test_two_names_of_one_tensor_are_refused(copy):
    def double(tensors) -> None:
        name = next(n for n in tensors if n.endswith("lora_A.weight"))
        tensors[name.removesuffix("weight") + "default.weight"] = tensors[name].clone()

    edit_tensors(copy, double)
    with pytest.raises(CorruptFileError, match="ambiguous"):
        read_adapter(copy)


def test_a_file_without_the_prefix_is_read(copy):
    edit_tensors(
        copy, lambda t: t.update({n.removeprefix("base_model.model."): t.pop(n) for n in list(t)})
    )
    load_adapter(tiny_base("llama_untied"), copy, name="x")


def test_a_file_without_factors_is_refused(copy):
    edit_tensors(copy, lambda t: [t.pop(name) for name in list(t) if "lora_" in name])
    with pytest.raises(CorruptFileError, match="no low-rank factors"):
        read_adapter(copy)


def test_manifests_are_strict_and_their_text_is_fixed(written):
    text = (written / MANIFEST_NAME).read_text()
    manifest = Manifest.model_validate_json(text)
    assert manifest.to_json() == text
    for change in ({"metrics": {"loss": float("nan")}}, {"time": "now"}, {"scaling": {"a": "x"}}):
        with pytest.raises(ValueError):
            Manifest.model_validate(manifest.model_dump() | change)


def test_a_config_that_json_cannot_say_has_no_content_hash():
    with pytest.raises(ValueError, match="not JSON compliant"):
        content_hash_of("", {"alpha": float("nan")})


def test_the_content_hash_is_what_the_format_document_says(written):
    tensors = hashlib.sha256((written / WEIGHTS).read_bytes()).hexdigest()
    settings = json.dumps(
        json.loads((written / CONFIG_NAME).read_text()), sort_keys=True, separators=(",", ":")
    )
    expected = hashlib.sha256(f"{tensors}\n{settings}".encode()).hexdigest()
    assert read_manifest(written / MANIFEST_NAME).content_hash == expected


def test_the_format_document_names_every_field_and_every_refusal():
    text = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
    fields = [*Manifest.model_fields, *BaseIdentity.model_fields, *Fingerprint.__dataclass_fields__]
    assert [name for name in fields if f"`{name}`" not in text] == []
    for limit in (
        f"{strict_tensors.MAX_TENSORS:,} tensors",
        f"{MAX_JSON_DEPTH} levels",
        f"{MAX_PATTERN:,} characters",
        f"{MAX_EXPRESSIONS} expressions",
    ):
        assert limit in text


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
