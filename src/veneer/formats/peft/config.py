"""Reads and writes PEFT's settings of LoRA adapters (adapter_config.json), and refuses unsupported
ones.

Reading is strict where a field changes the arithmetic: unsupported fields are refused by name,
never skipped. Missing fields have PEFT's defaults. Written files are those of PEFT 0.21, with
resolved targets.

Not known here: tensors, models. Facts: PEFT 0.21.2, peft/tuners/lora/config.py.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict

from veneer.adapters.config import DoRA, LoRA, LowRank
from veneer.bounds import ALPHA, RANK, SHARE, TOKEN
from veneer.errors import CorruptFileError, RefusedError, UnsafeFileError
from veneer.files.strict_json import validated
from veneer.patterns import PatternError, is_name, pattern

CONFIG_NAME = "adapter_config.json"
PEFT_LAYOUT = "0.21.2"
"""Version of PEFT whose format is written: `peft_version` in the file."""
MAX_PATTERN = 4000
MAX_EXPRESSIONS = 500
"""Limit for patterns that are more than a name; names are only looked up."""
MAX_ENTRIES = 10_000
MAX_BASE = 4096
"""Characters of the name or path of a base, and of its revision."""

_CHANGES_THE_MATHS = {
    "use_qalora": "QALoRA pools the inputs of A: not supported",
    "layer_replication": "the stack of layers is rebuilt first: not supported",
    "kasa_config": "KaSA truncates the base's weights: not supported",
    "arrow_config": "Arrow routes between adapters: not supported",
    "use_bdlora": "block-diagonal LoRA is not supported",
    "monteclora_config": "MonteCLoRA samples its weights: not supported",
    "megatron_config": "Megatron's parallel layers are not supported",
    "ensure_weight_tying": "an adapter shared by the embedding and the head is not supported",
}
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_ON_ALL_TOKENS = ("modules_to_save", "use_dora")
"""Fields that PEFT does not limit to the tokens after an activation, or ignores beside it."""
_START_ONLY = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_INERT = {
    "peft_type",
    "auto_mapping",
    "peft_version",
    "inference_mode",
    "runtime_config",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "velora_config",
    "megatron_core",
    "qalora_group_size",
}
"""Fields that do not affect a finished adapter."""


class PeftLoRA(BaseModel):
    """The fields that decide what an adapter computes, with PEFT's names."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)

    r: Annotated[int, RANK] = 8
    lora_alpha: Annotated[float, ALPHA] = 8
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    rank_pattern: dict[str, Annotated[int, RANK]] | None = None
    alpha_pattern: dict[str, Annotated[float, ALPHA]] | None = None
    target_modules: list[str] | str | None = None
    target_parameters: list[str] | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    lora_dropout: Annotated[float, SHARE] = 0.0
    bias: Literal["none", "all", "lora_only"] = "none"
    modules_to_save: list[str] | None = None
    fan_in_fan_out: bool = False
    alora_invocation_tokens: list[Annotated[int, TOKEN]] | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None

    def low_rank(self, adapted: list[str]) -> LowRank:
        """Converts the settings to Veneer's, without a model. adapted: modules named by the tensors

        Exact for files that Veneer writes. PEFT's layer filters and a null target list depend on
        the model: then the adapted modules themselves become the targets.
        """
        targets: str | list[str]
        parameters = [name.removesuffix(".weight") for name in self.target_parameters or []]
        if isinstance(self.target_modules, list) and self.layers_to_transform is None:
            targets = sorted({*self.target_modules, *parameters})
        elif isinstance(self.target_modules, str) and not parameters:
            targets = self.target_modules
        else:
            targets = adapted
        if isinstance(targets, str) and targets.lower() == "all-linear":
            targets = "all-linear"
        exclude = self.exclude_modules or []
        settings = self.method(
            rank=self.r,
            alpha=self.lora_alpha,
            dropout=self.lora_dropout,
            rslora=self.use_rslora,
            targets=targets,
            exclude=[exclude] if isinstance(exclude, str) else exclude,
            rank_pattern={
                key.removesuffix(r"\.weight"): r for key, r in (self.rank_pattern or {}).items()
            },
            alpha_pattern={
                key.removesuffix(r"\.weight"): a for key, a in (self.alpha_pattern or {}).items()
            },
            bias=self.bias,
            train_modules=self.modules_to_save or [],
        )
        return self.with_lora_fields(settings)

    def with_lora_fields(self, settings: LowRank) -> LowRank:
        """Adds the fields that LoRA has and its variants lack. Raises ConfigError if they do not
        go with the others."""
        fields = {"lora_bias": self.lora_bias, "activation": self.alora_invocation_tokens}
        lora_fields = {name: value for name, value in fields.items() if value}
        return (
            type(settings).of({**settings.model_dump(), **lora_fields}) if lora_fields else settings
        )

    @property
    def method(self) -> type[LowRank]:
        return DoRA if self.use_dora else LoRA

    def whole_patterns(self) -> list[str]:
        """Returns every string that is a regular expression of whole paths or of the list of
        layers."""
        patterns = [
            text for text in (self.target_modules, self.exclude_modules) if isinstance(text, str)
        ]
        layers = self.layers_pattern or []
        return patterns + ([layers] if isinstance(layers, str) else layers)


def variant_of(settings: LowRank) -> tuple[bool, bool]:
    """Returns (use_dora, lora_bias), which distinguish LoRA and its variants in the file.

    `method` and `with_lora_fields` read them back.
    """
    return isinstance(settings, DoRA), isinstance(settings, LoRA) and settings.lora_bias


