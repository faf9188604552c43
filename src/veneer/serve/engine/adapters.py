"""/v1/load_lora_adapter and /v1/unload_lora_adapter with vLLM's bodies and texts.

Every adapter of the library is served without being loaded. Loading one reads it now, so that the
next request finds it, and may give it a further name; unloading takes the name away.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from veneer.bounds import TOKEN
from veneer.library.residents.resident import ResidentStatus
from veneer.serve.limits import MOST_NAME
from veneer.serve.protocols.fields import Field, Flag, Num, Only, Text, read_fields
from veneer.serve.refusals import without_folders

_NAME = Text(MOST_NAME, 1)
LOAD = (
    Field("lora_name", _NAME, "the model's name from now on", required=True),
    Field("lora_path", _NAME, "the adapter in the library: NAME, NAME@2, NAME@TAG", required=True),
    Field(
        "load_inplace",
        Flag(),
        "the name may mean another adapter already; answers under way keep theirs",
    ),
    Field("is_3d_lora_weight", Only((False,), "its file says so itself"), "", no_effect=True),
    Field("base_model_name", _NAME, "its file says so itself", no_effect=True),
)
UNLOAD = (
    Field("lora_name", _NAME, "the model's name", required=True),
    Field("lora_int_id", Num(TOKEN), "names are enough", no_effect=True),
)
PIN = (Field("name", _NAME, "an adapter, as in model", required=True),)
"""Our own."""


@dataclass(frozen=True)
class LoadRequest:
    name: str
    reference: str
    in_place: bool


def loaded(body: dict[str, Any]) -> LoadRequest:
    """Refusal: 400."""
    values = read_fields(LOAD, body)
    return LoadRequest(values["lora_name"], values["lora_path"], values.get("load_inplace", False))


def unloaded(body: dict[str, Any]) -> str:
    """The name. Refusal: 400."""
    return str(read_fields(UNLOAD, body)["lora_name"])


def pinned(body: dict[str, Any]) -> str:
    """The name. Refusal: 400."""
    return str(read_fields(PIN, body)["name"])


def card_of(shown: ResidentStatus) -> dict[str, Any]:
    """An adapter that is in memory, on its way, or broken."""
    return {
        "reference": shown.reference,
        "version": shown.version,
        "tier": shown.tier.value,
        "bytes": shown.bytes,
        "answers": shown.holders,
        "pinned": shown.pinned,
        "idle_seconds": round(shown.idle_seconds, 3),
        "error": None if shown.error is None else without_folders(shown.error.headline),
    }
