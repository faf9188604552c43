"""Identifies a base: hashes of its values, structure and config, and of its tokenizer's behaviour.

An adapter is only right on the base it was trained on, and a name proves nothing. The fingerprint
is the same wherever the same weights were loaded from, on any device and in any file layout; tied
weights count once. In another dtype the bytes differ, so the fingerprint does too; `differences`
then names the dtype instead of the weights. It must be taken in the type that the weights are
stored in, before they are widened (models/load.py), and before adapters are attached, which add
parameters.

Older versions wrote neither `values_hash` nor `config`. Their fingerprints are compared by the
fields that they have.

Not known here: where the base came from, adapters, the chat template (data/template/template.py
hashes it).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from veneer.bases.identity.byte_hashes import ByteHashes
from veneer.bases.identity.config_fields import computing_fields, config_differences
from veneer.errors import CorruptFileError
from veneer.linear import PackedModule, num_parameters
from veneer.quant.config import FORMATS
from veneer.sharded import whole

SAMPLES_PER_TENSOR = 4096
"""Elements of every tensor that enter `weights_hash`."""

_INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_PROBES = (
    "The quick brown fox doesn't jump over 12,345.67 lazy dogs; it's 3 p.m.",
    "  two spaces,\ttab\n\nblank line\r\n    indented = f(x) - 1  # trailing  ",
    "naïve café ÅÄÖ ﬁ … Ωμέγα Привет 你好，世界 こんにちは 안녕 مرحبا 👩‍🚀🇫🇷 \u200b\ufeff",
    '{"name": "f_1", "arguments": {"a": [1, -2.5e-3, null], "B": "x\\ny"}}',
)


@dataclass(frozen=True)
class Fingerprint:
    """The identity of a base.

    architecture    class of the model, for instance LlamaForCausalLM
    model_type      transformers' name of the family, for instance llama
    dtype           of the weights; mixed ones joined by +, for instance bfloat16+float32, or
                    bfloat16+nf4 where linear layers are packed (quantize)
    num_parameters  tied weights counted once
    vocab_size      rows of the output distribution
    shapes_hash     SHA-256 over the sorted (name, shape) of every weight; packed ones in their
                    dense shape
    weights_hash    SHA-256 over (name, dtype, up to 4096 sampled values) of every weight: the only
                    hash of values in older versions
    values_hash     SHA-256 over (name, dtype, SHA-256 of all bytes) of every weight; "" in a
                    fingerprint of an older version
    config          the fields of its config that decide what it computes, by dotted path, and which
                    of them are defaults (bases/identity/config_fields.py); None in a fingerprint
                    of an older version
    """

    architecture: str
    model_type: str
    dtype: str
    num_parameters: int
    vocab_size: int
    shapes_hash: str
    weights_hash: str
    values_hash: str = ""
    config: Mapping[str, JsonValue] | None = None

    @property
    def quantize(self) -> str | None:
        """Returns the format of packed weights; None if all are dense."""
        return next((name for name in self.dtype.split("+") if name in FORMATS), None)

    @property
    def is_earlier(self) -> bool:
        """Whether an older version wrote it, which only compared samples of the weights."""
        return not self.values_hash

    @property
    def earlier(self) -> Fingerprint:
        """Returns the fingerprint that an older version computes for the same base."""
        return replace(self, values_hash="", config=None)

    @property
    def digest(self) -> str:
        """Returns the SHA-256 over all fields, in hex: equal digests mean equal fingerprints."""
        return _json_hash(self.to_dict())

    @property
    def weights_digest(self) -> str:
        """Returns the SHA-256 over all fields but the config, in hex; the library finds adapters by
        it.

        Another version of transformers may write other fields for the same config; reading an
        adapter compares these one by one.
        """
        return _json_hash(
            {name: value for name, value in self.to_dict().items() if name != "config"}
        )

    def to_dict(self) -> dict[str, JsonValue]:
        """Returns its fields, without those that an older version did not have."""
        return {name: value for name, value in asdict(self).items() if name not in _NEWER or value}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Fingerprint:
        """Restores a fingerprint from to_dict's result.

        Raises CorruptFileError with every missing, unknown or mistyped field.
        """
        needed = [
            name for name in _TYPES if name not in _NEWER or not stored.keys().isdisjoint(_NEWER)
        ]
        faults = [f"{name} is missing" for name in needed if name not in stored]
        faults += [
            f"{name} is not a field of a fingerprint" for name in stored if name not in _TYPES
        ]
        faults += [
            f"{name} is {stored[name]!r}, not of type {kind.__name__}"
            for name, kind in _TYPES.items()
            if name in stored and type(stored[name]) is not kind
        ]
        config = stored.get("config")
        if isinstance(config, dict) and not (
            config.keys() == {"set", "default"}
            and all(isinstance(value, dict) for value in config.values())
        ):
            faults.append("config has other parts than set and default, or they are not objects")
        if stored.get("values_hash") == "":
            faults.append("values_hash is empty")
        if faults:
            raise CorruptFileError(
                "the stored fingerprint of a base cannot be read",
                faults,
                "Was the file written by another version, or by hand? Restore the original.",
            )
        return cls(**stored)

    def differences(self, other: Fingerprint) -> list[str]:
        """Describes what differs, one line each, this side's value first; empty for the same base.

        If one of them comes from an older version, only that version's fields are compared.
        """
        mine, theirs = self.to_dict(), other.to_dict()
        compared = [name for name in _LABELS if name in mine and name in theirs]
        if "values_hash" in compared:  # covers more than samples
            compared.remove("weights_hash")
        lines = []
        for name in compared:
            # Other shapes or another dtype always mean other bytes: no need to report them.
            if name in _HASHES and (self.dtype, self.shapes_hash) != (
                other.dtype,
                other.shapes_hash,
            ):
                continue
            if mine[name] != theirs[name]:
                values = f"{_format_value(mine[name])} against {_format_value(theirs[name])}"
                lines.append(f"{_LABELS[name]}: {values}")
        if self.config is not None and other.config is not None:
            lines += config_differences(self.config, other.config)
        if self.dtype != other.dtype and self.shapes_hash == other.shapes_hash:
            lines.append(
                "weights in another dtype or quantization are another base: load the base in the"
                " same dtype, with the same quantize, to compare weights"
            )
        return lines


_NEWER = ("values_hash", "config")
"""Fields that older versions did not write."""

_TYPES: Mapping[str, type] = {
    **dict.fromkeys(("architecture", "model_type", "dtype"), str),
    **dict.fromkeys(("num_parameters", "vocab_size"), int),
    **dict.fromkeys(("shapes_hash", "weights_hash", "values_hash"), str),
    "config": dict,
}

_HASHES = ("weights_hash", "values_hash")

_LABELS = {
    "architecture": "architecture",
    "model_type": "model type",
    "dtype": "dtype of the weights",
    "num_parameters": "number of parameters",
    "vocab_size": "vocabulary size",
    "shapes_hash": "names and shapes of the weights",
    "weights_hash": "values of the weights",
    "values_hash": "values of the weights",
}


def _format_value(value: JsonValue) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 else text


def _json_hash(value: JsonValue) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def fingerprint(model: PreTrainedModel, hashes: ByteHashes | None = None) -> Fingerprint:
    """Computes the fingerprint of a model without adapters. hashes: of its tensors, if already
    started"""
    return _compute(model, hashes or ByteHashes())


def earlier_fingerprint(model: PreTrainedModel, held: torch.dtype | None = None) -> Fingerprint:
    """Computes the fingerprint as older versions did. held: the type that they held dense weights
    in; None: the model's"""
    return _compute(model, None, held)


