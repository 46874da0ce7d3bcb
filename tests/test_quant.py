import pytest
import torch
import torch.nn as nn

import quant
from common import UserError


def test_gradient_through_nf4_is_that_of_its_dequantized_twin():
    torch.manual_seed(0)
    layer = quant.NF4Linear.from_linear(nn.Linear(64, 24))
    x = torch.randn(5, 64, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    y, expected = layer(x), nn.functional.linear(twin, layer.dequantize(), layer.bias)
    (y ** 2).sum().backward()
    (expected ** 2).sum().backward()
    assert torch.equal(y, expected) and torch.allclose(x.grad, twin.grad)
    assert not any(p.requires_grad for p in layer.parameters())


def test_nan_in_weights_is_refused():
    weight = torch.randn(64, 64)
    weight[3, 5] = torch.nan
    with pytest.raises(UserError, match="1 of 4,096 values are NaN"):
        quant.nf4_quantize(weight)


def test_damaged_bitsandbytes_statistics_are_refused():
    layer = quant.NF4Linear.from_linear(nn.Linear(64, 64))
    good = quant.write_bnb(layer, "q")
    for key, value in (("q.weight", good["q.weight"][:-1]), ("q.weight.absmax", good["q.weight.absmax"][:-1]),
                       ("q.weight.quant_map", torch.arange(16.0)),
                       ("q.weight.quant_state.bitsandbytes__nf4", torch.tensor(list(b'{"blocksize": 1e99'), dtype=torch.uint8))):
        with pytest.raises(UserError, match="q.weight"):
            quant.read_bnb(good | {key: value}, "q", (64, 64))
