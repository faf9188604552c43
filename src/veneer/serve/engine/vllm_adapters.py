"""/v1/load_lora_adapter and /v1/unload_lora_adapter with vLLM's bodies and texts.

Every adapter of the library is served without being loaded. Loading one reads it now, so that the
next request finds it, and may give it a further name; unloading takes the name away.
"""

from typing import Annotated, Any

from veneer.bounds import TOKEN
from veneer.library.residents.resident import ResidentStatus
from veneer.serve.limits import MOST_NAME
from veneer.serve.protocols.body import NO_EFFECT, Body, Length, Num, OnlyFalse
from veneer.serve.refusals import without_folders

AdapterName = Annotated[str, Length(1, MOST_NAME)]


class LoadBody(Body):
    """The body of /v1/load_lora_adapter."""

    lora_name: AdapterName
    """the model's name from now on"""
    lora_path: AdapterName
    """the adapter in the library: NAME, NAME@2, NAME@TAG"""
    load_inplace: bool = False
    """the name may be in use by another adapter; open answers keep theirs"""
    is_3d_lora_weight: OnlyFalse = False
    """read from the adapter's file"""
    base_model_name: Annotated[AdapterName, NO_EFFECT] = ""
    """read from the adapter's file"""


class UnloadBody(Body):
    """The body of /v1/unload_lora_adapter."""

    lora_name: AdapterName
    """the model's name"""
    lora_int_id: Annotated[int, Num(TOKEN), NO_EFFECT] = 0
    """the name is enough"""


class PinBody(Body):
    """The body of /v1/adapters/pin and unpin, which are our own."""

    name: AdapterName
    """an adapter, as in model"""


def card_of(shown: ResidentStatus) -> dict[str, Any]:
    """Describes an adapter that is in memory, loading, or broken."""
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
