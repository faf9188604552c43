"""Merges a base and adapters into a folder that transformers loads, and checks it before it
appears.

    weights      W + D in float32, one layer at a time, rounded once to the stored type
    survival     share of D that is left after rounding (rounding.py); too little is refused
    logits       the written folder is loaded and compared with the adapter on its base (verify.py)
    other files  config, generation config, tokenizer and chat template of the base;
                 veneer_merge.json: what was merged

The folder appears only if every check passes. In memory: one layer and a few float32 copies of one
weight, besides the base, whose files are mapped.
"""

import copy
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from veneer.adapters.combinations import refuse_merge
from veneer.adapters.methods.targets import layer_number
from veneer.bases.identity.fingerprint import tokenizer_hash
from veneer.data.template.new_tokens import extended
from veneer.errors import ConfigError, RefusedError
from veneer.files.atomic import atomic_folder
from veneer.merge.fold.fold import (
    SourceTensor,
    names_to_untie,
    stored_tensors,
    tied_names,
    weight_changes,
)
from veneer.merge.fold.rounding import (
    Survival,
    SurvivalReport,
    by_layer,
    stochastic,
    survival,
    total,
)
from veneer.merge.fold.shards import MAX_SHARD_BYTES, ShardWriter
from veneer.merge.fold.tokens import tokens_of, with_rows
from veneer.merge.fold.verify import (
    LogitCheck,
    ReferenceLogits,
    compare,
    limited,
    reference,
    text_rows,
)
from veneer.models.frozen_base import FrozenBase
from veneer.models.load import load_base

