"""What a model's settings announce is held against its tensors; settings of the wrong kind are told
as what they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.test_models_load import edit_config, edit_weights, refusal
from tests.support.models.tiny_gguf import tiny, write_gguf
from tests.support.tiny import FAMILIES, save_tiny, tiny_model
from veneer.bases.config.announced import BUILT_EXTRA, announced_faults, built_faults
from veneer.bases.gguf.convert import read_header
from veneer.bases.loading.from_config import blueprint, build
from veneer.bases.loading.without_weights import load_skeleton
from veneer.errors import CorruptFileError, SourceError, VeneerError
from veneer.models.load import load_base

ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def edit_json(folder: Path, name: str, **changes: Any) -> Path:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"num_hidden_layers": 20_000},
            "num_hidden_layers: 20000 is not a number from 1 to 20; the files hold 20 tensors",
        ),
        ({"num_hidden_layers": 0}, "num_hidden_layers: 0 is not"),
        ({"num_hidden_layers": -1}, "num_hidden_layers: -1 is not"),
        ({"num_attention_heads": 2**40}, "num_attention_heads: 1099511627776 is not"),
        ({"num_attention_heads": -4}, "num_attention_heads: -4 is not"),
        ({"hidden_size": 2**40}, "hidden_size: 1099511627776 is not"),
        ({"hidden_size": -32}, "hidden_size: -32 is not"),
        ({"vocab_size": -1}, "vocab_size: -1 is not"),
        ({"max_position_embeddings": float("nan")}, "max_position_embeddings: nan is not"),
        (
            {"text_config": {"num_hidden_layers": 10**12}},
            "text_config.num_hidden_layers: 1000000000000 is not",
        ),
        ({"intermediate_size": 2**30}, "the largest  model.layers.0.mlp."),
        ({"vocab_size": 2**31 - 1}, "embed_tokens"),
        ({"architectures": 5}, "architectures: 5 is not a list of names"),
        ({"architectures": [1]}, "architectures: [1] is not a list of names"),
        (
            {"rope_parameters": {**ROPE, "rope_theta": 0}},
            "inv_freq holds values that are not finite",
        ),
        (
            {"rope_parameters": {**ROPE, "rope_theta": -1.0}},
            "inv_freq holds values that are not finite",
        ),
        ({"rms_norm_eps": -1e9}, "816 of 816 logits"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_config_that_its_weights_cannot_have_is_refused(
    changes: Any, says: str, tmp_path: Path
) -> None:
    text = refusal(CorruptFileError, edit_config(save_tiny(tmp_path, "llama"), **changes))
    assert says in text
    assert len(text) < 2000


def test_nothing_is_built_from_it_without_weights_either(tmp_path: Path) -> None:
    folder = edit_config(save_tiny(tmp_path, "llama"), num_hidden_layers=20_000)
    with pytest.raises(CorruptFileError, match="from 1 to 20"):
        load_skeleton(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(CorruptFileError, match="from 1 to 4,096"):
        blueprint(str(folder))
    edit_config(folder, num_hidden_layers=2, hidden_size=33)
    with pytest.raises(CorruptFileError, match="transformers cannot"):
        build((found := blueprint(str(folder))).config, found.dtype)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_is_held_to_what_it_does_not_say(family: str) -> None:
    model = tiny_model(family)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert announced_faults(model.config.to_dict().items(), shapes) == []
    count = sum(tensor.numel() for tensor in model.parameters())
    assert built_faults(model.config, num_tensors=len(shapes), num_values=count) == []


def test_a_chunk_of_no_size_and_a_layer_counted_from_the_end_are_no_faults() -> None:
    towers = {
        "audio_config.chunk_size": -1,
        "vision_config.feature_layer": -2,
        "sliding_window_size": -1,
    }
    assert announced_faults(towers.items(), {"weight": (3, 4)}) == []
    assert len(announced_faults([("chunk_size", -2), ("hidden_size", -1)], None)) == 2


def test_tables_that_no_file_holds_are_bounded_as_well() -> None:
    config = tiny_model("gpt_neox").config
    config.max_position_embeddings = 10**6
    assert built_faults(config, num_tensors=30, num_values=BUILT_EXTRA) == []
    config.intermediate_size = 2**26
    (total, largest) = built_faults(config, num_tensors=30, num_values=1000)
    assert "the files hold 1,000" in total
    assert "dense" in largest


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    for value in (float("nan"), float("inf")):
        folder = edit_weights(
            save_tiny(tmp_path, "llama"),
            model__layers__1__mlp__up_proj__weight=torch.full((48, 32), value),
        )
        assert "up_proj.weight holds values that are not finite" in refusal(
            CorruptFileError, folder
        )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"eos_token_id": "</s>"}, "eos_token_id </s> is not a token id"),
        ({"eos_token_id": [257, "</s>"]}, "eos_token_id </s> is not a token id"),
        ({"eos_token_id": -1}, "eos_token_id -1 is not a token id"),
        ({"eos_token_id": 2**64}, "eos_token_id 18446744073709551616 is not a token id"),
        ({"eos_token_id": 257.0}, "eos_token_id 257.0 is not a token id"),
        ({"temperature": "hot"}, "hot"),
        ({"num_beams": 10**9}, "num_beams 1000000000 is not between 1 and 64"),
        ({"repetition_penalty": [1.1]}, "repetition_penalty [1.1] is not a number"),
    ],
    ids=str,
)
def test_settings_of_generation_of_the_wrong_kind_are_refused(
    changes: Any, says: str, tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path, "llama")
    assert says in refusal(CorruptFileError, edit_json(folder, "generation_config.json", **changes))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_max_length": "long"}, "tokenizer"),
        ({"model_max_length": -5}, "model_max_length -5 is not a length"),
        ({"model_max_length": True}, "model_max_length True is not a length"),
        ({"chat_template": 5}, "chat_template"),
        ({"chat_template": ["{{ a }}"]}, "tokenizer"),
        ({"eos_token": 5}, "tokenizer"),
    ],
    ids=str,
)
def test_settings_of_a_tokenizer_of_the_wrong_kind_are_refused(
    changes: Any, says: str, tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path, "llama")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(VeneerError) as raised:
        load_base(str(edit_json(folder, "tokenizer_config.json", **changes)))
    assert isinstance(raised.value, CorruptFileError | SourceError)
    assert says in str(raised.value)


@pytest.mark.parametrize("layers", [20_000, 0])
def test_a_gguf_header_that_its_tensors_cannot_have_is_refused(layers: int, tmp_path: Path) -> None:
    model = tiny("llama")
    model.config.num_hidden_layers = layers
    path = write_gguf(tmp_path / "m.gguf", model, "llama")
    with pytest.raises(
        CorruptFileError, match=f"llama.block_count: {layers} is not a number from 1 to 20"
    ):
        read_header(path)
