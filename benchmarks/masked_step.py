"""A masked training step of ResNet-18 at batch 32, beside the dense one and torch's own.

    python benchmarks/masked_step.py [--size 64] [--repeats 15] [--device cuda]

Three copies of the network take turns, step by step, so that all see the same machine: dense;
masked by `secateurs.MaskKeeper` at 90 %; masked by `torch.nn.utils.prune`. Printed are the
medians of the ratios pair by pair. Bars: ours at most 1.05 of dense, and below torch's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from torchvision.models import resnet18

import secateurs as sc
from secateurs.methods.weights.global_mp import global_magnitude_masks
from secateurs.parts.prunable import prunable_parameters


def stepper(model: nn.Module, optimizer: torch.optim.Optimizer, size: int) -> Callable[[], None]:
    device = next(model.parameters()).device
    x, y = torch.randn(32, 3, size, size).to(device), torch.randint(10, (32,)).to(device)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=64, help="image side in pixels")
    parser.add_argument("--repeats", type=int, default=15, help="steps of each")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    arguments = parser.parse_args()
    torch.manual_seed(0)

    dense = resnet18(num_classes=10).to(arguments.device)
    steps = {"dense": stepper(dense, sgd(dense), arguments.size)}

    ours = resnet18(num_classes=10).to(arguments.device)
    optimizer = sgd(ours)
    params = prunable_parameters(ours)
    keep = sum(p.numel() for p in params.values()) // 10
    sc.MaskKeeper(ours, optimizer, sc.Masks(global_magnitude_masks(params, keep)))
    steps["secateurs"] = stepper(ours, optimizer, arguments.size)

    theirs = resnet18(num_classes=10).to(arguments.device)
    layers = [m for m in theirs.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    prune.global_unstructured([(m, "weight") for m in layers], prune.L1Unstructured, amount=0.9)
    steps["torch.nn.utils.prune"] = stepper(theirs, sgd(theirs), arguments.size)

    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(arguments.repeats + 2):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            if repeat >= 2:
                times[name].append(time.perf_counter() - begin)

    threads = f"{torch.get_num_threads()} threads"
    on = torch.cuda.get_device_name() if arguments.device == "cuda" else threads
    print(f"ResNet-18, batch 32, {arguments.size} pixels, {on}")
    for name, own in times.items():
        ratio = statistics.median(a / b for a, b in zip(own, times["dense"], strict=True))
        print(f"{name:22s} {statistics.median(own) * 1e3:8.1f} ms   {ratio:.3f} of dense")


if __name__ == "__main__":
    main()