PROCESSORS = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
RECORD_NAME = "veneer_merge.json"
LEAST_SURVIVAL = 0.9
"""Smallest survival of a merge. Losing a tenth of the update is like giving the adapter weight 0.9,
more than the difference between two seeds: the result would not be what was evaluated."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DtypeChoice = Literal["bf16", "fp16", "fp32"]


@dataclass(frozen=True)
class MergeReport(SurvivalReport):
    """Reports a merge.

    weights     name of each changed weight -> its survival
    logits      against the adapter on the weights that were merged into; None if not compared
    as_trained  against the adapter on the base it was trained on, if that is another
    """

    out: Path
    bytes: int
    dtype: str
    stochastic: bool
    untied: bool
    weights: dict[str, Survival]
    logits: LogitCheck | None
    as_trained: LogitCheck | None

    def to_dict(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "bytes": self.bytes,
            "dtype": self.dtype,
            "stochastic": self.stochastic,
            "untied": self.untied,
            "survival": _numbers(self.total),
            "layers": {name: _numbers(part) for name, part in self.layers.items()},
            "logits": None if self.logits is None else asdict(self.logits),
            "as_trained": None if self.as_trained is None else asdict(self.as_trained),
        }


def _numbers(part: Survival) -> dict[str, float]:
    return {"survival": part.share, "error": part.error, "relative_size": part.relative_size}


def merge_into_folder(
    base: FrozenBase,
    names: Sequence[tuple[str, float]],
    out: str | Path,
    *,
    dtype: DtypeChoice | None = None,
    stochastic: bool = False,
    seed: int = 0,
    rows: Sequence[list[int]] | None = None,
    check_logits: bool = True,
    least_survival: float = LEAST_SURVIVAL,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    as_trained: ReferenceLogits | None = None,
    record: Mapping[str, Any] | None = None,
) -> MergeReport:
    """Merges loaded adapters (name, weight) into a new folder, and detaches them from the base.

    dtype         None: each weight in the base's type (quantised ones: in the type of most others)
    stochastic    round up or down at random (by seed), so that every weight is right on average
    rows          token ids to compare logits on; None: built-in texts
    check_logits  False for a base that cannot run on this machine; the report then says so
    as_trained    logits of the adapters on the base they were trained on, if that is another
    record        further content of veneer_merge.json

    RefusedError: a method that cannot be merged, too little of the update left, overflow, or logits
    that do not agree. Nothing is then written.
    """
    if not names:
        raise ConfigError("no adapter is named", next_step="Name at least one to merge.")
    applied = [(base.attachments[name], weight) for name, weight in names]
    refuse_merge([(attachment.name, attachment.contents) for attachment, _ in applied])
    tokens = tokens_of(applied)
    expected = None
    if check_logits:
        expected = reference(base, names, text_rows(base) if rows is None else limited(rows))
    changes = weight_changes(base.model, applied)
    base.routing.active = ()
    for name, _ in names:
        base.detach(name)
    tied = tied_names(base.model)
    # The config has one field for all tied weights of a model.
    untied = bool(names_to_untie(tied, changes))
    target = None if dtype is None else DTYPES[dtype]
    stored = stored_tensors(base.model)
    if tokens is not None:
        stored, changes = with_rows(stored, changes, tokens, tied)
    layout = _FileLayout(
        base.model,
        {
            tensor_name: tensor
            for tensor_name, tensor in stored.items()
            if untied or tensor_name not in tied
        },
        target,
    )
    tokenizer = base.tokenizer if tokens is None else extended(base.tokenizer, tokens.texts)
    with atomic_folder(out, needed_bytes=layout.total_bytes) as partial:
        weights = layout.write(
            partial,
            changes,
            stochastic_seed=seed if stochastic else None,
            max_shard_bytes=max_shard_bytes,
        )
        _refuse_lost(weights, layout.dtype_name, stochastic, least_survival)
        ids = None if tokens is None else tokens.end
        write_surroundings(partial, base, tokenizer, dtype=layout.dtype, untied=untied, ids=ids)
        check, trained_check = _checked(partial, base, tokenizer, expected, as_trained)
        size = sum(path.stat().st_size for path in partial.iterdir())
        report = MergeReport(
            Path(out), size, layout.dtype_name, stochastic, untied, weights, check, trained_check
        )
        figures = report.to_dict()
        del figures["out"], figures["bytes"]
        text = json.dumps(
            {"format_version": 1, **(record or {}), **figures}, indent=2, sort_keys=True
        )
        (partial / RECORD_NAME).write_text(text + "\n", encoding="utf-8")
    return report


class _FileLayout:
    """Plans which tensors the files hold, and in which order they are read: layer by layer.

    transformers may store weights under other names, or in other pieces, than it computes with
    (experts one by one); the files are as its own save_pretrained writes them.
    """

    def __init__(
        self, model: PreTrainedModel, stored: Mapping[str, SourceTensor], dtype: torch.dtype | None
    ) -> None:
        self.model, self.stored = model, stored
        self.dtype = dtype or _common(stored)
        self.requested_dtype = dtype
        empty = {
            name: torch.empty(tensor.shape, dtype=self.type_of(tensor), device="meta")
            for name, tensor in stored.items()
        }
        self.planned: dict[str, Tensor] = revert_weight_conversion(model, empty)
        self.total_bytes = sum(planned_tensor.nbytes for planned_tensor in self.planned.values())

    @property
    def dtype_name(self) -> str:
        return next(
            (name for name, dtype in DTYPES.items() if dtype == self.dtype), str(self.dtype)
        )

    def type_of(self, stored: SourceTensor) -> torch.dtype:
        if not stored.dtype.is_floating_point:
            return stored.dtype
        if self.requested_dtype is not None:
            return self.requested_dtype
        return self.dtype if stored.quantised else stored.dtype

    def write(
        self,
        folder: Path,
        changes: Mapping[str, Any],
        *,
        stochastic_seed: int | None,
        max_shard_bytes: int,
    ) -> dict[str, Survival]:
        survivals: dict[str, Survival] = {}
        overflowing: list[str] = []
        with ShardWriter(folder, self.planned, max_shard_bytes=max_shard_bytes) as writer:
            for names in self._layers():
                tensors = {}
                for name in names:
                    tensors[name], lost = self._rounded(name, changes.get(name), stochastic_seed)
                    if lost is not None:
                        survivals[name] = lost
                    if tensors[name].is_floating_point() and not bool(
                        torch.isfinite(tensors[name]).all()
                    ):
                        overflowing.append(name)
                for file_name, tensor in revert_weight_conversion(self.model, tensors).items():
                    writer.write(file_name, tensor)
        if overflowing:
            raise RefusedError(
                f"values overflow in {self.dtype_name}",
                overflowing,
                "Take --dtype bf16 or --dtype fp32: they reach to 3e38."
                if self.dtype_name == "fp16"
                else "Give the adapters lower weights.",
            )
        return survivals

    def _layers(self) -> Iterator[list[str]]:
        """Groups names by layer: pieces of one tensor in a file never come from two layers."""
        groups: dict[str, list[str]] = {}
        for name in self.stored:
            number = layer_number(name)
            groups.setdefault(
                name if number is None else f"{name.partition(f'.{number}.')[0]}.{number}", []
            ).append(name)
        yield from groups.values()

    def _rounded(
        self, name: str, merge: Any, stochastic_seed: int | None
    ) -> tuple[Tensor, Survival | None]:
        stored = self.stored[name]
        value = stored.read()
        dtype = self.type_of(stored)
        if merge is None:
            return value.to(dtype), None
        value = value.float()
        merged_value: Tensor = merge(value)
        if stochastic_seed is None:
            rounded = merged_value.to(dtype)
        else:
            rounded = stochastic(merged_value, dtype, _generator(stochastic_seed, name))
        return rounded, survival(value, merged_value, rounded)


def _generator(seed: int, name: str) -> torch.Generator:
    """Returns a weight's own generator, independent of which other weights change."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _common(stored: Mapping[str, SourceTensor]) -> torch.dtype:
    """Returns the type of most values that are not quantised, float32 if all are."""
    counts: dict[torch.dtype, int] = {}
    for tensor in stored.values():
        if tensor.dtype.is_floating_point and not tensor.quantised:
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.shape.numel()
    return max(counts, key=lambda dtype: counts[dtype], default=torch.float32)


