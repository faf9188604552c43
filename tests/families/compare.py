"""The comparisons of the table of families (tests/families/__main__.py) that look into a forward:
losses, gradients, logits, answers of a base that `veneer.load` read from a folder, beside
transformers and PEFT on the same folder."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, GenerationConfig

from tests.families.models import IDS, save_family
from tests.families.page import GRADIENT, LOGITS, LOSS
from tests.support.helpers import fill, make_examples
from tests.support.models.loaded import differences
from tests.support.models.routed import acting_on, batch_loss
from veneer import api
from veneer.adapters.attach import attach
from veneer.adapters.config import LoRA
from veneer.adapters.placement.attachment import Attachment
from veneer.adapters.placement.reads import refused_by_peft
from veneer.base import Base
from veneer.bases.config.model_class import auto_class
from veneer.bases.quiet_transformers import quiet
from veneer.data.batching import make_groups
from veneer.data.examples import Example
from veneer.decoding.generate import generate
from veneer.errors import RefusedError
from veneer.execution.switches import forget_lengths
from veneer.formats.adapter import manifest_for, write_adapter
from veneer.models.starts.initial_values import begin
from veneer.models.step import batch_of, parts_of

ADAPTERS = {"a": LoRA(rank=3, alpha=5), "b": LoRA(rank=2, alpha=3, rslora=True)}
PROMPT_LENGTHS = (27, 4, 19, 38)
NEW_TOKENS = 10
FORWARD_ERROR = 2.0**-19
"""Relative, of what a small model in float32 gives when its sums are in another order: 1e-6 to 5e-6
is measured."""


class NotInPeft(Exception):
    """PEFT or transformers itself does not do this."""


def apart(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected value; infinite where it is not a
    number."""
    if found.shape != expected.shape:
        return float("inf")
    value = ((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12)).item()
    return value if value == value else float("inf")


def logits_apart(ours: Any, theirs: Any, ids: np.ndarray) -> float:
    """0 where they differ by what rounding explains: a model that repeats its layers many times
    amplifies it."""
    expected = logits_alone(theirs, ids)
    difference = apart(logits_alone(ours, ids), expected)
    return explained(difference, LOGITS, theirs, lambda: apart(logits_alone(theirs, ids), expected))


def explained(
    difference: float, limit: float, theirs: Any, moved: Callable[[], float], *, times: int = 5
) -> float:
    """The difference, or 0 where it is beyond the limit and rounding explains it.

    moved: how far the reference itself moves; called `times` times while its embeddings move by
    the error of a float32 forward. A router near a tie then chooses other experts.
    """
    if difference <= limit:
        return difference
    generator = torch.Generator().manual_seed(3)

    def nudge(_module: Any, _ids: Any, rows: Tensor) -> Tensor:
        return rows * (1 + FORWARD_ERROR * torch.randn(rows.shape, generator=generator))

    handle = theirs.get_input_embeddings().register_forward_hook(nudge)
    with torch.no_grad():
        farthest = max(moved() for _ in range(times))
    handle.remove()
    return difference if difference > 10 * farthest else 0.0


def logits_alone(model: Any, ids: np.ndarray) -> Tensor:
    """(T, V) of one text through the model's own forward."""
    forget_lengths(model)
    return model(input_ids=torch.from_numpy(ids.astype(np.int64))[None], use_cache=False).logits[0]


@torch.no_grad()
def depends_on_later_tokens(model: Any, examples: Sequence[Example]) -> bool:
    """Whether the logits of any of these texts change if tokens follow the text."""
    longer = ((example.ids, np.append(example.ids, example.ids[:5])) for example in examples)
    return any(
        apart(logits_alone(model, more)[: len(ids)], logits_alone(model, ids)) > LOGITS
        for ids, more in longer
    )


def nats(model: Any, examples: Sequence[Example]) -> Tensor:
    """Cross-entropy of the trained tokens of every row alone, summed. Tokens that no loss depends
    on are left out."""
    total = torch.zeros(())
    for example in examples:
        rows = np.flatnonzero(example.trained)
        logits = logits_alone(model, example.ids[: rows[-1]])
        targets = torch.from_numpy(example.ids[rows].astype(np.int64))
        total = total + F.cross_entropy(logits[rows - 1], targets, reduction="sum")
    return total


def trained_tokens(examples: Sequence[Example]) -> float:
    return float(sum(example.trained.sum() for example in examples))


def scale_of(parameter: Tensor) -> float:
    return 0.3 * max(1, parameter.shape[-1]) ** -0.5


