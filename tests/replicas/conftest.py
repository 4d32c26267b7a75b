"""Small Fashion-MNIST, and a table of what was measured; run with -s to see it."""

import copy
import statistics

import pytest
import torch

import secateurs as sc
from secateurs.errors import InputError
from secateurs.zoo.catalog import make_task
from secateurs.zoo.datasets import load_data

FASHION = "fashion-mnist?limit=6000&size=14"


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """On networks this small more threads only wait for each other."""
    torch.set_num_threads(1)


def perceptrons(data):
    """Tasks of an MLP on `data`: (hidden sizes, training) -> task."""

    def task(*hidden, finetuning=None, **training):
        spec = "zoo:mlp?hidden=" + ",".join(map(str, hidden))
        settings = sc.TrainSettings(lr=0.05, **training)
        return make_task(spec, data, training=settings, finetuning=finetuning)

    return task


def missing(data):
    """Why a data set cannot be loaded; empty where it can."""
    try:
        load_data(data)
    except InputError as error:
        return str(error)
    return ""


@pytest.fixture(scope="session")
def fashion():
    """Tasks on the first 6000 images at 14x14. On the digits the claims do not show."""
    if why := missing(FASHION):
        pytest.skip(f"needs Fashion-MNIST (apt install dataset-fashion-mnist): {why}")
    return perceptrons(FASHION)


@pytest.fixture(scope="session")
def fashion_or_digits():
    """The same, or tasks on scikit-learn's digits where Fashion-MNIST is not installed."""
    return perceptrons("digits" if missing(FASHION) else FASHION)


@pytest.fixture(scope="session")
def digits_transformer():
    """Seed -> (task, trained model): a vision transformer of 16 tokens with gated feed-forward
    layers, 120,000 parameters, about .97 on the digits. The models are copies."""
    spec = "zoo:vit-tiny?depth=5&hidden=96&gated=true"
    training = sc.TrainSettings(epochs=40, lr=3e-3, optimizer="adamw", weight_decay=0.05)
    task = make_task(spec, "digits", training=training)
    trained = {}

    def made(seed):
        if seed not in trained:
            trained[seed] = task.fresh_model(seed)
            sc.fit(trained[seed], task, task.training, seed=seed)
        return task, copy.deepcopy(trained[seed]).eval()

    return made


class Table(dict):
    """What was measured with several seeds, by arm; accuracies where nothing else is said."""

    def add(self, arm, task, model):
        self.note(arm, task.measure(model)["accuracy"])

    def note(self, arm, value):
        self.setdefault(arm, []).append(value)

    def mean(self, arm):
        return statistics.mean(self[arm])

    def means(self):
        return {arm: self.mean(arm) for arm in self}

    def deviation(self, arm):
        return statistics.stdev(self[arm]) if len(self[arm]) > 1 else 0.0

    def __str__(self):
        rows = (
            f"{arm!s:40} {self.mean(arm):.4f} ± {self.deviation(arm):.4f}  "
            + " ".join(f"{a:.4f}" for a in self[arm])
            for arm in self
        )
        return "\n" + "\n".join(rows)


@pytest.fixture
def table():
    """Where a replica writes down what it measures; printed at its end."""
    rows = Table()
    yield rows
    print(rows)


@pytest.fixture(scope="module")
def tables():
    """The same for measurements that several tests of a module share."""
    made = []

    def new():
        made.append(Table())
        return made[-1]

    yield new
    print(*made, sep="\n")
