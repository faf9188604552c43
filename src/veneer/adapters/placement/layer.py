"""The interface of a method's layers, for attaching, training, storing and merging.

A new method consists of a settings class (config.py), a layer with this interface, a builder that
puts layers into a model (attach.py), and a file layout (formats/registry.py). Nothing else asks
which method it is.
"""

from typing import Protocol

from torch import Tensor, nn


class Layer(Protocol):
    @property
    def scaling(self) -> float:
        """Factor of the update; 1 if the method has none."""

    def parts(self) -> dict[str, nn.Parameter]:
        """Returns the trained tensors by name, in the order of the flat buffer that checkpoints
        hold."""

    def stored(self) -> dict[str, Tensor]:
        """Returns tensors of the adapter's file, detached. For most methods the parts as they
        are."""

    def folded(self, weight: Tensor) -> Tensor:
        """Returns the base's dense weight plus the update, float32, a new tensor.

        weight, float32: linear (O, I), whatever the base's own orientation; embedding (V, D);
        experts (E, O, I). Raises ConfigError for a method that is no change of a weight.
        """
