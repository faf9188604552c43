"""Loads a stored adapter onto a base, if everything fits.

Not known here: how files are read (adapter.py).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.adapters.attach import attach
from veneer.adapters.placement.attachment import Attachment
from veneer.adapters.placement.score_head import PART, ScoreHead
from veneer.adapters.placement.token_rows import AddedTokens
from veneer.data.template.new_tokens import bring
from veneer.errors import AdapterMismatchError, CorruptFileError
from veneer.formats.adapter import StoredAdapter, read_adapter
from veneer.formats.manifest import MANIFEST_NAME
from veneer.formats.peft.config import CONFIG_NAME
from veneer.formats.peft.text_names import recorded_within
from veneer.formats.peft.token_files import TokenFit, fit_tokens
from veneer.formats.same_base import base_differences, text_differences, wrong_base_remedy
from veneer.models.capacity import capacity_of
from veneer.models.frozen_base import FrozenBase
from veneer.models.own_head import fresh_head
from veneer.private.torch import raise_versions
from veneer.wording import first_lines

MAX_DIFFERENT = 8
"""Most lines of an error about differences between two bases."""
MAX_UNFIT, MAX_UNFIT_ALONE = 3, 20
"""Most lines about tensors: if the base is known to differ, and if nothing else is known."""


def load_adapter(
    base: FrozenBase,
    source: str | Path | StoredAdapter,
    *,
    name: str,
    force_base: bool = False,
    take: bool = False,
) -> Attachment:
    """Attaches a stored adapter to `base` as `name`, not yet active, and adds it to
    base.attachments.

    Nothing is attached unless everything fits: every tensor is expected and has its shape, the base
    is the one of the fingerprint, tokenizer and chat template are those of training. force_base
    overrides the last two, never shapes. An adapter without a fingerprint loads by names and shapes
    only: another base of the same shapes goes unnoticed. take: uses the tensors of `source` without
    copying; the caller must not use them any more. Raises AdapterMismatchError with every fault,
    ConfigError (the name is taken), and what read_adapter raises.
    """
    stored = source if isinstance(source, StoredAdapter) else read_adapter(source)
    faults = [] if force_base else base_differences(stored.manifest, base)
    text_faults = [] if force_base else text_differences(stored.manifest, base)
    if stored.config.through_attention:
        _ = base.paths  # verifies attention and replaces it
    head = base.model.get_output_embeddings()
    parts = stored.split()
    fit = stored.file.fit(parts.method, base.model, head, base.read_past)
    token_fit = fit_tokens(stored.tokens, parts.tokens, base.model, head)
    score, score_faults = _score_head(stored, parts.head, base)
    misfits = [*fit.faults, *([] if token_fit is None else token_fit.faults), *score_faults]
    added_tokens = (
        None if token_fit is None or misfits else _added_tokens(stored, token_fit, base, misfits)
    )
    if misfits:
        misfit_lines = first_lines(misfits, MAX_UNFIT if faults else MAX_UNFIT_ALONE)
        made_for = (
            f"; it was made for {stored.name_or_path}"
            if stored.name_or_path and not fit.next_step
            else ""
        )
        share = f", {fit.concerned} of {len(stored.tensors)} tensors" if fit.concerned else ""
        raise AdapterMismatchError(
            f"adapter {name!r} does not fit {base.source}{share}{made_for}",
            [*first_lines(faults + text_faults, MAX_DIFFERENT), *misfit_lines],
            fit.next_step
            or (
                f"Load it on {stored.name_or_path}."
                if stored.name_or_path
                else "Load it on the base it was made for; the file does not name it."
            ),
        )
    if faults:
        raise AdapterMismatchError(
            f"adapter {name!r} was trained on another base than {base.source}",
            faults + text_faults,
            wrong_base_remedy(stored.manifest, stored.name_or_path, base),
        )
    if text_faults:
        raise AdapterMismatchError(
            f"{base.source} reads text differently than when adapter {name!r} was trained",
            text_faults,
            "Load the base with its original files, or use --force-base if you are sure.",
        )
    _check_scaling(stored, fit.scaling)
    assert fit.settings is not None
    attachment = attach(
        base.model,
        fit.settings,
        name=name,
        routing=base.routing,
        head=head,
        tokens=added_tokens,
        score=score,
        invocation=stored.file.invocation,
        values_follow=True,
        read_past=base.read_past,
    )
    if stored.manifest is not None:
        attachment.preamble = stored.manifest.preamble
    try:
        values = dict(fit.values) | (token_fit.values if token_fit is not None else {})
        if parts.head is not None:
            values[PART] = parts.head.float()
        _fill(
            attachment, values, take=take or stored is not source
        )  # tensors read here have no other owner
    except BaseException:
        base.detach(name)
        raise
    return attachment


def _score_head(
    stored: StoredAdapter, weight: Tensor | None, base: FrozenBase
) -> tuple[ScoreHead | None, list[str]]:
    """Returns an empty head for the adapter's weight on this base, and why the weight does not
    fit."""
    if stored.head is None or weight is None:
        return None, [] if weight is None else [f"{PART}   no such tensor"]
    head = fresh_head(base, stored.head)
    if weight.shape == head.weight.shape:
        return head, []
    return head, [f"{PART}   adapter {tuple(weight.shape)}   model {tuple(head.weight.shape)}"]


def _added_tokens(
    stored: StoredAdapter, fit: TokenFit, base: FrozenBase, faults: list[str]
) -> AddedTokens | None:
    """Finds the adapter's new tokens on this base; appends to faults if that fails."""
    assert stored.tokens is not None
    ids, num_base_tokens = stored.tokens.ids, len(base.tokenizer)
    texts = [] if stored.manifest is None else stored.manifest.new_tokens
    with base.routing.none():
        rows = capacity_of(base).tokens
    if not texts:
        if max(ids) >= min(num_base_tokens, rows or num_base_tokens):
            faults.append(
                f"rows of token {max(ids):,}, which the base does not have, and no"
                f" {MANIFEST_NAME} with its text"
            )
        return AddedTokens((), ids, head=fit.head)
    tokens = bring(base.tokenizer, texts, rows=rows)
    assert tokens is not None
    if tokens.ids != ids:
        faults.append(
            f"its tokens {_first_values(texts)} are {_first_values(ids)} in the adapter and"
            f" {_first_values(tokens.ids)} on this base"
        )
    return AddedTokens(tokens.texts, ids, head=fit.head)


