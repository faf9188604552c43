"""An adapter says what base it was trained on and how that base read text; another one is refused, both sides shown."""

import pytest

from tests.helpers import fill
from tests.tiny import CHATML, tiny_base
from veneer.adapters.config import LoRA
from veneer.errors import AdapterMismatchError
from veneer.formats.adapter import load_adapter, manifest_for, write_adapter
from veneer.formats.same_base import other_base
from veneer.models.initial_values import begin

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
    with pytest.raises(AdapterMismatchError, match="reads text otherwise") as caught:
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


def test_what_an_adapter_does_not_record_is_not_compared(tmp_path):
    base = tiny_base()
    attachment = begin(base, LoRA(rank=3), name="a").attachment
    path = write_adapter(tmp_path / "a", attachment, manifest_for(base, method="lora"), model=base.model).path
    other = tiny_base()
    another_template(other)
    load_adapter(other, path, name="b")
    assert list(other.attachments) == ["b"]


def test_another_base_is_named_with_its_revision_where_it_has_one():
    there, here = tiny_base(seed=1), tiny_base(seed=2)
    there.name_or_path, there.revision, here.name_or_path = "org/there", "0123abc", "org/here"
    manifest = manifest_for(there, method="lora", template_hash=there.template_hash())
    assert other_base(manifest, here)[0] == "base: org/there at 0123abc against org/here"
    assert other_base(manifest, there) == []