def _compute(
    model: PreTrainedModel, hashes: ByteHashes | None, held: torch.dtype | None = None
) -> Fingerprint:
    """Computes the fingerprint; hashes None leaves out fields that older versions did not have."""
    weights = _unique_weights(model)
    packed, parts = _packed_weights(model)
    shapes, sampled, values = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
    dtypes = set()
    for name, tensor in weights.items():
        dtype, shape = packed.get(
            name, (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        )
        if name in parts:
            continue
        converts = held is not None and name not in packed and tensor.is_floating_point()
        dtype = str(held).removeprefix("torch.") if converts else dtype
        dtypes.add(dtype)
        shapes.update(f"{name} {shape}\n".encode())
        sampled.update(f"{name} {dtype}\n".encode())
        sampled.update(_sample(tensor, held if converts else None))
        if hashes is not None:
            values.update(f"{name} {dtype} {hashes.digest_of(tensor)}\n".encode())
    for name, tensor in sorted(
        parts.items()
    ):  # not by identity: only some ways of loading share tables
        sampled.update(f"{name}\n".encode())
        sampled.update(_sample(tensor))
        if hashes is not None:
            values.update(f"{name} {hashes.digest_of(tensor)}\n".encode())
    return Fingerprint(
        architecture=type(model).__name__,
        model_type=model.config.model_type,
        dtype="+".join(sorted(dtypes)),
        num_parameters=num_parameters(model),
        vocab_size=model.config.get_text_config().vocab_size,
        shapes_hash=shapes.hexdigest(),
        weights_hash=sampled.hexdigest(),
        values_hash="" if hashes is None else values.hexdigest(),
        config=None if hashes is None else computing_fields(model),
    )


def _packed_weights(
    model: PreTrainedModel,
) -> tuple[dict[str, tuple[str, tuple[int, ...]]], dict[str, Tensor]]:
    """Returns the packed weights, and their scales, tables and offsets by name.

    A packed weight's name maps to its format and dense shape. The other values belong to such
    weights and are no weights of the base.
    """
    weights: dict[str, tuple[str, tuple[int, ...]]] = {}
    parts: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, PackedModule):
            shapes = module.packed_shapes().items()
            weights |= {f"{path}.{name}": (module.packed_format, shape) for name, shape in shapes}
            parts |= {f"{path}.{name}": part for name, part in module.packed_parts().items()}
            parts |= {f"{path}.{name}": number for name, number in module.packed_numbers().items()}
    return weights, parts


