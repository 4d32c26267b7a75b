"""Outcomes as the report gets them: plain values, made by hand."""

import copy

import pytest

LATENCY = {"median": 0.21, "low": 0.20, "high": 0.22, "repeats": 30}

COST = {
    "parameters": 1100, "nonzero": 1100, "macs": 1000, "effective_macs": 1000,
    "dense_bytes": 4400, "sparse_bytes": 4400, "batch": 1, "latency": LATENCY,
}  # fmt: skip

OUTCOME = {
    "method": "global-mp",
    "options": {},
    "budget": "sparsity=0.9",
    "seed": 0,
    "source": {"model": "zoo:mlp", "data": "digits"},
    "unit": 1,
    "primary": "accuracy",
    "higher_is_better": True,
    "promise": {"kind": "sparsity", "asked": 0.9, "reached": 0.9, "tolerance": 0.001},
    "before": COST,
    "after": {**COST, "nonzero": 200, "effective_macs": 100, "sparse_bytes": 1025},
    "metrics_before": {"accuracy": 0.984, "loss": 0.05},
    "metrics_after": {"accuracy": 0.978, "loss": 0.08},
    "layers": [
        {"name": "0.weight", "kept": 100, "total": 600},
        {"name": "2.weight", "kept": 0, "total": 400},
    ],
    "history": [
        {"round": 0, "density": 1.0, "accuracy": 0.984, "loss": 0.05},
        {"round": 1, "density": 0.1, "accuracy": 0.978, "loss": 0.08},
    ],
    "tables": {"controls": [{"control": "reinit", "accuracy": 0.91}]},
    "notes": ["2.weight was emptied"],
}


def changed(outcome, **fields):
    return {**copy.deepcopy(outcome), **fields}


@pytest.fixture
def outcome():
    return copy.deepcopy(OUTCOME)


@pytest.fixture
def bare():
    """One-shot pruning without a task: nothing was measured, not even the promise."""
    nothing = {"before": None, "after": None, "promise": None, "primary": "", "source": {}}
    empty = {"metrics_before": {}, "metrics_after": {}, "history": [], "tables": {}, "notes": []}
    return changed(OUTCOME, **nothing, **empty)


@pytest.fixture
def many():
    """Four methods times three seeds."""
    out = []
    for number, method in enumerate(("global-mp", "gmp", "random-pruning", "small-dense")):
        for seed in range(3):
            quality = 0.97 - 0.1 * number + 0.002 * seed
            metrics = {"accuracy": quality, "loss": 1 - quality}
            out.append(changed(OUTCOME, method=method, seed=seed, metrics_after=metrics))
    return out


@pytest.fixture
def timed():
    """Rows of two engines, of which one failed."""
    pruned = {"median": 0.105, "low": 0.1, "high": 0.11, "repeats": 30}
    ours = {"engine": "onnxruntime", "promised": 0.1, "dense": LATENCY, "pruned": pruned}
    none = {"engine": "compile", "promised": 0.1, "dense": None, "pruned": None}
    return [
        {**ours, "ratio": 0.5, "low": 0.45, "high": 0.55, "failure": ""},
        {**none, "ratio": None, "low": None, "high": None, "failure": "no compiler"},
    ]


EVENTS = [
    {"event": "train", "at": stage, "stage": "train", "step": step, "loss": 2.0 / (step + 1)}
    for stage in ("0-train", "1-prune")
    for step in range(40)
]


@pytest.fixture
def events():
    return copy.deepcopy(EVENTS)