def read_config(path: Path, stored: Mapping[str, Any]) -> tuple[PeftLoRA, list[str]]:
    """Reads the settings, and the names of unknown fields that are off. stored: content of the file

    Raises CorruptFileError (every field with a wrong value), RefusedError (every unsupported
    field), UnsafeFileError (regular expressions that cannot be matched in linear time).
    """
    refused, ignored = _refused_fields(stored)
    if refused:
        raise RefusedError(
            f"{path} requires something that Veneer does not support", refused, _remedy(stored)
        )
    config = validated(PeftLoRA, stored, f"{path} has invalid fields", "Restore it.")
    if faults := _value_faults(config):
        raise CorruptFileError(f"{path} has invalid fields", faults, "Restore the file.")
    if unsafe := _pattern_faults(config):
        raise UnsafeFileError(
            f"{path} holds unsafe regular expressions", unsafe, "List the names instead."
        )
    return config, ignored


def _value_faults(config: PeftLoRA) -> list[str]:
    faults = []
    if isinstance(config.target_modules, list) and not (
        config.target_modules or config.target_parameters
    ):
        faults.append("target_modules and target_parameters are empty: nothing is adapted")
    if config.lora_bias and config.use_dora:
        faults.append("lora_bias and use_dora exclude each other")
    if config.alora_invocation_tokens == []:
        faults.append("alora_invocation_tokens is empty: the adapter would act on no token")
    for name in ("base_model_name_or_path", "revision"):
        if len(getattr(config, name) or "") > MAX_BASE:
            count = len(getattr(config, name))
            faults.append(f"{name} has {count:,} characters, the limit is {MAX_BASE:,}")
    for name in PeftLoRA.model_fields:
        entries = getattr(config, name)
        if isinstance(entries, (list, dict)):
            faults += [f"{name} holds an empty name"] if "" in entries else []
            faults += [f"{name} has {len(entries):,} entries"] if len(entries) > MAX_ENTRIES else []
    return faults


def _refused_fields(stored: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    refused = [f"{name}: {why}" for name, why in _CHANGES_THE_MATHS.items() if stored.get(name)]
    start = stored.get("init_lora_weights", True)
    if isinstance(start, str) and start.startswith(_CHANGES_THE_BASE):
        refused.append(
            f"init_lora_weights {start!r}: the update belongs to a changed base (W minus the"
            " start), which the file does not hold; added to the original base it would be silently"
            " wrong"
        )
    elif start not in _START_ONLY:
        refused.append(f"init_lora_weights {start!r} is unknown")
    if stored.get("alora_invocation_tokens"):
        bias = ["bias"] if stored.get("bias", "none") != "none" else []
        refused += [
            f"{name} beside alora_invocation_tokens: it would act on all tokens"
            for name in (*bias, *(name for name in _ON_ALL_TOKENS if stored.get(name)))
        ]
    if (task := stored.get("task_type")) not in (None, "CAUSAL_LM"):
        refused.append(f"task_type {task!r}: Veneer runs causal language models")
    known = {*PeftLoRA.model_fields, *_CHANGES_THE_MATHS, *_INERT, "init_lora_weights", "task_type"}
    unknown = sorted(set(stored) - known)
    refused += [f"{name}: unknown, and switched on" for name in unknown if stored[name]]
    return refused, [name for name in unknown if not stored[name]]


def _remedy(stored: Mapping[str, Any]) -> str:
    start = stored.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGES_THE_BASE):
        return (
            "Save it once more with PEFT: model.save_pretrained(folder,"
            " path_initial_model_for_weight_conversion=...) writes it as plain LoRA."
        )
    return "Merge the adapter with the library that made it, or train it again as LoRA."


def _pattern_faults(config: PeftLoRA) -> list[str]:
    """Reports why patterns of an untrusted file are not run."""
    faults, expressions = [], 0
    ends = [*(config.rank_pattern or {}), *(config.alpha_pattern or {})]
    for number, source in enumerate([*ends, *config.whole_patterns()]):
        if len(source) > MAX_PATTERN:
            faults.append(
                f"{source[:80]!r}… has {len(source):,} characters, the limit is {MAX_PATTERN:,}"
            )
            continue
        expressions += not is_name(source)
        try:
            expression = pattern(source)
            if number < len(ends):
                expression.ends("")
        except PatternError as fault:
            faults.append(str(fault))
    if expressions > MAX_EXPRESSIONS:
        faults.append(f"there are {expressions:,} of them, the limit is {MAX_EXPRESSIONS:,}")
    return faults


def config_json(config: PeftLoRA) -> dict[str, Any]:
    """Returns the file's content: PEFT's own fields and order.

    Fields of newer variants are left out: absent means off, and older readers do not know them.
    """
    fields = config.model_dump()
    if config.alora_invocation_tokens is None:
        del fields["alora_invocation_tokens"]
    fields["lora_alpha"] = _number(config.lora_alpha)
    fields["alpha_pattern"] = {
        key: _number(alpha) for key, alpha in (config.alpha_pattern or {}).items()
    }
    fields["rank_pattern"] = config.rank_pattern or {}
    return fields | {
        "auto_mapping": None,
        "inference_mode": True,
        "init_lora_weights": True,
        "layer_replication": None,
        "loftq_config": {},
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "peft_type": "LORA",
        "peft_version": PEFT_LAYOUT,
        "task_type": "CAUSAL_LM",
    }


def config_text(fields: Mapping[str, Any]) -> str:
    """Returns the file's text as PEFT writes it: two spaces, sorted keys, no newline at the end."""
    return json.dumps(fields, indent=2, sort_keys=True, allow_nan=False)


def _number(value: float) -> float | int:
    """Returns whole numbers as int, as PEFT's users write and older readers expect."""
    return int(value) if value == int(value) else value
