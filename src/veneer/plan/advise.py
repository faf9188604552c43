"""Advice on which method to use, and why: rules with their evidence, applied to a task.

The evidence is from other people's work unless it says otherwise; where it is thin, the sentence
says so.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from veneer.adapters.config import Full, LoRA, MethodConfig, Prefix
from veneer.plan.choice import Choice
from veneer.quant.config import FOUR_BITS

TaskKind = Literal["style", "format", "task", "instructions", "knowledge"]

SMALL_BASE = 5 * 10**8
"""Most parameters of a base for which full fine-tuning is worth comparing."""


@dataclass(frozen=True)
class TuningTask:
    """Describes a task. kind: what to learn. rows, tokens: of the data, None if unknown. variants:
    adapters over one base."""

    kind: TaskKind = "task"
    rows: int | None = None
    tokens: int | None = None
    variants: int = 1
    merge: bool = False
    parameters: int = 0
    hidden_size: int = 2048
    fixed_instruction: bool = False
    """All rows begin with the same instruction, which an adapter should replace in a small file."""


@dataclass(frozen=True)
class Advice:
    choice: Choice
    learning_rate: float | None
    """None: training takes it from the base's weights."""
    reasons: list[str]
    fits: bool


def advise(task: TuningTask, choice: Choice, fits: Callable[[Choice], bool]) -> Advice:
    """Returns the choice to start with.

    choice: gives batch, length and the rest. fits: returns whether a choice fits the memory.
    """
    full = replace(choice, method=Full(), quantize=None)
    high_rank = replace(choice, method=LoRA(rank=128, alpha=32.0, rslora=True))
    default_lora = replace(choice, method=LoRA(), quantize=None)
    reasons: list[str] = []
    single_variant = task.variants == 1
    if task.kind == "knowledge" and single_variant and fits(full):
        reasons.append(
            "New knowledge at scale: with 20 B tokens of code, every weight reached 0.263 on"
            " HumanEval, LoRA of rank 256 0.224, of rank 16 0.162 (Biderman et al. 2024,"
            " arXiv:2405.09673). Mix in 5-10% general text: it forgets most."
        )
        return Advice(full, _rate(full.method, task), reasons, True)
    if task.kind == "knowledge":
        reasons.append(
            "New knowledge wants every weight"
            + (
                ", which does not fit"
                if single_variant
                else f", but {task.variants} variants share one base"
            )
            + ": LoRA of rank 128 with alpha / sqrt(rank) comes closest (arXiv:2405.09673,"
            " arXiv:2312.03732)."
        )
        chosen = high_rank
    elif task.fixed_instruction and not task.merge and (task.rows or 0) >= 1000:
        reasons.append(
            "One instruction to compile in, and at least 1,000 rows: a prefix that starts from it"
            " is the smallest file (PEFT's comparison, Llama-3.2-3B on GSM8K: 41.6 points from a"
            " real prompt, 18.6 from random values, LoRA 47.8)."
        )
        prefix = replace(choice, method=Prefix())
        return Advice(prefix, _rate(prefix.method, task), reasons, fits(prefix))
    elif task.kind == "instructions" and (task.rows or 0) > 10_000:
        reasons.append(
            "Over 10,000 instructions: rank 64 and alpha / sqrt(rank) was the best LoRA of PEFT's"
            " comparison (51.3 points against 47.4 with alpha / rank); at large ranks LoRA equals"
            " full fine-tuning there (arXiv:2405.09673)."
        )
        chosen = replace(choice, method=LoRA(rank=64, alpha=32.0, rslora=True))
    elif task.kind in ("style", "format") or (task.rows is not None and task.rows < 1000):
        reasons.append(
            "Few rows, or tone and form: LoRA leads at 100 and 1,000 examples (MNLI: 63.8 and 85.6,"
            " full 60.2 and 85.8, prefixes 37.6-48.3 and 75.2-82.5; Hu et al. 2021,"
            " arXiv:2106.09685). Stop early on held-out loss."
        )
        chosen = replace(choice, method=LoRA(rank=8, alpha=16.0))
    else:
        reasons.append(
            "LoRA on every linear layer: equal to full fine-tuning within noise at a 350th of the"
            " values and 57% of the memory (PEFT's comparison, Llama-3.2-3B on GSM8K: 47.8 against"
            " 47.2, one seed)."
        )
        chosen = default_lora
    if not fits(chosen):
        four_bits = replace(chosen, quantize=FOUR_BITS)
        if fits(four_bits) or choice.quantize is None:
            reasons.append(
                "The base does not fit in 16 bits: held in 4 (NF4), 4.1 bits a weight; MMLU stays"
                " (53.1 against 53.0; Dettmers et al. 2023, arXiv:2305.14314), expect 2-5 points"
                " less on mathematics."
            )
            chosen = four_bits
    if task.variants > 1:
        reasons.append(
            f"{task.variants} variants over one base: one rank for all, so that they can be served"
            " together; a file each."
        )
    if task.merge:
        reasons.append(
            "It is to be merged: LoRA can be added into the weights, a prefix or bottleneck layers"
            " cannot."
        )
    if single_variant and 0 < task.parameters <= SMALL_BASE and fits(full):
        reasons.append("The base is small: compare full fine-tuning too; it is affordable here.")
    return Advice(chosen, _rate(chosen.method, task), reasons, fits(chosen))


def _rate(method: MethodConfig, task: TuningTask) -> float | None:
    """Returns the default rate of a method; None if it depends on weights, which a plan does not
    read."""
    if method.rate_of_weights is not None:
        return None
    return method.rate_by_width(task.hidden_size)
