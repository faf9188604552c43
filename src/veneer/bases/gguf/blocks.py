"""Keeps the linear layers of a .gguf file in its blocks, as a frozen base.

Once per file, the config, the tokenizer and everything that is no linear layer (norms, embeddings,
output head) are written into a folder in the cache, with the location of each layer's blocks. The
base then maps the file itself: its blocks take no memory of their own, except q and k of
llama-family files, whose rows the file stores in another order.

config.json, tokenizer, generation_config.json   as for a converted file (bases/gguf/convert.py)
model.safetensors                                dense weights
blocks.json
    module -> kind, offset, rows, columns, heads of the row order
"""

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import init_empty_weights
from gguf import ReaderTensor
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from veneer.bases.config.announced import without_storage
from veneer.bases.folder.model_folder import ModelFolder
from veneer.bases.gguf.convert import Header, converted_into, file_config, generation_settings
from veneer.bases.gguf.tokenizer import rebuild_tokenizer
from veneer.bases.gguf.weights import dense_values, parameter_names, stored_shape
from veneer.bases.kept import blocks_folder, is_whole
from veneer.errors import CorruptFileError, SourceError
from veneer.files.strict_json import read_model_json
from veneer.kernels.packed.gguf import FORMATS, Kind, first_bad_block
from veneer.linear import is_transposed_linear
from veneer.quant.gguf_linear import GGUFLinear

ARCHITECTURES = (
    *("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"),
    *("falcon", "stablelm", "starcoder2", "nemotron"),
)
"""Architectures of bases/gguf/convert.py whose linear layers equal the file's matrices, row for row
(llama: in another order)."""

_KINDS: dict[str, Kind] = {kind: kind for kind in FORMATS}
_FLOATS = ("F32", "F16", "BF16")
_DENSE = "Remove quantize: the whole file is then converted."


