"""Pre-training on the classes that a target needs: clothes and digits, for other digits.

Paper: arXiv 2310.08782. Source: 10 classes of Fashion-MNIST and 10 of scikit-learn's digits at
28x28, 90 images each. Target: 5 other digits a class, shifted by (1, 2) pixels, at 70 % contrast.
Surrogate and student are the same network of two convolutions, 250 Adam steps, 20 outputs
whatever is kept; 6 of 20 classes stay; accuracy on 500 more digits of a linear probe on the frozen
features, means of 8 seeds (about 3 minutes of one core):

    kept of the source    accuracy
    all 20 classes        88.5 ± 2.2
    label mapping         91.3 ± 1.5
    feature mapping       91.2 ± 1.6
    6 classes at random   88.0 ± 2.6
    the 6 last in votes   85.8 ± 2.7
    nothing (untrained)   83.8 ± 4.3

Both mappings keep digits only: all of their votes, with every seed. A target with inverted polarity
still goes to digits, but to one class of them (47, 49 and 28 of 50 votes, where 11, 12 and 16 went
to the first before): two of three seeds are noted. The card's trial saw it go to other classes.
"""

import statistics

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import secateurs as sc
from secateurs.training.subset import task_on
from secateurs.zoo.datasets import TensorData, as_fetched, load_data

from .conftest import missing

pytestmark = pytest.mark.slow

DATA = "fashion-mnist?limit=4000"
SEEDS = 8
EACH, SHOTS, KEEP = 90, 5, 6 / 20
DIGITS = set(range(10, 20))


class Network(nn.Module):
    """Two convolutions with batch norm, their mean over the image, and a linear head."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.AdaptiveAvgPool2d(3), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(288, 20)

    def forward(self, x):
        return self.head(self.features(x))


@pytest.fixture(scope="module")
def pictures():
    """Clothes and digits as (images in [0, 1], labels)."""
    if why := missing(DATA):
        pytest.skip(f"needs Fashion-MNIST (apt install dataset-fashion-mnist): {why}")
    from sklearn.datasets import load_digits

    clothes = load_data(DATA).train
    low, high = clothes.inputs.min(), clothes.inputs.max()
    small, labels = load_digits(return_X_y=True)
    small = torch.tensor(small / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    large = F.interpolate(small, (28, 28), mode="bilinear")
    return ((clothes.inputs - low) / (high - low), clothes.targets), (large, torch.tensor(labels))


def draw(images, labels, counts, generator):
    """Disjoint parts with so many images of every class."""
    parts = [[] for _ in counts]
    for one in range(10):
        rows = (labels == one).nonzero().view(-1)
        rows = rows[torch.randperm(len(rows), generator=generator)]
        for part, some in zip(parts, rows[: sum(counts)].split(counts), strict=True):
            part.append(some)
    return [(images[torch.cat(part)], labels[torch.cat(part)]) for part in parts]


def shifted(images, contrast=0.7):
    return contrast * torch.roll(images, (1, 2), (2, 3))


def world(pictures, seed):
    """The task of the source, and what the target has to train on and to be judged by."""
    generator = torch.Generator().manual_seed(seed)
    (own,) = draw(*pictures[0], [EACH], generator)
    digits, shots, held_out = draw(*pictures[1], [EACH, SHOTS, 50], generator)
    source = torch.cat([own[0], digits[0]]), torch.cat([own[1], digits[1] + 10])
    data = TensorData(*source)
    loader = DataLoader(data, 64, shuffle=True, collate_fn=as_fetched)
    task = sc.classification(
        Network, loader, DataLoader(data, 512, collate_fn=as_fetched),
        training=sc.TrainSettings(steps=250, optimizer="adam", lr=2e-3, weight_decay=0.0),
    )  # fmt: skip
    return task, *((shifted(images), labels) for images, labels in (shots, held_out))


def trained(task, seed):
    model = task.fresh_model(seed)
    sc.fit(model, task, task.training, seed=seed)
    return model.eval().requires_grad_(False)


def probe(model, shots, held_out):
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    made = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
    made.fit(model.features(shots[0]).numpy(), shots[1].numpy())
    return 100 * made.score(model.features(held_out[0]).numpy(), held_out[1].numpy())


def kept(selection):
    return [row["group"] for row in selection.by_cluster() if row["stays"]]


def test_a_third_of_the_classes_is_enough_if_they_are_the_right_ones(pictures):
    table, shares = {}, {"label": [], "feature": []}
    for seed in range(SEEDS):
        task, shots, held_out = world(pictures, seed)
        labels = task.train.dataset.targets
        surrogate = trained(task, seed)
        features = surrogate.features(task.train.dataset.inputs).numpy()
        arms = {
            "label": ({"labels": labels}, surrogate(shots[0])),
            "feature": ({"embeddings": features, "labels": labels}, surrogate.features(shots[0])),
        }
        rows = {"full": torch.arange(len(labels))}
        for mapping, (source, target) in arms.items():
            found = sc.select(source, "dp4tl", KEEP, target=target.numpy(), mapping=mapping)
            assert abs(found.kept / found.total - KEEP) < 1e-9
            votes = [row["votes"] for row in found.by_cluster()]
            shares[mapping].append(sum(votes[10:]) / sum(votes))
            assert not any("may not understand" in note for note in found.notes)
            rows[mapping] = torch.from_numpy(found.indices)
            if mapping == "label":
                order = sorted(range(20), key=lambda g, f=found: -f.by_cluster()[g]["rank"])
                rows["lowest"] = torch.isin(labels, torch.tensor(order[:6]))
        generator = torch.Generator().manual_seed(100 + seed)
        rows["random"] = torch.isin(labels, torch.randperm(20, generator=generator)[:6])
        table.setdefault("full", []).append(probe(surrogate, shots, held_out))
        table.setdefault("untrained", []).append(
            probe(task.fresh_model(seed).eval().requires_grad_(False), shots, held_out)
        )
        for arm in ("label", "feature", "random", "lowest"):
            student = trained(task_on(task, rows[arm]), seed + 50)
            table.setdefault(arm, []).append(probe(student, shots, held_out))
    print()
    for arm, values in table.items():
        spread = statistics.stdev(values)
        print(f"    {arm:<12}{statistics.fmean(values):5.1f} ± {spread:.1f}")
    print({mapping: [round(100 * s) for s in own] for mapping, own in shares.items()})
    mean = {arm: statistics.fmean(values) for arm, values in table.items()}
    for mapping in ("label", "feature"):
        assert min(shares[mapping]) >= 0.8
        assert mean[mapping] >= mean["full"] - 2
        assert mean[mapping] >= mean["lowest"] + 0.5


def test_an_inverted_target_is_not_understood_and_a_note_says_so(pictures):
    told = {"plain": [], "inverted": []}
    for seed in range(3):
        task, shots, _ = world(pictures, seed)
        surrogate = trained(task, seed)
        source = {"labels": task.train.dataset.targets}
        for name, images in (("plain", shots[0]), ("inverted", 1 - shots[0])):
            logits = surrogate(images).numpy()
            found = sc.select(source, "dp4tl", KEEP, target=logits, mapping="label")
            top = max(row["votes"] for row in found.by_cluster())
            told[name].append((top, any("may not understand" in note for note in found.notes)))
    print("\n   ", told)
    assert not any(noted for _, noted in told["plain"])
    assert sum(noted for _, noted in told["inverted"]) >= 2
    assert max(top for top, _ in told["plain"]) < min(top for top, _ in told["inverted"])
