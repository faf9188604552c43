"""The fingerprint of a base: the same for the same weights, another for anything else."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from torch import nn

from tests.support.tiny import FAMILIES, save_tiny, tiny_base, tiny_model, tiny_tokenizer
from veneer.bases.identity.config_fields import NOT_COMPUTED, READ_ANYWAY, computing_fields
from veneer.bases.identity.fingerprint import (
    _PROBES,
    SAMPLES_PER_TENSOR,
    Fingerprint,
    _sample,
    fingerprint,
    tokenizer_hash,
)
from veneer.bases.quiet_transformers import quiet
from veneer.errors import CorruptFileError
from veneer.linear import PackedModule
from veneer.models.load import load_base


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_weights_have_one_fingerprint_in_memory_and_from_disk(
    family: str, tmp_path: Path
) -> None:
    in_memory = fingerprint(tiny_model(family))
    assert load_base(str(save_tiny(tmp_path, family))).fingerprint() == in_memory
    assert fingerprint(tiny_model(family)).digest == in_memory.digest


@pytest.mark.parametrize("family", ["llama", "llama_untied", "gpt2", "mixtral"])
def test_a_change_in_any_one_tensor_changes_it(family: str) -> None:
    model = tiny_model(family)
    before = fingerprint(model)
    for name, parameter in model.named_parameters():
        changed = parameter.view(-1)[parameter.numel() // 3 :][:1]
        kept = changed.clone()
        changed += 0.25
        assert before.differences(fingerprint(model)) != [], name
        changed.copy_(kept)
    assert fingerprint(model) == before


def test_a_renamed_or_reshaped_model_differs_in_what_it_says() -> None:
    base = fingerprint(tiny_model("llama"))
    deeper = fingerprint(tiny_model("llama", num_hidden_layers=3))
    other = fingerprint(tiny_model("qwen2"))
    assert any("names and shapes" in line for line in base.differences(deeper))
    assert any("number of parameters: 24,224 against" in line for line in base.differences(deeper))
    assert not any("values" in line for line in base.differences(deeper))
    assert any(
        "LlamaForCausalLM against Qwen2ForCausalLM" in line for line in base.differences(other)
    )
    assert base.differences(fingerprint(tiny_model("llama"))) == []


def test_other_values_in_the_same_shapes_are_named_as_values() -> None:
    one, other = fingerprint(tiny_model("llama")), fingerprint(tiny_model("llama", seed=1))
    assert len(one.differences(other)) == 1
    assert one.differences(other)[0].startswith("values of the weights")
    assert one.digest != other.digest


def test_another_dtype_is_another_fingerprint_and_said_to_be_the_dtype() -> None:
    single, half = (
        fingerprint(tiny_model("llama")),
        fingerprint(tiny_model("llama", torch.bfloat16)),
    )
    assert single.digest != half.digest
    lines = single.differences(half)
    assert "dtype of the weights: float32 against bfloat16" in lines
    assert any("load the base in the same dtype" in line for line in lines)
    assert not any(line.startswith(("values", "names")) for line in lines)


def test_a_tied_head_stored_twice_counts_once(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "llama")
    before = load_base(str(folder)).fingerprint()
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert load_base(str(folder)).fingerprint() == before


def test_shards_and_one_file_are_the_same_base(tmp_path: Path) -> None:
    with quiet():
        tiny_model("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert load_base(str(tmp_path)).fingerprint() == fingerprint(tiny_model("llama"))


def test_adapters_and_training_do_not_change_a_bases_fingerprint() -> None:
    base = tiny_base("llama")
    before = base.fingerprint()
    base.model.get_input_embeddings().weight.add_(1.0)
    base.model.extra = torch.nn.Linear(2, 2)
    assert base.fingerprint() == before
    assert fingerprint(base.model) != before


def test_a_large_tensor_is_sampled_over_all_its_rows_and_columns() -> None:
    rows, columns = 1024, 512
    places = torch.arange(rows * columns, dtype=torch.int32).view(rows, columns)
    sampled = torch.frombuffer(bytearray(_sample(places)), dtype=torch.int32)
    assert len(sampled) == SAMPLES_PER_TENSOR
    assert (sampled.diff() > 0).all()
    assert len((sampled // columns).unique()) == rows
    assert len((sampled % columns).unique()) > 0.9 * columns


def test_a_fingerprint_survives_json_and_hides_no_fault() -> None:
    one = fingerprint(tiny_model("gpt2"))
    stored = json.loads(json.dumps(one.to_dict()))
    assert Fingerprint.from_dict(stored) == one
    del stored["dtype"]
    stored["vocab_size"] = "272"
    stored["colour"] = "red"
    with pytest.raises(CorruptFileError) as raised:
        Fingerprint.from_dict(stored)
    assert len(raised.value.faults) == 3
    for word in ("dtype is missing", "vocab_size is '272'", "colour"):
        assert word in str(raised.value)


@pytest.mark.parametrize("version", ["this", "an earlier"])
def test_the_digest_covers_every_field_and_so_do_the_differences(version: str) -> None:
    own = fingerprint(tiny_model("gpt2"))
    one = own if version == "this" else own.earlier
    for name, value in one.to_dict().items():
        changed: Any = (
            {**value, "set": {"n_head": 3}}
            if isinstance(value, dict)
            else value + ("x" if isinstance(value, str) else 1)
        )
        other = replace(one, **{name: changed})
        assert other.digest != one.digest, name
        assert (other.weights_digest != one.weights_digest) == (name != "config"), name
        samples_beside_all_bytes = version == "this" and name == "weights_hash"
        assert (
            bool(one.differences(other)) != samples_beside_all_bytes and one.differences(one) == []
        ), name


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rms_norm_eps", 1e-3),
        ("hidden_act", "gelu"),
        ("num_attention_heads", 2),
        ("rope_parameters.rope_theta", 500),
    ],
)
def test_a_field_of_the_config_that_decides_what_is_computed_is_another_base(
    field: str, value: Any
) -> None:
    one, model = fingerprint(tiny_model("llama")), tiny_model("llama")
    *above, name = field.split(".")
    if above:
        getattr(model.config, above[0])[name] = value
    else:
        setattr(model.config, name, value)
    other = fingerprint(model)
    assert [line.split(":")[0] for line in one.differences(other)] == [f"config.json {field}"]
    assert str(value) in one.differences(other)[0].partition(" against ")[2]
    assert other.weights_digest == one.weights_digest and other.digest != one.digest
    assert other.earlier == one.earlier


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_cache", False),
        ("attention_dropout", 0.5),
        ("pad_token_id", 1),
        ("transformers_version", "4.40"),
    ],
)
def test_a_field_that_computes_nothing_is_no_other_base(name: str, value: Any) -> None:
    one, model = fingerprint(tiny_model("llama")), tiny_model("llama")
    setattr(model.config, name, value)
    assert fingerprint(model) == one


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("unsloth_fixed", True),
        ("is_llama_config", True),
        ("rope_interleaved", False),
        ("transformers.js_config", {"kv_cache_dtype": {"q4f16": "float16"}}),
    ],
)
def test_a_key_that_no_code_reads_is_no_other_base(name: str, value: Any, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "llama")
    one = load_base(str(folder)).fingerprint()
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    assert load_base(str(folder)).fingerprint() == one


def test_a_key_that_code_reads_and_the_class_does_not_declare_is_another_base() -> None:
    one, model = fingerprint(tiny_model("llama")), tiny_model("llama")
    model.config.sliding_window = 8
    assert fingerprint(model).differences(one) == [
        "config.json sliding_window: 8 against not there"
    ]
    model.config.sliding_window = None
    assert fingerprint(model).differences(one) == []


def test_every_name_that_shared_code_of_transformers_reads_of_a_config_is_known() -> None:
    folder = Path(transformers.__file__).parent
    sources = [*folder.glob("*.py"), *(folder / "integrations").glob("*.py")]
    pattern = re.compile(r"""(?:getattr|hasattr)\((?:\w+\.)*\w*config, "(\w+)\"""")
    read = {
        name for source in sources for name in pattern.findall(source.read_text(encoding="utf-8"))
    }
    assert len(read) > 40
    assert {
        name
        for name in read - READ_ANYWAY - NOT_COMPUTED - READ_ELSEWHERE
        if not name.startswith("_")
    } == set()