def _unique_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Returns parameters and stored buffers by name, sorted; tied ones under the first name."""
    unique: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        unique.setdefault(id(tensor), (name, tensor))
    return dict(unique.values())


def _sample(tensor: Tensor, held: torch.dtype | None = None) -> bytes:
    """Returns the bytes (little-endian) of up to SAMPLES_PER_TENSOR elements, converted to `held`.

    Each comes from one of equally wide ranges, at an offset that varies: a fixed stride that
    divides the row length would only see one column.
    """
    flat = whole(tensor).detach().reshape(-1).view(_INTEGER_OF_SIZE[tensor.element_size()])
    size, count = flat.numel(), min(flat.numel(), SAMPLES_PER_TENSOR)
    if size > count:
        flat = flat[_sampled_positions(size, count).to(flat.device)]
    if held is not None:
        flat = flat.view(tensor.dtype).to(held).view(_INTEGER_OF_SIZE[held.itemsize])
    return flat.cpu().numpy().tobytes()


@lru_cache(maxsize=64)
@torch.inference_mode(mode=False)
def _sampled_positions(size: int, count: int) -> Tensor:
    """Returns the positions of the sampled elements, (count), equal for all tensors of a size."""
    starts = torch.arange(count + 1, device="cpu") * size // count
    # Knuth's multiplicative hash; its high bits, for the low ones repeat with the row length.
    offsets = (torch.arange(count, device="cpu") * 2654435761 % 2**32 * starts.diff()) >> 32
    return starts[:-1] + offsets


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hashes the behaviour of a tokenizer: vocabulary, special tokens, ids of fixed texts (SHA-256,
    hex).

    Files are not hashed: versions of one library write them differently. The fixed texts have
    words, numbers, whitespace, many scripts, code, and each added token between two letters.
    """
    added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
    probes = [*_PROBES, *(f"a {content} b" for content in sorted(added))]
    behaviour = {
        "vocabulary": tokenizer.get_vocab(),
        "added": added,
        "roles": {
            role: tokenizer.special_tokens_map[role]
            for role in sorted(tokenizer.special_tokens_map)
        },
        "probes": [tokenizer(text, add_special_tokens=True)["input_ids"] for text in probes],
    }
    text = json.dumps(behaviour, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
