"""Likeness to the dense model on noise, and models that come as ONNX files."""

import json
import math

import pytest
import torch
from click.testing import CliRunner

import secateurs as sc
from secateurs.cli import main
from secateurs.errors import InputError
from secateurs.zoo.catalog import make_task
from secateurs.zoo.likeness import floats, relative_square
from secateurs.zoo.networks import make_network


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved network: a model that has weights."""
    folder = tmp_path_factory.mktemp("likeness") / "out"
    task = make_task("zoo:convnet", "digits")
    outcome = sc.prune(task.fresh_model(0), "global-mp", "sparsity=0.1", task, recover=False)
    outcome.source = {"model": "zoo:convnet", "data": "digits"}
    sc.save(outcome, folder)
    return folder


def test_a_model_is_like_itself_and_less_so_the_more_goes(saved):
    task = make_task(str(saved), "noise?samples=8")
    assert task.measure(task.model)["error"] == pytest.approx(0, abs=1e-6)
    errors = [
        sc.prune(task.model, "spa", f"macs={share}", task, recover=False).metrics_after["error"]
        for share in (0.9, 0.3)
    ]
    assert 0 < errors[0] < errors[1]
    assert not task.higher_is_better


def test_the_error_is_relative_to_the_outputs():
    target = torch.tensor([3.0, 4.0])
    own = {"a": torch.tensor([[3.0]]), "b": torch.tensor([9.0]), "n": torch.tensor([1])}
    assert floats(own).tolist() == [3, 9]
    assert math.sqrt(float(relative_square(own, target))) == pytest.approx(1)


def test_a_model_without_weights_has_nothing_to_be_like():
    with pytest.raises(InputError, match="no weights to stay like"):
        make_task("zoo:convnet", "noise")


def test_a_model_that_noise_of_one_kind_does_not_feed_is_refused(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    sizes["num_attention_heads"] = 2
    config = transformers.CLIPConfig(
        text_config={**sizes, "vocab_size": 20, "eos_token_id": 2},
        vision_config={**sizes, "image_size": 8, "patch_size": 4},
    )
    transformers.CLIPModel(config).save_pretrained(tmp_path / "clip")
    with pytest.raises(InputError, match=r"data: got noise; accepted: a data set: .*clip fails on"):
        make_task(f"hf:{tmp_path / 'clip'}", "noise")


def test_an_onnx_file_goes_in_and_a_smaller_one_comes_out(tmp_path):
    for name in ("onnx", "onnxruntime", "onnxscript", "onnx2torch"):
        pytest.importorskip(name)
    from secateurs.deploy.onnx_export import export_onnx
    from secateurs.deploy.onnx_import import import_onnx

    torch.manual_seed(0)
    path = tmp_path / "dense.onnx"
    export_onnx(make_network("convnet").eval(), torch.randn(1, 1, 8, 8), path)
    command = ["prune", str(path), "--method", "spa", "--budget", "macs=0.5", "--no-recover"]
    result = CliRunner().invoke(main, [*command, "--out", str(tmp_path / "run"), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[-1])
    small = tmp_path / "run" / "model.onnx"
    assert small.stat().st_size < 0.7 * path.stat().st_size
    read = sc.load(tmp_path / "run")
    again = import_onnx(small).model
    inputs = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.allclose(read.model(inputs), again(inputs), atol=1e-5)
