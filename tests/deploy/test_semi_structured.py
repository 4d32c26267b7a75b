"""2:4 in sparse kernels where there are some; elsewhere the dense layer stays and says why."""

import pytest
import torch
from torch import nn

from secateurs.deploy.semi_structured import (
    is_two_of_four,
    pack_semi_structured,
    unpack_semi_structured,
)
from secateurs.errors import InputError
from secateurs.parts.patterns import NM


def halved(model):
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.mul_(NM(2, 4).mask(layer.weight.abs()))
    return model


def test_the_pattern_is_recognised():
    weight = torch.tensor([[1.0, 0, 2, 0, 0, 0, 0, 3]])
    assert is_two_of_four(weight)
    assert is_two_of_four(torch.zeros(2, 4))
    assert not is_two_of_four(torch.tensor([[1.0, 2, 3, 0]]))
    assert not is_two_of_four(torch.zeros(2, 6))
    assert not is_two_of_four(torch.zeros(2, 2, 4))


def test_without_kernels_the_dense_layers_stay_and_say_why():
    torch.manual_seed(0)
    model = halved(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)))
    inputs = torch.randn(5, 64)
    wanted = model(inputs)
    told = pack_semi_structured(model)
    assert told.packed == ()
    assert told.dense == dict.fromkeys(["0", "2"], "no sparse kernels on cpu")
    assert torch.equal(model(inputs), wanted)
    unpack_semi_structured(model)
    assert torch.equal(model(inputs), wanted)


def test_a_model_that_is_not_2_of_4_is_refused():
    with pytest.raises(InputError, match="2:4"):
        pack_semi_structured(nn.Sequential(nn.Linear(64, 64)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_packed_model_gives_what_the_dense_one_gives():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 64), nn.Linear(64, 10))
    model = halved(layers).cuda().half()
    inputs = torch.randn(64, 128, device="cuda", dtype=torch.half)
    wanted = model(inputs)
    told = pack_semi_structured(model)
    assert told.packed == ("0", "2")
    assert "multiples of 64" in told.dense["3"]
    assert torch.allclose(model(inputs), wanted, atol=1e-2)
    unpack_semi_structured(model)
    assert torch.equal(model(inputs), wanted)
