"""Which base this is: hashes of its structure and of sampled weights, and of what its tokenizer does.

An adapter is only right on the base it was trained on; a name is no proof of that. The fingerprint is
the same wherever the same weights were loaded from, on any device, in whatever file layout; tied weights
count once. In another dtype the bytes differ, so the fingerprint does too: `differences` then names the
dtype rather than the weights. It must be taken in the type that the weights are stored in, before they are widened
(models/load.py), and before adapters are attached: they add parameters.

Not known here: where the base came from, adapters, the chat template (data/template.py hashes that).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any, get_type_hints

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from veneer.errors import CorruptFileError
from veneer.linear import PackedModule, num_parameters
from veneer.quant.config import FORMATS
from veneer.shards import make_whole

SAMPLES_PER_TENSOR = 4096
"""Elements hashed of every tensor: 1.1 M values for a 135M model (a few ms), and every tensor is seen."""

_INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_PROBES = (
    "The quick brown fox doesn't jump over 12,345.67 lazy dogs; it's 3 p.m.",
    "  two spaces,\ttab\n\nblank line\r\n    indented = f(x) - 1  # trailing  ",
    "naïve café ÅÄÖ ﬁ … Ωμέγα Привет 你好，世界 こんにちは 안녕 مرحبا 👩‍🚀🇫🇷 \u200b\ufeff",
    '{"name": "f_1", "arguments": {"a": [1, -2.5e-3, null], "B": "x\\ny"}}',
)


@dataclass(frozen=True)
class Fingerprint:
    """architecture    class of the model, for instance LlamaForCausalLM
    model_type      transformers' name of the family, for instance llama
    dtype           of the weights; mixed ones joined by +, for instance bfloat16+float32, or bfloat16+nf4 where linear
                    layers are held packed (quantize)
    num_parameters  tied weights counted once
    vocab_size      rows of the output distribution
    shapes_hash     SHA-256 over the sorted (name, shape) of every weight; packed ones in their dense shape
    weights_hash    SHA-256 over (name, dtype, up to 4096 sampled values) of every weight
    """

    architecture: str
    model_type: str
    dtype: str
    num_parameters: int
    vocab_size: int
    shapes_hash: str
    weights_hash: str

    @property
    def quantize(self) -> str | None:
        """The format that packed weights are held in; None: all are dense."""
        return next((held for held in self.dtype.split("+") if held in FORMATS), None)

    @property
    def digest(self) -> str:
        """SHA-256, in hex, over all fields: equal digests mean equal fingerprints."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, str | int]:
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Fingerprint:
        """The inverse of to_dict. Raises CorruptFileError with every missing, unknown or mistyped field."""
        types = get_type_hints(cls)
        names = [field.name for field in fields(cls)]
        faults = [f"{name} is missing" for name in names if name not in stored]
        faults += [f"{name} is not a field of a fingerprint" for name in stored if name not in names]
        faults += [
            f"{name} is {stored[name]!r}, not of type {types[name].__name__}"
            for name in names
            if name in stored and type(stored[name]) is not types[name]
        ]
        if faults:
            raise CorruptFileError(
                "the stored fingerprint of a base cannot be read",
                faults,
                "Was the file written by another version, or by hand? Restore it from where it was made.",
            )
        return cls(**stored)

    def differences(self, other: Fingerprint) -> list[str]:
        """What differs, one line each, this one's value first; empty if they are the same base."""
        mine, theirs = self.to_dict(), other.to_dict()
        lines = []
        for name, label in _LABELS.items():
            # Other shapes or another dtype always mean other bytes: to say so adds nothing.
            if name == "weights_hash" and (self.dtype, self.shapes_hash) != (other.dtype, other.shapes_hash):
                continue
            if mine[name] != theirs[name]:
                lines.append(f"{label}: {_shown(mine[name])} against {_shown(theirs[name])}")
        if self.dtype != other.dtype and self.shapes_hash == other.shapes_hash:
            lines.append(
                "weights stored in another dtype, rounded to one or quantized otherwise are another base: load the "
                "base in the same dtype, with the same quantize, to compare weights"
            )
        return lines


