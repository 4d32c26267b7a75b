"""A training pruner in a loop of your own: two lines around it, nothing inside.

python examples/bare_loop.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import secateurs as sc


def main(method: str = "gmp", budget: str = "sparsity=0.9", steps: int = 300) -> sc.Outcome:
    pixels, labels = load_digits(return_X_y=True)
    x = torch.tensor(pixels / 16, dtype=torch.float32)
    y = torch.tensor(labels)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    attachment = sc.create(method).attach(model, optimizer, budget, total_steps=steps)
    for _ in range(steps):
        batch = torch.randint(1400, (64,))
        loss = F.cross_entropy(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    outcome = attachment.finalize()

    accuracy = (model(x[1400:]).argmax(1) == y[1400:]).float().mean().item()
    print(f"{method}: {outcome.masks.sparsity:.1%} sparse, accuracy {accuracy:.3f}")
    return outcome


if __name__ == "__main__":
    main()
