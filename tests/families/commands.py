"""The comparisons of the table of families (tests/families/__main__.py) that go the way of a user:
`veneer train`, `generate`, `merge` and `export` on a base in a folder, and what PEFT, transformers
and gguf make of the files."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import nn

from tests.families.compare import (
    NotInPeft,
    Trial,
    apart,
    depends_on_later_tokens,
    explained,
    greedy_by_rereading,
    greedy_by_transformers,
    logits_alone,
    logits_apart,
    losses_apart,
    nats,
    trained_tokens,
)
from tests.families.page import LOSS, TRAINED
from veneer import api
from veneer.cli.main import main
from veneer.data.examples import Example
from veneer.data.template.template import ChatTemplate
from veneer.decoding.text import text_of
from veneer.errors import RefusedError
from veneer.merge.gguf.names import names_of
from veneer.training.config import RunConfig

STEPS, RATE, WEIGHT = 3, 1e-4, 0.5
QUESTION = "what now?"
CONVERSATIONS = (
    ("say it", "this is it"),
    ("say it", "and that"),
    ("say it all", "all the rest of it"),
    ("ask", "me"),
    ("another thing", "yes, and no: nothing else"),
    ("x", "y z"),
)
"""(what is asked, what is answered): rows that share a prompt beside rows that do not, around
window and switch."""


class CommandFailed(Exception):
    """The command line ended with another exit code than 0; its message."""


def command(*arguments: object) -> str:
    """What `veneer ARGUMENTS` prints on stdout. Raises CommandFailed."""
    said, talk = io.StringIO(), io.StringIO()
    with redirect_stdout(said), redirect_stderr(talk):
        code = main([str(argument) for argument in arguments])
    if code == RefusedError.exit_code:
        _, _, faults = talk.getvalue().partition(":\n")
        raise RefusedError(f"veneer {arguments[0]}", [faults.strip().split("\n")[0]])
    if code:
        lines = [line for line in talk.getvalue().splitlines() if line.strip()]
        raise CommandFailed(
            f"veneer {arguments[0]} ended with {code}: " + " / ".join(lines[-3:])[:300]
        )
    return said.getvalue()


def run(trial: Trial) -> float:
    """Three steps of `veneer train --from a`: every loss, and what the last file computes, against
    torch's AdamW on a in PEFT, or through the model's own forward where PEFT does not read the
    file.

    Raises NotInPeft if they differ and transformers' logits of a text depend on the tokens after
    it: the rows of our batch are padded, those of the reference are not.
    """
    reference, trained = _trainable(trial)
    start = [value.detach().clone() for value in trained]
    expected = _trained_by_torch(reference, trained, _rows(trial))
    losses = _train(trial, "run", [("a", 1.0)], steps=STEPS)
    worst = max(abs(ours / theirs - 1) for ours, theirs in zip(losses, expected, strict=True))
    result = trial.beside("run/adapter")
    with torch.no_grad():
        texts = [example.ids for example in trial.examples[:2]]
        worst = max(
            worst,
            *(
                apart(logits_alone(result.model, ids), logits_alone(reference, ids))
                for ids in texts
            ),
        )
    if worst > TRAINED and depends_on_later_tokens(reference, _rows(trial)):
        raise NotInPeft("its logits of a text depend on the tokens after the text")
    after = [logits_alone(reference, ids).detach() for ids in texts]

    def moved() -> float:
        """How far the reference's logits end from where they ended before."""
        for value, first in zip(trained, start, strict=True):
            value.data = first.clone()
        with torch.enable_grad():
            _trained_by_torch(reference, trained, _rows(trial))
        return max(
            apart(logits_alone(reference, ids), end) for ids, end in zip(texts, after, strict=True)
        )

    return explained(worst, TRAINED, reference, moved, times=1)


def goes_on(trial: Trial) -> float:
    """The first loss of a run from the sum run + 0.5 b, against transformers' model with PEFT's own
    merges of the files in its weights; where PEFT does not read them, against the sum beside the
    model's own forward."""
    parents = [("run", 1.0), ("b", WEIGHT)]
    try:
        summed = _with_updates(trial, parents)
    except NotInPeft:
        summed = _acting(trial, parents)
    [found] = _train(trial, "next", parents, steps=1)
    return losses_apart(found, summed, _rows(trial), LOSS)


def generated(trial: Trial, twin: Any) -> float:
    """`veneer generate` against transformers' loop with the file in PEFT: 1 if the texts differ."""
    said = command(
        "generate",
        "--adapter",
        trial.place / trial.final,
        "--max-new-tokens",
        10,
        "--json",
        QUESTION,
    )
    tokenizer = trial.base.tokenizer
    stops = trial.base.model.generation_config.eos_token_id
    prompt = ChatTemplate(tokenizer).encode_prompt([{"role": "user", "content": QUESTION}])
    text = json.loads(said[said.index("{") :])["answer"]  # Reformer prints lines of its own
    trouble = "answers otherwise"
    try:
        if text == text_of(tokenizer, greedy_by_transformers(twin, prompt, stops)):
            return 0.0
    except Exception as fault:
        trouble = f"stops ({type(fault).__name__})"
    if text == text_of(tokenizer, greedy_by_rereading(twin, prompt, stops)):
        raise NotInPeft(f"as without a cache; with one transformers' own loop {trouble}")
    return 1.0


def merged(trial: Trial, twin: Any) -> float:
    """The folder of `veneer merge` as transformers loads it: the logits of the file in PEFT."""
    command(
        "merge", "--adapter", trial.place / trial.final, "--out", trial.place / "merged", "--json"
    )
    plain = trial.theirs("merged")
    with torch.no_grad():
        return max(logits_apart(plain, twin, example.ids) for example in trial.examples[:2])


