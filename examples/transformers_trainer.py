"""A training pruner under `transformers.Trainer`: attach it to the optimizer, train as ever.

python examples/transformers_trainer.py
"""

from __future__ import annotations

import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import secateurs as sc


class Parity(Dataset):
    """Sequences of two symbols; the label says which of them is more frequent."""

    def __init__(self, samples: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(1, 3, (samples, 15), generator=generator)
        self.labels = (self.tokens == 2).sum(1).gt(7).long()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.labels[index]}


def main(method: str = "gmp", budget: str = "sparsity=0.8", steps: int = 150) -> sc.Outcome:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=3,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
        num_labels=2,
    )
    model = BertForSequenceClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)

    attachment = sc.create(method).attach(model, optimizer, budget, total_steps=steps)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=32,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            seed=0,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=Parity(2048, seed=0),
            optimizers=(optimizer, schedule),
        )
        trainer.train()
    outcome = attachment.finalize()

    test = Parity(512, seed=1)
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=test.tokens.to(model.device)).logits.cpu()
    accuracy = (logits.argmax(1) == test.labels).float().mean().item()
    print(f"{method}: {outcome.masks.sparsity:.1%} sparse, accuracy {accuracy:.3f}")
    return outcome


if __name__ == "__main__":
    main()