@dataclass
class Trial:
    """A family in a folder: our base loaded from it, and the files of two adapters with random
    values.

    place       everything of it lies here;  base   as `veneer.load` gives it
    final       the adapter that is merged and exported: a, or the run's once there is one
    untrained   the error that says why it cannot be trained; None: it can
    """

    name: str
    place: Path
    final: str = "a"
    untrained: RefusedError | None = None
    base: Base = field(init=False)
    _beside: dict[str, Base] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.base = api.load(save_family(self.name, self.folder))

    @property
    def folder(self) -> Path:
        return self.place / "base"

    @cached_property
    def examples(self) -> list[Example]:
        """Four rows that share a prompt, two that share another, and one alone; around window and
        switch."""
        groups = [
            make_examples(n, vocab=IDS, prompt=5, longest=44, seed=s)
            for s, n in enumerate((4, 2, 1))
        ]
        return [example for group in groups for example in group]

    def theirs(self, folder: str = "base") -> Any:
        """The model as transformers loads it from the base's folder, or from another one."""
        with quiet():
            config = AutoConfig.from_pretrained(self.place / folder)
            return auto_class(config).from_pretrained(self.place / folder, use_kernels=False).eval()

    def attach(self) -> None:
        """Puts both adapters on the base, with values as if they were trained, and writes their
        files."""
        for number, (name, config) in enumerate(ADAPTERS.items()):
            made = self._begun(name, config)
            for parameter in made.parameters().values():
                fill([parameter], seed=parameter.numel() + number, scale=scale_of(parameter))
            with self.base.routing.none():
                manifest = manifest_for(self.base, method="lora")
                write_adapter(self.place / name, made, manifest, model=self.base.model)

    def _begun(self, name: str, config: LoRA) -> Attachment:
        try:
            return begin(self.base, config, name=name).attachment
        except RefusedError as refusal:  # what needs no training is compared all the same
            self.untrained, head = refusal, self.base.model.get_output_embeddings()
            return attach(self.base.model, config, name=name, routing=self.base.routing, head=head)

    def beside(self, adapter: str) -> Base:
        """Another base from the folder, on which one adapter acts: its own forward is compared."""
        if adapter not in self._beside:
            other = self._beside[adapter] = api.load(self.folder)
            other.use(other.load_adapter(self.place / adapter, name="x"))
        return self._beside[adapter]

    def in_peft(self, adapter: str, *, trains: bool = False) -> Any:
        """The adapter's file in PEFT on transformers' model. NotInPeft: it refuses the file, or
        misses tensors of its own files too."""
        import peft

        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                folder = self.place / adapter
                loaded = peft.PeftModel.from_pretrained(
                    self.theirs(), folder, is_trainable=trains
                ).eval()
        except Exception as fault:
            raise NotInPeft(f"{type(fault).__name__}: {fault}") from fault
        lost = [
            str(w.message)
            for w in caught
            if "missing" in str(w.message) or "nexpected" in str(w.message)
        ]
        if lost and self._own_file_is_read():
            raise ValueError(lost[0])
        if lost:
            raise NotInPeft("it misses tensors of its own file of this model too")
        return loaded

    def _own_file_is_read(self) -> bool:
        """Whether PEFT finds all tensors of a file that it wrote itself."""
        import peft

        with (
            tempfile.TemporaryDirectory() as folder,
            warnings.catch_warnings(record=True) as caught,
        ):
            warnings.simplefilter("always")
            self.fresh_in_peft().save_pretrained(folder)
            peft.PeftModel.from_pretrained(self.theirs(), folder)
        return not any("missing" in str(w.message) for w in caught)

    def fresh_in_peft(self) -> Any:
        """PEFT's own all-linear adapter; of Mamba's models, where PEFT refuses that, on all it
        takes."""
        import peft

        model = self.theirs()
        targets: str | list[str] = "all-linear"
        if refused := refused_by_peft(model):
            head = model.get_output_embeddings()
            linear = [
                p
                for p, m in model.named_modules()
                if isinstance(m, torch.nn.Linear) and m is not head
            ]
            targets = sorted({path.rpartition(".")[2] for path in linear if path not in refused})
        config = peft.LoraConfig(r=3, lora_alpha=5, task_type="CAUSAL_LM", target_modules=targets)
        return peft.get_peft_model(model, config).eval()


def loaded(trial: Trial) -> float:
    """Before anything is attached. Raises ValueError with the first attribute that differs."""
    theirs = trial.theirs()
    with torch.no_grad():
        value = logits_apart(trial.base.model, theirs, trial.examples[0].ids)
    if found := differences(trial.base.model, theirs):
        raise ValueError(f"{len(found)} attributes differ: {found[0]}")
    return value


