"""Settings of the objectives, which a run file gives under `objective`. `--help` reads this file,
so it does not import torch.

Sources: DPO, Rafailov et al. 2023, arXiv:2305.18290; IPO, Azar et al. 2023, arXiv:2310.12036; KTO,
Ethayarajh et al. 2024, arXiv:2402.01306; ORPO, Hong et al. 2024, arXiv:2403.07691.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from veneer.bounds import BETA, FACTOR, SMOOTHING
from veneer.data.examples import RowKind
from veneer.files.settings import StrictSettings


class ObjectiveConfig(StrictSettings):
    """Base class of objectives: properties of an objective besides its settings.

    rows           what the rows of a run hold
    share_of_rate  factor of the method's usual learning rate
    """

    rows: ClassVar[RowKind]
    share_of_rate: ClassVar[float] = 1.0

    name: str = ""
    """Name in the run file; every objective has one."""


class Answers(ObjectiveConfig):
    rows: ClassVar[RowKind] = "answers"

    name: Literal["answers"] = "answers"


class PreferenceConfig(ObjectiveConfig):
    """Base class of objectives that learn which answers are preferred."""

    share_of_rate: ClassVar[float] = 0.1


class _ReferenceConfig(PreferenceConfig):
    """Base class of objectives over pairs with a reference."""

    rows: ClassVar[RowKind] = "pairs"

    sft_weight: Annotated[float, FACTOR] = 0.0
    """Weight of the cross-entropy of the preferred answer, added to the loss; it keeps the
    probabilities of both answers from falling."""


class DPO(_ReferenceConfig):
    name: Literal["dpo"] = "dpo"
    beta: Annotated[float, BETA] = 0.1
    """Strength of the pull towards the reference; a smaller value lets the model move further."""
    label_smoothing: Annotated[float, SMOOTHING] = 0.0
    """Share of the pairs that are assumed to be swapped."""
    per_token: bool = False
    """Compare means over tokens instead of sums, so that longer answers have no advantage; beta is
    then larger, 1 to 5."""


class IPO(_ReferenceConfig):
    name: Literal["ipo"] = "ipo"
    beta: Annotated[float, BETA] = 0.1
    """The margin that training aims at is 1 / (2 beta)."""
    per_token: bool = True
    """Compare means over tokens, as TRL does; false compares sums, as the paper's formula does."""


class KTO(PreferenceConfig):
    rows: ClassVar[RowKind] = "ratings"

    name: Literal["kto"] = "kto"
    beta: Annotated[float, BETA] = 0.1
    """Strength of the pull towards the reference."""
    good_weight: Annotated[float, FACTOR] = 1.0
    """Weight of answers that are rated good."""
    bad_weight: Annotated[float, FACTOR] = 1.0
    """Weight of answers that are rated bad."""


class ORPO(PreferenceConfig):
    rows: ClassVar[RowKind] = "pairs"

    name: Literal["orpo"] = "orpo"
    weight: Annotated[float, FACTOR] = 0.1
    """Weight of the odds ratio beside the cross-entropy of the preferred answer."""


AnyObjective = Annotated[Answers | DPO | IPO | KTO | ORPO, Field(discriminator="name")]

OBJECTIVES: dict[str, type[ObjectiveConfig]] = {
    "answers": Answers,
    "dpo": DPO,
    "ipo": IPO,
    "kto": KTO,
    "orpo": ORPO,
}