_LABELS = {
    "architecture": "architecture",
    "model_type": "model type",
    "dtype": "dtype of the weights",
    "num_parameters": "number of parameters",
    "vocab_size": "vocabulary size",
    "shapes_hash": "names and shapes of the weights",
    "weights_hash": "values of the weights",
}


def _shown(value: str | int) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value[:12]}…" if len(value) == 64 else value


def fingerprint(model: PreTrainedModel) -> Fingerprint:
    """The fingerprint of a model that carries no adapters. 0.1 s for 135M parameters on a CPU core."""
    weights = _unique_weights(model)
    packed, parts = _packed(model)
    shapes, values = hashlib.sha256(), hashlib.sha256()
    dtypes = set()
    for name, tensor in weights.items():
        dtype, shape = packed.get(name, (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)))
        if name in parts:
            continue
        dtypes.add(dtype)
        shapes.update(f"{name} {shape}\n".encode())
        values.update(f"{name} {dtype}\n".encode())
        values.update(_sample(tensor))
    for name, tensor in sorted(parts.items()):  # not by identity: tables are shared by some loads and not by others
        values.update(f"{name}\n".encode())
        values.update(_sample(tensor))
    return Fingerprint(
        architecture=type(model).__name__,
        model_type=model.config.model_type,
        dtype="+".join(sorted(dtypes)),
        num_parameters=num_parameters(model),
        vocab_size=model.config.get_text_config().vocab_size,
        shapes_hash=shapes.hexdigest(),
        weights_hash=values.hexdigest(),
    )


def _packed(model: PreTrainedModel) -> tuple[dict[str, tuple[str, tuple[int, ...]]], dict[str, Tensor]]:
    """Name of a packed weight -> its format and the shape that it stands for; and the scales, tables and offsets by
    name: values that belong to such a weight, and no weights of the base."""
    weights: dict[str, tuple[str, tuple[int, ...]]] = {}
    parts: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, PackedModule):
            shapes = module.packed_shapes().items()
            weights |= {f"{path}.{name}": (module.packed_format, shape) for name, shape in shapes}
            parts |= {
                f"{path}.{name}": part for name, part in module._buffers.items() if part is not None and part.numel()
            }
            parts |= {f"{path}.{name}": number for name, number in module.packed_numbers().items()}
    return weights, parts


def _unique_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters and stored buffers by name, sorted; one that has two names (tied) under the first."""
    unique: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        unique.setdefault(id(tensor), (name, tensor))
    return dict(unique.values())


def _sample(tensor: Tensor) -> bytes:
    """Up to SAMPLES_PER_TENSOR elements, their bytes as stored (little-endian).

    One from each of equally wide stretches, at an offset that varies from stretch to stretch: a fixed
    stride that divides the row length would see a single column.
    """
    make_whole(tensor)
    flat = tensor.detach().reshape(-1).view(_INTEGER_OF_SIZE[tensor.element_size()])
    size, count = flat.numel(), min(flat.numel(), SAMPLES_PER_TENSOR)
    if size > count:
        flat = flat[_places(size, count).to(flat.device)]
    return flat.cpu().clone().numpy().tobytes()  # numpy fixes the size of the memory that it is given


@lru_cache(maxsize=64)
def _places(size: int, count: int) -> Tensor:
    """(count) of the elements that are hashed, the same for all tensors of a size."""
    starts = torch.arange(count + 1) * size // count
    # Knuth's multiplicative hash; its high bits, for the low ones repeat with the row length.
    offsets = (torch.arange(count) * 2654435761 % 2**32 * starts.diff()) >> 32
    return starts[:-1] + offsets


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256, in hex, of what a tokenizer does: vocabulary, special tokens, ids of fixed texts.

    Of behaviour, not of files: they are written differently by versions of one library. The fixed texts
    have words, numbers, whitespace, many scripts, code, and each added token between two letters.
    """
    added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
    probes = [*_PROBES, *(f"a {content} b" for content in sorted(added))]
    behaviour = {
        "vocabulary": tokenizer.get_vocab(),
        "added": added,
        "roles": {role: tokenizer.special_tokens_map[role] for role in sorted(tokenizer.special_tokens_map)},
        "probes": [tokenizer(text, add_special_tokens=True)["input_ids"] for text in probes],
    }
    text = json.dumps(behaviour, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
