"""Plain convolutional networks: the demo network, Conv-2/4/6, VGG."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from secateurs.errors import InputError, require
from secateurs.zoo.networks import Shape, network, scaled

POOL = "M"
"""In a list of channels: 2x2 maximum pooling, stride 2."""


def conv_block(inputs: int, outputs: int) -> nn.Sequential:
    """3x3 convolution, BatchNorm, ReLU; the image keeps its size."""
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            norm=nn.BatchNorm2d(outputs),
            relu=nn.ReLU(),
        )
    )


def pooling() -> nn.MaxPool2d:
    """2x2 pooling that rounds up, so that no side ever becomes 0."""
    return nn.MaxPool2d(2, ceil_mode=True)


class ConvNet(nn.Module):
    """Blocks of convolution, BatchNorm and ReLU, average pooling, one linear layer."""

    def __init__(self, inputs: int, config: tuple[int | str, ...], classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = inputs
        for entry in config:
            if isinstance(entry, str):
                layers.append(pooling())
            else:
                layers.append(conv_block(channels, entry))
                channels = entry
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) of any size -> (N, classes)."""
        logits: Tensor = self.classifier(self.pool(self.features(x)).flatten(1))
        return logits


@network("convnet", inputs=(1, 8, 8), config=(32, "M", 64, "M", 64))
@network("vgg-11", config=(64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512))
@network(
    "vgg-16",
    config=(
        64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512,
    ),
)  # fmt: skip
@network(
    "vgg-16-a",
    config=(
        32, 64, "M", 128, 128, "M", 256, 256, 256, "M", 256, 256, 256, "M", 256, 256, 256,
    ),
)  # fmt: skip
@network(
    "vgg-19",
    config=(
        64, 64, "M", 128, 128, "M", 256, 256, 256, 256, "M", 512, 512, 512, 512, "M",
        512, 512, 512, 512,
    ),
)  # fmt: skip
def convnet(
    inputs: Shape,
    classes: int,
    width: float = 1.0,
    *,
    config: tuple[int | str, ...] = (32, "M", 64, "M", 64),
) -> nn.Module:
    """3x3 convolutions with BatchNorm and ReLU by a list of channels.

    ``convnet`` (56,224 weights on one-channel images) learns the 8x8 digits in seconds.
    ``vgg-*`` are those of Simonyan & Zisserman (arXiv 1409.1556) for 32x32 images, with
    BatchNorm and one linear layer; ``vgg-16-a`` is the one pruned by the L1 norm of its
    filters (Li et al., arXiv 1608.08710).

    Args:
        config: channels of the convolutions at width 1, and ``M`` where the image is pooled.
    """
    parsed = tuple(_entry(entry, config) for entry in config)
    require(any(isinstance(e, int) for e in parsed), "config", config, "at least one convolution")
    widths = tuple(e if isinstance(e, str) else scaled(e, width) for e in parsed)
    return ConvNet(inputs[0], widths, classes)


def _entry(entry: int | str, config: tuple[int | str, ...]) -> int | str:
    if entry == POOL:
        return POOL
    if str(entry).isdecimal() and int(entry) > 0:
        return int(entry)
    raise InputError("config", config, f"channels of at least 1, or {POOL} for pooling")


class StackedConvs(nn.Module):
    """Pairs of 3x3 convolutions, each pair pooled, then three linear layers."""

    def __init__(
        self, inputs: Shape, pairs: tuple[int, ...], hidden: tuple[int, int], classes: int
    ) -> None:
        super().__init__()
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        channels, height, width = inputs
        for number, size in enumerate(pairs, start=1):
            for half in "ab":
                layers[f"conv{number}{half}"] = nn.Conv2d(channels, size, 3, padding=1)
                layers[f"relu{number}{half}"] = nn.ReLU()
                channels = size
            layers[f"pool{number}"] = pooling()
            height, width = -(-height // 2), -(-width // 2)
        self.features = nn.Sequential(layers)
        # does nothing at the size the network was built for
        self.pool = nn.AdaptiveAvgPool2d((height, width))
        self.hidden = nn.Sequential(
            OrderedDict(
                fc1=nn.Linear(channels * height * width, hidden[0]),
                relu1=nn.ReLU(),
                fc2=nn.Linear(hidden[0], hidden[1]),
                relu2=nn.ReLU(),
            )
        )
        self.classifier = nn.Linear(hidden[1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) of any size -> (N, classes)."""
        pooled = self.pool(self.features(x))
        logits: Tensor = self.classifier(self.hidden(pooled.flatten(1)))
        return logits


@network("conv-2", pairs=1)
@network("conv-4", pairs=2)
@network("conv-6", pairs=3)
def stacked_convs(inputs: Shape, classes: int, width: float = 1.0, *, pairs: int = 1) -> nn.Module:
    """Conv-2, Conv-4 and Conv-6 of the lottery-ticket paper (arXiv 1803.03635, figure 2).

    Pairs of convolutions of 64, 128 and 256 channels, each followed by pooling, then linear
    layers of 256 and 256: 4.3, 2.4 and 2.3 million weights on 32x32 images (the
    paper prints 1.7 for the last).

    Args:
        pairs: of convolutions, 1 to 3.
    """
    require(1 <= pairs <= 3, "pairs", pairs, "1 to 3")
    channels = tuple(scaled(size, width) for size in (64, 128, 256)[:pairs])
    hidden = scaled(256, width)
    return StackedConvs(inputs, channels, (hidden, hidden), classes)