def loss(trial: Trial, reference: Any) -> float:
    """One training step over all rows, adapter a; the gradients stay with the adapter for
    `gradient`."""
    return losses_apart(one_step(trial), reference, trial.examples, LOSS)


def one_step(trial: Trial) -> float:
    """The loss of a step over all rows, forward and backward, adapter a."""
    base, examples = trial.base, trial.examples
    total, value = trained_tokens(examples), torch.zeros(())
    for parameter in base.attachments["a"].parameters().values():
        parameter.requires_grad_(True).grad = None
    base.use("a")
    for part in parts_of(base, examples, [list(range(len(examples)))]):
        batch = batch_of(base, examples, part, share_prompt=True)
        nats_of_part = batch_loss(base, batch, total=total)
        nats_of_part.backward()
        value = value + nats_of_part.detach()
    return value.item()


def losses_apart(found: float, reference: Any, examples: Sequence[Example], limit: float) -> float:
    """A loss of ours against that of the reference, one row at a time; relative."""

    @torch.no_grad()
    def expected() -> float:
        return nats(reference, examples).item() / trained_tokens(examples)

    own = expected()
    difference = abs(found / own - 1)
    return explained(difference, limit, reference, lambda: abs(expected() / own - 1))


def gradient(trial: Trial) -> float:
    """Of adapter a after `loss`, against torch's through the model's own forward, one row at a
    time. Where they differ, both are computed again in float64: in float32 a limit or a router near
    a tie falls to the other side in a batch of other shape."""
    value = _gradient(trial)
    if value > GRADIENT:
        with in_float64(trial):
            one_step(trial)
            value = _gradient(trial)
    return value


def _gradient(trial: Trial) -> float:
    expected = own_gradient(trial, "a", trial.examples, trained_tokens(trial.examples))
    return gradients_apart(trial.base.attachments["a"], expected)


@contextmanager
def in_float64(trial: Trial) -> Iterator[None]:
    """Both bases of the trial and their adapters hold float64 values within the block."""
    bases = [trial.base, *(trial.beside(name) for name in ADAPTERS)]
    values = [
        p
        for base in bases
        for made in base.attachments.values()
        for p in made.parameters().values()
    ]
    for base in bases:
        base.model.double()
    for value in values:
        value.data, value.grad = value.data.double(), None
    try:
        yield
    finally:
        for base in bases:
            base.model.float()
        for value in values:
            value.data, value.grad = value.data.float(), None


def own_gradient(
    trial: Trial, adapter: str, examples: Sequence[Example], total: float
) -> Attachment:
    other = trial.beside(adapter)
    made = other.attachments["x"]
    for parameter in made.parameters().values():
        parameter.requires_grad_(True).grad = None
    (nats(other.model, examples) / total).backward()
    return made


def gradients_apart(ours: Attachment, expected: Attachment) -> float:
    worst, other = 0.0, expected.parameters()
    for key, parameter in ours.parameters().items():
        # None: text alone does not pass here (a vision tower, attention to an encoder)
        pair = [torch.zeros(1) if p.grad is None else p.grad for p in (parameter, other[key])]
        if pair[0].any() or pair[1].any():
            worst = max(worst, apart(*pair))
    return worst


def several(trial: Trial) -> float:
    """One step in which a acts on some rows, b on others and none on the last; losses and all
    gradients. 0 where they differ by what rounding explains."""
    value = _several(trial)
    for name, rows in _rows_of_adapters(trial).items():
        if name is not None and value > GRADIENT:
            moved = partial(_gradient_moves, trial, name, rows)
            value = explained(value, GRADIENT, trial.beside(name).model, moved)
    return value


def _gradient_moves(trial: Trial, name: str, rows: Sequence[Example]) -> float:
    """How far the reference's gradient lies from the one that was computed before."""
    parameters = trial.beside(name).attachments["x"].parameters()
    before = {key: p.grad.clone() for key, p in parameters.items() if p.grad is not None}
    with torch.enable_grad():
        own_gradient(trial, name, rows, trained_tokens(trial.examples))
    return max(apart(parameters[key].grad, grad) for key, grad in before.items() if grad.any())


def _rows_of_adapters(trial: Trial) -> dict[str | None, list[Example]]:
    return {"a": trial.examples[:4], "b": trial.examples[4:6], None: trial.examples[6:]}


