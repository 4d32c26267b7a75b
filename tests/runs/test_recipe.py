"""Recipes: what is accepted, what is refused and how."""

from __future__ import annotations

import pytest

from secateurs.errors import InputError
from secateurs.runs.matrix import Matrix
from secateurs.runs.recipe import Recipe, Stage, stages_for

GOOD = """
model: zoo:convnet
data: digits
training: {epochs: 2}
stages:
  - train
  - prune: {method: global-mp, budget: sparsity=0.9, min_percent: 0.05}
  - finetune: {epochs: 1, lr: 0.01}
"""


def test_round_trip() -> None:
    recipe = Recipe.parse(GOOD)
    assert Recipe.parse(recipe.as_yaml()) == recipe
    assert recipe.stages[1] == Stage("prune", "global-mp", "sparsity=0.9", {"min_percent": 0.05})


def test_a_choice_of_engines_is_kept_and_none_leaves_the_identity_as_it_was() -> None:
    timed = Recipe.parse(GOOD + "engines: [eager, onnxruntime]\n")
    assert timed.engines == ("eager", "onnxruntime")
    assert Recipe.parse(timed.as_yaml()) == timed
    assert "engines" not in Recipe.parse(GOOD).as_dict()
    with pytest.raises(InputError, match="did you mean 'onnxruntime'"):
        Recipe.parse(GOOD + "engines: [onnx]\n")


def test_identity_sees_every_setting() -> None:
    recipe = Recipe.parse(GOOD)
    others = [
        GOOD.replace("0.9", "0.8"),
        GOOD.replace("epochs: 2", "epochs: 3"),
        GOOD + "seed: 1\n",
    ]
    identities = {recipe.identity(), *(Recipe.parse(text).identity() for text in others)}
    assert len(identities) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: zoo:convnet\nmodel: x\ndata: digits\nstages: [train]", "model: got twice, line 2"),
        (GOOD + "sead: 3\n", "did you mean 'seed'"),
        (GOOD.replace("global-mp", "globl-mp"), "did you mean 'global-mp'"),
        (GOOD.replace("min_percent", "min_precent"), "did you mean 'min_percent'"),
        (GOOD.replace("sparsity=0.9", "sparsity=1.9"), r"sparsity in \[0, 1\)"),
        (GOOD.replace("sparsity=0.9", "latency=8ms"), "for global-mp: sparsity="),
        (GOOD.replace("  - train\n", "  - trian\n"), "did you mean 'train'"),
        (GOOD.replace("epochs: 2", "epochs: two"), "epochs: got 'two'"),
        ("model: zoo:convnet\ndata: digits", "no 'stages'"),
        ("model: zoo:convnet\ndata: digits\nstages: []", "at least one stage"),
        ("model: [", "malformed YAML"),
        ("- a list", "a mapping with the keys"),
        (GOOD.replace("budget: sparsity=0.9, ", ""), "no 'budget'"),
    ],
)
def test_refusals_name_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Recipe.parse(text)


def test_a_fresh_model_is_trained_before_methods_that_prune_after_training() -> None:
    kinds = [s.kind for s in stages_for("global-mp", "sparsity=0.9", {}, fresh=True)]
    assert kinds == ["train", "prune"]
    for method, fresh in (("random-pruning", True), ("global-mp", False), ("gmp", True)):
        assert [s.kind for s in stages_for(method, "sparsity=0.9", {}, fresh=fresh)] == ["prune"]


MATRIX = """
model: zoo:convnet
data: digits
methods: [gmp, {method: global-mp, min_percent: 0.1}]
budgets: [sparsity=0.8, sparsity=0.9]
seeds: 3
"""


def test_matrix_has_every_cell_and_the_baselines() -> None:
    cells = Matrix.parse(MATRIX).cells
    labels = {cell.label for cell in cells}
    assert labels == {
        "gmp",
        "global-mp (min_percent=0.1)",
        "random-pruning",
        "global-mp",
        "small-dense",
    }
    assert len(cells) == len({cell.identity for cell in cells}) == 5 * 2 * 3
    without = Matrix.parse(MATRIX + "baselines: false\n")
    assert len(without.cells) == 2 * 2 * 3


def test_matrix_round_trip() -> None:
    matrix = Matrix.parse(MATRIX)
    assert Matrix.parse(matrix.as_yaml()) == matrix


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("seeds: 3", "seeds: 0"), "at least one seed"),
        (("gmp,", "gpm,"), "did you mean 'gmp'"),
        (("sparsity=0.8", "sparsity=-1"), "sparsity in"),
        (("budgets", "budget"), "did you mean 'budgets'"),
        (("min_percent: 0.1", "min_percent: 200"), "0 to 100"),
    ],
)
def test_matrix_refusals(change: tuple[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Matrix.parse(MATRIX.replace(*change))


def test_the_demo_says_how_its_arms_are_trained() -> None:
    from importlib.resources import files

    from secateurs.zoo.catalog import make_task

    text = files("secateurs.runs").joinpath("demo.yaml").read_text()
    matrix = Matrix.parse(text)
    task = make_task("zoo:convnet", "digits")
    assert (task.training.epochs, task.finetuning.epochs) == (10, 5)
    assert "10 epochs from fresh weights" in matrix.about
    assert "had 10 and adds 5" in matrix.about
    first = dict(task.fresh_model(0).named_parameters())["features.0.conv.weight"]
    assert f"{first.numel()} weights more" in matrix.about
    assert Matrix.parse(matrix.as_yaml()) == matrix


def test_how_it_recovers_is_the_stage_s_own_in_a_matrix() -> None:
    [stage] = stages_for("global-mp", "sparsity=0.9", {"recover": "perp"}, fresh=False)
    assert (stage.recover, stage.options) == ("perp", {})
    matrix = Matrix.parse(
        "model: zoo:mlp\ndata: digits\nbudgets: [sparsity=0.5]\nbaselines: false\n"
        "methods: [wanda, {method: wanda, recover: false}]\n"
    )
    assert [c.label for c in matrix.cells] == ["wanda", "wanda (recover=False)"]
    assert [c.recipe.stages[-1].recover for c in matrix.cells] == [True, False]


def test_a_method_may_have_budgets_of_its_own_in_a_matrix() -> None:
    text = (
        "model: zoo:mlp\ndata: digits\nbudgets: [sparsity=0.5]\nbaselines: false\n"
        "methods: [magnitude, {method: magnitude, label: pattern, budgets: OWN}]\n"
    )
    matrix = Matrix.parse(text.replace("OWN", "['2:4', sparsity=0.8]"))
    found = [(c.label, c.stage.budget, c.stage.options) for c in matrix.cells]
    assert found == [("magnitude", "sparsity=0.5", {}), ("pattern", "2:4", {}),
                     ("pattern", "sparsity=0.8", {})]  # fmt: skip
    assert Matrix.parse(matrix.as_yaml()) == matrix
    for wrong in ("[]", "2:4"):
        with pytest.raises(InputError, match="budgets: got .*a list of budgets"):
            Matrix.parse(text.replace("OWN", wrong))
