"""/v1/classify and /v1/rerank: labels of texts and ranks of documents, by an adapter's score head.

Source: vLLM's bodies and responses, docs.vllm.ai/en/latest/serving/openai_compatible_server.html.
"""

import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from veneer.adapters.labels import HeadSettings, probabilities
from veneer.bounds import Number
from veneer.data.files.labels import pair_text
from veneer.objectives.labels import chosen
from veneer.serve.limits import MOST_CLASSIFIED, MOST_TEXT
from veneer.serve.protocols.body import (
    BY_TYPE,
    NO_EFFECT,
    Body,
    Length,
    NotSupported,
    Num,
    OnlyTrue,
)
from veneer.serve.protocols.sampling_body import ModelName, Unused
from veneer.serve.refusals import Fault

_Text = Annotated[str, Length(1, MOST_TEXT)]
_Texts = Annotated[list[_Text], Length(1, MOST_CLASSIFIED)]


@dataclass(frozen=True)
class TextScores:
    """Holds the outputs of a score head for texts.

    outputs  (N, C), before they become probabilities
    tokens   number of tokens of all texts
    """

    head: HeadSettings
    outputs: NDArray[np.float64]
    tokens: int


class HeadBody(Body):
    """The fields of both paths."""

    model: ModelName
    """an adapter with a score head: NAME, NAME@2, NAME@TAG, BASE:NAME"""
    user: Unused = ""
    activation: OnlyTrue = True
    """scores are probabilities, except those of kind regression"""
    use_activation: OnlyTrue = True
    """the same"""
    softmax: OnlyTrue = True
    """the same"""
    add_special_tokens: OnlyTrue = True
    """texts are tokenised as in training"""
    priority: Annotated[int, Num(Number(int, 0, 0)), NO_EFFECT] = 0
    """requests take turns"""
    truncate_prompt_tokens: NotSupported = None
    """shorten the texts"""


class ClassifyBody(HeadBody):
    """The body of /v1/classify."""

    input: Annotated[_Text | _Texts, BY_TYPE]
    """one or several texts; no chat template is applied"""
    messages: NotSupported = None
    """use input"""

    def texts(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else self.input


class RerankBody(HeadBody):
    """The body of /v1/rerank."""

    query: _Text
    """what the documents are compared with"""
    documents: _Texts
    """texts"""
    top_n: Annotated[int, Num(Number(int, 0, 10**9))] = 0
    """results to return; 0 (default): all"""
    return_documents: OnlyTrue = True
    """results have their documents"""
    max_tokens_per_doc: NotSupported = None
    """shorten the documents"""

    def conflicts(self) -> Iterator[Fault]:
        yield from super().conflicts()
        characters = len(self.query) * len(self.documents) + sum(map(len, self.documents))
        if characters > MOST_TEXT:
            yield Fault(
                "documents",
                f"have {characters:,} characters with the query before each, {MOST_TEXT:,} may",
            )

    def texts(self) -> list[str]:
        """Returns the text that the head reads for each document."""
        return [pair_text(self.query, document) for document in self.documents]


def classify_response(model: str, scores: TextScores) -> dict[str, Any]:
    """Writes the response of /v1/classify. A head of several labels has one field more than vLLM's
    responses: the labels that reach their thresholds."""
    head = scores.head
    probs_NC = probabilities(head.kind, scores.outputs)
    data = [
        {
            "index": index,
            "label": head.output_names[int(probs.argmax())],
            "probs": probs.tolist(),
            "num_classes": head.num_outputs,
        }
        for index, probs in enumerate(probs_NC)
    ]
    if head.kind == "labels":
        for entry, marks in zip(data, chosen(head, scores.outputs), strict=True):
            entry["labels"] = [head.labels[number] for number in np.flatnonzero(marks)]
    return {
        "id": f"classify-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": model,
        "data": data,
        "usage": {
            "prompt_tokens": scores.tokens,
            "total_tokens": scores.tokens,
            "completion_tokens": 0,
            "prompt_tokens_details": None,
        },
    }


def rerank_response(
    model: str, documents: Sequence[str], top_n: int, scores: TextScores
) -> dict[str, Any]:
    """Writes the response of /v1/rerank: the best documents first. top_n: 0 for all"""
    relevance = probabilities(scores.head.kind, scores.outputs)[:, 0].tolist()
    order = sorted(range(len(documents)), key=lambda index: (-relevance[index], index))
    return {
        "id": f"rerank-{uuid.uuid4().hex}",
        "model": model,
        "usage": {"prompt_tokens": scores.tokens, "total_tokens": scores.tokens},
        "results": [
            {
                "index": index,
                "document": {"text": documents[index]},
                "relevance_score": relevance[index],
            }
            for index in order[: top_n or None]
        ],
    }
