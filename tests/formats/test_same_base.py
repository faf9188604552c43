"""An adapter says what base it was trained on and how that base read text; another one is refused,
both sides shown."""

import json

import pytest

from tests.support.helpers import fill
from tests.support.tiny import CHATML, save_tiny, tiny_base
from veneer.adapters.config import LoRA
from veneer.bases.identity.fingerprint import Fingerprint
from veneer.errors import AdapterMismatchError
from veneer.formats.adapter import manifest_for, write_adapter
from veneer.formats.loading import load_adapter
from veneer.formats.same_base import base_differences
from veneer.models.frozen_base import FrozenBase
from veneer.models.load import load_base
from veneer.models.starts.initial_values import begin

OTHER = CHATML.replace("assistant", "helper")


@pytest.fixture
def folder(tmp_path):
    base = tiny_base()
    attachment = begin(base, LoRA(rank=3), name="a").attachment
    fill(attachment.parameters().values())
    manifest = manifest_for(base, method="lora", template_hash=base.template_hash())
    return write_adapter(tmp_path / "adapter", attachment, manifest, model=base.model).path


def more_tokens(base):
    base.tokenizer.add_tokens(["<new>"])


def another_template(base):
    base.tokenizer.chat_template = OTHER


def no_template(base):
    base.tokenizer.chat_template = None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (more_tokens, "tokenizer: sha256 "),
        (another_template, "chat template: sha256 "),
        (no_template, "… against none"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_base_that_reads_text_otherwise_is_refused_unless_forced(folder, change, says):
    base = tiny_base()
    change(base)
    with pytest.raises(AdapterMismatchError, match="reads text differently") as caught:
        load_adapter(base, folder, name="b")
    (fault,) = caught.value.faults
    assert says in fault
    assert " against " in fault
    assert not base.attachments
    load_adapter(base, folder, name="b", force_base=True)
    assert list(base.attachments) == ["b"]


def test_both_differences_and_another_base_are_told_at_once(folder):
    base = tiny_base(seed=5)
    more_tokens(base)
    another_template(base)
    with pytest.raises(AdapterMismatchError, match="another base") as caught:
        load_adapter(base, folder, name="b")
    text = str(caught.value)
    assert "tokenizer: sha256" in text
    assert "chat template: sha256" in text
    assert "weights" in text


def edited(folder, **fields):
    """A base whose config.json says other fields over the same weights."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **fields}))
    return folder


EDITS = {
    "rotation": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "heads": {"head_dim": 16, "num_attention_heads": 2, "num_key_value_heads": 1},
    "epsilon": {"rms_norm_eps": 1e-2},
    "activation": {"hidden_act": "gelu"},
}


@pytest.mark.parametrize("fields", EDITS.values(), ids=EDITS)
def test_an_edited_config_over_the_same_weights_is_another_base(fields, tmp_path):
    """Adapters of an earlier version, which knew nothing of the config, are compared as it compared
    them."""
    save_tiny(tmp_path / "base")
    base = load_base(str(tmp_path / "base"))
    attachment = begin(base, LoRA(rank=3), name="a").attachment
    own = write_adapter(
        tmp_path / "own", attachment, manifest_for(base, method="lora"), model=base.model
    ).path
    other = load_base(str(edited(tmp_path / "base", **fields)))
    with pytest.raises(AdapterMismatchError, match="another base") as caught:
        load_adapter(other, own, name="b")
    changed = [
        fault.split(":")[0].removeprefix("config.json ").split(".")[0]
        for fault in caught.value.faults
    ]
    assert changed == list(fields)
    load_adapter(other, as_written_earlier(own), name="b")


def as_written_earlier(folder):
    path = folder / "veneer.json"
    manifest = json.loads(path.read_text())
    manifest["base"]["fingerprint"] = Fingerprint.from_dict(
        manifest["base"]["fingerprint"]
    ).earlier.to_dict()
    path.write_text(json.dumps(manifest))
    return folder


def test_one_changed_value_is_another_base(folder):
    base = tiny_base()
    base.model.get_input_embeddings().weight[133, 17] += 2**-10
    changed = FrozenBase(base.model, base.tokenizer, base.source, base.name_or_path)
    with pytest.raises(AdapterMismatchError, match="values of the weights"):
        load_adapter(changed, folder, name="b")


def test_what_an_adapter_does_not_record_is_not_compared(tmp_path):
    base = tiny_base()
    attachment = begin(base, LoRA(rank=3), name="a").attachment
    path = write_adapter(
        tmp_path / "a", attachment, manifest_for(base, method="lora"), model=base.model
    ).path
    other = tiny_base()
    another_template(other)
    load_adapter(other, path, name="b")
    assert list(other.attachments) == ["b"]


def test_another_base_is_named_with_its_revision_where_it_has_one():
    there, here = tiny_base(seed=1), tiny_base(seed=2)
    there.name_or_path, there.revision, here.name_or_path = "org/there", "0123abc", "org/here"
    manifest = manifest_for(there, method="lora", template_hash=there.template_hash())
    assert base_differences(manifest, here)[0] == "base: org/there at 0123abc against org/here"
    assert base_differences(manifest, there) == []
