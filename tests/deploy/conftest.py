"""One thread, and small networks to carry to ONNX and back."""

import pytest
import torch
from torch import nn


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """On networks this small more threads only wait for each other."""
    torch.set_num_threads(1)


class Small(nn.Module):
    """Convolutions with a norm, one of them depthwise, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, stride=2, groups=8)
        self.classifier = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        return self.classifier(self.depthwise(x).mean((2, 3)))


@pytest.fixture
def small():
    torch.manual_seed(0)
    model = Small()
    nn.init.uniform_(model.norm.running_var, 0.5, 2)
    nn.init.normal_(model.norm.weight)
    return model


@pytest.fixture
def images():
    return torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
