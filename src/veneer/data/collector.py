"""Collects the examples of a run, set by set, and what all of them have in common."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from veneer.data.batching import RowSpans
from veneer.data.checks.tally import Tally
from veneer.data.examples import Example, Problem, Row


@dataclass(frozen=True)
class SetSize:
    """Number of rows, examples and tokens that one set contributes to a run."""

    name: str
    rows: int
    examples: int
    tokens: int


@dataclass
class ExampleCollector:
    """Collects rows and their examples, in the same order; each row ends where its example ends."""

    tally: Tally
    rows: list[Row] = field(default_factory=list)
    sets: list[SetSize] = field(default_factory=list)
    chats: bool = False
    """Whether any row has messages, which a template renders."""
    _examples: list[Example] = field(default_factory=list)
    _systems: set[str | None] = field(default_factory=set)
    _counted: tuple[int, int, int] = (0, 0, 0)
    _tokens: int = 0
    _num_examples: int = 0

    def add(
        self,
        row: Row,
        parts: Sequence[tuple[Row, Example]],
        teacher: Sequence[tuple[Row, Example]] = (),
    ) -> None:
        """Adds a row's examples, each with the part of the row that it covers.

        teacher: examples that a teacher reads. They stand behind the row's own; the tally and the
        tokens leave them out
        """
        self.tally.add(row, [example for _, example in parts])
        self._tokens += sum(len(example.ids) for _, example in parts)
        if row.messages and len(self._systems) < 2:
            self._systems |= {_system_of(part) for part, _ in parts}
        self.chats |= bool(row.messages)
        self._num_examples += len(parts) + len(teacher)
        self.keep([*parts, *teacher])

    def keep(self, parts: Sequence[tuple[Row, Example]]) -> None:
        for row, example in parts:
            self.rows.append(row)
            self._examples.append(example)

    def end_set(self, name: str) -> None:
        """Ends a set: the rows since the last call belong to it."""
        totals = self.tally.rows, self._num_examples, self._tokens
        self.sets.append(
            SetSize(
                name, *(total - before for total, before in zip(totals, self._counted, strict=True))
            )
        )
        self._counted = totals

    def extend_rows(
        self, extra_of: Callable[[Sequence[Example]], Sequence[Example] | None], fault: str
    ) -> list[Problem]:
        """Adds one example to every row, behind its own; numbers the rows.

        extra_of: makes them, from the examples of a set; None is a fault of the set
        """
        problems = []
        rows, examples, sets, start, number = self.rows, self._examples, self.sets, 0, 0
        self.rows, self._examples, self.sets = [], [], []
        for set_size in sets:
            span = slice(start, start + set_size.examples)
            own, own_rows, start = examples[span], rows[span], span.stop
            extra = extra_of(own) if own else []
            if extra is None:
                problems.append(Problem("D117", set_size.name, fault))
                self.sets.append(replace(set_size, rows=0, examples=0, tokens=0))
                continue
            spans = RowSpans.of(own)
            for row, example in enumerate(extra):
                numbers = spans.examples([row])
                for member in [*(own[n] for n in numbers), example]:
                    self._examples.append(replace(member, row=number))
                    self.rows.append(own_rows[numbers[0]])
                number += 1
            more = sum(len(example.ids) for example in extra)
            self.sets.append(
                replace(
                    set_size, examples=set_size.examples + len(extra), tokens=set_size.tokens + more
                )
            )
        return problems

    def close(self) -> Sequence[Example]:
        return self._examples

    @property
    def common_system(self) -> str | None:
        """Returns the system message that all conversations begin with, if there is one."""
        return next(iter(self._systems)) if len(self._systems) == 1 else None


def _system_of(row: Row) -> str | None:
    """Returns the system message that the row begins with."""
    first = row.messages[0] if row.messages else {}
    return first["content"] if first.get("role") == "system" else None
