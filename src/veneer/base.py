"""The public Base: a FrozenBase that attaches, loads, switches and merges adapters, and answers.

The other folders take a FrozenBase (models/frozen_base.py): the model and the adapters on it. This
file only calls their functions.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict, Unpack, overload

from veneer.adapters.attach import check_settings
from veneer.adapters.config import AdapterConfig
from veneer.adapters.placement.attachment import Attachment
from veneer.adapters.placement.names import (
    active_adapters,
    adapter_names,
    check_name,
    chosen_name,
    name_error,
)
from veneer.adapters.placement.routing import Active
from veneer.bounds import LENGTH, ROWS, SEED, check_numbers
from veneer.data.examples import TrainOn
from veneer.data.files.writing import Record
from veneer.data.template.new_tokens import bring, token_texts
from veneer.data.template.user_prompt import UserPrompt
from veneer.decoding.answers import Answer as Answer
from veneer.decoding.answers import answer_prompts
from veneer.decoding.schedule.lookup import LookupMode
from veneer.errors import ConfigError
from veneer.evaluation.id_pairs import IdPair
from veneer.evaluation.rows import RowOptions
from veneer.evaluation.scores import Score, score_rows
from veneer.formats.adapter import read_adapter
from veneer.formats.loading import load_adapter
from veneer.library.library import Library
from veneer.library.pool import Pool
from veneer.merge.fold.in_memory import MergedParameters, merged_weights
from veneer.models.capacity import capacity_of
from veneer.models.frozen_base import FrozenBase
from veneer.models.starts.initial_values import begin
from veneer.training.own_loop.forward_queue import ForwardQueue
from veneer.training.own_loop.state import TrainerOptions, choose_start
from veneer.training.own_loop.trainer import Trainer, open_trainer
from veneer.wording import html_table, millions


class GenerateOptions(TypedDict, total=False):
    """The options of `Base.generate` for any kind of prompt."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    system: str | None
    variables: Mapping[str, Any] | None
    lookup: LookupMode


class ScoreOptions(TypedDict, total=False):
    """The options of `Base.score` for one adapter or several."""

    per_token: bool
    system: str | None
    variables: Mapping[str, Any] | None
    length: int
    format: str
    train_on: str
    columns: Mapping[str, str | None] | None
    batch: int
    progress: Callable[[int, int], None] | None


