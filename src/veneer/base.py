"""The Base that people hold: a FrozenBase with what the rooms above it add: adapters made, named,
loaded, merged, used.

There is one Base. FrozenBase (models/frozen_base.py) is the part of it that those rooms themselves
take: the model, and what sits on it. So taking an adapter away (`detach`) stands there and making
one (`attach`) here: that begins with what the base computes, and tells the pool. Everything here
composes; nothing computes.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, overload

from veneer.adapters.attach import check_settings
from veneer.adapters.config import AdapterConfig
from veneer.adapters.placement.attachment import Attachment
from veneer.adapters.placement.routing import Active
from veneer.adapters.preamble import Preamble
from veneer.bounds import SEED, check_numbers, check_weights
from veneer.data.examples import RowFault
from veneer.data.files.formats import to_conversation
from veneer.data.template.new_tokens import bring
from veneer.data.template.template import ChatTemplate
from veneer.decoding.generate import generate, limits_of
from veneer.decoding.text import TextStream, text_of
from veneer.errors import ConfigError
from veneer.files.nesting import is_text, walk
from veneer.formats.loading import load_adapter
from veneer.library.library import Library
from veneer.library.pool import Pool
from veneer.merge.fold.in_memory import MergedParameters, merged_weights
from veneer.models.capacity import capacity_of
from veneer.models.frozen_base import FrozenBase
from veneer.models.initial_values import begin
from veneer.wording import html_table, millions

Prompt = str | Sequence[Mapping[str, Any]]


class Answer(str):
    """An answer's text. cut_after: tokens after which it was cut; None: it came to its end."""

    cut_after: int | None

    def __new__(cls, text: str, *, cut_after: int | None = None) -> Self:
        made = super().__new__(cls, text)
        made.cut_after = cut_after
        return made


