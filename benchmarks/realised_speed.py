"""What half the multiplications are worth in milliseconds, on this machine's CPU or GPU.

    python benchmarks/realised_speed.py [--batch 8] [--repeats 10] [--share 0.5]
                                        [--device cuda --dtype float16]

ResNet-50, MobileNetV2 and a ViT-B lose channels, neurons and heads by their L1 norms until half
the MACs are left; dense and pruned forward passes then take turns in the same run.
Bar, for the CPU: at most 0.6 of the dense latency. With --batch 1 the cost of calling 150 small
operations decides over MobileNetV2, and no smaller tensor lowers that; the same holds of small
batches on a GPU.
"""

from __future__ import annotations

import argparse
import copy

import torch
from torch import nn

import secateurs as sc
from secateurs.parts.costs import measure_latencies
from secateurs.structure.choice import Limits, choose
from secateurs.structure.scores import unit_scores
from secateurs.structure.surgery import shorten

BAR = 0.6


def models() -> dict[str, nn.Module]:
    import timm
    import torchvision

    return {
        "ResNet-50": torchvision.models.resnet50(),
        "MobileNetV2": torchvision.models.mobilenet_v2(),
        "ViT-B/16": timm.create_model("vit_base_patch16_224"),
    }


def halved(model: nn.Module, inputs: torch.Tensor, share: float) -> tuple[nn.Module, float]:
    """A copy of the model with `share` of its MACs, and the share that was reached."""
    structure = sc.axes(copy.deepcopy(model), inputs)
    elements = {n: p.detach().abs() for n, p in model.named_parameters()}
    scores = unit_scores(structure, elements)
    whole = structure.macs()
    choice = choose(
        structure, scores, structure.macs, share * whole, scope="local", limits=Limits(round_to=16)
    )
    made = shorten(structure.trace, choice.kept)
    return made.model.eval(), choice.cost / whole


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, default=8, help="images a pass")
    parser.add_argument("--repeats", type=int, default=10, help="timed passes")
    parser.add_argument("--share", type=float, default=0.5, help="MACs that are left")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 for its own default")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", help="of the timed passes")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    inputs = torch.randn(arguments.batch, 3, 224, 224)
    on = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"batch {arguments.batch}, {on}, {arguments.dtype}, {torch.get_num_threads()} threads")
    for name, model in models().items():
        pruned, reached = halved(model.eval(), inputs[:2], arguments.share)
        model, pruned = model.to(device, dtype), pruned.to(device, dtype)
        timed = inputs.to(device, dtype)
        dense, short = measure_latencies([model, pruned], timed, repeats=arguments.repeats)
        ratio = short.median / dense.median
        print(
            f"{name:12} MACs {reached:.3f}   dense {dense.median:7.1f} ms   pruned "
            f"{short.median:7.1f} ms ({short.low:.1f} to {short.high:.1f})   ratio {ratio:.2f}, "
            f"bar {BAR}: {'holds' if ratio <= BAR else 'MISSED'}",
            flush=True,
        )


if __name__ == "__main__":
    main()
