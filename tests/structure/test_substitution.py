"""Exchanged layers: in place, as a plan, and again at load."""

import pytest
import torch
from torch import nn

import secateurs as sc
from secateurs.errors import InputError
from secateurs.outcome import Outcome
from secateurs.structure.persistence import rebuild, rebuilds
from secateurs.structure.substitution import Substitute, resubstitute, substitute


class Thin(Substitute):
    """Two thin linear layers for a wide one, only for these tests."""

    kind = "test-thin"

    def __init__(self, inputs, outputs, rank):
        super().__init__()
        self.first, self.second = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs)

    def forward(self, x):
        return self.second(self.first(x))

    def config(self):
        return {"rank": self.first.out_features}

    @classmethod
    def shaped(cls, dense, config):
        return cls(dense.in_features, dense.out_features, config["rank"])


def make():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 3)))


def test_a_layer_is_exchanged_in_place_and_saved_without_pickle(tmp_path):
    model = make().eval()
    outcome = Outcome(model)
    outcome.surgery.append(substitute(model, {"0": Thin(6, 8, 2), "2.0": Thin(8, 3, 1)}))
    assert not model[0].training
    sc.save(outcome, tmp_path / "out")
    again = sc.load(tmp_path / "out", make)
    x = torch.randn(5, 6)
    torch.testing.assert_close(again.model(x), model(x), rtol=0, atol=0)
    assert isinstance(again.model[2][0], Thin)


def test_the_dense_model_of_a_plan_is_asked_for():
    plan = substitute(make(), {"2.0": Thin(8, 3, 1)})
    with pytest.raises(InputError, match=r"no layer '2\.0'"):
        rebuild(nn.Sequential(nn.Linear(6, 8)), [plan])
    with pytest.raises(InputError, match="no layer ''"):
        substitute(make(), {"": Thin(8, 3, 1)})


def test_nothing_is_exchanged_where_one_path_is_wrong():
    model = make()
    with pytest.raises(InputError, match="'7'"):
        substitute(model, {"0": Thin(6, 8, 2), "7": Thin(8, 3, 1)})
    assert isinstance(model[0], nn.Linear)


def test_unknown_kinds_and_forms_are_named():
    with pytest.raises(InputError, match=r"test-thick.*test-thin"):
        resubstitute(make(), {"layers": {"0": {"kind": "test-thick", "config": {}}}})
    with pytest.raises(InputError, match=r"form of surgery.*folded"):
        rebuild(make(), [{"form": "folded"}])


def test_a_kind_is_one_class():
    with pytest.raises(InputError, match="test-thin"):
        type("Other", (Substitute,), {"kind": "test-thin"})


def test_a_method_may_bring_a_form_of_its_own():
    @rebuilds("test-shortened")
    def shortened(model, plan):
        return model[: plan["length"]]

    assert len(rebuild(make(), [{"form": "test-shortened", "length": 2}])) == 2