def _first_values(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values[:4])) + (", …" if len(values) > 4 else "")


@torch.no_grad()
def _fill(attachment: Attachment, values: Mapping[str, Tensor], *, take: bool) -> None:
    """Copies the stored values into the adapter's parameters; take: without copying if possible."""
    parameters = attachment.parameters()
    assert parameters.keys() == values.keys()
    for path, value in values.items():
        parameter = parameters[path]
        if take and (value.dtype, value.device) == (parameter.dtype, parameter.device):
            assert value.shape == parameter.shape
            parameter.data = value
        else:
            parameter.copy_(value)
    raise_versions(parameters.values())


def _check_scaling(stored: StoredAdapter, scaling: Mapping[str, float]) -> None:
    """Checks that the factors on this base equal those of training. Raises CorruptFileError."""
    if stored.manifest is None:
        return
    recorded = recorded_within(stored.manifest.scaling, scaling)
    faults = [
        f"{path}: {scaling.get(path)} from {CONFIG_NAME}, {recorded.get(path)} while training"
        for path in sorted(scaling.keys() | recorded.keys())
        if scaling.get(path) != recorded.get(path)
    ]
    if faults:
        raise CorruptFileError(
            f"{stored.folder}: the scaling does not agree", faults, "Restore the folder."
        )