READ_ELSEWHERE = {
    *(
        "pad_token_id",
        "gradient_checkpointing",
        "compile_config",
        "distributed_config",
        "inference_mode",
        "peft_type",
    ),
    *(
        "fusion_config",
        "transformers_weights",
        "weight_mapping",
        "weight_block_size",
    ),  # how weights are read
    *(
        "backbone_config",
        "hidden_sizes",
        "out_features",
        "stage_names",
        "vision_config",
    ),  # of images
    *(
        "token_classification_bias",
        "chain_hidden_post_norm",
        "logits_mup_width_multiplier",
        "unpadded_vocab_size",
    ),
    *(
        "mtp_hidden_states_first",
        "mtp_layer_types",
        "mtp_mlp_layer_types",
        "mtp_per_layer_config",
        "num_mtp_layers",
    ),
    "first_k_dense_replace",
}
"""Names that shared code reads for other things than a model's logits: other heads, and tokens
drafted ahead."""


def without(one: Fingerprint, *names: str) -> Fingerprint:
    """A fingerprint by a version of transformers whose class does not declare these fields."""
    config: Any = one.config
    kept = {
        kind: {name: part[name] for name in part.keys() - {*names}} for kind, part in config.items()
    }
    return replace(one, config=kept)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "mistral", "phi"])