@dataclass(frozen=True)
class LinearBlocks:
    """Location of the blocks of one linear layer.

    heads: number of heads whose row order must be undone; 0: rows are in the model's order
    """

    kind: Kind
    offset: int
    rows: int
    columns: int
    heads: int

    @property
    def row_bytes(self) -> int:
        return self.columns // FORMATS[self.kind].size * FORMATS[self.kind].bytes

    def read(self, file: Tensor) -> Tensor:
        """Returns (rows, row_bytes) of the mapped file: a view, or a copy if rows are reordered."""
        blocks = file[self.offset : self.offset + self.rows * self.row_bytes].view(
            self.rows, self.row_bytes
        )
        if not self.heads:
            return blocks
        pairs = blocks.view(self.heads, self.rows // self.heads // 2, 2, self.row_bytes)
        return pairs.transpose(1, 2).reshape(self.rows, self.row_bytes)


def lay_out(path: Path, sha256: str) -> Path:
    """Returns the folder for the .gguf file at `path`, made on the first call. sha256: of its bytes

    Raises SourceError if its layers cannot be held as blocks, and as gguf.convert does.
    """
    target = blocks_folder(sha256)
    if not is_whole(target):
        with converted_into(path, target) as parts:
            _write(*parts)
    return target


def build(
    model_folder: ModelFolder, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """Builds the model with a GGUFLinear over the mapped file for every layer of blocks.json.

    The other weights are dense in `dtype`.
    """
    assert model_folder.file is not None
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    dense = load_file(model_folder.folder / "model.safetensors")
    size = model_folder.file.stat().st_size
    file = torch.from_file(str(model_folder.file), shared=False, size=size, dtype=torch.uint8)
    for path, layer in _read_layers(model_folder.folder, size).items():
        bias = dense.pop(f"{path}.bias", None)
        parent, _, last = path.rpartition(".")
        packed = GGUFLinear(
            layer.read(file), layer.kind, dtype=dtype, bias=None if bias is None else bias.to(dtype)
        )
        packed.replaces_transposed = is_transposed_linear(model.get_submodule(path))
        setattr(model.get_submodule(parent), last, packed)
    rest = {name: value.to(dtype) for name, value in dense.items()}
    unexpected = model.load_state_dict(rest, strict=False, assign=True).unexpected_keys
    model.tie_weights()
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if empty or unexpected:
        raise CorruptFileError(
            f"the dense weights in {model_folder.folder} do not belong to this model",
            [f"missing {name}" for name in empty[:8]]
            + [f"unknown {name}" for name in unexpected[:8]],
            "Delete this folder: it is built again from the .gguf file.",
        )
    model.generation_config = GenerationConfig.from_pretrained(model_folder.folder)
    nn.Module.to(model, device)
    return model


def _read_layers(folder: Path, size: int) -> dict[str, LinearBlocks]:
    """Reads blocks.json and checks it against the file's size, because the kernels do not."""
    layers = {
        path: LinearBlocks(**fields)
        for path, fields in read_model_json(folder / "blocks.json").items()
    }
    for path, layer in layers.items():
        inside = layer.kind in FORMATS and 0 <= layer.offset <= size - layer.rows * layer.row_bytes
        if not inside or min(layer.rows, layer.row_bytes) <= 0:
            raise CorruptFileError(
                f"{folder / 'blocks.json'} places {path} outside the .gguf file",
                next_step="Delete this folder: it is built again from the .gguf file.",
            )
    return layers


def _write(isolated: Path, header: Header, folder: Path) -> None:
    if header.architecture not in ARCHITECTURES:
        raise SourceError(
            f"the layers of a {header.architecture} .gguf file cannot be held as blocks",
            [f"possible with  {', '.join(ARCHITECTURES)}"],
            _DENSE,
        )
    tokenizer = rebuild_tokenizer(isolated, header.pre_tokenizer)
    config = file_config(header)
    if header.architecture == "falcon" and config.new_decoder_architecture:
        raise SourceError(
            "the layers of this Falcon .gguf file cannot be held as blocks",
            [f"q, k and v of {config.num_kv_heads} groups of heads are stored in another order"],
            _DENSE,
        )
    model = without_storage(config, header.dtype)
    layers, dense = _sort_tensors(model, header)
    model.config.architectures = [type(model).__name__]
    model.config.dtype = header.dtype
    folder.mkdir()
    save_file(dense, folder / "model.safetensors", metadata={"format": "pt"})
    table = {path: asdict(layer) for path, layer in layers.items()}
    (folder / "blocks.json").write_text(
        json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8"
    )
    model.config.save_pretrained(folder)
    generation_settings(tokenizer, model, header.fields).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _sort_tensors(
    model: PreTrainedModel, header: Header
) -> tuple[dict[str, LinearBlocks], dict[str, Tensor]]:
    """Sorts the file's tensors into layers of blocks and dense weights by the model's names."""
    parameters = dict(model.named_parameters())
    names = parameter_names(header.architecture, model)
    layers: dict[str, LinearBlocks] = {}
    dense: dict[str, Tensor] = {}
    faults: list[str] = []
    refused: Counter[str] = Counter()
    for tensor in header.tensors.values():
        name = names.get(tensor.name)
        if name is None:
            faults.append(f"{tensor.name} is not in the model")
            continue
        kind, shape = tensor.tensor_type.name, stored_shape(tensor)
        if shape != tuple(parameters[name].shape):
            faults.append(
                f"{tensor.name}: {shape} in the file, {tuple(parameters[name].shape)} in the model"
            )
        elif _is_layer(model, name) and (block_kind := _KINDS.get(kind)):
            rows, columns = shape
            heads = _interleaved_heads(tensor, model, header)
            layer = LinearBlocks(block_kind, int(tensor.data_offset), rows, columns, heads)
            faults += _bad_blocks(tensor, layer)
            layers[name.removesuffix(".weight")] = layer
        elif _is_layer(model, name) and kind not in _FLOATS:
            refused[kind] += 1
        else:
            dense[name] = dense_values(tensor, header.architecture, model.config, header.dtype)
    known = {*dense, *(f"{path}.weight" for path in layers)}
    if not refused:
        faults += [f"not in the file  {name}" for name in parameters if name not in known]
    faults += [f"{count} layers are stored as {kind}" for kind, count in sorted(refused.items())]
    if not layers and not faults:
        faults.append(f"no layer is stored in blocks: the file's type is {header.dtype}")
    if faults:
        kinds = f"blocks of {', '.join(FORMATS)} can be held"
        raise SourceError(
            "the layers of the .gguf file cannot be held as blocks", [*faults[:12], kinds], _DENSE
        )
    return layers, dense


def _is_layer(model: PreTrainedModel, name: str) -> bool:
    """Whether this is a linear layer's weight. The output head does not count: it stays dense."""
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    return (
        last == "weight"
        and isinstance(module, nn.Linear)
        and module is not model.get_output_embeddings()
    )


def _interleaved_heads(tensor: ReaderTensor, model: PreTrainedModel, header: Header) -> int:
    """Returns the heads of q or k whose row halves llama.cpp interleaves; 0 for other tensors.

    Source: LlamaModel.permute in
    https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py.
    """
    config = model.config
    if header.architecture != "llama":
        return 0
    if ".attn_q." in tensor.name:
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if ".attn_k." in tensor.name else 0


def _bad_blocks(tensor: ReaderTensor, layer: LinearBlocks) -> list[str]:
    blocks = torch.from_numpy(np.array(tensor.data)).view(layer.rows, layer.row_bytes)
    bad = first_bad_block(blocks, layer.kind)
    return (
        []
        if bad is None
        else [f"{tensor.name}: the scale of row {bad[0]}, block {bad[1]} is not finite"]
    )
