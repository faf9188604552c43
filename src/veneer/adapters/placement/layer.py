"""What one adapter puts at one place of a base: the contract that attaching, training, storing and
merging need.

A new method brings a settings class (config.py), a layer that keeps this contract, a builder
(attach.py) that puts layers in their places, and a file layout (formats/registry.py). Nothing else
asks which method it is.
"""

from typing import Protocol

from torch import Tensor, nn


class Layer(Protocol):
    @property
    def scaling(self) -> float:
        """Factor of the update; 1 for methods without one."""

    def parts(self) -> dict[str, nn.Parameter]:
        """The trained tensors by name, in the order of the flat buffer that checkpoints hold."""

    def stored(self) -> dict[str, Tensor]:
        """What the adapter's file holds, detached. Most methods: the parts as they are."""

    def folded(self, weight: Tensor) -> Tensor:
        """The base's dense weight with the update in it, float32, a fresh tensor.

        weight, float32: linear (O, I), whatever the base's own orientation; embedding (V, D);
        experts (E, O, I). Raises ConfigError for a method that no change of a weight can express.
        """