def _refuse_lost(
    weights: Mapping[str, Survival], dtype: str, stochastic: bool, least: float
) -> None:
    overall = total(weights.values())
    if abs(1 - overall.share) <= 1 - least:
        return
    worst = sorted(by_layer(weights).items(), key=lambda item: item[1].share)[:3]
    other_dtypes = [name for name in ("fp16", "fp32") if name != dtype]
    options = [f"--dtype {name}" for name in other_dtypes]
    options += [] if stochastic or dtype == "fp32" else ["--stochastic (right on average, noisier)"]
    raise RefusedError(
        f"{overall.share:.0%} of the update is left after rounding to {dtype}, below {least:.0%}:"
        " nothing was written",
        [
            (
                f"the update is {overall.relative_size:.2g} of the weights' size; steps of {dtype}"
                " are coarser than most of it"
            ),
            *(
                f"layer {name}: {part.share:.0%}" if name.isdigit() else f"{name}: {part.share:.0%}"
                for name, part in worst
            ),
        ],
        (
            f"Take {' or '.join(options)}; or keep the adapter beside its base, where nothing is"
            " rounded."
            if options
            else "Keep the adapter beside its base, where nothing is rounded."
        ),
    )


def write_surroundings(
    folder: Path,
    base: FrozenBase,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: torch.dtype,
    untied: bool,
    ids: int | None = None,
) -> None:
    """Writes config, generation config, tokenizer, chat template and image processors. ids: least
    size of the tables.
    """
    config = copy.deepcopy(base.model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        part.dtype = dtype
        if untied:
            part.tie_word_embeddings = False
        if ids is not None and isinstance(vocab_size := getattr(part, "vocab_size", None), int):
            part.vocab_size = max(vocab_size, ids)
    config.architectures = [type(base.model).__name__]
    config.save_pretrained(folder)
    if base.model.generation_config is not None:
        base.model.generation_config.to_json_file(folder / "generation_config.json")
    tokenizer.save_pretrained(folder)
    for processor in PROCESSORS:
        if (source := Path(base.model.config.name_or_path or "") / processor).is_file():
            shutil.copyfile(source, folder / processor)


def _checked(
    folder: Path,
    base: FrozenBase,
    tokenizer: PreTrainedTokenizerBase,
    expected: ReferenceLogits | None,
    as_trained: ReferenceLogits | None,
) -> tuple[LogitCheck | None, LogitCheck | None]:
    """Loads the written folder and compares it. RefusedError if its tokenizer or logits differ."""
    if expected is None:
        return None, None
    merged = load_base(str(folder), dtype="stored", device=str(base.device))
    if tokenizer_hash(merged.tokenizer) != tokenizer_hash(tokenizer) or (
        merged.tokenizer.chat_template != tokenizer.chat_template
    ):
        raise RefusedError(
            "the written tokenizer does not read text as the base's does",
            next_step="Please report this base: its tokenizer does not survive being saved.",
        )
    check = compare(merged, expected)
    if not check.agrees:
        raise RefusedError(
            "the merged model does not answer like the adapter on its base: nothing was written",
            [
                (
                    f"logits differ by {check.mean_difference:.3g} on average (largest"
                    f" {check.max_difference:.3g})"
                ),
                (
                    f"the adapter moves them by {check.mean_effect:.3g} on average (largest"
                    f" {check.max_effect:.3g})"
                ),
            ],
            "Take a finer --dtype, or keep the adapter beside its base.",
        )
    return check, None if as_trained is None else compare(merged, as_trained)
