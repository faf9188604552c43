"""4-bit folders in bitsandbytes' layout: written and read back to the byte, decided per tensor,
refused when damaged."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.models.packed import packed_modules
from tests.support.tiny import save_tiny
from veneer.adapters.config import LoRA
from veneer.api import load, write_quantized
from veneer.bases.identity.weight_table import weight_line, weight_table
from veneer.bases.packed.bnb_files import file_tensors
from veneer.errors import AdapterMismatchError, ConfigError, CorruptFileError, SourceError
from veneer.formats.adapter import manifest_for, write_adapter
from veneer.formats.packed_base import write_packed
from veneer.models.load import load_base
from veneer.quant.layers import HeldLinear
from veneer.quant.nf4 import quantize

IDS = torch.tensor([[5, 80, 99, 7, 250, 31, 31, 80, 12, 0, 77, 140]])
STATE = "model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"


def saved(tmp_path, family="llama", quantize="nf4", **settings):
    base = load_base(
        str(save_tiny(tmp_path / "dense", family, torch.bfloat16)),
        dtype="stored",
        quantize=quantize,
        **settings,
    )
    return base, write_packed(base, tmp_path / "packed").path


def edit(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("family", ["llama", "llama_untied", "gpt2", "opt", "mixtral"])
@pytest.mark.parametrize("quantize", ["nf4", "fp4"])
def test_a_written_folder_is_the_same_base_and_writes_the_same_bytes(family, quantize, tmp_path):
    base, folder = saved(tmp_path, family, quantize)
    again = load_base(str(folder), dtype="stored")
    assert again.quantize == quantize
    assert again.dtype == torch.bfloat16
    assert again.fingerprint() == base.fingerprint()
    with torch.no_grad():
        logits = again.model(IDS).logits
        assert torch.equal(logits, base.model(IDS).logits)
    write_packed(
        again, tmp_path / "again"
    )  # after it has computed: bitsandbytes changes its scales then
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        folder / "model.safetensors"
    ).read_bytes()
    assert load_base(str(folder), quantize=quantize).fingerprint() == base.fingerprint()


def test_another_offset_of_the_scales_is_another_base(tmp_path):
    """It is a number in JSON, no tensor, and moves every scale of its weight."""

    def moved(weights):
        state = bytes(weights[STATE].numpy()).decode()
        facts = json.loads(state)
        changed = state.replace(repr(facts["nested_offset"]), repr(2 * facts["nested_offset"]))
        weights[STATE] = torch.frombuffer(bytearray(changed.encode()), dtype=torch.uint8)

    base, folder = saved(tmp_path)
    edit(folder, moved)
    other = load_base(str(folder)).fingerprint()
    assert other.weights_hash != base.fingerprint().weights_hash
    assert other.shapes_hash == base.fingerprint().shapes_hash


def test_the_state_is_what_bitsandbytes_writes(tmp_path):
    _, folder = saved(tmp_path)
    state = bytes(load_file(folder / "model.safetensors")[STATE].numpy()).decode()
    assert state.startswith(
        '{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [48, 32],'
        ' "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.'
    )
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "bitsandbytes"
    assert settings["llm_int8_skip_modules"] == ["lm_head"]


def test_what_a_folder_holds_dense_stays_dense_and_packed_bytes_may_be_stored_as_another_type(
    tmp_path,
):
    base, folder = saved(tmp_path, keep_dense=["self_attn", "layers.1.mlp.up_proj"])
    kept = {"model.layers.1.mlp.up_proj"} | {
        f"model.layers.{n}.self_attn.{p}_proj" for n in (0, 1) for p in "qkvo"
    }
    linears = {p for p, m in base.model.named_modules() if isinstance(m, torch.nn.Linear)} - {
        "lm_head"
    }
    assert linears == kept

    def as_bf16(weights):
        name = STATE.split(".quant_state")[0]
        weights[name] = weights[name].view(-1).view(torch.bfloat16).view(-1, 1)

    edit(folder, as_bf16)
    again = load_base(str(folder))
    assert set(packed_modules(again.model)) == set(packed_modules(base.model))
    assert again.fingerprint() == base.fingerprint()


@pytest.mark.parametrize(
    ("part", "value", "says"),
    [
        (".absmax", None, "part absmax is missing"),
        (".nested_absmax", None, "its state holds nested_"),
        (".quant_map", torch.zeros(15), "quant_map has 60 bytes"),
        ("", torch.zeros(5, 1, dtype=torch.uint8), "weight has 5 bytes"),
        (".quant_state.bitsandbytes__nf4", torch.zeros(9, dtype=torch.uint8), "up_proj"),
        ("", None, "part weight is missing"),
    ],
    ids=str,
)
def test_parts_that_do_not_belong_together_are_refused(part, value, says, tmp_path):
    _, folder = saved(tmp_path)

    def change(weights):
        weights.pop(STATE.split(".quant_state")[0] + part)
        if value is not None:
            weights[STATE.split(".quant_state")[0] + part] = value

    edit(folder, change)
    with pytest.raises(CorruptFileError) as caught:
        load_base(str(folder))
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        (
            "nested_blocksize",
            2**64,
            "nested block size 18446744073709551616",
        ),  # 0 to C, which then divides by it
        ("nested_blocksize", 2**63, "nested block size"),
        ("nested_blocksize", 2**32, "nested block size"),
        ("nested_blocksize", 0, "nested block size 0"),
        ("nested_blocksize", -256, "nested block size -256"),
        ("nested_blocksize", 255, "nested block size 255"),
        ("nested_blocksize", True, "nested block size True"),
        ("nested_blocksize", 256.0, "nested block size 256.0"),
        ("nested_blocksize", [256], "nested block size [256]"),
        ("nested_offset", 10**400, "nested offset 1000"),
        ("nested_offset", float("nan"), "nested offset nan"),
        ("nested_offset", float("inf"), "nested offset inf"),
        ("nested_offset", "0.1", "nested offset '0.1'"),
        ("blocksize", 64.0, "block size 64.0"),
        ("blocksize", 2**64 + 64, "block size 18446744073709551680"),
        ("blocksize", {"a": 1}, "block size {'a': 1}"),
        ("dtype", ["float32"], "type ['float32']"),
        ("dtype", "float8_e4m3fn", "type 'float8_e4m3fn'"),
        ("shape", [2**64, 32], "shape [18446744073709551616, 32]"),
        ("shape", [-48, -32], "shape [-48, -32]"),
        ("shape", [48, 32, 1.0], "shape [48, 32, 1.0]"),
        ("shape", [1] * 9_000, "shape [1, 1"),
        ("shape", [2**39] * 8, "weight has 768 bytes of U8"),
        ("quant_type", {"nf4": 1}, "quant_type {'nf4': 1} under 'nf4'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_state_whose_numbers_are_not_those_of_a_weight_is_refused(field, value, says, tmp_path):
    folder = save_tiny(tmp_path / "dense", "llama", torch.bfloat16)
    weights = load_file(folder / "model.safetensors")
    name = STATE.split(".quant_state")[0]
    packed = file_tensors(name, quantize(weights.pop(name), book="nf4", double=True, name=name))
    state = json.loads(bytes(packed[STATE].numpy())) | {field: value}
    packed[STATE] = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    save_file(weights | packed, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CorruptFileError) as caught:
        load_base(str(folder))
    assert says in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_state_nested_too_deep_is_refused(tmp_path):
    _, folder = saved(tmp_path)
    edit(
        folder,
        lambda w: w.update({STATE: torch.frombuffer(bytearray(b"[" * 60_000), dtype=torch.uint8)}),
    )
    with pytest.raises(CorruptFileError, match="nested too deep"):
        load_base(str(folder))


def test_parts_of_a_type_that_is_not_read_are_named(tmp_path):
    _, folder = saved(tmp_path)
    name = STATE.split(".quant_state")[0] + ".absmax"
    edit(folder, lambda w: w.update({name: w[name].view(torch.float8_e8m0fnu)}))
    with pytest.raises(SourceError, match="of type F8_E8M0"):
        load_base(str(folder))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"quant_method": "hqq"}, "hqq"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "in 8 bits"),
    ],
    ids=str,
)
def test_other_quantised_folders_are_named_and_refused(settings, says, tmp_path):
    folder = save_tiny(tmp_path, "llama")
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match="not supported") as caught:
        load_base(str(folder), quantize="nf4")
    assert says in str(caught.value)


def test_another_format_than_the_folder_holds_is_refused(tmp_path):
    _, folder = saved(tmp_path)
    with pytest.raises(ConfigError, match="as nf4, not as fp4"):
        load_base(str(folder), quantize="fp4")


def test_names_to_keep_dense_must_exist_and_mean_something(tmp_path):
    folder = str(save_tiny(tmp_path, "llama"))
    with pytest.raises(ConfigError) as caught:
        load_base(folder, quantize="nf4", keep_dense=["up_projj"])
    assert "up_projj" in str(caught.value)
    with pytest.raises(ConfigError, match="keep_dense does not work"):
        load_base(folder, keep_dense=["up_proj"])


def test_a_dense_base_is_not_written_as_4_bits(tmp_path):
    with pytest.raises(ConfigError, match="not held in 4 bits"):
        write_quantized(load(str(save_tiny(tmp_path / "dense", "llama"))), tmp_path / "out")


def test_an_adapter_says_which_quantize_its_base_was_held_in(tmp_path):
    folder = str(save_tiny(tmp_path / "base", "llama", torch.bfloat16))
    held = load(folder, quantize="nf4")
    made = held.attach(LoRA(rank=2), name="a")
    write_adapter(tmp_path / "a", made, manifest_for(held, method="lora"), model=held.model)
    dense = load(folder)
    with pytest.raises(AdapterMismatchError, match="--quantize nf4"):
        dense.load_adapter(tmp_path / "a")
    dense.load_adapter(tmp_path / "a", force_base=True)
    load(folder, quantize="nf4").load_adapter(tmp_path / "a")
    other = load(folder, quantize="fp4")
    with pytest.raises(AdapterMismatchError, match="over nf4 weights"):
        other.load_adapter(tmp_path / "a")
    made = dense.attach(LoRA(rank=2), name="b")
    write_adapter(tmp_path / "b", made, manifest_for(dense, method="lora"), model=dense.model)
    with pytest.raises(AdapterMismatchError, match="without --quantize"):
        load(folder, quantize="nf4").load_adapter(tmp_path / "b")


def test_the_table_of_weights_adds_up_and_tells_what_is_not_packed(tmp_path):
    base = load_base(
        str(save_tiny(tmp_path, "mixtral", torch.bfloat16)), dtype="stored", quantize="nf4"
    )
    table = {(g.what, g.held): g for g in weight_table(base.model)}
    assert sum(g.values for g in table.values()) == base.fingerprint().num_parameters
    layers = [m for m in packed_modules(base.model).values() if isinstance(m, HeldLinear)]
    assert table["linear layers", "nf4"].modules == len(layers)
    assert ("experts", "nf4") in table
    assert ("output head", "bfloat16") in table
    assert "experts" in weight_line(base.model)
