"""Checks what another program would refuse of an adapter, or apply wrongly without an error.

A finding is a refusal (the adapter fails to load) or, worse, silent: it loads and computes
something else. Facts: PEFT 0.21, transformers 5.24, vLLM's LoRA loader, llama.cpp's
convert_lora_to_gguf.py and its file reader.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from transformers import PreTrainedModel

from veneer.adapters.combinations import refuse_merge
from veneer.adapters.config import AdapterConfig, DoRA, Prefix
from veneer.adapters.placement.reads import refused_by_peft
from veneer.errors import VeneerError
from veneer.formats.adapter import StoredAdapter
from veneer.formats.manifest import MANIFEST_NAME
from veneer.formats.peft.low_rank import LOW_RANK
from veneer.merge.combine.low_rank_adapters import PlacedAdapter, fit_adapter, place
from veneer.merge.export.folders import VLLM_DEFAULT_RANK, VLLM_RANKS
from veneer.merge.gguf.adapter import gguf_adapter_faults
from veneer.merge.gguf.names import names_of
from veneer.merge.programs import WHOLE_MODEL, Program

BESIDE_ITS_BASE = "veneer generate --adapter computes it beside its base"


@dataclass(frozen=True)
class LintFinding:
    """Describes a problem. silent: it loads and answers wrongly. mended: a command that fixes
    it.
    """

    silent: bool
    what: str
    mended: str = ""


def lint(stored: StoredAdapter, model: PreTrainedModel, consumer: Program) -> list[LintFinding]:
    """Lists all problems; empty: it is applied as trained. model: the base or its skeleton."""
    if consumer in WHOLE_MODEL:
        return _merged(stored, model)
    if not stored.layout.peft_reads:
        text = f"method {stored.config.name}: no layout that anyone else reads"
        return [LintFinding(False, text, BESIDE_ITS_BASE)]
    try:
        adapted = fit_adapter(stored, model).scaling
        if consumer in INJECTED_BY_PEFT and (refusal := peft_refusal(adapted, model)) is not None:
            return [refusal]
        if consumer in READS_EVERY_LAYOUT:
            return _beside_tokens(stored)
        if (method_finding := _OF_METHOD.get(type(stored.config), {}).get(consumer)) is not None:
            return [method_finding]
        placed = place(stored, model)
    except VeneerError as fault:
        return [LintFinding(False, fault.headline, fault.next_step)]
    return [*_LORA[consumer](placed, model)]


def _merged(stored: StoredAdapter, model: PreTrainedModel) -> list[LintFinding]:
    try:
        refuse_merge([(str(stored.folder), stored.contents)])
        names_of(model.config)
    except VeneerError as fault:
        return [LintFinding(False, fault.headline, fault.next_step)]
    return []


def peft_refusal(adapted: Iterable[str], model: PreTrainedModel) -> LintFinding | None:
    """Returns a finding for LoRA on a module where PEFT refuses it. adapted: paths of modules."""
    if not (refused := sorted(refused_by_peft(model).intersection(adapted))):
        return None
    names = ", ".join(sorted({path.rpartition(".")[2] for path in refused}))
    return LintFinding(
        False,
        f"LoRA on {names}, {len(refused)} modules: PEFT refuses it on Mamba models",
        "veneer merge",
    )


def _beside_tokens(stored: StoredAdapter) -> list[LintFinding]:
    if stored.tokens is None:
        return []
    if stored.layout is not LOW_RANK:
        text = (
            f"rows of {len(stored.tokens.ids):,} tokens: not read beside {stored.layout.peft_type}"
        )
        return [LintFinding(True, text, BESIDE_ITS_BASE)]
    if stored.manifest is None or not stored.manifest.new_tokens:
        return []
    instruction = (
        "add them to the tokenizer, and model.resize_token_embeddings(len(tokenizer)), before it is"
        " loaded"
    )
    return [
        LintFinding(
            False,
            f"it brings {len(stored.tokens.ids):,} tokens, whose texts {MANIFEST_NAME} says",
            instruction,
        )
    ]


def _differing(placed: PlacedAdapter) -> list[str]:
    """Returns the settings that one rank and one alpha cannot express."""
    settings = placed.settings
    names = {"rank_pattern": settings.rank_pattern, "alpha_pattern": settings.alpha_pattern}
    return [name for name, pattern in names.items() if pattern]


def _vllm(placed: PlacedAdapter, model: PreTrainedModel) -> list[LintFinding]:
    export = "veneer export --to vllm writes it so that it is right"
    findings = [
        LintFinding(True, f"{name}: vLLM ignores it, the scaling is wrong", export)
        for name in _differing(placed)
    ]
    findings += [
        LintFinding(
            False, f"{name}: a value trained in full", "veneer merge, then serve the merged model"
        )
        for name in placed.values
    ]
    if placed.settings.acts_from:
        findings.append(
            LintFinding(False, "an activation: vLLM rejects the adapter", BESIDE_ITS_BASE)
        )
    if (rank := max(update.A.shape[-2] for update in placed.updates.values())) > VLLM_DEFAULT_RANK:
        allowed_rank = next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)
        fix = (
            f"start it with --max-lora-rank {allowed_rank}"
            if allowed_rank
            else "veneer combine A --how svd --rank 512"
        )
        findings.append(
            LintFinding(False, f"rank {rank}: vLLM takes {VLLM_DEFAULT_RANK} by default", fix)
        )
    return findings


def _llamacpp(placed: PlacedAdapter, model: PreTrainedModel) -> list[LintFinding]:
    export = "veneer export --to llamacpp folds it in"
    findings = [
        LintFinding(True, f"{name}: its converter ignores it, the scaling is wrong", export)
        for name in _differing(placed)
    ]
    if placed.settings.rslora:
        findings.append(
            LintFinding(True, "rsLoRA: its converter ignores it, the scaling is wrong", export)
        )
    try:
        findings += [
            LintFinding(False, fault, "veneer export --to llamacpp --merged")
            for fault in gguf_adapter_faults(placed, model)
        ]
    except VeneerError as fault:
        findings.append(
            LintFinding(False, fault.headline, "llama.cpp's own converter, after veneer merge")
        )
    return findings


def _transformers(placed: PlacedAdapter, model: PreTrainedModel) -> list[LintFinding]:
    if not placed.settings.acts_from:
        return []
    text = "an activation: load_adapter does not look for it, and the base answers alone"
    return [LintFinding(True, text, f"load it with PEFT, or {BESIDE_ITS_BASE}")]


_LORA: Mapping[Program, Callable[[PlacedAdapter, PreTrainedModel], list[LintFinding]]] = {
    "vllm": _vllm,
    "llamacpp": _llamacpp,
    "transformers": _transformers,
}
INJECTED_BY_PEFT: tuple[Program, ...] = ("peft", "transformers")
READS_EVERY_LAYOUT: tuple[Program, ...] = ("peft",)
_OF_METHOD: Mapping[type[AdapterConfig], Mapping[Program, LintFinding]] = {
    DoRA: {
        "transformers": LintFinding(
            True,
            "DoRA: transformers drops its magnitudes and starts new ones",
            "load it with PEFT, or veneer merge",
        )
    },
    Prefix: {
        "transformers": LintFinding(
            False, "prefix tuning: transformers' load_adapter refuses it", "load it with PEFT"
        )
    },
}
"""Findings for other methods than LoRA; a consumer that is not named here takes only LoRA."""
