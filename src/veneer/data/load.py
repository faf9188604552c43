"""Loads a run's data: read, split, tokenise, apply the length limit, check.

`load_data` refuses data that must not be trained on. `examine_data` does the same work and only
reports, for `veneer data check`. Knows nothing of runs or batches.
"""

import gc
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from itertools import chain
from typing import Any

import numpy as np

from veneer.adapters.labels import HeadSettings
from veneer.adapters.preamble import NONE, Preamble
from veneer.bounds import SET_WEIGHT
from veneer.data.activation import activation_problems, text_ids
from veneer.data.checks.check import CheckReport, Findings, check, refuse, unknown_tokens
from veneer.data.checks.closer import look_closer
from veneer.data.checks.tally import Tally
from veneer.data.collector import ExampleCollector, SetSize
from veneer.data.config import DataConfig
from veneer.data.encoder import RowRules, SetEncoder
from veneer.data.examples import Example, Problem, Row, grouped
from veneer.data.files.labels import label_problems, with_labels
from veneer.data.mismatched import add_mismatched
from veneer.data.mixture import Mixture, mix_sets
from veneer.data.split import Split
from veneer.data.template.template import ChatTemplate
from veneer.errors import ConfigError


@dataclass(frozen=True)
class DataSet:
    """The training and validation data of a run.

    `train_rows` and `validation_rows` are the rows of the examples, in the same order; each ends
    where its example ends.

    fingerprint   hash of ids, masks and mixture: equal only if a run would see the same tokens
    preamble      the system turn that all training rows begin with, and the template's variables
    mixture       how many rows of each set an epoch uses; None: every row once
    sets, held    the sets that train and validation consist of, one after the other
    in_files      a line for the screen if the tokens are in files; then only a few rows are held
    head          settings of the score head that learns the rows' labels; None without labels
    """

    train: Sequence[Example]
    validation: Sequence[Example]
    train_rows: list[Row]
    validation_rows: list[Row]
    report: CheckReport
    fingerprint: str
    preamble: Preamble = NONE
    mixture: Mixture | None = None
    sets: Sequence[SetSize] = ()
    held: Sequence[SetSize] = ()
    in_files: str | None = None
    head: HeadSettings | None = None


def load_data(
    data: DataConfig,
    rules: RowRules,
    tokenizer: Any,
    *,
    today: date | None = None,
    purpose: str = "trained on",
    resumes: bool = False,
) -> DataSet:
    """Loads the examples of a run. Raises DataError with everything that prevents it from starting.

    today    the date that chat templates may write: the same date gives the same tokens
    purpose  what the rows are used for, as errors name it
    resumes  the run has started with these rows before
    """
    data_set = examine_data(data, rules, tokenizer, today=today)
    refuse(data_set.report, data.called, purpose, resumes=resumes)
    return data_set


def examine_data(
    data: DataConfig, rules: RowRules, tokenizer: Any, *, today: date | None = None
) -> DataSet:
    """Loads data like load_data, but reports faults and keeps the remaining rows.

    Raises DataError only if nothing can be checked: a set is not found, or the tokenizer is
    unusable.
    """
    template = ChatTemplate(tokenizer, today=today, variables=rules.preamble.variables)
    training, validation = (ExampleCollector(Tally(frozenset(template.stop_ids))) for _ in range(2))
    return read_data(data, rules, template, training, validation)


def examine_closely(data: DataConfig, rules: RowRules, tokenizer: Any) -> DataSet:
    """Examines rows, and reports near-duplicates and personal data too.

    Raises what examine_data raises.
    """
    data_set = examine_data(data, rules, tokenizer)
    kept, held_out = (
        [row for row, example in zip(rows, examples, strict=True) if example.kind != "rejected"]
        for rows, examples in (
            (data_set.train_rows, data_set.train),
            (data_set.validation_rows, data_set.validation),
        )
    )
    data_set.report.problems.extend(grouped(look_closer(data.called, kept, held_out)))
    return data_set


