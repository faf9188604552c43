"""Score heads over a base: a fresh one, and one that acts without layers of an adapter.

Full fine-tuning trains such a head with the base's weights; a folder that it wrote has one.
"""

from transformers import PreTrainedModel

from veneer.adapters.config import MethodConfig
from veneer.adapters.labels import HeadSettings
from veneer.adapters.placement.acting import Applied
from veneer.adapters.placement.attachment import Attachment
from veneer.adapters.placement.score_head import ScoreHead
from veneer.adapters.placement.wrapping import unwrapped
from veneer.linear import frozen_linear
from veneer.models.frozen_base import FrozenBase, hidden_size

OWN_HEAD = "score_head"
"""Name under which the head of a model folder is attached."""


def head_width(model: PreTrainedModel) -> int:
    """Returns the width of the hidden states that the base's own head reads."""
    head = model.get_output_embeddings()
    linear = None if head is None else frozen_linear(unwrapped(head))
    return hidden_size(model.config) if linear is None else linear.in_features


def fresh_head(base: FrozenBase, settings: HeadSettings) -> ScoreHead:
    return ScoreHead.fresh(settings, hidden_size=head_width(base.model), device=base.device)


def head_line(settings: HeadSettings) -> str:
    return f"a score head with {settings.num_outputs:,} outputs over the last token"


def attach_head(base: FrozenBase, method: MethodConfig, score: ScoreHead, *, name: str) -> Applied:
    """Attaches a head without layers of an adapter, not active yet; returns it as it acts."""
    base.routing.enter(base.model, name, Attachment(name, method, score=score))
    return base.routing.applied(((name, 1.0),))


def own_head(base: FrozenBase) -> ScoreHead | None:
    """Returns the head of the base's folder while it is attached; None without one."""
    attachment = base.routing.attached.get(OWN_HEAD)
    if attachment is None or attachment.layers:  # an adapter may take the name of a detached head
        return None
    return attachment.score
