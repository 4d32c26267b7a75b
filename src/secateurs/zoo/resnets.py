"""Residual networks for small images."""

from __future__ import annotations

from torch import Tensor, nn

from secateurs.errors import require
from secateurs.zoo.networks import Shape, network, scaled


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut: y = relu(x + f(x)).

    Where the shape changes, the shortcut is a 1x1 convolution with BatchNorm (option B of He
    et al., arXiv 1512.03385).
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut.append(nn.Conv2d(inputs, outputs, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(outputs))
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, outputs, H / stride, W / stride)."""
        y = self.relu1(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        total: Tensor = self.relu2(y + self.shortcut(x))
        return total


class ResNet(nn.Module):
    """A 3x3 convolution, stages of residual blocks, average pooling, one linear layer."""

    def __init__(
        self, inputs: int, stages: tuple[int, ...], blocks: tuple[int, ...], classes: int
    ) -> None:
        super().__init__()
        channels = stages[0]
        self.conv = nn.Conv2d(inputs, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.stages = nn.ModuleList()
        for stage, (size, count) in enumerate(zip(stages, blocks, strict=True)):
            layers = []
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(ResidualBlock(channels, size, stride))
                channels = size
            self.stages.append(nn.Sequential(*layers))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) of any size -> (N, classes)."""
        x = self.relu(self.norm(self.conv(x)))
        for stage in self.stages:
            x = stage(x)
        logits: Tensor = self.classifier(self.pool(x).flatten(1))
        return logits


@network("resnet-8", depth=8)
@network("resnet-20", depth=20)
@network("resnet-32", depth=32)
@network("resnet-56", depth=56)
@network("resnet-110", depth=110)
def cifar_resnet(inputs: Shape, classes: int, width: float = 1.0, *, depth: int = 20) -> nn.Module:
    """The ResNet of 16, 32 and 64 channels for 32x32 images (arXiv 1512.03385, section 4.2).

    Shortcuts are of option B. ResNet-20 has 270,896 weights in convolutions and classifier on
    three-channel images and 10 classes.

    Args:
        depth: layers on the longest path, 6n + 2.
    """
    require(depth >= 8 and depth % 6 == 2, "depth", depth, "6n + 2, such as 20, 32, 56 or 110")
    stages = tuple(scaled(size, width) for size in (16, 32, 64))
    return ResNet(inputs[0], stages, ((depth - 2) // 6,) * 3, classes)


@network("resnet-18")
def resnet18(inputs: Shape, classes: int, width: float = 1.0) -> nn.Module:
    """ResNet-18 (arXiv 1512.03385) in its form for 32x32 images: a 3x3 stem and no pooling."""
    stages = tuple(scaled(size, width) for size in (64, 128, 256, 512))
    return ResNet(inputs[0], stages, (2, 2, 2, 2), classes)
