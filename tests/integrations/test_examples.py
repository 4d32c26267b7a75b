"""The examples run, in short."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_compress_a_model(tmp_path: Path) -> None:
    outcome = load("compress_a_model").main(epochs=1, out=str(tmp_path))
    assert outcome.promise.kept


def test_compare_methods(tmp_path: Path) -> None:
    board = load("compare_methods").main(epochs=0.5, out=str(tmp_path))
    labels = {row["label"] for row in board}
    assert {"random-pruning", "global-mp", "small-dense", "granet from 50 %"} <= labels


@pytest.mark.parametrize("method", ["global-mp", "gmp", "lottery-ticket"])
def test_audit_a_method(method: str) -> None:
    rows = load("audit_a_method").main(method, epochs=0.3, seeds=1)
    assert [row["arm"] for row in rows] == ["finetune", "scratch-e", "scratch-b"]


def test_fedtiny_is_a_flower_app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The apps that its pyproject names, as Flower loads them, against one call of `prune`."""
    pytest.importorskip("flwr")
    import tomllib

    import torch
    from flwr.app import Context, RecordDict

    import secateurs as sc
    from secateurs.federated.engine import identity, inline_grid

    folder = EXAMPLES / "fedtiny"
    monkeypatch.syspath_prepend(str(folder))
    app = tomllib.loads((folder / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    found = {
        kind: getattr(importlib.import_module(name.split(":")[0]), name.split(":")[1])
        for kind, name in app["components"].items()
    }
    brief = {"epochs": 1.0, "rounds": 3, "clients": 3, "out": str(tmp_path / "out")}
    config = {**app["config"], **brief}
    context = Context(1, 1, {}, RecordDict(), config)
    with identity():
        found["serverapp"](inline_grid(found["clientapp"], 3, config=config), context)
    made = sc.load(tmp_path / "out" / "outcome", lambda: settings_task(config).fresh_model(0))

    task = settings_task(config)
    options = {key: config[key] for key in ("clients", "alpha", "rounds", "shots", "allocation")}
    here = sc.prune(task.fresh_model(0), "fedtiny", config["budget"], task, **options)
    assert made.history == here.history
    for name, tensor in here.model.state_dict().items():
        assert torch.equal(tensor, made.model.state_dict()[name])


def settings_task(config: dict) -> object:
    import secateurs as sc
    from secateurs.zoo.catalog import make_task

    training = sc.TrainSettings(epochs=config["epochs"], lr=config["lr"])
    return make_task(config["model"], config["data"], training=training)