def test_a_field_that_one_version_of_transformers_lacks_has_its_default(family: str) -> None:
    """Whichever of the two versions wrote the fingerprint, and whatever the defaults of the other
    one are."""
    one = fingerprint(tiny_model(family))
    config: Any = one.config
    dropped = without(one, *config["default"])
    assert dropped.differences(one) == one.differences(dropped) == []
    assert len(config["default"]) > 4 and config["set"]
    for name in config["set"]:
        lacking = without(one, name)
        assert [line.split(":")[0] for line in lacking.differences(one)] == [f"config.json {name}"]
        assert len(one.differences(lacking)) == 1


def test_values_that_a_config_derives_from_others_are_defaults() -> None:
    config: Any = fingerprint(tiny_model("llama")).config
    assert config["default"]["head_dim"] == 8 and "num_key_value_heads" in config["set"]
    config = fingerprint(tiny_model("llama", num_key_value_heads=4)).config
    assert config["default"]["num_key_value_heads"] == 4


def test_a_default_that_was_changed_is_a_difference_in_both_directions() -> None:
    one, model = fingerprint(tiny_model("mistral")), tiny_model("mistral")
    model.config.sliding_window = 4096  # the default of its class
    other = fingerprint(model)
    assert one.differences(other) == ["config.json sliding_window: 8 against 4096"]
    assert other.differences(one) == ["config.json sliding_window: 4096 against 8"]


@pytest.mark.parametrize(("share", "same"), [(1.0, True), (0.5, False)])
def test_a_share_of_the_rotation_is_all_where_rotary_settings_lack_it(
    share: float, same: bool
) -> None:
    one, model = fingerprint(tiny_model("llama")), tiny_model("llama")
    model.config.rope_parameters |= {"partial_rotary_factor": share, "type": "default"}
    other = fingerprint(model)
    assert (one.differences(other) == other.differences(one) == []) == same


@pytest.mark.parametrize("config", [{"rms_norm_eps": 1}, {"set": {}}, {"set": {}, "default": []}])
def test_a_stored_config_of_other_parts_is_refused(config: dict[str, Any]) -> None:
    stored = {**fingerprint(tiny_model("llama")).to_dict(), "config": config}
    with pytest.raises(CorruptFileError, match="config has other parts than set and default"):
        Fingerprint.from_dict(stored)


def test_what_an_earlier_version_wrote_is_compared_by_what_it_wrote() -> None:
    own, other = fingerprint(tiny_model("llama")), fingerprint(tiny_model("llama", seed=1))
    assert Fingerprint.from_dict(own.earlier.to_dict()) == own.earlier
    assert set(own.to_dict()) - set(own.earlier.to_dict()) == {"values_hash", "config"}
    assert own.earlier.differences(own) == own.differences(own.earlier) == []
    for one, another in ((own.earlier, other), (own, other.earlier)):
        assert [line.split(":")[0] for line in one.differences(another)] == [
            "values of the weights"
        ]
    stored = own.to_dict()
    del stored["config"]
    with pytest.raises(CorruptFileError, match="config is missing"):
        Fingerprint.from_dict(stored)


def test_numbers_are_compared_however_a_config_writes_them() -> None:
    """10000.0 is 10000, and what JSON has no number for is compared by its name."""
    models = [tiny_model("llama"), tiny_model("llama")]
    for model, theta in zip(models, (10000.0, 10000), strict=True):
        model.config.rope_parameters["rope_theta"] = theta
        model.config.rope_parameters["time_step_limit"] = (0.0, float("inf"))
    one, other = map(fingerprint, models)
    assert one.digest == other.digest
    assert json.loads(json.dumps(one.to_dict(), allow_nan=False)) == other.to_dict()


def test_every_field_says_what_the_model_is() -> None:
    model = tiny_model("llama_untied", torch.bfloat16)
    weights = dict(sorted(model.state_dict().items()))
    shapes = "".join(f"{name} {tuple(tensor.shape)}\n" for name, tensor in weights.items())
    values = b"".join(
        f"{name} bfloat16\n".encode() + _sample(tensor) for name, tensor in weights.items()
    )
    all_bytes = "".join(f"{name} bfloat16 {sha256(tensor)}\n" for name, tensor in weights.items())
    assert fingerprint(model) == Fingerprint(
        architecture="LlamaForCausalLM",
        model_type="llama",
        dtype="bfloat16",
        num_parameters=sum(tensor.numel() for tensor in weights.values()),
        vocab_size=272,
        shapes_hash=hashlib.sha256(shapes.encode()).hexdigest(),
        weights_hash=hashlib.sha256(values).hexdigest(),
        values_hash=hashlib.sha256(all_bytes.encode()).hexdigest(),
        config=computing_fields(model),
    )


def sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(
        bytes(tensor.detach().contiguous().view(-1).view(torch.uint8).tolist())
    ).hexdigest()


class Half(PackedModule):
    """A packed weight with what belongs to a format: scales, an empty place, a table that two
    share, a number."""

    packed_format = "nf4"

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(6, dtype=torch.uint8), requires_grad=False)
        self.bias = nn.Parameter(torch.arange(3.0))
        self.register_buffer("scales", torch.tensor([0.5, 2.0]))
        self.register_buffer("like", torch.empty(0), persistent=False)
        self.register_buffer("table", self.scales)

    def packed_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"weight": (3, 4)}

    def packed_numbers(self) -> dict[str, torch.Tensor]:
        return {"offset": torch.tensor([7.0])}


def test_of_a_packed_weight_the_dense_shape_counts_and_every_value_that_belongs_to_its_format() -> (
    None
):
    model = tiny_model("llama_untied")
    model.model.layers = nn.ModuleList([Half()])
    half, dense = model.model.layers[0], dict(model.named_parameters())
    place = "model.layers.0."
    packed = {f"{place}weight": ("nf4", (3, 4))}
    shapes = values = every_byte = b""
    for name in sorted(dense):
        dtype, shape = packed.get(name, ("float32", tuple(dense[name].shape)))
        shapes += f"{name} {shape}\n".encode()
        values += f"{name} {dtype}\n".encode() + _sample(dense[name])
        every_byte += f"{name} {dtype} {sha256(dense[name])}\n".encode()
    parts = {"scales": half.scales, "table": half.scales, "offset": torch.tensor([7.0])}
    for name in sorted(parts):
        values += f"{place}{name}\n".encode() + _sample(parts[name])
        every_byte += f"{place}{name} {sha256(parts[name])}\n".encode()
    found = fingerprint(model)
    assert (found.dtype, found.quantize) == ("float32+nf4", "nf4")
    assert found.num_parameters == 3 * 4 + sum(
        t.numel() for n, t in dense.items() if n not in packed
    )
    assert found.shapes_hash == hashlib.sha256(shapes).hexdigest()
    assert found.weights_hash == hashlib.sha256(values).hexdigest()
    assert found.values_hash == hashlib.sha256(every_byte).hexdigest()


def test_the_sampled_places_are_those_that_adapters_on_disk_were_made_with() -> None:
    """hashlib.sha256(_sample(torch.arange(20_000, dtype=torch.int32))), when the first adapters
    were written."""
    places = _sample(torch.arange(20_000, dtype=torch.int32))
    assert (
        hashlib.sha256(places).hexdigest()
        == "704ef91ca35ee337c1f0d53021208db005fbb1419a259e748fcd61e8d95709f5"
    )
    assert _sample(torch.arange(4096, dtype=torch.int16)) == bytes(np.arange(4096, dtype="<i2"))


def test_a_tokenizer_hash_follows_what_the_tokenizer_does(tmp_path: Path) -> None:
    one = tokenizer_hash(tiny_tokenizer())
    tiny_tokenizer().save_pretrained(tmp_path)
    save_tiny(tmp_path)
    loaded = load_base(str(tmp_path)).tokenizer
    assert tokenizer_hash(loaded) == one
    loaded("a text", padding="max_length", truncation=True, max_length=5)  # state, not behaviour
    assert tokenizer_hash(loaded) == one
    loaded.chat_template = "{{ messages }}"  # hashed on its own
    assert tokenizer_hash(loaded) == one
    loaded.add_tokens([AddedToken("<tool>", special=True)])
    assert tokenizer_hash(loaded) != one
    other_role = tiny_tokenizer()
    other_role.eos_token = "<|endoftext|>"
    assert tokenizer_hash(other_role) != one


def test_a_tokenizer_hash_and_a_digest_are_over_sorted_ascii_json() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<ü>", special=True)])
    added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
    probes = [*_PROBES, *(f"a {content} b" for content in sorted(added))]
    behaviour = {
        "vocabulary": dict(sorted(tokenizer.get_vocab().items())),
        "added": dict(sorted(added.items())),
        "roles": dict(sorted(tokenizer.special_tokens_map.items())),
        "probes": [tokenizer(text, add_special_tokens=True)["input_ids"] for text in probes],
    }
    text = json.dumps(dict(sorted(behaviour.items())), default=str)
    assert tokenizer_hash(tokenizer) == hashlib.sha256(text.encode("ascii")).hexdigest()
    one = fingerprint(tiny_model("gpt2"))
    text = json.dumps(dict(sorted(one.to_dict().items())))
    assert one.digest == hashlib.sha256(text.encode("ascii")).hexdigest()
