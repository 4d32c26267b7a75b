"""Multi-layer perceptrons, LeNet-300-100 among them."""

from __future__ import annotations

from collections import OrderedDict
from math import prod

from torch import Tensor, nn

from secateurs.errors import require
from secateurs.zoo.networks import Shape, network, scaled

LENET = (300, 100)


class Perceptron(nn.Module):
    """Linear layers with ReLU between them; whatever shape a sample has, it is flattened."""

    def __init__(
        self, features: int, hidden: tuple[int, ...], classes: int, batch_norm: bool
    ) -> None:
        super().__init__()
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for number, size in enumerate(hidden, start=1):
            layers[f"fc{number}"] = nn.Linear(features, size)
            if batch_norm:
                layers[f"norm{number}"] = nn.BatchNorm1d(size)
            layers[f"relu{number}"] = nn.ReLU()
            features = size
        self.features = nn.Sequential(layers)
        self.classifier = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, ...) -> (N, classes)."""
        logits: Tensor = self.classifier(self.features(x.flatten(1)))
        return logits


@network("lenet-300-100", inputs=(1, 28, 28), ranks=(1, 2, 3))
def lenet(inputs: Shape, classes: int, width: float = 1.0) -> nn.Module:
    """LeNet-300-100 (LeCun et al. 1998): 266,200 weights on 28x28 pixels and 10 classes."""
    return mlp(inputs, classes, width, hidden=LENET)


@network("mlp", inputs=(1, 28, 28), ranks=(1, 2, 3))
def mlp(
    inputs: Shape,
    classes: int,
    width: float = 1.0,
    *,
    hidden: tuple[int, ...] = LENET,
    batch_norm: bool = False,
) -> nn.Module:
    """A multi-layer perceptron with ReLU.

    Args:
        hidden: sizes of the hidden layers at width 1; none makes it linear.
        batch_norm: normalise before every ReLU.
    """
    require(all(size > 0 for size in hidden), "hidden", hidden, "sizes of at least 1")
    sizes = tuple(scaled(size, width) for size in hidden)
    return Perceptron(prod(inputs), sizes, classes, batch_norm)
