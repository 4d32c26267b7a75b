"""The command line: help from the methods' own fields, JSON, and one-line refusals."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from secateurs.cli import main, plain_default
from secateurs.method import Selector
from secateurs.registry import list_methods, options_of

QUICK = ["--epochs", "0.2", "--finetune-epochs", "0.1", "--no-latency", "--threads", "1"]
DIGITS = ["--data", "digits"]
BUDGET = ["--budget", "sparsity=0.5"]
MP = ["--method", "global-mp"]
DAREX = ["--method", "darex", "--budget", "sparsity=0.9"]
WITH_WEIGHTS = "zoo:convnet@{stranger}"


def invoke(*words: object) -> Result:
    return CliRunner().invoke(main, [str(w) for w in words])


def prune(*words: object, model: object = "zoo:convnet") -> list[object]:
    return ["prune", model, *words]


# ---------------------------------------------------------------- help and listing


@pytest.mark.parametrize(
    "command",
    ["demo", "prune", "select", "run", "resume", "bench", "merge", "methods", "inspect", "report"],
)
def test_every_command_explains_itself(command: str) -> None:
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert result.output.startswith("Usage:")


def test_without_a_command_there_is_the_help() -> None:
    result = invoke()
    assert result.exit_code == 0
    assert result.output == invoke("--help").output
    assert len(result.output.splitlines()) > 10


def test_help_lists_every_method_with_its_command() -> None:
    shown = {command: invoke(command, "--help").output for command in ("prune", "select")}
    for name, cls in list_methods().items():
        selects = issubclass(cls, Selector)
        assert name in shown["select" if selects else "prune"]
        assert name not in shown["prune" if selects else "select"]


@pytest.mark.parametrize("name", list(list_methods()))
def test_help_of_a_method_shows_its_fields_with_types_and_defaults(name: str) -> None:
    command = "select" if issubclass(list_methods()[name], Selector) else "prune"
    output = " ".join(invoke(command, "--method", name, "--help").output.split())
    for item in options_of(list_methods()[name]):
        assert "--" + item.name.replace("_", "-") in output
        assert "".join(item.help.split()) in "".join(output.split())
        shown = ("yes" if item.default else "no") if item.type == "bool" else None
        default = shown or plain_default(item.default)
        assert f"[default:{default.replace(' ', '')}]" in "".join(output.split())


def test_methods_as_json_and_filtered() -> None:
    rows = json.loads(invoke("methods", "--json").output)
    assert [row["name"] for row in rows] == list(list_methods())
    found = json.loads(invoke("methods", "--when", "PDT", "--unit", "weight", "--json").output)
    assert {"gmp", "granet"} <= {row["name"] for row in found}
    assert all("PDT" in row["tags"]["when"] for row in found)
    assert "resize" in json.loads(invoke("methods", "small*", "--json").output)[0]["needs"]


# ---------------------------------------------------------------- the way through


def test_prune_run_report_inspect_and_resume(tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = invoke(*prune(*DIGITS, *MP, *BUDGET, *QUICK, "--out", out, "--json"))
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["promise"]["reached"] == pytest.approx(0.5, abs=1e-4)
    assert (out / "report.html").stat().st_size > 10_000
    again = json.loads(invoke("resume", out, "--json").stdout)
    assert again["metrics_after"] == answer["metrics_after"]
    layers = json.loads(invoke("inspect", out, "--json").stdout)["layers"]
    assert sum(x["kept"] for x in layers) == sum(x["kept"] for x in answer["layers"])
    assert invoke("report", out).exit_code == 0


def test_recipe_from_a_file(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: zoo:convnet\ndata: digits\nlatency: false\ntraining: {epochs: 0.2}\n"
        "stages:\n  - prune: {method: gmp, budget: sparsity=0.8}\n"
    )
    result = invoke("run", recipe, "--out", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["method"] == "gmp"


def test_bench_ends_in_a_leaderboard(tmp_path: Path) -> None:
    matrix = tmp_path / "matrix.yaml"
    matrix.write_text(
        "model: zoo:convnet\ndata: digits\nmethods: [global-mp]\nbudgets: [sparsity=0.5]\n"
        "seeds: 2\nbaselines: false\nlatency: false\n"
        "training: {epochs: 0.2}\nfinetuning: {epochs: 0.1}\n"
    )
    result = invoke("bench", matrix, "--out", tmp_path / "bench", "--workers", 2, "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert len(answer["results"]) == 2
    assert {row["dense_latency_ms"] for row in answer["results"]} == {None}
    assert answer["leaderboard"][0]["label"] == "global-mp"
    again = json.loads(invoke("resume", tmp_path / "bench", "--json").stdout)
    assert again["results"] == answer["results"]


def test_a_bench_times_the_dense_network_beside_each_outcome(tmp_path: Path) -> None:
    matrix, out = tmp_path / "matrix.yaml", tmp_path / "bench"
    matrix.write_text(
        "model: zoo:convnet\ndata: digits\nmethods: [global-mp, rethinking-value]\n"
        "budgets: [sparsity=0.5]\nbaselines: false\nabout: Read me with care.\n"
        "training: {epochs: 0.2}\nfinetuning: {epochs: 0.1}\n"
    )
    result = invoke("bench", matrix, "--out", out, "--workers", 1)
    assert result.exit_code == 0, result.output
    assert "Read me with care." in result.stdout
    rows = json.loads(invoke("resume", out, "--json").stdout)["results"]
    for row in rows:
        for side, key in (("before", "dense_latency_ms"), ("after", "latency_ms")):
            assert row["timing"][side]["median"] == row[key] > 0
            raw = {s: row["timed"][s]["median"] for s in ("before", "after")}
        ratio = raw["after"] / raw["before"]
        assert row["latency_ms"] / row["dense_latency_ms"] == pytest.approx(ratio)
        assert (out / "cells" / row["cell"] / "recipe.yaml").is_file()
    one, *others = {row["dense_latency_ms"] for row in rows}
    assert others == pytest.approx([one] * len(others)), "the same dense network"
    page = (out / "report.html").read_text()
    assert "Read me with care." in page
    assert "The masked models run" in page
    assert "not timed" not in page


def test_without_the_report_extra_a_run_ends_well_and_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as lacking:
        for name in ("jinja2", "plotly"):
            lacking.setitem(sys.modules, name, None)
        result = invoke(*prune(*DIGITS, *MP, *BUDGET, *QUICK, "--out", out))
        assert result.exit_code == 0, result.output
        assert result.stderr.startswith("note    no report without jinja2 and plotly")
        assert "report  not written" in result.stdout
        refused = invoke("report", out)
        assert refused.exit_code == 2
        assert "secateurs[report]" in refused.stderr
    assert (out / "outcome" / "outcome.json").is_file()
    assert not (out / "report.html").exists()
    assert invoke("report", out).exit_code == 0
    assert (out / "report.html").is_file()


# ---------------------------------------------------------------- refusals


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Broken things to hand to the command line."""
    root = tmp_path_factory.mktemp("broken")
    made = {"root": root, "none": root / "nothing-here"}

    def write(name: str, text: str) -> None:
        made[name] = root / f"{name}.yaml"
        made[name].write_text(text)

    good = "model: zoo:convnet\ndata: digits\nstages: [train]\n"
    write("duplicate", good + "data: digits\n")
    write("unknown-key", good + "sead: 1\n")
    write("malformed", "model: [\n")
    write("stage", good.replace("train", "trian"))
    write("no-stages", "model: zoo:convnet\ndata: digits\n")
    write("epochs", good + "training: {epochs: -1}\n")
    matrix = "model: zoo:convnet\ndata: digits\nmethods: [gmp]\nbudgets: [sparsity=0.9]\n"
    write("matrix-key", matrix + "seed: 1\n")
    write("matrix-method", matrix.replace("gmp", "gpm"))
    write("matrix-budget", matrix.replace("0.9", "9"))
    write("matrix-seeds", matrix + "seeds: 0\n")
    write("matrix-negative", matrix + "seeds: -2\n")
    write("matrix-list", matrix.replace("[gmp]", "gmp"))
    write("recover", good.replace("train", "prune: {method: gmp, budget: 2:4, recover: maybe}"))
    write("good-matrix", matrix)
    made["full"] = root / "full"
    made["full"].mkdir()
    (made["full"] / "something.txt").write_text("mine")
    made["truncated"] = root / "truncated.safetensors"
    made["truncated"].write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}")
    for name, plan, database in (("halved", "{", b""), ("garbled", "{}", b"no database")):
        folder = made[name] = root / name
        (folder / "outcome").mkdir(parents=True)
        (folder / "recipe.yaml").write_text(good)
        (folder / "environment.json").write_text("{}")
        (folder / "outcome" / "outcome.json").write_text(plan)
        made[f"{name}-bench"] = root / f"{name}-bench"
        made[f"{name}-bench"].mkdir()
        (made[f"{name}-bench"] / "matrix.yaml").write_text(matrix)
        (made[f"{name}-bench"] / "bench.sqlite").write_bytes(database)
    made["stranger"] = root / "stranger.safetensors"
    save_file({"other.weight": torch.zeros(2, 2)}, made["stranger"])
    for name, label, cut in (("labels", 77, 0), ("short", 1, 5)):
        folder = made[f"fashion-{name}"] = root / f"fashion-{name}"
        folder.mkdir()
        for part, count in (("train", 4), ("t10k", 2)):
            images = struct.pack(">4I", 0x803, count, 28, 28) + bytes(count * 784)
            (folder / f"{part}-images-idx3-ubyte").write_bytes(images[: len(images) - cut])
            labels = struct.pack(">2I", 0x801, count) + bytes([label] * count)
            (folder / f"{part}-labels-idx1-ubyte").write_bytes(labels)
    (root / "broken_models.py").write_text(
        "import torch\nfrom torch import nn\n\n"
        "def nan():\n    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
        "    nn.init.constant_(net[1].weight, float('nan'))\n    return net\n\n"
        "def nothing():\n    return nn.Sequential(nn.Flatten(), nn.AdaptiveAvgPool1d(10),"
        " nn.BatchNorm1d(10))\n\n"
        "def number():\n    return 3\n\n"
        "def scaled(factor):\n    return factor\n\n"
        "def small():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 4))\n"
    )
    return made


