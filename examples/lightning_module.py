"""A training pruner under Lightning: attach it in `configure_optimizers`.

python examples/lightning_module.py
"""

from __future__ import annotations

import logging

import lightning as L
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import secateurs as sc


class Digits(L.LightningModule):
    """A small network that is pruned while Lightning trains it."""

    def __init__(self, method: str, budget: str, steps: int) -> None:
        super().__init__()
        self.method, self.budget, self.steps = method, budget, steps
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(self.net.parameters(), lr=3e-3)
        pruner = sc.create(self.method)
        self.attachment = pruner.attach(self.net, optimizer, self.budget, self.steps)
        return optimizer


def main(method: str = "gmp", budget: str = "sparsity=0.9", steps: int = 300) -> sc.Outcome:
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    L.seed_everything(0, verbose=False)
    pixels, labels = load_digits(return_X_y=True)
    x = torch.tensor(pixels / 16, dtype=torch.float32)
    y = torch.tensor(labels)
    loader = DataLoader(TensorDataset(x[:1400], y[:1400]), batch_size=64, shuffle=True)

    module = Digits(method, budget, steps)
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    outcome = module.attachment.finalize()

    module.cpu().eval()
    accuracy = (module.net(x[1400:]).argmax(1) == y[1400:]).float().mean().item()
    print(f"{method}: {outcome.masks.sparsity:.1%} sparse, accuracy {accuracy:.3f}")
    return outcome


if __name__ == "__main__":
    main()
