"""What we write is what our own strict readers take, whatever a model, a row or a user says: or it
is refused first."""

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from veneer.cli.config_file import read_run_config
from veneer.errors import InputError
from veneer.files.strict_json import illegible, json_text, legible, parse_json
from veneer.formats.manifest import BaseIdentity, Manifest, make_readable, read_manifest
from veneer.library.records import ObjectFacts, Record, Version, read_record, write_record
from veneer.training.config import RunConfig
from veneer.training.output.records import Records, read_records
from veneer.training.state.checkpoint import save_checkpoint
from veneer.training.state.folder import resume_config, write_run_file
from veneer.training.state.origin import Origin
from veneer.training.state.progress import RunProgress, load_state

FEW = settings(max_examples=60, deadline=None)
TEXT = st.text(st.characters(exclude_categories=()), max_size=12) | st.sampled_from(
    [
        "\0",
        "\ud800",
        "\udcff",
        "a\r\n\x85\u2028b",
        "\ufeff",
        "\x1b[0m",
        "null",
        "1e999",
        "[" * 40,
        "x" * 50_000,
    ]
)
SCALAR = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | TEXT
JSON = st.recursive(
    SCALAR, lambda v: st.lists(v, max_size=3) | st.dictionaries(TEXT, v, max_size=3), max_leaves=8
)
RECORD = st.dictionaries(TEXT, JSON, max_size=5)


@FEW
@given(RECORD)
def test_json(value):
    text = json_text(value)
    assert parse_json(text.encode(), Path("f"), max_bytes=10**7) == legible(value)
    assert not illegible(legible(value))


@FEW
@given(RECORD)
def test_a_runs_records(value):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "metrics.jsonl"
        with Records(file) as records:
            records.write({**value, "kind": "evaluation", "step": 1})
            records.write({"kind": "end"})
        first, _ = read_records(file)
        assert first == legible({**value, "kind": "evaluation", "step": 1})


@FEW
@given(TEXT, st.floats(), st.dictionaries(TEXT, st.floats(), max_size=3), RECORD)
def test_a_checkpoints_state(text, number, losses, recipe):
    progress = RunProgress(step=3, best_loss=number, losses=losses, sample={"before": text})
    origin = Origin("2026-01-31", {"dtype": text}, text, None, recipe)
    with tempfile.TemporaryDirectory() as folder:
        state = {"origin": origin.to_dict(), "progress": vars(progress)}
        path = save_checkpoint(Path(folder), 3, {"values": torch.zeros(2)}, state)
        found = load_state(path)
    assert found.progress.sample == {"before": legible(text)}
    assert found.progress.losses == legible(losses) and found.origin.settings == legible(recipe)


@FEW
@given(
    TEXT,
    TEXT,
    st.lists(TEXT, max_size=2),
    st.dictionaries(TEXT, st.integers(1, 9), max_size=2),
    st.floats(),
)
def test_a_run_file_and_the_manifest_that_holds_it(data, out, targets, ranks, clip):
    fields = {"base": "b", "data": {"train": data}, "out": "o", "clip": clip}
    try:
        config = RunConfig.model_validate(
            {
                **fields,
                "method": {
                    "name": "lora",
                    "targets": targets or "all-linear",
                    "rank_pattern": ranks,
                },
            }
        )
    except ValidationError:
        return
    with tempfile.TemporaryDirectory() as folder:
        here = config.model_copy(update={"out": folder})
        write_run_file(here)
        assert resume_config(folder) == here
        assert read_run_config(Path(folder) / "run.yaml", {}) == here
        manifest = make_readable(
            lambda: Manifest(
                veneer_version="1",
                method="lora",
                base=BaseIdentity(name=data, fingerprint={}),
                recipe=here.model_dump(mode="json"),
                metrics={"validation_loss": 1.0},
            )
        )
        (Path(folder) / "veneer.json").write_text(manifest.to_json())
        assert read_manifest(Path(folder) / "veneer.json") == manifest


@FEW
@given(
    TEXT,
    st.lists(TEXT, max_size=2),
    st.dictionaries(TEXT, st.floats(allow_nan=False, allow_infinity=False)),
)
def test_a_librarys_records_or_they_are_refused(note, tags, metrics):
    facts = ObjectFacts(
        method="lora", bytes=1, tensors=1, parameters=1, content_hash="0" * 64, metrics=metrics
    )
    version = Version(
        version=1, object="0" * 64, added="2026-01-31T12:00:00Z", tags=tags, note=note, facts=facts
    )
    record = Record(next_version=2, versions=[version])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "x.json"
        if illegible(record.model_dump(mode="json")):
            with pytest.raises(InputError):
                write_record(file, record)
            assert not file.exists()
        else:
            write_record(file, record)
            # pydantic writes half a surrogate pair in a key as U+FFFD by itself
            assert read_record(file) == Record.model_validate(record.model_dump(mode="json"))
