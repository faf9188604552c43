"""What notebooks and the command line call. Everything here composes the rooms below; nothing
computes.

base    = veneer.load("smollm2-135m")
adapter = base.attach(veneer.LoRA(rank=16), name="tickets")
run     = veneer.train("smollm2-135m", "tickets.jsonl", out="runs/tickets")        (trained.py)
base.load_adapter("runs/tickets", name="tickets")
base.use("tickets")
print(base.generate("Where is my parcel?"))
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from veneer.adapters.preamble import Preamble
from veneer.base import Base
from veneer.bases.compute import HeldAs
from veneer.bases.tokenizer import load_tokenizer
from veneer.bounds import LENGTH, NEW_TOKENS, ROWS, check_numbers
from veneer.comparison.comparison import run_comparison
from veneer.comparison.jobs import JobExecutor
from veneer.comparison.local import LocalExecutor
from veneer.comparison.plan import DEFAULT_STEPS, Candidate, Comparison, prepare_rows
from veneer.data.checks.check import refuse_beyond, refuse_unreadable
from veneer.data.checks.closer import look_closer
from veneer.data.examples import Example, RowRef, grouped
from veneer.data.files.writing import ROWS_NAME, Record, as_set, is_rows
from veneer.data.load import DataSet, examine_data, load_data
from veneer.data.template.new_tokens import bring, extended, room_with
from veneer.errors import ConfigError
from veneer.evaluation.evaluation import EvaluationOptions, Progress
from veneer.evaluation.evaluation import evaluate as evaluate_rows
from veneer.evaluation.general import BUILT_IN
from veneer.evaluation.intervals import Counts
from veneer.evaluation.registry import find_metrics
from veneer.evaluation.user_function import UserFunction
from veneer.files.strict_json import read_json
from veneer.formats.packed_base import WrittenBase, write_packed
from veneer.library.library import Library
from veneer.merge.combine.combine import Recipe
from veneer.merge.combine.combine_run import CombineReport, combine_adapters
from veneer.merge.combine.extract import ExtractReport, extract_adapter
from veneer.merge.export.export_run import WeightSource as WeightSource
from veneer.merge.export.export_run import export_adapter as export_adapter
from veneer.merge.export.export_run import export_merged_gguf as export_merged_gguf
from veneer.merge.export.export_run import export_ollama as export_ollama
from veneer.merge.export.export_run import lint_adapter as lint_adapter
from veneer.merge.fold.folder import DtypeChoice, MergeReport
from veneer.merge.fold.merge_run import Into, merge_adapters
from veneer.models.capacity import capacity_of, configured_capacity
from veneer.models.frozen_base import FrozenBase
from veneer.models.likelihood import example_nats
from veneer.models.load import load_base
from veneer.plan.probe import fit_config, forecast
from veneer.quant.config import Quantize
from veneer.report.notebook import Evaluation
from veneer.report.page import write_report
from veneer.training.config import DataConfig, RunConfig
from veneer.training.output.screen import Screen
from veneer.training.processes.world import joined, world_of
from veneer.training.run import run_training
from veneer.training.state.folder import resume_config as resume_config
from veneer.training.state.place import locked_folder


def load(
    source: str | Path,
    *,
    dtype: HeldAs = "auto",
    device: str = "auto",
    quantize: Quantize | None = None,
    keep_dense: Sequence[str] = (),
    library: Library | str | Path | None = None,
) -> Base:
    """Load a base: a hub id (`org/name` or `org/name@revision`), a folder, a .gguf file, or a named
    default.

    dtype auto keeps the type the weights are stored in, or takes float32 on a CPU whose products in
    that type are slow (base.compute says which and why); stored keeps it always. device auto takes
    a GPU if there is one. quantize holds the linear layers in 4 bits (nf4, fp4) or in the blocks of
    a .gguf file (gguf); keep_dense names modules that stay as they are stored. library is where
    Base.use finds adapters that are not loaded yet.
    """
    if not isinstance(source, str | Path):
        raise ConfigError(f"a base is named by text or a path, and this is {source!r}")
    if not (library is None or isinstance(library, Library | str | Path)):
        raise ConfigError(f"library is {library!r}, and takes a folder or a Library")
    kept = [keep_dense] if isinstance(keep_dense, str) else keep_dense
    loaded = load_base(
        str(source), dtype=dtype, device=device, quantize=quantize, keep_dense=kept, own_pages=True
    )
    return Base(
        model=loaded.model,
        tokenizer=loaded.tokenizer,
        source=loaded.source,
        name_or_path=loaded.name_or_path,
        revision=loaded.revision,
        quantize=loaded.quantize,
        compute=loaded.compute,
        identity=loaded.identity,
        as_held=loaded.as_held,
        library=Library(library) if isinstance(library, str | Path) else library,
    )


def write_quantized(base: Base, out: str | Path) -> WrittenBase:
    """A base held as nf4 or fp4 as a folder that transformers with bitsandbytes loads. ConfigError
    for another base."""
    if base.compute.widens and base.compute.times is not None:
        raise ConfigError(
            f"{base.source} was widened to float32 for speed: what stays dense would be written in"
            " twice the bytes",
            next_step="Load it with dtype stored to write it.",
        )
    return write_packed(base, out)


def train_run(
    config: RunConfig | None,
    *,
    resume: bool,
    screen: Screen,
    rows: Mapping[str, Iterable[Record]] = MappingProxyType({}),
) -> dict[str, Any]:
    """Run what a run file says, write its report, and return what summary.json holds.

    rows: files of rows that are written into its folder first, by name.

    With torchrun's variables in the environment this is one process of several
    (training/processes/world.py): all compute what the leader, rank 0, was given, and None is
    enough for the others.
    """
    with joined() as world:
        settings, given = world.shared(
            None if config is None else [config.model_dump(mode="json"), given_of(config)]
        )
        asked = with_given(RunConfig.model_validate(settings), given) if config is None else config
        if asked.model_dump(mode="json") != settings:
            raise ConfigError(
                "the processes of this run were given different settings",
                next_step="Give all the same.",
            )
        summary = run_training(
            asked, resume=resume, screen=screen, plan=forecast, world=world, rows=rows
        )
        if world.leads:
            write_report(Path(asked.out))
            screen.end(summary)
    return summary


def given_of(config: RunConfig) -> list[str]:
    """The method's settings that somebody gave, which an adapter that goes on takes in place of its
    own."""
    return sorted(config.method.model_fields_set)


def with_given(config: RunConfig, given: Sequence[str]) -> RunConfig:
    """A run that was read with all its settings, as if these alone had been given."""
    values = config.method.model_dump(include=set(given))
    return config.model_copy(update={"method": type(config.method).model_validate(values)})


def fit_run(config: RunConfig, memory_bytes: int) -> tuple[RunConfig, list[str]]:
    """The run, changed by the shortest list of changes that makes it fit, and what was changed, in
    words.

    Raises DoesNotFitError where no change helps.
    """
    if config.from_adapter:
        step = "Leave --fit out, and change micro_batch, length or checkpointing yourself."
        raise ConfigError(
            "a run that goes on from an adapter is not changed so that it fits", next_step=step
        )
    return fit_config(config, run_rows(config), memory_bytes, world_of(os.environ).size)


def run_rows(config: RunConfig) -> DataSet:
    """The rows of a run as it would read them, those that are too long cut. Loads no weights.

    DataError: rows that the run would refuse for another reason than their length.
    """
    tokenizer, model_config = load_tokenizer(config.base)
    capacity = configured_capacity(model_config)
    tokens = bring(tokenizer, config.new_tokens, rows=capacity.tokens)
    found = examine_data(
        config.data.model_copy(update={"long_rows": "cut"}),
        length=config.length,
        capacity=room_with(capacity, tokens),
        tokenizer=extended(tokenizer, config.new_tokens),
        preamble=Preamble(variables=config.template.variables),
    )
    refuse_unreadable(found.report, config.data.called)
    return found


def check_data(
    data: str,
    *,
    base: str,
    length: int = 2048,
    format: str = "auto",
    train_on: str = "assistant",
    long_rows: str = "refuse",
    validation: str | None = None,
    variables: Mapping[str, Any] | None = None,
    columns: Mapping[str, str | None] | None = None,
) -> tuple[DataSet, Any]:
    """What would be trained on and held out, with its report, and the tokenizer to show it with.
    Loads no weights."""
    tokenizer, config = load_tokenizer(base)
    fields = DataConfig.of(
        {
            "train": data,
            "format": format,
            "train_on": train_on,
            "long_rows": long_rows,
            "validation": validation,
            "map": columns or {},
        }
    )
    found = examine_data(
        fields,
        length=length,
        capacity=configured_capacity(config),
        tokenizer=tokenizer,
        preamble=Preamble(variables=variables or {}),
    )
    found.report.problems.extend(
        grouped(look_closer(data, found.train_rows, found.validation_rows))
    )
    return found, tokenizer


def evaluate(
    base: Base,
    data: str | Path | Iterable[Record],
    *,
    metrics: Sequence[str | UserFunction] = (),
    labels: Sequence[str] = (),
    length_normalised: bool = False,
    general: str | None = None,
    against: Path | None = None,
    length: int = 2048,
    format: str = "auto",
    train_on: str = "assistant",
    max_new_tokens: int = 256,
    batch: int = 16,
    predictions: Path | None = None,
    system: str | None = None,
    variables: Mapping[str, Any] | None = None,
    columns: Mapping[str, str | None] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Loss (nats per trained token) and the metrics asked for, with the adapter that is in use.

    data is what a set is called, or the rows themselves, each a dict. They are asked as what acts
    was trained (base.preamble), unless system or variables say otherwise, as for generate. What
    else can be asked, and what comes back: evaluation/evaluation.py. A metric is a name,
    `regex:PATTERN`, or a function (answer, references) -> number.
    """
    check_numbers(
        length=(LENGTH, length), max_new_tokens=(NEW_TOKENS, max_new_tokens), batch=(ROWS, batch)
    )
    if not isinstance(base, FrozenBase):
        step = "veneer.evaluate(veneer.load(…), rows), or run.evaluate(rows)."
        raise ConfigError(
            f"evaluate takes a loaded base, and this is a {type(base).__name__}", next_step=step
        )
    with base.routing.held():  # a switch by another thread is for what comes after it
        preamble = base.preamble.asked(system, variables)
        choices = EvaluationOptions(
            metrics=find_metrics([metrics] if isinstance(metrics, str) else metrics),
            max_new_tokens=max_new_tokens,
            labels=[labels] if isinstance(labels, str) else list(labels),
            length_normalised=length_normalised,
            predictions=predictions,
            against=against,
            general=general,
            variables=preamble.variables,
        )
        capacity, tokenizer = capacity_of(base), base.acting_tokenizer
        with as_set(data) as named:
            fields = DataConfig.of(
                {
                    "train": named,
                    "validation_share": 0.0,
                    "format": format,
                    "train_on": train_on,
                    "map": columns or {},
                }
            )
            loaded = load_data(
                fields,
                length=length,
                capacity=capacity,
                tokenizer=tokenizer,
                preamble=preamble,
                purpose="evaluated",
            )
        rows, examples = list(loaded.train_rows), list(loaded.train)
        if is_rows(data):
            rows = [replace(each, ref=RowRef(ROWS_NAME, each.ref.line)) for each in rows]
            examples = [replace(each, ref=RowRef(ROWS_NAME, each.ref.line)) for each in examples]
        paths = base.paths

        def nats(examples: Sequence[Example]) -> Counts:
            refuse_beyond("this cannot be computed", examples, capacity, tokenizer)
            return example_nats(base.model, paths, examples, batch=batch)

        return Evaluation(
            evaluate_rows(base, rows, examples, choices, nats=nats, progress=progress)
        )