def in_gguf(trial: Trial) -> float | None:
    """The f16 file of `veneer export --merged` against the folder of `veneer merge`, its matrices
    rounded to f16: the values as `gguf` reads them, the logits as `veneer.load` does, llama.cpp's
    answers where that is installed.

    None: no such file is written of this family.
    """
    try:
        names = names_of(trial.base.config)
    except RefusedError:
        return None
    path = trial.place / "model.gguf"
    command("export", trial.place / trial.final, "--to", "llamacpp", "--merged", "--out", path)
    stored = {
        tensor.name: np.float32(np.sort(tensor.data, axis=None))
        for tensor in gguf.GGUFReader(path).tensors
    }
    model = trial.theirs("merged")
    towers = tuple(f"{path}." for path in trial.base.paths.left_out)
    for name, weight in model.named_parameters():
        if name.startswith(towers):
            continue
        weight.data = weight.data.half().float() if weight.dim() > 1 else weight.data
        expected = np.sort(
            weight.detach().numpy(), axis=None
        )  # rows of q and k stand in another order
        found = stored.get(names.of(name) or "")
        shifts = (0, 1)  # of Gemma's norms
        if found is None or not any(
            np.allclose(found - shift, expected, rtol=0, atol=1e-6) for shift in shifts
        ):
            raise ValueError(f"{name} is not in the file, or with other values")
    again = api.load(path, dtype="float32")
    _compare_llama_cpp(again, path)
    with torch.no_grad():
        return max(logits_apart(again.model, model, example.ids) for example in trial.examples[:2])


def _compare_llama_cpp(base: Any, path: Path) -> None:
    """Raises ValueError if llama.cpp's greedy answers differ; does nothing where it is not
    installed."""
    if find_spec("llama_cpp") is None:
        return
    from tests.merge.test_llama_cpp import answers, ours

    prompts = [[5, 80, 97, 7], [20, 31, 31, 80, 12, 77, 14], list(range(10, 40))]
    if answers(path, prompts=prompts) != ours(base, prompts=prompts):
        raise ValueError("llama.cpp answers otherwise")


def _train(trial: Trial, out: str, parents: list[tuple[str, float]], *, steps: int) -> list[float]:
    """The losses that `veneer train` writes down, step by step, from one adapter or a sum of
    several."""
    starts = [{"adapter": str(trial.place / name), "weight": weight} for name, weight in parents]
    settings = {"schedule": "constant", "warmup": 0, "clip": "null", "data.validation_share": 0}
    flags = [flag for name, value in settings.items() for flag in ("--set", f"{name}={value}")]
    files = ("--base", trial.folder, "--data", _written_rows(trial), "--out", trial.place / out)
    numbers = ("--steps", steps, "--batch", len(CONVERSATIONS), "--learning-rate", RATE)
    command("train", *files, "--from", json.dumps(starts), *numbers, *flags)
    lines = (trial.place / out / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [record["loss"] for record in records if record["kind"] == "step"]


def _rows(trial: Trial) -> Sequence[Example]:
    """The conversations as a run reads them: which of their tokens train is not what is compared
    here."""
    settings = {"train": str(_written_rows(trial)), "validation_share": 0.0}
    config = RunConfig.model_validate(
        {"base": str(trial.folder), "data": settings, "out": "unused"}
    )
    return api.run_rows(config).train


def _written_rows(trial: Trial) -> Path:
    path = trial.place / "rows.jsonl"
    rows = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for question, answer in CONVERSATIONS
    ]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in rows))
    return path


def _trainable(trial: Trial) -> tuple[Any, list[nn.Parameter]]:
    """A model with adapter a, and the parameters of a."""
    try:
        model = trial.in_peft("a", trains=True)
        return model, [parameter for parameter in model.parameters() if parameter.requires_grad]
    except NotInPeft:
        other = api.load(trial.folder)  # another one: its adapter is about to move
        other.use(other.load_adapter(trial.place / "a", name="x"))
        trained = list(other.attachments["x"].parameters().values())
        for parameter in trained:
            parameter.requires_grad_(True)
        return other.model, trained


def _trained_by_torch(
    model: Any, trained: list[nn.Parameter], rows: Sequence[Example]
) -> list[float]:
    """Losses of STEPS steps of AdamW over all rows; `trained` move."""
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = nats(model, rows) / trained_tokens(rows)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _with_updates(trial: Trial, parents: list[tuple[str, float]]) -> Any:
    """transformers' model with PEFT's merge of every adapter's file added to its weights.

    Raises NotInPeft if one changed tensor stands in several layers: PEFT adds the updates of all
    of them to it.
    """
    model, base = trial.theirs(), trial.theirs().state_dict()
    weights = model.state_dict()
    for name, weight in parents:
        folder = f"{name}/adapter" if name == "run" else name
        with_adapter = trial.in_peft(folder).merge_and_unload().state_dict()
        changed = [
            key
            for key, value in weights.items()
            if value.is_floating_point() and not torch.equal(with_adapter[key], base[key])
        ]
        if len({weights[key].data_ptr() for key in changed}) < len(changed):
            raise NotInPeft("it adds the updates of several layers to the weight they share")
        for key in changed:
            weights[key] += weight * (with_adapter[key] - base[key])
    return model


def _acting(trial: Trial, parents: list[tuple[str, float]]) -> Any:
    """The model of a base on which these adapters act together."""
    base = api.load(trial.folder)
    names = [base.load_adapter(trial.place / name, name=name) for name, _ in parents]
    base.use(names, [weight for _, weight in parents])
    return base.model