@dataclass
class Base(FrozenBase):
    """A frozen causal LM with adapters on it, made by `veneer.load`.

    library   where `use` finds adapters that are not loaded yet, if anywhere
    """

    library: Library | None = None
    _pool: Pool = field(init=False, repr=False)
    _merged: MergedParameters | None = field(default=None, init=False, repr=False)
    _queue: ForwardQueue = field(init=False, repr=False)

    def __reduce__(self) -> Any:  # called by copy, deepcopy and pickle
        raise ConfigError(
            "a base cannot be copied or pickled: its adapters and locks belong to this object",
            next_step="Load it again where you need another one: veneer.load(base.source).",
        )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._pool = Pool(self, lambda: self.library, self._refuse_if_merged)
        self._queue = ForwardQueue(self)

    def _repr_html_(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        weights = f"{dtype}, {self.quantize}" if self.quantize else dtype
        acting = [adapter.name for adapter in self.routing.acting.adapters]
        facts = [
            ("parameters", millions(self.model.num_parameters())),
            ("weights", f"{weights} on {self.device}"),
            ("adapters", ", ".join(self.attachments) or "none"),
            ("in use", ", ".join(acting) or "the base alone"),
        ]
        return html_table(f"base {self.source}", facts)

    @property
    def adapter_budget_bytes(self) -> int | None:
        """Limits the bytes of all loaded adapters; None: no limit.

        Beyond it, the least recently used adapters from the library are evicted, except those that
        are in use, pinned or changed.
        """
        return self._pool.budget_bytes

    @adapter_budget_bytes.setter
    def adapter_budget_bytes(self, limit: int | None) -> None:
        self._pool.budget_bytes = limit

    def attach(
        self, config: AdapterConfig, *, name: str, seed: int = 0, new_tokens: Sequence[str] = ()
    ) -> Attachment:
        """Attaches a new adapter, which acts once `use(name)` is called.

        new_tokens: texts that become tokens of this adapter. Raises ConfigError if the settings
        match no module, or if one of the texts is a token already.
        """
        check_numbers(seed=(SEED, seed))
        check_name(name)
        check_settings(config)
        _ = self.paths
        with self.routing.none():
            tokens = bring(self.tokenizer, new_tokens, rows=capacity_of(self).tokens)
        return self._pool.adopt(
            lambda: begin(self, config, name=name, seed=seed, tokens=tokens).attachment
        )

    def load_adapter(
        self, named: str | Path, *, name: str | None = None, force_base: bool = False
    ) -> str:
        """Loads an adapter (Veneer's or PEFT's) and returns its name. It acts once `use` is called.

        named: the folder of an adapter or of a run, or a name in the library (NAME, NAME@2). Raises
        AdapterMismatchError if it was made for another base (force_base accepts another
        fingerprint, never another shape), SourceError if there is no such adapter.
        """
        if not isinstance(named, str | Path):
            raise name_error(named)
        if name is not None:
            check_name(name)
        _ = self.paths
        chosen = Path(named).name if name is None else name

        def loaded() -> Attachment:
            folder = (self.library or Library(None)).locate(named)
            return load_adapter(self, folder, name=chosen, force_base=force_base)

        self._pool.adopt(loaded)
        return chosen

    def trainer(
        self,
        method: AdapterConfig | str | Path | None = None,
        *,
        name: str | None = None,
        seed: int = 0,
        new_tokens: Sequence[str] = (),
        length: int = 2048,
        train_on: TrainOn = "assistant",
        variables: Mapping[str, Any] | None = None,
        resume: str | Path | None = None,
    ) -> Trainer:
        """Returns a trainer, for a training loop that you write yourself.

        method     settings of a new adapter, or an existing one to go on with: as in load_adapter
        name       of the adapter on this base
        seed       of its initial values and dropout masks
        length     longest row, tokens
        train_on   tokens that are trained: as data.train_on in a run file
        variables  variables of the chat template
        resume     folder of Trainer.save_state, in place of all other arguments but name

        Raises what attach and load_adapter raise.
        """
        name = chosen_name(name, "trainer", self.attachments)
        options = TrainerOptions(seed, length, train_on, variables, token_texts(new_tokens))
        start = choose_start(self, method, options, resume)
        options = start.options
        if isinstance(start.method, str | Path):
            stored = read_adapter((self.library or Library(None)).locate(start.method))
            self._pool.adopt(lambda: load_adapter(self, stored, name=name))
            start = start.of_parent(stored.content_hash)
        else:
            self.attach(start.method, name=name, seed=options.seed, new_tokens=options.new_tokens)
        return open_trainer(self, self.attachments[name], self._queue, start)

    def use(self, name: str | Sequence[str] | None, weights: Sequence[float] | None = None) -> None:
        """Switches to one adapter, to several with weights, or with None to the base alone.

        A name that is not loaded is loaded from the library (`name@2` and `name@tag` too), and
        keeps the version that it had then. Forward passes in progress finish with the adapters that
        they began with. Raises ConfigError for an unknown name.
        """
        self._pool.activate(self._active(name, weights))

    @contextmanager
    def using(
        self, name: str | Sequence[str] | None, weights: Sequence[float] | None = None
    ) -> Iterator[None]:
        """Switches adapters as `use` does, for this thread and within a block alone."""
        with self._pool.holding(self._active(name, weights)):
            yield

    def pin(self, *names: str) -> None:
        """Keeps these adapters loaded whatever the budget; loads those that are missing."""
        self._pool.ready(names)
        self._pool.pin(names, pinned=True)

    def unpin(self, *names: str) -> None:
        self._pool.pin(names, pinned=False)

    def _active(self, name: str | Sequence[str] | None, weights: Sequence[float] | None) -> Active:
        active = active_adapters(name, weights)
        if active:
            self._refuse_if_merged()
        return active

    def _refuse_if_merged(self) -> None:
        """Raises ConfigError while an adapter is merged: another one would take the merged weights
        for those of the base."""
        if self._merged is not None:
            raise ConfigError(
                "an adapter is merged into the base's weights", next_step="Call unmerge() first."
            )

    def merge(self, name: str | Sequence[str], weights: Sequence[float] | None = None) -> None:
        """Folds adapters into the weights, for inference without their cost, until unmerge().

        The original weights are kept in memory, and no other adapter can be used meanwhile. Raises
        RefusedError if the weights are quantised, ConfigError while the base computes; nothing
        changes then.
        """
        wanted = self._active(name, weights)
        if not wanted:
            raise ConfigError(
                "merge needs the name of an adapter", next_step="For instance merge('name')."
            )
        self._pool.ready(n for n, _ in wanted)
        self._require_idle("merge")
        merged = merged_weights(self.model, [(self.attachments[n], weight) for n, weight in wanted])
        with self.routing.lock:
            self._require_idle("merge")
            merged.install()
            self.routing.active, self._merged = (), merged

    def _require_idle(self, change: str) -> None:
        """Raises ConfigError while anything computes with the base, or trains on it."""
        if self._queue.gradients:
            raise ConfigError(
                f"a trainer is open, and {change} changes the base's weights",
                next_step="Close the trainers of this base first.",
            )
        if self.routing.is_held:
            raise ConfigError(
                f"the base is in use, and {change} changes its weights",
                ["a forward or an answer is in progress, or a `using` block is open"],
                "Call it when they have ended.",
            )

    def unmerge(self) -> None:
        """Puts the original weights back: the same tensors. Does nothing if none is merged."""
        if self._merged is not None:
            with self.routing.lock:
                self._require_idle("unmerge")
                self._merged.restore()
                self._merged = None

    @overload
    def generate(  # type: ignore[overload-overlap]  # str is a sequence of str
        self,
        prompt: str | Sequence[Mapping[str, Any]],
        *,
        on_text: Callable[[str], None] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Answer: ...

    @overload
    def generate(
        self,
        prompt: Sequence[str] | Sequence[Sequence[Mapping[str, Any]]],
        **options: Unpack[GenerateOptions],
    ) -> list[Answer]: ...

    def generate(
        self,
        prompt: UserPrompt | Sequence[UserPrompt],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        system: str | None = None,
        variables: Mapping[str, Any] | None = None,
        lookup: LookupMode = "auto",
        on_text: Callable[[str], None] | None = None,
    ) -> Answer | list[Answer]:
        """Answers a text or the messages of a conversation, or a list of them together.

        on_text receives the text of a single answer piece by piece. The prompt is rendered as the
        rows of the adapter were: with their system turn, unless the messages have one, and their
        template variables. system and variables override these; system "" means no system turn, a
        variable None means that it is not set.

        lookup "auto" guesses tokens that the answer may copy from its prompt or from itself, and
        checks them in one step; "off" computes a token a step. The text is the same.
        """
        return answer_prompts(
            self,
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            system=system,
            variables=variables,
            lookup=lookup,
            on_text=on_text,
        )

    @overload
    def score(  # type: ignore[overload-overlap]  # str is a sequence of str
        self,
        rows: str | Path | Iterable[Record] | Iterable[IdPair],
        *,
        adapter: str | None = None,
        **options: Unpack[ScoreOptions],
    ) -> list[Score]: ...

    @overload
    def score(
        self,
        rows: str | Path | Iterable[Record] | Iterable[IdPair],
        *,
        adapter: Sequence[str | None],
        **options: Unpack[ScoreOptions],
    ) -> dict[str | None, list[Score]]: ...

    def score(
        self,
        rows: str | Path | Iterable[Record] | Iterable[IdPair],
        *,
        adapter: str | Sequence[str | None] | None = None,
        per_token: bool = False,
        system: str | None = None,
        variables: Mapping[str, Any] | None = None,
        length: int = 2048,
        format: str = "auto",
        train_on: str = "assistant",
        columns: Mapping[str, str | None] | None = None,
        batch: int = 16,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Score] | dict[str | None, list[Score]]:
        """Computes the log-probability of the answers in rows: a Score for each row, in order.

        rows       the name of a set of rows; or the rows, each a dict or (context, answer) in ids
        adapter    a name; a list of names, scored in the same forwards, gives {name: scores}, with
                   None in the list for the base alone. Default: the adapters in use
        per_token  also the log-probability of each token

        Rows are read as the adapter's training rows were, unless system or variables override that;
        train_on, length, format and columns are those of a run. Raises DataError with every row
        that is longer than `length` or cannot be computed.
        """
        check_numbers(length=(LENGTH, length), batch=(ROWS, batch))
        names = [] if adapter is None else adapter_names(adapter)
        with ExitStack() as stack:
            stack.enter_context(self.routing.held())  # a switch elsewhere concerns later calls
            sets = [self.routing.applied(self.routing.active)] if adapter is None else []
            for name in names:
                stack.enter_context(self.using(name))
                sets.append(self.routing.applied(self.routing.active))
            scores = score_rows(
                self,
                rows,
                sets,
                RowOptions(length, format, train_on, columns or {}),
                per_token=per_token,
                system=system,
                variables=variables,
                batch_rows=batch,
                progress=progress,
            )
        if adapter is None or isinstance(adapter, str):
            return scores[0]
        return dict(zip(names, scores, strict=True))
