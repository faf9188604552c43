"""The functions that notebooks and the command line call. They compose the folders below.

base    = veneer.load("smollm2-135m")
adapter = base.attach(veneer.LoRA(rank=16), name="tickets")
run     = veneer.train("smollm2-135m", "tickets.jsonl", out="runs/tickets")        (trained.py)
base.load_adapter("runs/tickets", name="tickets")
base.use("tickets")
print(base.generate("Where is my parcel?"))
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack, overload

from veneer.adapters.placement.acting import check_answers
from veneer.adapters.preamble import Preamble
from veneer.base import Base
from veneer.bases.compute import HeldAs
from veneer.bases.tokenizer import load_tokenizer
from veneer.bounds import LENGTH, NEW_TOKENS, ROWS, check_numbers
from veneer.comparison.comparison import run_comparison
from veneer.comparison.jobs import JobExecutor
from veneer.comparison.local import LocalExecutor
from veneer.comparison.plan import DEFAULT_STEPS, Candidate, Comparison, shared_rows
from veneer.data.checks.check import refuse_beyond
from veneer.data.encoder import RowRules
from veneer.data.examples import Example, Row, RowRef, prompt_key
from veneer.data.files.writing import Record
from veneer.data.load import DataSet, checked_for, examine_closely
from veneer.data.template.user_prompt import UserPrompt, prompt_list, prompt_messages
from veneer.decoding.schedule.lookup import LookupMode, check_lookup
from veneer.errors import ConfigError
from veneer.evaluation.evaluation import EvaluationOptions, Progress
from veneer.evaluation.evaluation import evaluate as evaluate_rows
from veneer.evaluation.general import BUILT_IN
from veneer.evaluation.head_evaluation import HEAD_ONLY, evaluate_head, refuse_options
from veneer.evaluation.intervals import Counts
from veneer.evaluation.label_figures import probabilities
from veneer.evaluation.label_scores import Nats, label_scores
from veneer.evaluation.labels import AUTO, checked_labels, with_accuracy
from veneer.evaluation.metrics.registry import find_metrics
from veneer.evaluation.metrics.user_function import UserFunction
from veneer.evaluation.preferences import PREFERENCES_ONLY, are_preferences, evaluate_preferences
from veneer.evaluation.rows import RowOptions, acting_head, load_rows
from veneer.formats.packed_base import WrittenBase, write_packed
from veneer.library.library import Library
from veneer.merge.combine.combine_run import combine_adapters as combine_adapters
from veneer.merge.combine.extract import extract_adapter as extract_adapter
from veneer.merge.export.export_run import WeightSource as WeightSource
from veneer.merge.export.export_run import export_adapter as export_adapter
from veneer.merge.export.export_run import export_merged_gguf as export_merged_gguf
from veneer.merge.export.export_run import export_ollama as export_ollama
from veneer.merge.export.export_run import lint_adapter as lint_adapter
from veneer.merge.fold.merge_run import merge_adapters as merge_adapters
from veneer.models.capacity import capacity_of, configured_capacity
from veneer.models.frozen_base import FrozenBase
from veneer.models.likelihood import example_nats
from veneer.models.load import load_base
from veneer.quant.config import Quantize
from veneer.report.notebook import Evaluation
from veneer.runs import fit_run as fit_run
from veneer.runs import run_rows as run_rows
from veneer.runs import train_jobs as train_jobs
from veneer.runs import train_run as train_run
from veneer.training.config import DataConfig, RunConfig
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
    """Loads a base: a hub id (`org/name` or `org/name@revision`), a folder, a .gguf file, or the
    name of a default model.

    dtype       auto: the type of the stored weights, or float32 on a CPU that is slow in that type
                (base.compute says why); stored: always the type of the stored weights
    device      auto: a GPU if there is one
    quantize    keeps linear layers in 4 bits (nf4, fp4) or in the blocks of a .gguf file (gguf)
    keep_dense  names modules that stay as they are stored
    library     where Base.use finds adapters that are not loaded yet
    """
    if not isinstance(source, str | Path):
        raise ConfigError(f"a base is named by text or a path, and this is {source!r}")
    if not (library is None or isinstance(library, Library | str | Path)):
        raise ConfigError(f"library is {library!r}, and takes a folder or a Library")
    dense = [keep_dense] if isinstance(keep_dense, str) else keep_dense
    loaded = load_base(
        str(source), dtype=dtype, device=device, quantize=quantize, keep_dense=dense, own_pages=True
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
        routing=loaded.routing,
        library=Library(library) if isinstance(library, str | Path) else library,
    )


def write_quantized(base: Base, out: str | Path) -> WrittenBase:
    """Writes a base in nf4 or fp4 as a folder that transformers with bitsandbytes loads.

    Raises ConfigError for another base.
    """
    if base.compute.widens and base.compute.times is not None:
        raise ConfigError(
            f"{base.source} computes in float32 for speed: dense weights that it widened would take"
            " twice the bytes on disk",
            next_step="Load it with dtype stored, then write it.",
        )
    return write_packed(base, out)


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
    activation: str = "",
) -> tuple[DataSet, Any]:
    """Reads and encodes the rows to train on and to hold out; returns them with their report, and
    the tokenizer. Loads no weights. activation: of the adapter (method.activation)"""
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
    data_set = examine_closely(
        fields,
        RowRules(
            length, configured_capacity(config), Preamble(variables=variables or {}), kind="any"
        ),
        tokenizer,
    )
    return checked_for(data_set, activation, tokenizer), tokenizer


def evaluate(
    base: Base,
    data: str | Path | Iterable[Record],
    *,
    metrics: Sequence[str | UserFunction] = (),
    labels: str | Sequence[str] = (),
    length_normalised: bool = False,
    general: str | None = None,
    against: Path | None = None,
    length: int = 2048,
    format: str = "auto",
    train_on: str = "assistant",
    max_new_tokens: int = 256,
    lookup: LookupMode = "auto",
    batch: int = 16,
    predictions: Path | None = None,
    system: str | None = None,
    variables: Mapping[str, Any] | None = None,
    columns: Mapping[str, str | None] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Computes the loss (nats per trained token) and metrics of the adapters that are in use.

    data     the name of a set of rows, or the rows themselves, each a dict
    metrics  names, `regex:PATTERN`, or functions (answer, references) -> number
    labels   what accuracy chooses from by likelihood; "auto": the rows' own answers

    Prompts are rendered as the adapter's training rows were (base.preamble), unless system or
    variables override that, as in Base.generate. evaluation/evaluation.py describes the other
    options and the result.
    """
    check_numbers(
        length=(LENGTH, length), max_new_tokens=(NEW_TOKENS, max_new_tokens), batch=(ROWS, batch)
    )
    check_lookup(lookup)
    if not isinstance(base, FrozenBase):
        step = "veneer.evaluate(veneer.load(…), rows), or run.evaluate(rows)."
        raise ConfigError(
            f"evaluate takes a loaded base, and this is a {type(base).__name__}", next_step=step
        )
    with base.routing.held():  # a switch in another thread concerns later calls
        preamble = base.preamble.overridden(system, variables)
        of_answers: dict[str, object] = {"metrics": metrics, "labels": labels, "general": general}
        of_answers |= {"against": against, "predictions": predictions}
        if (head := acting_head(base)) is not None:
            refuse_options(HEAD_ONLY, of_answers)
        choices = EvaluationOptions(
            metrics=find_metrics(
                with_accuracy([metrics] if isinstance(metrics, str) else metrics, labels)
            ),
            max_new_tokens=max_new_tokens,
            lookup=lookup,
            labels=[] if labels == AUTO else [labels] if isinstance(labels, str) else list(labels),
            length_normalised=length_normalised,
            predictions=predictions,
            against=against,
            general=general,
            variables=preamble.variables,
        )
        data_set = load_rows(
            base,
            data,
            RowOptions(length, format, train_on, columns or {}),
            preamble=preamble,
            purpose="evaluated",
            kind="any",
        )
        rows, examples = data_set.train_rows, list(data_set.train)
        if head is not None:
            prompts = [prompt_key(row) for row in rows]
            return Evaluation(
                evaluate_head(base, examples, head, prompts, batch=batch, progress=progress)
            )
        nats = _nats(base, batch)
        if are_preferences(examples):
            refuse_options(PREFERENCES_ONLY, {"metrics": metrics, "labels": labels})
            return Evaluation(evaluate_preferences(base, rows, examples, choices, nats=nats))
        return Evaluation(
            evaluate_rows(base, rows, examples, choices, nats=nats, progress=progress)
        )


