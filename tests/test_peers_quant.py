"""quant.py against what others wrote: bitsandbytes, transformers."""
import bitsandbytes.functional as bnb
import pytest
import torch
import torch.nn as nn

import quant

pytestmark = pytest.mark.peers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 64), (128, 172), (3, 50), (300, 1024)])
def test_nf4_is_bitsandbytes_bit_for_bit(shape, dtype):
    torch.manual_seed(0)
    weight = (torch.randn(shape) * 0.05).to(dtype)
    weight[0] = 0  # whole blocks of zeros
    weight.view(-1)[-1] = 3.0  # an outlier
    for double in (False, True):
        packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=double)
        ours = quant.nf4_quantize(weight, 64, double)
        assert torch.equal(ours["packed"], packed.view(-1)) and torch.equal(ours["absmax"], state.absmax)
        if double:
            assert torch.equal(ours["nested_absmax"], state.state2.absmax) and torch.equal(ours["offset"], state.offset)
        assert torch.equal(quant.nf4_dequantize(ours, shape, 64, dtype), bnb.dequantize_4bit(packed, state))


def test_eight_bit_scales_are_bitsandbytes_for_a_million_values():
    torch.manual_seed(0)
    x = torch.rand(1 << 20) * 2 - 1
    codes, state = bnb.quantize_blockwise(x, blocksize=256)
    ours, absmax = quant.dynamic_quantize(x)
    assert torch.equal(ours, codes) and torch.equal(absmax, state.absmax)
    assert torch.equal(quant.dynamic_map(), bnb.create_dynamic_map())


@pytest.mark.parametrize("double", [False, True])
def test_nf4_tensors_pass_to_bitsandbytes_and_back(double):
    torch.manual_seed(0)
    linear = nn.Linear(128, 48)
    layer = quant.NF4Linear.from_linear(linear, double=double)
    tensors = quant.write_bnb(layer, "q")
    state = bnb.QuantState.from_dict({k: t for k, t in tensors.items() if k != "q.weight"}, device="cpu")
    theirs = bnb.dequantize_4bit(tensors["q.weight"], state)
    assert torch.equal(theirs, layer.dequantize())
    packed, state = bnb.quantize_4bit(linear.weight.data, quant_type="nf4", compress_statistics=double)
    tensors = {"q.weight": packed} | {f"q.weight.{k}": t for k, t in state.as_dict(packed=True).items()}
    assert torch.equal(quant.read_bnb(tensors, "q", (48, 128)).dequantize(), layer.dequantize())