@dataclass
class Base(FrozenBase):
    """A frozen causal LM that adapters sit on. Made by `load`.

    library   where `use` finds names that are not loaded yet; None: nowhere
    """

    library: Library | None = None
    _pool: Pool = field(init=False, repr=False)
    _merged: MergedParameters | None = field(default=None, init=False, repr=False)

    def __reduce__(
        self,
    ) -> Any:  # of copy, deepcopy and pickle, and so of what hands a base to another process
        raise ConfigError(
            "a base is neither copied nor pickled: its adapters and locks are this object's own",
            next_step="Load it again where another one is needed: veneer.load(base.source).",
        )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._pool = Pool(self, lambda: self.library, self._unmerged)

    def _repr_html_(self) -> str:
        held = str(self.dtype).removeprefix("torch.") + (
            f", {self.quantize}" if self.quantize else ""
        )
        acting = (
            ", ".join(adapter.name for adapter in self.routing.acting.adapters) or "the base alone"
        )
        facts = [
            ("parameters", millions(self.model.num_parameters())),
            ("held as", f"{held} on {self.device}"),
            ("adapters", ", ".join(self.attachments) or "none"),
            ("acts", acting),
        ]
        return html_table(f"base {self.source}", facts)

    @property
    def adapter_budget_bytes(self) -> int | None:
        """Bytes of all loaded adapters together; beyond them those from the library go that were
        not used for longest, unless they act, are pinned or were changed. None: no bound."""
        return self._pool.budget_bytes

    @adapter_budget_bytes.setter
    def adapter_budget_bytes(self, limit: int | None) -> None:
        self._pool.budget_bytes = limit

    def attach(
        self, config: AdapterConfig, *, name: str, seed: int = 0, new_tokens: Sequence[str] = ()
    ) -> Attachment:
        """A fresh adapter; it acts once `use(name)` is called. new_tokens: texts that become tokens
        of its own.

        ConfigError: its settings match nothing; one of the texts is a token already.
        """
        check_numbers(seed=(SEED, seed))
        _check_name(name)
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
        """Read an adapter (ours or PEFT's) and put it beside the base; returns its name. It does
        not act yet.

        named   as --adapter takes it: an adapter's folder, a run's, or a name in the library (NAME,
                NAME@2)
        AdapterMismatchError: it was made for another base (force_base overrides a fingerprint,
            never a shape).
        SourceError: there is no such adapter.
        """
        if not isinstance(named, str | Path):
            raise _no_name(named)
        if name is not None:
            _check_name(name)
        _ = self.paths
        chosen = Path(named).name if name is None else name

        def loaded() -> Attachment:
            folder = (self.library or Library(None)).locate(named)
            return load_adapter(self, folder, name=chosen, force_base=force_base)

        self._pool.adopt(loaded)
        return chosen

    def use(self, name: str | Sequence[str] | None, weights: Sequence[float] | None = None) -> None:
        """Let one adapter act, several with weights, or none: the base alone, bit for bit. A
        pointer change.

        A name that is not loaded is read from the library (also `name@2`, `name@tag`), and stays
        the version that it was then. Forwards in progress end with what they began with.
        ConfigError: unknown, with the nearest name.
        """
        self._pool.activate(self._active(name, weights))

    @contextmanager
    def using(
        self, name: str | Sequence[str] | None, weights: Sequence[float] | None = None
    ) -> Iterator[None]:
        """`use` within a block and for this thread alone; afterwards what acted before acts
        again."""
        with self._pool.holding(self._active(name, weights)):
            yield

    def pin(self, *names: str) -> None:
        """Keep these loaded whatever the budget, loading them from the library where they are
        not."""
        self._pool.ready(names)
        self._pool.pin(names, pinned=True)

    def unpin(self, *names: str) -> None:
        self._pool.pin(names, pinned=False)

    def _active(self, name: str | Sequence[str] | None, weights: Sequence[float] | None) -> Active:
        names = (
            []
            if name is None
            else [name]
            if not isinstance(name, Iterable) or isinstance(name, str)
            else [*name]
        )
        for each in names:
            if not isinstance(each, str):
                raise _no_name(each)
        if names:
            self._unmerged()
        if weights is not None and (isinstance(weights, str) or not isinstance(weights, Iterable)):
            raise ConfigError(
                f"weights is {weights!r}, and takes one for each adapter",
                next_step="For instance [0.5].",
            )
        weights = None if weights is None else [*weights]
        check_weights(weights or ())
        if weights is not None and len(weights) != len(names):
            raise ConfigError(
                f"{len(names)} adapters and {len(weights)} weights: give one weight for each"
            )
        return tuple(zip(names, weights or [1.0] * len(names), strict=True))

    def _unmerged(self) -> None:
        """ConfigError while an adapter is merged: what is put beside the base then would take its
        weights for the base's."""
        if self._merged is not None:
            raise ConfigError(
                "an adapter is merged into the base's weights", next_step="Call unmerge() first."
            )

    def merge(self, name: str | Sequence[str], weights: Sequence[float] | None = None) -> None:
        """Fold adapters into the weights, for inference without their cost; the originals are kept
        for unmerge().

        Until then no adapter acts beside the base. RefusedError over quantised weights, ConfigError
        while the base is in use: everything is as it was then, and what acted acts.
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
        """Put the base's own weights back: the same tensors, so every bit. Nothing happens where
        none is merged."""
        if self._merged is not None:
            with self.routing.lock:
                self._idle("unmerge")
                self._merged.restore()
                self._merged = None

    @overload
    def generate(  # type: ignore[overload-overlap]  # str is a sequence of str
        self,
        prompt: str | Sequence[Mapping[str, Any]],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        system: str | None = None,
        variables: Mapping[str, Any] | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> Answer: ...

    @overload
    def generate(
        self,
        prompt: Sequence[str] | Sequence[Sequence[Mapping[str, Any]]],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        system: str | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> list[Answer]: ...

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        system: str | None = None,
        variables: Mapping[str, Any] | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> Answer | list[Answer]:
        """The answer to a user's sentence or to chat messages; of a list of them the answers,
        computed together.

        on_text gets the text of a single one as it grows, piece by piece. It is asked as what acts
        was trained: with the system turn of all its rows, unless the messages have one, and what
        their template was told. system and variables say otherwise; "" is no system turn, None no
        variable.
        """
        _check_asked(temperature=temperature, top_p=top_p, seed=seed, max_new_tokens=max_new_tokens)
        if system is not None and not isinstance(system, str):
            raise ConfigError(
                f"system is {_kind(system)}, not text",
                next_step='Give a text; "" is no system turn.',
            )
        if variables is not None and not isinstance(variables, Mapping):
            raise ConfigError(
                f"variables is {_kind(variables)}, not a dict",
                next_step="Give them as {name: value}.",
            )
        asked_for: Any = prompt if isinstance(prompt, str) else _listed(prompt)
        several = not isinstance(prompt, str) and not any(
            isinstance(each, Mapping) for each in asked_for
        )
        prompts: Sequence[Any] = asked_for if several else [asked_for]
        if several and on_text is not None:
            raise ConfigError(
                "on_text is given, and several prompts",
                next_step="Ask one at a time to read along.",
            )

        def say(text: str) -> None:
            if on_text is not None and text:
                on_text(text)

        with self.routing.held():  # a switch by another thread is for its next answer
            tokenizer = self.acting_tokenizer
            stream = TextStream(tokenizer)
            asked = self.preamble.asked(system, variables)
            ids = [self._prompt_ids(each, asked) for each in prompts]
            found = generate(
                self,
                ids,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                on_token=None if on_text is None else lambda token: say(stream.push(token)),
            )
            most = limits_of(self, ids, max_new_tokens)
        say(stream.end())
        answers = [
            Answer(text_of(tokenizer, each), cut_after=limit if len(each) >= limit else None)
            for each, limit in zip(found, most, strict=True)
        ]
        return answers if several else answers[0]

    def _prompt_ids(self, prompt: Prompt, preamble: Preamble) -> list[int]:
        if not all(is_text(inner) for inner, _ in walk(prompt) if isinstance(inner, str)):
            raise ConfigError("the prompt is not UTF-8", next_step="Give it as UTF-8 text.")
        messages = prompt if isinstance(prompt, str) else _conversation(prompt)
        if self.tokenizer.chat_template is None:
            if not isinstance(prompt, str):
                raise ConfigError("this base has no chat template: give the prompt as a string")
            if preamble:
                raise ConfigError(
                    "this base has no chat template: it takes neither a system turn nor variables"
                )
            return list(self.acting_tokenizer(prompt)["input_ids"])
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        template = ChatTemplate(self.acting_tokenizer, variables=preamble.variables)
        return template.encode_prompt(preamble.opening(messages))


def _conversation(prompt: Any) -> list[dict[str, Any]]:
    """Messages as those of a row are read. ConfigError: it is no conversation."""
    messages = _listed(prompt)
    if odd := [each for each in messages if not isinstance(each, Mapping)]:
        raise _no_prompt(odd[0])
    try:
        return to_conversation([dict(message) for message in messages], None)[0]
    except RowFault as fault:
        raise ConfigError(
            "the messages are no conversation", [fault.message], fault.next_step
        ) from None


def _listed(prompt: Any) -> list[Any]:
    if isinstance(prompt, bytes | Mapping) or not isinstance(prompt, Iterable):
        raise _no_prompt(prompt)
    return [*prompt]


def _no_prompt(found: object) -> ConfigError:
    step = (
        "Give a text, or a list of messages: [{'role': 'user', 'content': '…'}]; several as a list"
        " of such."
    )
    return ConfigError(f"a prompt is {_kind(found)}, and no text or conversation", next_step=step)


def _check_asked(**numbers: object) -> None:
    if missing := [name for name, value in numbers.items() if value is None]:
        raise ConfigError(
            f"{', '.join(missing)} is None, not a number", next_step="Leave it out for the default."
        )


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not name:
        raise _no_name(name)


def _no_name(name: object) -> ConfigError:
    step = (
        f"Give its name: {name.name!r}."
        if isinstance(name, Attachment)
        else "For instance 'tickets'."
    )
    return ConfigError(f"an adapter is named by text, and this is {_kind(name)}", next_step=step)


def _kind(value: object) -> str:
    if value is None or value == "":
        return "None" if value is None else "empty"
    return (
        f"the class {value.__name__}"
        if isinstance(value, type)
        else f"of type {type(value).__name__}"
    )