class ChooseOptions(TypedDict, total=False):
    """The options of `choose` for one prompt or several."""

    length_normalised: bool
    system: str | None
    variables: Mapping[str, Any] | None
    batch: int


@overload
def choose(  # type: ignore[overload-overlap]  # str is a sequence of str
    base: Base,
    prompt: str | Sequence[Mapping[str, Any]],
    choices: Sequence[str],
    **options: Unpack[ChooseOptions],
) -> dict[str, float]: ...


@overload
def choose(
    base: Base,
    prompt: Sequence[str] | Sequence[Sequence[Mapping[str, Any]]],
    choices: Sequence[str],
    **options: Unpack[ChooseOptions],
) -> list[dict[str, float]]: ...


def choose(
    base: Base,
    prompt: UserPrompt | Sequence[UserPrompt],
    choices: Sequence[str],
    *,
    length_normalised: bool = False,
    system: str | None = None,
    variables: Mapping[str, Any] | None = None,
    batch: int = 16,
) -> dict[str, float] | list[dict[str, float]]:
    """Returns the probability of each choice as the answer to a prompt, the likeliest first; a list
    of them for a list of prompts.

    Nothing is generated: every choice is scored behind the prompt, which is computed once. The
    probabilities are over the choices alone, of the adapters in use, and uncalibrated.

    prompt             a text, or the messages of a conversation; or a list of them
    length_normalised  compares log-probabilities per token: for choices of very different lengths
    """
    check_numbers(batch=(ROWS, batch))
    if isinstance(choices, str):
        raise ConfigError(
            "choices is a text, and takes several", next_step="For instance ['yes', 'no']."
        )
    labels, (prompts, several) = checked_labels(choices), prompt_list(prompt)
    with base.routing.held():
        preamble, tokenizer = base.preamble.overridden(system, variables), base.acting_tokenizer
        rows = [
            Row(
                RowRef("prompts", number),
                [
                    *prompt_messages(tokenizer, item, preamble),
                    {"role": "assistant", "content": labels[0]},
                ],
                format="prompt_completion",
            )
            for number, item in enumerate(prompts, 1)
        ]
        scores = label_scores(
            tokenizer,
            rows,
            labels,
            nats=_nats(base, batch),
            length_normalised=length_normalised,
            variables=preamble.variables,
        )
    answers = [
        dict(sorted(zip(labels, row, strict=True), key=lambda pair: -pair[1]))
        for row in probabilities(scores).tolist()
    ]
    return answers if several else answers[0]


def _nats(base: FrozenBase, batch: int) -> Nats:
    """Returns a function that computes the nats of examples with the adapters in use."""
    check_answers(base.routing.acting.adapters)
    capacity, tokenizer = capacity_of(base), base.acting_tokenizer

    def nats(examples: Sequence[Example]) -> Counts:
        refuse_beyond("this cannot be computed", examples, capacity, tokenizer)
        return example_nats(base, examples, batch=batch)

    return nats


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

    candidates   names of methods, for `base` and `data`; or pairs (name, settings)
    place        computes the runs: this machine by default, or OnRay (comparison/ray_place.py)
    """
    shared = {"base": base or "", "data": data or "", "out": str(out)}
    chosen = [
        Candidate(candidate, RunConfig.of({**shared, "method": candidate}))
        if isinstance(candidate, str)
        else Candidate(*candidate)
        for candidate in candidates
    ]
    if not chosen:
        raise ConfigError("nothing to compare", next_step="Name methods, or give settings.")
    first = chosen[0].config
    with locked_folder(Path(out)):  # one comparison at a time in a folder
        rows = shared_rows(chosen, validation, test, Path(out))
        comparison = Comparison(
            [candidate.over(rows) for candidate in chosen],
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