def merge(
    base: str,
    adapters: Sequence[tuple[str | Path, float]],
    *,
    out: str | Path,
    dtype: DtypeChoice | None = None,
    stochastic: bool = False,
    seed: int = 0,
    quantize: Quantize | None = None,
    keep_dense: Sequence[str] = (),
    into: Into | None = None,
    original: str | None = None,
    data: str | None = None,
    check_logits: bool = True,
    force_base: bool = False,
) -> MergeReport:
    """Merge adapter folders, each with its weight, into their base and write it as a folder; see
    merge/fold/folder.py."""
    rows = None
    if data is not None:
        fields = DataConfig.of({"train": data, "validation_share": 0.0})
        tokenizer, config = load_tokenizer(base)
        capacity = configured_capacity(config)
        loaded = load_data(
            fields,
            length=2048,
            capacity=capacity,
            tokenizer=tokenizer,
            purpose="used for the check",
        )
        rows = [example.ids.tolist() for example in loaded.train]
    return merge_adapters(
        base,
        adapters,
        out=out,
        dtype=dtype,
        stochastic=stochastic,
        seed=seed,
        quantize=quantize,
        keep_dense=keep_dense,
        into=into,
        original=original,
        rows=rows,
        check_logits=check_logits,
        force_base=force_base,
    )