def _several(trial: Trial) -> float:
    base, total = trial.base, trained_tokens(trial.examples)
    rows = _rows_of_adapters(trial)
    examples = [(name, example) for name, own in rows.items() for example in own]
    for attachment in base.attachments.values():
        for parameter in attachment.parameters().values():
            parameter.requires_grad_(True).grad = None
    found = 0.0
    for part in base.paths.together([example for _, example in examples], 0):
        chosen = [examples[number] for number in part]
        names = list(dict.fromkeys(name for name, _ in chosen))
        groups = [[example for own, example in chosen if own == name] for name in names]
        batch = make_groups(groups, packed=base.paths.packed, share_prompt=True, device=base.device)
        adapters = [() if name is None else ((base.attachments[name], 1.0),) for name in names]
        with base.routing.held(acting_on(batch, adapters)):
            loss_of_part = batch_loss(base, batch, total=total)
            if loss_of_part.requires_grad:
                loss_of_part.backward()
        found += loss_of_part.item()
    expected, worst = 0.0, 0.0
    for name in ADAPTERS:
        other = trial.beside(name)
        with torch.no_grad():
            expected += nats(other.model, rows[name]).item() / total
        worst = max(
            worst,
            gradients_apart(base.attachments[name], own_gradient(trial, name, rows[name], total)),
        )
    with torch.no_grad():
        expected += nats(trial.theirs(), rows[None]).item() / total
    return max(worst, 10 * abs(found - expected) / expected)  # losses agree ten times as closely


def to_peft(trial: Trial, twin: Any) -> float:
    trial.base.use("a")
    with torch.no_grad():
        return max(
            logits_apart(trial.base.model, twin, example.ids) for example in trial.examples[:2]
        )


def from_peft(trial: Trial) -> float:
    """PEFT's own file here, with values as training could have left them."""
    texts = [example.ids for example in trial.examples[:2]]
    try:
        theirs = trial.fresh_in_peft()
        _move(theirs, texts[0])
        with torch.no_grad():
            logits_alone(theirs, texts[0])
        theirs.save_pretrained(trial.place / "theirs")
    except Exception as fault:
        raise NotInPeft(f"{type(fault).__name__}: {fault}") from fault
    other = trial.beside("theirs")
    with torch.no_grad():
        return max(logits_apart(other.model, theirs, ids) for ids in texts)


def _move(model: Any, ids: np.ndarray) -> None:
    """Random values everywhere but where no gradient comes: the update stays zero there."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with suppress(AssertionError, RuntimeError):  # Reformer gives no gradient outside of train mode
        logits_alone(model, ids).square().sum().backward()
        trained = [parameter for parameter in trained if parameter.grad is not None]
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if any(parameter is moving for moving in trained):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(noise * scale_of(parameter))


def answers(trial: Trial, twin: Any) -> float:
    """The share of greedy answers that differ, four prompts at once against transformers' loop one
    at a time.

    Raises NotInPeft if the answers are those of whole texts, and transformers' loop with a cache
    gives others.
    """
    prompts = [[(7 * i + j * j) % IDS for j in range(n)] for i, n in enumerate(PROMPT_LENGTHS)]
    trial.base.use("a")
    stops = trial.base.model.generation_config.eos_token_id
    found = generate(trial.base, prompts, max_new_tokens=NEW_TOKENS)
    expected: list[Any] = []
    trouble = "answers otherwise"
    for prompt in prompts:
        try:
            expected.append(greedy_by_transformers(twin, prompt, stops))
        except Exception as fault:
            trouble = f"stops ({type(fault).__name__})"
            expected.append(None)
    different = [i for i, answer in enumerate(found) if answer != expected[i]]
    if different and all(
        found[i] == greedy_by_rereading(twin, prompts[i], stops) for i in different
    ):
        raise NotInPeft(f"as without a cache; with one transformers' own loop {trouble}")
    return len(different) / len(prompts)


def greedy_by_transformers(model: Any, prompt: list[int], stops: list[int]) -> list[int]:
    settings = GenerationConfig(
        max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=stops, pad_token_id=0
    )
    ids = torch.tensor([prompt])
    forget_lengths(model)
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings
    )
    return _before_stop(out[0, len(prompt) :].tolist(), stops)


@torch.no_grad()
def greedy_by_rereading(model: Any, prompt: list[int], stops: list[int]) -> list[int]:
    """The whole text computed for each token."""
    ids = list(prompt)
    for _ in range(NEW_TOKENS):
        ids.append(int(logits_alone(model, np.asarray(ids))[-1].argmax()))
    return _before_stop(ids[len(prompt) :], stops)


def _before_stop(ids: list[int], stops: list[int]) -> list[int]:
    return ids[: next((place for place, token in enumerate(ids) if token in stops), len(ids))]