SHARDS = ["prune-shards", "{root}", "--method", "wanda", "--out", "shards"]
CASES: dict[str, tuple[list[object], list[str]]] = {
    "shards: no calibration data": ([*SHARDS, "--budget", "2:4"], ["--data", "wanda"]),
    "shards: not a checkpoint": (
        [*SHARDS, "--budget", "2:4", "--data", "topics?as=language"],
        ["folder", "model.safetensors"],
    ),
    "shards: not layer-wise": (
        ["prune-shards", "{root}", "--method", "global-mp", *BUDGET, "--out", "shards"],
        ["method", "global-mp", "layer-wise"],
    ),
    "unknown command": (["prnue"], ["prnue"]),
    "unknown option": (["prune", "--budgit", "1"], ["--budgit"]),
    "missing model": (["prune", *DIGITS, *MP, *BUDGET], ["MODEL"]),
    "missing budget": (prune(*DIGITS, *MP), ["--budget"]),
    "unknown method": (
        prune(*DIGITS, "--method", "globl-mp", *BUDGET),
        ["method", "globl-mp", "did you mean 'global-mp'"],
    ),
    "unknown zoo model": (
        prune(*DIGITS, *MP, *BUDGET, model="zoo:convnt"),
        ["convnt", "did you mean 'convnet'"],
    ),
    "unknown torchvision model": (
        prune(*DIGITS, *MP, *BUDGET, model="torchvision:resnet17"),
        ["resnet17", "did you mean 'resnet18'"],
    ),
    "unknown timm model": (
        prune(*DIGITS, *MP, *BUDGET, model="timm:resnet51"),
        ["resnet51", "'resnet50'"],
    ),
    "unknown kind of model": (prune(*DIGITS, *MP, *BUDGET, model="zooo:convnet"), ["zooo"]),
    "model that is no name": (prune(*DIGITS, *MP, *BUDGET, model="convnet"), ["convnet"]),
    "hf model that is nowhere": (
        prune(*DIGITS, *MP, *BUDGET, model="hf:{none}"), ["nothing-here"]
    ),
    "python model, no module": (
        prune(*DIGITS, *MP, *BUDGET, model="python:no_such_module:make"), ["no_such_module"]
    ),
    "python model, no function": (
        prune(*DIGITS, *MP, *BUDGET, model="python:broken_models:nope"), ["nope"]
    ),
    "python model, not a module": (
        prune(*DIGITS, *MP, *BUDGET, model="python:broken_models:number"), ["number"]
    ),
    "python model that needs arguments": (
        prune(*DIGITS, *MP, *BUDGET, model="python:torch.nn:Linear"),
        ["model", "python:torch.nn:Linear", "without arguments", "in_features, out_features"],
    ),
    "python model made by compiled code": (
        prune(*DIGITS, *MP, *BUDGET, model="python:builtins:dict"), ["builtins:dict", "a dict"]
    ),
    "python data that need arguments": (
        prune("--data", "python:broken_models:scaled", *MP, *BUDGET),
        ["data", "broken_models:scaled", "without arguments", "factor"],
    ),
    "NaN in the weights": (
        prune(*DIGITS, *MP, *BUDGET, *QUICK, model="python:broken_models:nan"), ["NaN"]
    ),
    "nothing to prune": (
        prune(*DIGITS, *MP, *BUDGET, *QUICK, model="python:broken_models:nothing"),
        ["nothing to prune"],
    ),
    "too few outputs": (
        prune(*DIGITS, *MP, *BUDGET, *QUICK, model="python:broken_models:small"),
        ["labels", "0 to 3"],
    ),
    "truncated weights": (
        prune(*DIGITS, *MP, *BUDGET, model="zoo:convnet@{truncated}"), ["truncated.safetensors"]
    ),
    "missing weights": (
        prune(*DIGITS, *MP, *BUDGET, model="zoo:convnet@{none}.safetensors"), ["nothing-here"]
    ),
    "weights of another model": (
        prune(*DIGITS, *MP, *BUDGET, model="zoo:convnet@{stranger}"), ["weight"]
    ),
    "unknown data": (prune("--data", "digitz", *MP, *BUDGET), ["digitz", "did you mean 'digits'"]),
    "missing data folder": (
        prune("--data", "fashion-mnist:{none}", *MP, *BUDGET), ["nothing-here"]
    ),
    "truncated data": (prune("--data", "fashion-mnist:{fashion-short}", *MP, *BUDGET), ["images"]),
    "labels out of range": (
        prune("--data", "fashion-mnist:{fashion-labels}", *MP, *BUDGET), ["77"]
    ),
    "image folder that is nowhere": (
        prune("--data", "imagefolder:{none}", *MP, *BUDGET), ["nothing-here"]
    ),
    "image folder without images": (
        prune("--data", "imagefolder:{full}", *MP, *BUDGET), ["full"]
    ),
    "text that is nowhere": (prune("--data", "text:{none}", *MP, *BUDGET), ["nothing-here"]),
    "hf data that is nowhere": (prune("--data", "hf:{none}", *MP, *BUDGET), ["nothing-here"]),
    "data option unknown": (prune("--data", "fashion-mnist?limt=6", *MP, *BUDGET), ["limt"]),
    "sparsity of one": (prune(*DIGITS, *MP, "--budget", "sparsity=1"), ["budget", "sparsity=1"]),
    "negative sparsity": (prune(*DIGITS, *MP, "--budget", "sparsity=-0.1"), ["sparsity=-0.1"]),
    "malformed budget": (prune(*DIGITS, *MP, "--budget", "ninety"), ["budget", "ninety"]),
    "unknown kind of budget": (
        prune(*DIGITS, *MP, "--budget", "sparsty=0.9"), ["did you mean 'sparsity'"]
    ),
    "engine that there is not": (
        prune(*DIGITS, *MP, *BUDGET, "--engines", "eager,onnx"), ["engines", "'onnxruntime'"]
    ),
    "budget the method cannot honour": (
        prune(*DIGITS, *MP, "--budget", "latency=8ms"), ["latency=8ms", "sparsity="]
    ),
    "N:M with N above M": (prune(*DIGITS, *MP, "--budget", "5:4"), ["5:4"]),
    "parameters below the biases": (
        prune(*DIGITS, *MP, "--budget", "params=3k", *QUICK, model="zoo:mlp?hidden=4000"),
        ["params", "at least"],
    ),
    "option out of range": (
        prune(*DIGITS, *MP, *BUDGET, "--min-percent", 300), ["min_percent", "300"]
    ),
    "option of the wrong type": (
        prune(*DIGITS, *MP, *BUDGET, "--min-weights", "many"), ["min_weights", "many"]
    ),
    "choice that is none": (prune(*DIGITS, *MP, *BUDGET, "--count", "some"), ["count", "some"]),
    "two floors": (
        prune(*DIGITS, *MP, *BUDGET, "--min-weights", 3, "--min-percent", 1), ["min_percent"]
    ),
    "floor that cannot be met": (
        prune(*DIGITS, *MP, "--budget", "sparsity=0.99", *QUICK, "--min-weights", 5000),
        ["min_weights", "largest sparsity"],
    ),
    "exclude matches nothing": (
        prune(*DIGITS, *MP, *BUDGET, *QUICK, "--exclude", "no_such_layer"), ["no_such_layer"]
    ),
    "rewinding beyond the end": (
        prune(*DIGITS, "--method", "lottery-rewinding", *BUDGET, *QUICK, "--rewind", "200%"),
        ["rewind", "200%"],
    ),
    "ramp that ends too late": (
        prune(*DIGITS, "--method", "gmp", *BUDGET, *QUICK, "--end", 99999), ["end", "99999"]
    ),
    "seed that is no number": (prune(*DIGITS, *MP, *BUDGET, "--seed", "x"), ["--seed", "x"]),
    "no batches": (prune(*DIGITS, *MP, *BUDGET, "--batch-size", 0), ["batch_size", "0"]),
    "training setting unknown": (prune(*DIGITS, *MP, *BUDGET, "--train", "lrr=1"), ["lrr=1"]),
    "training setting negative": (prune(*DIGITS, *MP, *BUDGET, "--train", "lr=-1"), ["lr", "-1"]),
    "loss that explodes": (
        prune(*DIGITS, *MP, *BUDGET, *QUICK, "--train", "lr=1e12", model="zoo:mlp"),
        ["loss", "step"],
    ),
    "tracker unknown": (
        prune(*DIGITS, *MP, *BUDGET, *QUICK, "--track", "tensorbord"),
        ["did you mean 'tensorboard'"],
    ),
    "output folder not empty": (prune(*DIGITS, *MP, *BUDGET, "--out", "{full}"), ["full", "empty"]),
    "output folder below a file": (
        prune(*DIGITS, *MP, *BUDGET, "--out", "/dev/null/out"), ["/dev/null/out", "can be made"]
    ),
    "seed of more than 64 bits": (
        prune(*DIGITS, *MP, *BUDGET, "--seed", 10**30), ["seed", "64 bits"]
    ),
    "recipe that is nowhere": (["run", "{none}"], ["recipe", "nothing-here"]),
    "recipe with a duplicate key": (["run", "{duplicate}"], ["data", "twice"]),
    "recipe with an unknown key": (["run", "{unknown-key}"], ["sead", "did you mean 'seed'"]),
    "malformed recipe": (["run", "{malformed}"], ["malformed"]),
    "recipe with an unknown stage": (["run", "{stage}"], ["did you mean 'train'"]),
    "recipe without stages": (["run", "{no-stages}"], ["stages"]),
    "recipe with negative epochs": (["run", "{epochs}"], ["epochs", "-1"]),
    "matrix with an unknown key": (["bench", "{matrix-key}"], ["did you mean 'seeds'"]),
    "matrix with an unknown method": (["bench", "{matrix-method}"], ["did you mean 'gmp'"]),
    "matrix with an impossible budget": (["bench", "{matrix-budget}"], ["sparsity=9"]),
    "matrix without seeds": (["bench", "{matrix-seeds}"], ["seeds", "0"]),
    "matrix with a negative number of seeds": (["bench", "{matrix-negative}"], ["seeds", "-2"]),
    "matrix with a method for a list": (["bench", "{matrix-list}"], ["a list of methods"]),
    "benchmark into a full folder": (
        ["bench", "{good-matrix}", "--out", "{full}"], ["full", "empty"]
    ),
    "benchmark without workers": (
        ["bench", "{good-matrix}", "--out", "{root}/b", "--workers", 0], ["workers", "0"]
    ),
    "recipe with a recovery that is neither": (["run", "{recover}"], ["recover", "maybe"]),
    "report of a truncated outcome": (["report", "{halved}"], ["outcome.json", "whole JSON"]),
    "report of a strange outcome": (["report", "{garbled}"], ["outcome.json", "secateurs.save"]),
    "resume of an empty benchmark": (["resume", "{halved-bench}"], ["bench.sqlite"]),
    "report of a benchmark that is none": (["report", "{garbled-bench}"], ["bench.sqlite"]),
    "resume of what is no run": (["resume", "{full}"], ["full", "recipe.yaml"]),
    "report of what is no run": (["report", "{none}"], ["nothing-here"]),
    "delta without a base": (prune(*DIGITS, *DAREX, model=WITH_WEIGHTS), ["base", "darex"]),
    "delta to a base without weights": (
        prune(*DIGITS, *DAREX, "--base", "zoo:convnet", model=WITH_WEIGHTS),
        ["base", "zoo:convnet", "a model with weights"],
    ),
    "delta of a model without weights": (
        prune(*DIGITS, *DAREX, "--base", WITH_WEIGHTS), ["model", "a model with weights"]
    ),
    "delta to a base that is nowhere": (
        prune(*DIGITS, *DAREX, "--base", "{none}", model=WITH_WEIGHTS), ["nothing-here"]
    ),
    "base for a method that has no use for it": (
        prune(*DIGITS, *MP, *BUDGET, "--base", WITH_WEIGHTS), ["base", "none, for global-mp"]
    ),
    "rescaling by nothing": (
        prune(*DIGITS, *DAREX, "--q", 0, "--base", WITH_WEIGHTS, model=WITH_WEIGHTS), ["q", "0"]
    ),
    "merge without a delta": (["merge", WITH_WEIGHTS], ["DELTA"]),
    "merge of a delta that is nowhere": (["merge", WITH_WEIGHTS, "{none}"], ["nothing-here"]),
    "merge of a folder without a delta": (
        ["merge", WITH_WEIGHTS, "{full}"], ["full", "delta.safetensors"]
    ),
    "merge of what is no delta": (
        ["merge", WITH_WEIGHTS, "{stranger}"], ["stranger", "a delta as secateurs.save writes it"]
    ),
    "merge of half a delta": (["merge", WITH_WEIGHTS, "{truncated}"], ["truncated"]),
    "filter by an unknown unit": (["methods", "--unit", "wheight"], ["did you mean 'weight'"]),
    "inspect an unknown model": (["inspect", "zoo:convnt"], ["did you mean 'convnet'"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_input_gets_one_line_and_exit_code_2(
    case: str, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(files["root"]))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words, expected = CASES[case]
    told = [str(w) for w in words]
    for name, path in files.items():
        told = [w.replace("{" + name + "}", str(path)) for w in told]
    result = invoke(*told)
    assert result.exit_code == 2, (result.output, result.exception)
    lines = result.stderr.strip().splitlines()
    own = [line for line in lines if line.startswith("secateurs: ")]
    assert len(own) == 1, result.stderr
    for text in expected:
        assert text in own[0]
    assert (files["full"] / "something.txt").read_text() == "mine"


@pytest.mark.parametrize("track", [[], ["--track", "tensorboard"]])
def test_a_run_that_is_refused_before_training_leaves_no_folder(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, track: list[str]
) -> None:
    if track:
        pytest.importorskip("tensorboard")
    monkeypatch.syspath_prepend(str(files["root"]))
    out = tmp_path / "run"
    words = prune(
        *DIGITS, *MP, *BUDGET, *QUICK, *track, "--out", out,
        model="python:broken_models:nan?trained=true",
    )  # fmt: skip
    for _ in range(2):
        result = invoke(*words)
        assert result.exit_code == 2
        assert "NaN in the weights" in result.stderr
        assert not out.exists()


def test_a_run_that_is_refused_after_training_stays_and_can_be_resumed(tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = prune(
        *DIGITS, *MP, "--budget", "sparsity=0.99", *QUICK, "--min-weights", 5000, "--out", out
    )
    for command in (words, ["resume", out]):
        result = invoke(*command)
        assert result.exit_code == 2
        assert "min_weights" in result.stderr
        assert (out / "work" / "0-train" / "train.safetensors").is_file()


def test_there_are_at_least_forty_cases() -> None:
    assert len(CASES) >= 40


def test_methods_page_is_up_to_date() -> None:
    import importlib.util

    page = Path(__file__).parents[1] / "docs" / "make_methods_table.py"
    spec = importlib.util.spec_from_file_location("make_methods_table", page)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text() == module.page(), "run `make docs`"
    for name, cls in list_methods().items():
        assert f"## {name}" in module.page()
        assert cls.paper is None or cls.paper.title in module.page()