def combine(
    adapters: Sequence[tuple[str | Path, float]], recipe: Recipe, *, base: str, out: str | Path
) -> CombineReport:
    """Make one adapter folder of several, each with its weight; see merge/combine/combine.py."""
    return combine_adapters(adapters, recipe, base=base, out=out)


def extract(
    base: str,
    model: str,
    *,
    out: str | Path,
    rank: int | None = None,
    energy: float | None = None,
    keep: bool = False,
    check_logits: bool = True,
) -> ExtractReport:
    """Make an adapter folder out of a fully fine-tuned model and its base; see
    merge/combine/extract.py."""
    return extract_adapter(
        base, model, out=out, rank=rank, energy=energy, keep=keep, check_logits=check_logits
    )


def compare(
    candidates: Sequence[str | tuple[str, RunConfig]],
    *,
    out: str | Path,
    base: str | None = None,
    data: str | None = None,
    validation: str | None = None,
    test: str | None = None,
    steps: int | None = None,
    seconds: float | None = None,
    seeds: int = 3,
    rates: Sequence[float] = (1 / 3, 1.0, 3.0),
    extend: int = 1,
    metrics: Sequence[str] = (),
    labels: str | None = None,
    max_new_tokens: int = 128,
    general: str | None = None,
    say: Callable[[str], None] | None = None,
    place: JobExecutor | None = None,
) -> dict[str, Any]:
    """Compares methods; returns the content of comparison.json (docs/format.md).

    candidates   names of methods, over `base` and `data`; or (name, settings) each
    place        where runs are computed: on this machine, or OnRay (comparison/ray_place.py)
    """
    chosen = [
        (
            Candidate(
                each,
                RunConfig.of(
                    {"base": base or "", "data": data or "", "method": each, "out": str(out)}
                ),
            )
            if isinstance(each, str)
            else Candidate(*each)
        )
        for each in candidates
    ]
    if not chosen:
        raise ConfigError("nothing to compare", next_step="Name methods, or give settings.")
    first = chosen[0].config
    with locked_folder(Path(out)):  # one comparison at a time in a folder
        train, held_out = first.data.train, validation or first.data.validation
        if not isinstance(train, str) or not (held_out is None or isinstance(held_out, str)):
            raise ConfigError(
                "methods are compared on one set of rows, and several are given",
                next_step="Name one.",
            )
        rows = prepare_rows(train, held_out, test, first.data.format, Path(out), first.data.map)
        comparison = Comparison(
            [each.over(rows) for each in chosen],
            first.base,
            rows.train,
            rows.validation,
            rows.test,
            Path(out),
            steps=DEFAULT_STEPS if steps is None and seconds is None else steps,
            seconds=seconds,
            factors=rates,
            extend=extend,
            seeds=seeds,
            metrics=metrics,
            labels=labels,
            max_new_tokens=max_new_tokens,
            general=general or BUILT_IN,
        )
        return run_comparison(comparison, place or LocalExecutor(), say or (lambda text: None))


def read_summary(run: str | Path) -> dict[str, Any]:
    """summary.json of a finished run."""
    return read_json(Path(run) / "summary.json")
