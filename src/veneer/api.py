"""What notebooks and the command line call. Everything here composes the rooms below; nothing computes.

base    = veneer.load("smollm2-135m")
adapter = base.attach(veneer.LoRA(rank=16), name="tickets")
run     = veneer.train("smollm2-135m", "tickets.jsonl", out="runs/tickets")
base.load_adapter("runs/tickets/adapter", name="tickets")
base.use("tickets")
print(base.generate("Where is my parcel?"))
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from veneer.adapters.attachment import Attachment
from veneer.adapters.config import AdapterConfig, LoRA, Method
from veneer.adapters.routing import Active
from veneer.bases.compute import HeldAs
from veneer.bases.tokenizer import load_tokenizer
from veneer.bounds import LENGTH, NEW_TOKENS, ROWS, SEED, check_numbers, check_weights
from veneer.compare.comparison import run_comparison
from veneer.compare.plan import DEFAULT_STEPS, Candidate, Comparison, prepare_rows
from veneer.data.check import refuse_beyond
from veneer.data.examples import Example
from veneer.data.load import DataSet, examine_data, load_data
from veneer.data.template import ChatTemplate
from veneer.decoding.generate import generate
from veneer.errors import ConfigError
from veneer.evaluate.bootstrap import Counts
from veneer.evaluate.evaluation import Choices, Progress
from veneer.evaluate.evaluation import evaluate as evaluate_rows
from veneer.evaluate.general import BUILT_IN
from veneer.evaluate.registry import find_metrics
from veneer.evaluate.user_function import UserFunction
from veneer.files.nesting import is_text, walk
from veneer.files.strict_json import read_json
from veneer.formats.adapter import load_adapter
from veneer.formats.packed_base import WrittenBase, write_packed
from veneer.library.library import Library
from veneer.library.pool import Pool
from veneer.merge.combine import Recipe
from veneer.merge.combine_run import CombineReport, combine_adapters
from veneer.merge.export_run import export_adapter as export_adapter
from veneer.merge.export_run import export_merged_gguf as export_merged_gguf
from veneer.merge.export_run import lint_adapter as lint_adapter
from veneer.merge.extract import ExtractReport, extract_adapter
from veneer.merge.folder import DtypeChoice, MergeReport
from veneer.merge.in_memory import Merged, merged_weights
from veneer.merge.merge_run import Into, merge_adapters
from veneer.models.capacity import capacity_of, configured_capacity
from veneer.models.frozen_base import FrozenBase
from veneer.models.initial_values import begin
from veneer.models.likelihood import example_nats
from veneer.models.load import load_base
from veneer.plan.probe import fitted, planned_memory_bytes
from veneer.quant.config import Quantize
from veneer.report.page import write_report
from veneer.train.config import DataConfig, RunConfig
from veneer.train.folder import held
from veneer.train.folder import resume_config as resume_config
from veneer.train.screen import QuietScreen, Screen
from veneer.train.training import run_training

Prompt = str | Sequence[Mapping[str, Any]]


@dataclass
class Base(FrozenBase):
    """A frozen causal LM that adapters sit on. Made by `load`.

    library   where `use` finds names that are not loaded yet; None: nowhere
    """

    library: Library | None = None
    _pool: Pool = field(init=False, repr=False)
    _merged: Merged | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._pool = Pool(self, lambda: self.library, self._unmerged)

    @property
    def adapter_budget_bytes(self) -> int | None:
        """Bytes of all loaded adapters together; beyond them those from the library go that were not used for
        longest, unless they act, are pinned or were changed. None: no bound."""
        return self._pool.budget_bytes

    @adapter_budget_bytes.setter
    def adapter_budget_bytes(self, limit: int | None) -> None:
        self._pool.budget_bytes = limit

    def attach(self, config: AdapterConfig, *, name: str, seed: int = 0) -> Attachment:
        """A fresh adapter; it acts once `use(name)` is called. ConfigError if its settings match nothing."""
        check_numbers(seed=(SEED, seed))
        _ = self.paths
        return self._pool.adopt(lambda: begin(self, config, name=name, seed=seed).attachment)

    def load_adapter(self, folder: str | Path, *, name: str | None = None, force_base: bool = False) -> str:
        """Read an adapter folder (ours or PEFT's) and put it beside the base; returns its name. It does not act yet.

        AdapterMismatchError: it was made for another base (force_base overrides a fingerprint, never a shape).
        """
        _ = self.paths
        chosen = Path(folder).name if name is None else name
        self._pool.adopt(lambda: load_adapter(self, folder, name=chosen, force_base=force_base))
        return chosen

    def use(self, name: str | Sequence[str] | None, weights: Sequence[float] | None = None) -> None:
        """Let one adapter act, several with weights, or none: the base alone, bit for bit. A pointer change.

        A name that is not loaded is read from the library (also `name@2`, `name@tag`), and stays the version that it
        was then. Forwards in progress end with what they began with. ConfigError: unknown, with the nearest name.
        """
        self._pool.activate(self._active(name, weights))

    @contextmanager
    def using(
        self, name: str | Sequence[str] | None, weights: Sequence[float] | None = None
    ) -> Iterator[None]:
        """`use` within a block and for this thread alone; afterwards what acted before acts again."""
        with self._pool.holding(self._active(name, weights)):
            yield

    def pin(self, *names: str) -> None:
        """Keep these loaded whatever the budget, loading them from the library where they are not."""
        self._pool.ready(names)
        self._pool.pin(names, pinned=True)

    def unpin(self, *names: str) -> None:
        self._pool.pin(names, pinned=False)

    def _active(self, name: str | Sequence[str] | None, weights: Sequence[float] | None) -> Active:
        names = [] if name is None else [name] if isinstance(name, str) else list(name)
        if names:
            self._unmerged()
        check_weights(weights or ())
        if weights is not None and len(weights) != len(names):
            raise ConfigError(f"{len(names)} adapters and {len(weights)} weights: give one weight for each")
        return tuple(zip(names, weights or [1.0] * len(names), strict=True))

    def _unmerged(self) -> None:
        """ConfigError while an adapter is merged: what is put beside the base then would take its weights for the base's."""
        if self._merged is not None:
            raise ConfigError(
                "an adapter is merged into the base's weights", next_step="Call unmerge() first."
            )

    def merge(self, name: str | Sequence[str], weights: Sequence[float] | None = None) -> None:
        """Fold adapters into the weights, for inference without their cost; the originals are kept for unmerge().

        Until then no adapter acts beside the base. RefusedError over quantised weights, ConfigError while the base is in
        use: everything is as it was then, and what acted acts.
        """
        wanted = self._active(name, weights)
        if not wanted:
            raise ConfigError(
                "no adapter is named that could be merged", next_step="For instance merge('name')."
            )
        self._pool.ready(n for n, _ in wanted)
        self._idle("merge")
        merged = merged_weights(self.model, [(self.attachments[n], weight) for n, weight in wanted])
        with self.routing.lock:
            self._idle("merge")
            merged.install()
            self.routing.active, self._merged = (), merged

    def _idle(self, what: str) -> None:
        """ConfigError while anything computes with the base: weights must not change under it."""
        if self.routing.is_held:
            raise ConfigError(
                f"the base is in use, and {what} changes its weights",
                ["a forward or an answer is in progress, or a `using` block is open"],
                "Call it when that is done.",
            )

    def unmerge(self) -> None:
        """Put the base's own weights back: the same tensors, so every bit. Nothing happens where none is merged."""
        if self._merged is not None:
            with self.routing.lock:
                self._idle("unmerge")
                self._merged.restore()
                self._merged = None

    def generate(
        self, prompt: Prompt, *, max_new_tokens: int = 256, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0,
        on_text: Callable[[str], None] | None = None,
    ) -> str:  # fmt: skip
        """The answer to a user's sentence or to chat messages. on_text gets the text as it grows, piece by piece."""
        ids = self._prompt_ids(prompt)
        stream = _TextStream(self.tokenizer, on_text) if on_text is not None else None
        with self.routing.held():  # a switch by another thread is for its next answer
            (answer,) = generate(
                self, [ids], max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed,
                on_token=stream,
            )  # fmt: skip
        if stream is not None:
            stream.end(answer)
        return _text(self.tokenizer, answer)

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        messages = prompt if isinstance(prompt, str) else [dict(message) for message in prompt]
        if not all(is_text(inner) for inner, _ in walk(messages) if isinstance(inner, str)):
            raise ConfigError("the prompt is not UTF-8", next_step="Give it as UTF-8 text.")
        if self.tokenizer.chat_template is None:
            if not isinstance(prompt, str):
                raise ConfigError("this base has no chat template: give the prompt as a string")
            return list(self.tokenizer(prompt)["input_ids"])
        messages = (
            [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
        )
        return ChatTemplate(self.tokenizer).encode_prompt(messages)


def _text(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))


class _TextStream:
    """Turns ids into text as they come; holds back what may still change, such as half a character."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        self.tokenizer, self.on_text = tokenizer, on_text
        self.ids: list[int] = []
        self.sent = 0

    def __call__(self, token: int) -> None:
        self.ids.append(token)
        self._send(_text(self.tokenizer, self.ids))

    def _send(self, text: str) -> None:
        if len(text) > self.sent and not text.endswith("\ufffd"):
            self.on_text(text[self.sent :])
            self.sent = len(text)

    def end(self, ids: list[int]) -> None:
        text = _text(self.tokenizer, ids)
        if len(text) > self.sent:
            self.on_text(text[self.sent :])


def load(
    source: str, *, dtype: HeldAs = "auto", device: str = "auto", quantize: Quantize | None = None,
    keep_dense: Sequence[str] = (), library: Library | str | Path | None = None,
) -> Base:  # fmt: skip
    """Load a base: a hub id (`org/name` or `org/name@revision`), a folder, a .gguf file, or a named default.

    dtype auto keeps the type the weights are stored in, or takes float32 on a CPU whose products in that type are slow
    (base.compute says which and why); stored keeps it always. device auto takes a GPU if there is one.
    quantize holds the linear layers in 4 bits (nf4, fp4) or in the blocks of a .gguf file (gguf); keep_dense names
    modules that stay as they are stored.
    library is where Base.use finds adapters that are not loaded yet.
    """
    loaded = load_base(source, dtype=dtype, device=device, quantize=quantize, keep_dense=keep_dense)
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
    """A base held as nf4 or fp4 as a folder that transformers with bitsandbytes loads. ConfigError for another base."""
    if base.compute.widens and base.compute.times is not None:
        raise ConfigError(
            f"{base.source} was widened to float32 for speed: what stays dense would be written in twice the bytes",
            next_step="Load it with dtype stored to write it.",
        )
    return write_packed(base, out)


def train(base: str, data: str | Mapping[str, Any], *, out: str | Path, method: Method | None = None, **settings: Any) -> dict[str, Any]:  # fmt: skip
    """Train and return the run's summary (the content of summary.json). `settings`: the run file's fields."""
    config = RunConfig(base=base, data=data, out=str(out), method=method or LoRA(), **settings)  # type: ignore[arg-type]
    return train_run(config, resume=False, screen=QuietScreen())


def train_run(config: RunConfig, *, resume: bool, screen: Screen) -> dict[str, Any]:
    """Run what a run file says, write its report, and return what summary.json holds."""
    summary = run_training(config, resume=resume, screen=screen, plan=planned_memory_bytes)
    write_report(Path(config.out))
    screen.end(summary)
    return summary


def fit_run(config: RunConfig, memory_bytes: int) -> tuple[RunConfig, list[str]]:
    """The run, changed by the shortest list of changes that makes it fit, and what was changed, in words.

    Raises DoesNotFitError where no change helps.
    """
    fields = config.data.model_dump() | {"long_rows": "cut"}
    tokenizer, model_config = load_tokenizer(config.base)
    data = examine_data(
        **fields, length=config.length, capacity=configured_capacity(model_config), tokenizer=tokenizer
    )
    return fitted(config, data, memory_bytes)


def check_data(
    data: str, *, base: str, length: int = 2048, format: str = "auto", train_on: str = "assistant",
    long_rows: str = "refuse", validation: str | None = None,
) -> tuple[DataSet, Any]:  # fmt: skip
    """What would be trained on and held out, with its report, and the tokenizer to show it with. Loads no weights."""
    tokenizer, config = load_tokenizer(base)
    fields = DataConfig.model_validate(
        {
            "train": data,
            "format": format,
            "train_on": train_on,
            "long_rows": long_rows,
            "validation": validation,
        }
    )
    found = examine_data(
        **fields.model_dump(), length=length, capacity=configured_capacity(config), tokenizer=tokenizer
    )
    return found, tokenizer


def evaluate(
    base: Base, data: str, *, metrics: Sequence[str | UserFunction] = (), labels: Sequence[str] = (),
    length_normalised: bool = False, general: str | None = None, against: Path | None = None, length: int = 2048,
    format: str = "auto", train_on: str = "assistant", max_new_tokens: int = 256, batch: int = 16,
    predictions: Path | None = None, progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Loss (nats per trained token) and the metrics asked for, with the adapter that is in use.

    What else can be asked, and what comes back: evaluate/evaluation.py. A metric is a name, `regex:PATTERN`, or a function
    (answer, references) -> number.
    """
    check_numbers(length=(LENGTH, length), max_new_tokens=(NEW_TOKENS, max_new_tokens), batch=(ROWS, batch))
    choices = Choices(
        metrics=find_metrics(metrics), max_new_tokens=max_new_tokens, labels=list(labels),
        length_normalised=length_normalised, predictions=predictions, against=against, general=general,
    )  # fmt: skip
    fields = DataConfig.model_validate(
        {"train": data, "validation_share": 0.0, "format": format, "train_on": train_on}
    )
    capacity = capacity_of(base)
    loaded = load_data(**fields.model_dump(), length=length, capacity=capacity, tokenizer=base.tokenizer)
    paths = base.paths

    def nats(examples: Sequence[Example]) -> Counts:
        refuse_beyond("this cannot be computed", examples, capacity, base.tokenizer)
        return example_nats(base.model, paths, examples, batch=batch)

    with base.routing.held():
        return evaluate_rows(base, loaded.train_rows, loaded.train, choices, nats=nats, progress=progress)


def merge(
    base: str, adapters: Sequence[tuple[str | Path, float]], *, out: str | Path, dtype: DtypeChoice | None = None,
    stochastic: bool = False, seed: int = 0, quantize: Quantize | None = None, keep_dense: Sequence[str] = (), into: Into | None = None,
    original: str | None = None, data: str | None = None, check_logits: bool = True, force_base: bool = False,
) -> MergeReport:  # fmt: skip
    """Merge adapter folders, each with its weight, into their base and write it as a folder; see merge/folder.py."""
    rows = None
    if data is not None:
        fields = DataConfig.model_validate({"train": data, "validation_share": 0.0})
        tokenizer, config = load_tokenizer(base)
        capacity = configured_capacity(config)
        loaded = load_data(**fields.model_dump(), length=2048, capacity=capacity, tokenizer=tokenizer)
        rows = [example.ids.tolist() for example in loaded.train]
    return merge_adapters(
        base, adapters, out=out, dtype=dtype, stochastic=stochastic, seed=seed, quantize=quantize, keep_dense=keep_dense, into=into,
        original=original, rows=rows, check_logits=check_logits, force_base=force_base,
    )  # fmt: skip


def combine(
    adapters: Sequence[tuple[str | Path, float]], recipe: Recipe, *, base: str, out: str | Path
) -> CombineReport:
    """Make one adapter folder of several, each with its weight; see merge/combine.py."""
    return combine_adapters(adapters, recipe, base=base, out=out)


def extract(
    base: str, model: str, *, out: str | Path, rank: int | None = None, energy: float | None = None, keep: bool = False,
    check_logits: bool = True,
) -> ExtractReport:  # fmt: skip
    """Make an adapter folder out of a fully fine-tuned model and its base; see merge/extract.py."""
    return extract_adapter(
        base, model, out=out, rank=rank, energy=energy, keep=keep, check_logits=check_logits
    )


def compare(
    candidates: Sequence[str | tuple[str, RunConfig]], *, out: str | Path, base: str | None = None,
    data: str | None = None, validation: str | None = None, test: str | None = None, steps: int | None = None,
    seconds: float | None = None, seeds: int = 3, rates: Sequence[float] = (1 / 3, 1.0, 3.0), extend: int = 1,
    metrics: Sequence[str] = (), labels: str | None = None, max_new_tokens: int = 128, general: str | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Methods side by side: the content of comparison.json (docs/format.md); compare/plan.py says what is chosen.

    candidates   names of methods, over `base` and `data`; or (name, settings) each
    """
    chosen = [
        Candidate(each, RunConfig(base=base or "", data=data or "", method=each, out=str(out)))  # type: ignore[arg-type]
        if isinstance(each, str)
        else Candidate(*each)
        for each in candidates
    ]
    if not chosen:
        raise ConfigError("nothing to compare", next_step="Name methods, or give settings.")
    first = chosen[0].config
    with held(Path(out)):  # one comparison at a time: two would take each other's rows and runs
        rows = prepare_rows(
            first.data.train, validation or first.data.validation, test, first.data.format, Path(out)
        )
        comparison = Comparison(
            [each.over(rows) for each in chosen], first.base, rows.train, rows.validation, rows.test, Path(out), steps=DEFAULT_STEPS if steps is None and seconds is None else steps, seconds=seconds,
            factors=rates, extend=extend, seeds=seeds, metrics=metrics, labels=labels, max_new_tokens=max_new_tokens,
            general=general or BUILT_IN,
        )  # fmt: skip
        return run_comparison(comparison, say or (lambda text: None))


def read_summary(run: str | Path) -> dict[str, Any]:
    """summary.json of a finished run."""
    return read_json(Path(run) / "summary.json")
