"""What two thin convolutions are worth in milliseconds: dense and factorised, in one run.

    python benchmarks/low_rank.py [--model vgg-16] [--batch 8] [--share 0.5] [--repeats 15]

The kernels of a convolutional network of the zoo, on 32x32 images, are cut to the ranks that a
share of the MACs pays, in each of the three ways; nothing is trained, as time does not ask what
weights say. Dense and factorised forward passes take turns; the ratio is the median over the
rounds. Below 1 is
faster; at the share of the MACs, every multiplication saved is time saved.
"""

from __future__ import annotations

import argparse
import copy
import statistics

import torch
from torch import nn

from secateurs.methods.ranks.trained_rank_pruning import TrainedRankPruning
from secateurs.outcome import Outcome
from secateurs.parts.budgets import Budget
from secateurs.parts.costs import count_macs, forward_call, time_calls, timing_conditions
from secateurs.parts.low_rank import MODES, Mode
from secateurs.zoo.networks import make_network


def factorised(model: nn.Module, inputs: torch.Tensor, mode: Mode, share: float) -> nn.Module:
    """A copy of the model with `share` of its MACs, its kernels of low rank."""
    method = TrainedRankPruning(mode=mode)
    outcome = Outcome(copy.deepcopy(model))
    plan = method.plan(outcome.model, inputs, Budget.parse(f"macs={share}"))
    method.factorise(outcome, plan)
    return outcome.model


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="vgg-16", help="a convolutional network of the zoo")
    parser.add_argument("--batch", type=int, default=8, help="images a pass")
    parser.add_argument("--share", type=float, default=0.5, help="MACs that are left")
    parser.add_argument("--repeats", type=int, default=15, help="timed rounds")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    inputs = torch.randn(arguments.batch, 3, 32, 32)
    torch.manual_seed(0)
    dense = make_network(arguments.model).eval()
    models = [dense, *(factorised(dense, inputs, mode, arguments.share) for mode in MODES)]
    with timing_conditions(*models, threads=arguments.threads):
        times = time_calls(
            [forward_call(model, inputs) for model in models], repeats=arguments.repeats
        )
    whole = sum(count_macs(dense, inputs).values())
    print(
        f"{arguments.model}, batch {arguments.batch}, {arguments.threads} thread(s), "
        f"dense {statistics.median(times[0]):.1f} ms"
    )
    for mode, model, own in zip(MODES, models[1:], times[1:], strict=True):
        ratios = sorted(a / b for a, b in zip(own, times[0], strict=True))
        tenth = len(ratios) // 10
        print(
            f"{mode}  MACs {sum(count_macs(model, inputs).values()) / whole:.3f}   "
            f"{statistics.median(own):7.1f} ms   of dense {statistics.median(ratios):.2f} "
            f"({ratios[tenth]:.2f} to {ratios[-1 - tenth]:.2f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