def read_data(
    data: DataConfig,
    rules: RowRules,
    template: ChatTemplate,
    training: ExampleCollector,
    validation: ExampleCollector,
    *,
    say: Callable[[int], None] = lambda rows: None,
) -> DataSet:
    """Reads the rows of all sets into training and validation examples.

    say: called with the number of rows read so far. A set from which rows are held out is read
    twice, because the choice depends on all of its prompts.
    """
    capacity, length, head = rules.capacity, rules.longest, rules.head
    findings, total, split = Findings(), 0, Split()
    encoder = SetEncoder(data, template, rules, findings)
    if head is not None:
        head = with_labels(head, encoder.training_rows())
        encoder = replace(encoder, rules=replace(rules, head=head))
        findings.problems += label_problems(head, data.called)
    with _manual_collection() as collect:
        for data_set in data.train_sets:
            read = out = 0
            is_held_out = encoder.choose_held_out(data_set, split)
            for rows in encoder.scan(data_set):
                read += len(rows)
                held_out = [row for row in rows if is_held_out(row)]
                out += len(held_out)
                encoder.encode(held_out, validation)
                kept = [row for row in rows if not is_held_out(row)] if held_out else rows
                encoder.encode(kept, training)
                say(total + read)
                collect()
            total += read
            if not data.validation_sets:
                _report_share(data_set.path, out, read, data.validation_share, findings)
                validation.end_set(data_set.called)
            training.end_set(data_set.called)
        for data_set in data.validation_sets:
            for rows in encoder.scan(data_set):
                encoder.encode(rows, validation)
                collect()
            validation.end_set(data_set.called)
    if template.writes_date and training.chats:
        message = f"the chat template writes the date: rows are tokenised as on {template.today}"
        findings.problems.append(Problem("D213", data.called, message, fatal=False))
    if rules.kind == "ratings":
        findings.problems += add_mismatched(training, length, spare=training.close())
        findings.problems += add_mismatched(validation, length, spare=training.close())
    train_examples, validation_examples = training.close(), validation.close()
    if (
        capacity.tokens is not None
        and max(training.tally.largest_id, validation.tally.largest_id) >= capacity.tokens
    ):
        findings.problems += unknown_tokens(
            chain(train_examples, validation_examples), capacity, template.tokenizer
        )
    report = check(
        data.called,
        training.tally,
        validation.tally,
        findings=findings,
        length=length,
        by_model=length < rules.length,
        long_rows=data.long_rows,
        stop_tokens=[template.tokenizer.decode([number]) for number in template.stop_ids],
    )
    mixture = _mixture_of_sets(data, training.sets)
    return DataSet(
        train_examples,
        validation_examples,
        training.rows,
        validation.rows,
        report,
        _fingerprint(train_examples, validation_examples, mixture=mixture),
        Preamble(training.common_system, template.variables),
        mixture,
        training.sets,
        validation.sets,
        head=head,
    )


def _mixture_of_sets(data: DataConfig, set_sizes: Sequence[SetSize]) -> Mixture | None:
    """Mixes the training sets. Returns None if an epoch uses every row once.

    Raises ConfigError for a share that a set is too small for, and if an epoch may have no row.
    """
    sets = data.train_sets
    sizes, tokens = [s.rows for s in set_sizes], [s.tokens for s in set_sizes]
    mixture = mix_sets(
        sizes, tokens, [s.weight for s in sets], [s.share for s in sets], by=data.shares_of
    )
    for data_set, set_size, draw in zip(sets, set_sizes, mixture.draws, strict=True):
        if draw > SET_WEIGHT.most * set_size.rows:
            raise ConfigError(
                f"an epoch would take each of the {set_size.rows:,} rows of {data_set.called}"
                f" {draw / set_size.rows:,.0f} times",
                [f"share {data_set.share} of an epoch; {SET_WEIGHT.most:,} times at most"],
                "Give it a smaller share, or more rows.",
            )
    if any(sizes) and max(mixture.draws) < 1:
        raise ConfigError(
            "an epoch would take less than one row of each set",
            [
                f"{data_set.called}: {draw:.2g} of {size:,} rows"
                for data_set, size, draw in zip(sets, sizes, mixture.draws, strict=True)
            ],
            "Give larger weights.",
        )
    return None if mixture.is_plain else mixture


def _report_share(file: str, held_out: int, total: int, share: float, findings: Findings) -> None:
    """Reports that many more rows are held out than requested."""
    if held_out > 2 * share * total + 10:
        message = (
            f"{held_out:,} of {total:,} rows are held out, where {share:.1%} was asked for: "
            "rows that answer the same prompt stay together"
        )
        findings.problems.append(Problem("D216", file, message, fatal=False))


@contextmanager
def _manual_collection() -> Iterator[Callable[[], int]]:
    """Runs Python's garbage collector only on request within the block, and only on new objects.

    A row makes hundreds of objects, which live until its chunk of rows is done. The automatic
    collector would visit them again and again, with everything else in the process: a third of the
    time.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield lambda: gc.collect(1)
    finally:
        if was_on:
            gc.enable()


def _fingerprint(*parts: Sequence[Example], mixture: Mixture | None) -> str:
    """Hashes ids and masks in order, and the mixture (BLAKE2b, hexadecimal)."""
    digest = hashlib.blake2b(digest_size=16)
    if mixture is not None:
        digest.update(repr(mixture).encode())
    for examples in parts:
        digest.update(len(examples).to_bytes(8, "little"))
        for example in examples:
            digest.update(len(example.ids).to_bytes(8, "little"))
            digest.update(np.ascontiguousarray(example.ids, dtype="<i4").tobytes())
            digest.update(np.packbits(example.trained).tobytes())
            if example.kind != "answer":
                digest.update(example.kind.encode())
            if example.label:
                digest.update(np.array(example.label, dtype="<f8").tobytes())
    return digest.hexdigest()


def checked_for(data: DataSet, activation: str, tokenizer: Any) -> DataSet:
    """Returns the rows with the problems of an activation in their report."""
    examples = chain(data.train, data.validation)
    problems = activation_problems(examples, text_ids(activation, tokenizer))
    report = replace(data.report, problems=grouped([*data.report.problems, *problems]))
    return replace(data, report=report)
