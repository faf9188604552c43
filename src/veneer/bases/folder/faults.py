"""Checks a base that was just loaded: incomplete weights, wrong settings, non-finite values."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from veneer.errors import CorruptFileError, SourceError, fault_lines, is_out_of_memory
from veneer.sharded import whole
from veneer.wording import first_lines

NEXT_DOWNLOAD = "Download the model again; if the error stays, ask its author."
MOST_BEAMS = 64
_NUMBERS = (
    *(
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "typical_p",
        "epsilon_cutoff",
        "eta_cutoff",
        "repetition_penalty",
    ),
    *(
        "length_penalty",
        "no_repeat_ngram_size",
        "num_beams",
        "num_return_sequences",
        "max_length",
        "min_length",
    ),
)
"""Numbers that a model's own generation loop uses."""
_MASK = re.compile(r"mask|bias")


def check_loaded(
    folder: Path,
    model: PreTrainedModel,
    info: Mapping[str, Any],
    earlier_faults: Sequence[str] = (),
) -> None:
    """Raises CorruptFileError if a weight is missing, misshapen or left over.

    others: faults that were found before
    """
    faults = [f"missing    {name}" for name in sorted(info["missing_keys"])]
    faults += [
        f"misshapen  {name}: {tuple(stored)} in the file, {tuple(built)} in the model"
        for name, stored, built in sorted(info["mismatched_keys"])
    ]
    faults += [f"error      {message}" for message in info.get("error_msgs", [])]
    faults += earlier_faults
    # A file may hold old buffers and parts of other models, but no layer that config.json omits.
    known = {_without_numbers(name) for name in model.state_dict()}
    faults += [
        f"left over  {name}: config.json builds fewer of these"
        for name in sorted(info["unexpected_keys"])
        if _without_numbers(name) in known
    ]
    if faults:
        raise CorruptFileError(
            f"the weights in {folder} are not those of a {type(model).__name__} as config.json"
            " describes it",
            first_lines(faults, 20),
            NEXT_DOWNLOAD,
        )


def check_generation(folder: Path, settings: GenerationConfig) -> None:
    """Raises CorruptFileError for invalid stop tokens or numbers in generation_config.json."""
    stops = settings.eos_token_id
    faults = [
        f"eos_token_id {str(stop)[:40]} is not a token id"
        for stop in (stops if isinstance(stops, list) else [stops])
        if stop is not None and (type(stop) is not int or not 0 <= stop < 2**31)
    ]
    for name in _NUMBERS:
        value = getattr(settings, name, None)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            faults.append(f"{name} {str(value)[:40]} is not a number")
    for name in ("num_beams", "num_return_sequences"):
        value = getattr(settings, name, None)
        if isinstance(value, int | float) and not 1 <= value <= MOST_BEAMS:
            faults.append(f"{name} {str(value)[:40]} is not between 1 and {MOST_BEAMS}")
    if faults:
        raise CorruptFileError(
            f"generation_config.json in {folder} cannot be used", faults, NEXT_DOWNLOAD
        )


def tokenizer_faults(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Reports settings of tokenizer_config.json of the wrong kind, which fail only when a text is
    encoded."""
    faults = []
    most, template = tokenizer.model_max_length, tokenizer.chat_template
    if isinstance(most, bool) or not isinstance(most, int | float) or not most >= 1:
        faults.append(f"model_max_length {str(most)[:40]} is not a length")
    texts = list(template.values()) if isinstance(template, dict) else [template]
    if not all(text is None or isinstance(text, str) for text in texts):
        faults.append(f"chat_template is {type(template).__name__}, not text")
    return faults


@torch.no_grad()
def check_finite(folder: Path, model: PreTrainedModel) -> bool:
    """Checks that weights, frequencies and logits are finite. Returns True.

    Raises CorruptFileError if not: a damaged file, a rope_theta of 0. Raises SourceError if the
    model's forward fails. Logits alone are not enough: a fused attention skips scores that are NaN.
    """
    if not (
        faults := [
            f"{name} holds values that are not finite" for name in _non_finite_tensors(model)
        ]
    ):
        logits = _logits_of_three_tokens(folder, model)
        if not torch.isfinite(logits).all():
            wrong = int((~torch.isfinite(logits)).sum())
            faults = [f"{wrong:,} of {logits.numel():,} logits of three tokens, in {model.dtype}"]
    if faults:
        raise CorruptFileError(
            f"the model in {folder} does not compute finite values",
            faults[:12],
            f"Try another dtype (float32). {NEXT_DOWNLOAD}",
        )
    return True


def _logits_of_three_tokens(folder: Path, model: PreTrainedModel) -> torch.Tensor:
    """Computes logits of three tokens without a cache.

    Training needs them without one, and xLSTM's cache is broken for most settings. Raises
    SourceError if modelling code fails: every weight is there, so the files are not damaged.
    """
    ids = torch.zeros(1, 3, dtype=torch.long, device=model.device)
    try:
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    except Exception as fault:  # modelling code may fail with anything
        if is_out_of_memory(fault):
            raise
        raise SourceError(
            f"the forward of {type(model).__name__} fails on a text of three tokens",
            fault_lines(fault, 4),
            f"The weights in {folder} are complete. Check the settings in its config.json, or"
            " choose another base.",
        ) from fault
    return logits


def _non_finite_tensors(model: PreTrainedModel) -> list[str]:
    """Returns the names of weights and tables with non-finite values; masks may hold infinities."""
    buffers = [(name, b) for name, b in model.named_buffers() if not _MASK.search(name)]
    tensors = [
        (name, tensor)
        for name, tensor in [*model.named_parameters(), *buffers]
        if tensor.is_floating_point() and tensor.numel() and not tensor.is_meta
    ]
    # The extremes are NaN if any value is; all are copied from the device at once.
    extremes = (torch.stack(torch.aminmax(whole(tensor).detach())) for _, tensor in tensors)
    finite_flags = [torch.isfinite(ends).all() for ends in extremes]
    if not finite_flags:
        return []
    finite = torch.stack([flag.to(model.device) for flag in finite_flags]).tolist()
    return [name for (name, _), is_finite in zip(tensors, finite, strict=True) if not is_finite]


def _without_numbers(name: str) -> str:
    return re.sub(r"\.\d+\.", ".N.", name)
