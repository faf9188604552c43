"""Makes the objective of a run's settings."""

from veneer.objectives.answers import AnswersObjective
from veneer.objectives.config import DPO, IPO, KTO, ORPO, AnyObjective, Classify, Distil
from veneer.objectives.distil import DistilObjective
from veneer.objectives.labels import ClassifyObjective
from veneer.objectives.objective import Objective
from veneer.objectives.preferences import DPOObjective, IPOObjective, KTOObjective, ORPOObjective


def make_objective(config: AnyObjective) -> Objective:
    match config:
        case DPO():
            return DPOObjective(config)
        case IPO():
            return IPOObjective(config)
        case KTO():
            return KTOObjective(config)
        case ORPO():
            return ORPOObjective(config)
        case Distil():
            return DistilObjective(config)
        case Classify():
            return ClassifyObjective(config)
        case _:
            return AnswersObjective()
