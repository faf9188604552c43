"""A prefix's two files: what is written, what is read back, what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.helpers import fill
from tests.support.tiny import tiny_base
from veneer.adapters.config import Prefix
from veneer.errors import AdapterMismatchError, ConfigError, CorruptFileError, RefusedError
from veneer.formats.adapter import adapter_file_bytes, manifest_for, read_adapter, write_adapter
from veneer.formats.loading import load_adapter
from veneer.models.starts.initial_values import begin
from veneer.models.step import prepare

IDS = torch.tensor([[5, 200, 17, 99, 3, 64, 230], [1, 90, 31, 7, 255, 12, 80]])
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def prefixed(family="qwen3", seed=0, **settings):
    """A tiny base with a prefix of random values acting, and the attachment. head_dim is not hidden
    / heads."""
    base = tiny_base(family)
    prepare(base.model)
    attachment = begin(
        base, Prefix(**{"tokens": 5, "start": "random", **settings}), name="a"
    ).attachment
    fill(attachment.parameters().values(), seed=seed, scale=1.0)
    base.routing.active = (("a", 1.0),)
    return base, attachment


def logits(base):
    with torch.no_grad():
        return base.model(input_ids=IDS, use_cache=False).logits


def written(tmp_path, base, attachment):
    return write_adapter(
        tmp_path / "adapter", attachment, manifest_for(base, method="prefix"), model=base.model
    )


@pytest.mark.parametrize(
    "settings", [{}, {"layers": [1]}, {"projection": 7}, {"frozen_tokens": 2}], ids=str
)
def test_what_is_written_is_read_back_to_the_bit(tmp_path, settings):
    base, attachment = prefixed(**settings)
    before = logits(base)
    expected = adapter_file_bytes(attachment, base.model)
    made = written(tmp_path, base, attachment)
    assert made.bytes == expected == (made.path / WEIGHTS).stat().st_size
    tensors = load_file(made.path / WEIGHTS)
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        "prompt_embeddings": (5, 2 * len(attachment.config.layers or [0, 1]) * 2 * 12)
    }
    base.routing.active = ()
    load_adapter(base, made.path, name="b")
    base.routing.active = (("b", 1.0),)
    assert torch.equal(logits(base), before)
    stored = read_adapter(made.path)
    kept = {name: value for name, value in settings.items() if name != "projection"}
    assert stored.config == Prefix(tokens=5, **kept)
    again = write_adapter(
        tmp_path / "again", base.attachments["b"], stored.manifest, model=base.model
    )
    assert all(
        (made.path / n).read_bytes() == (again.path / n).read_bytes() for n in (CONFIG, WEIGHTS)
    )


def test_the_file_has_the_size_that_arithmetic_says():
    base, attachment = prefixed("llama", tokens=30)
    header = 112  # one tensor's entry, padded to a multiple of 8
    assert adapter_file_bytes(attachment, base.model) == 8 + header + 30 * 2 * 2 * (2 * 8) * 4


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"num_transformer_submodules": 2}, RefusedError, "models of one stack"),
        ({"task_type": "SEQ_CLS"}, CorruptFileError, "classifier without a head"),
        ({"modules_to_save": ["lm_head"]}, RefusedError, "modules_to_save"),
        ({"gate": True}, RefusedError, "gate: unknown, and switched on"),
        ({"num_virtual_tokens": 6}, CorruptFileError, "(5, 96)"),
        ({"num_virtual_tokens": "5"}, CorruptFileError, "num_virtual_tokens"),
        ({"num_attention_heads": 5}, CorruptFileError, "not a multiple"),
        ({"layers": [0, 1]}, CorruptFileError, "PREFIX_TUNING"),
        ({"num_frozen_tokens": 1}, CorruptFileError, "PREFIX_TUNING, and num_frozen_tokens 1"),
        ({"peft_type": "CARTRIDGE"}, CorruptFileError, "CARTRIDGE, and num_frozen_tokens None"),
        (
            {"peft_type": "CARTRIDGE", "num_frozen_tokens": 6},
            CorruptFileError,
            "num_frozen_tokens 6 of 5",
        ),
        ({"num_attention_heads": 4}, AdapterMismatchError, "key/value heads   adapter 4   model 2"),
        ({"num_layers": 4, "token_dim": 12}, AdapterMismatchError, "layers   adapter 4   model 2"),
        (
            {"peft_type": "VENEER_PREFIX", "layers": [0, 3]},
            AdapterMismatchError,
            "the model has layers 0-1",
        ),
        ({"peft_type": "VENEER_PREFIX", "layers": [1, 0]}, CorruptFileError, "not rising"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_with_both_sides(tmp_path, change, error, says):
    base, attachment = prefixed()
    folder = written(tmp_path, base, attachment).path
    (folder / "veneer.json").unlink()
    stored = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(stored | change))
    with pytest.raises(error) as caught:
        load_adapter(base, folder, name="b")
    assert says in str(caught.value)
    assert list(base.attachments) == ["a"]


def test_a_tensor_too_many_or_none_is_refused(tmp_path):
    base, attachment = prefixed()
    folder = written(tmp_path, base, attachment).path
    (folder / "veneer.json").unlink()
    tensors = load_file(folder / WEIGHTS)
    save_file({**tensors, "word_embeddings": torch.zeros(2)}, folder / WEIGHTS)
    with pytest.raises(AdapterMismatchError, match="word_embeddings does not belong"):
        load_adapter(base, folder, name="b")
    save_file({"word_embeddings": torch.zeros(2)}, folder / WEIGHTS)
    with pytest.raises(CorruptFileError, match="holds no prompt_embeddings"):
        load_adapter(base, folder, name="b")


def test_folding_says_what_to_do_instead():
    _, attachment = prefixed()
    (layer,) = attachment.layers.values()
    with pytest.raises(ConfigError, match="beside its base"):
        layer.folded(torch.zeros(2, 2))
