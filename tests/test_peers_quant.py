"""quant.py against what others wrote: bitsandbytes, transformers."""

import pytest
import torch
import torch.nn as nn
from test_quant import ids, small_model

import quant as make
from formats import packed as quant
from model import Transformer

pytestmark = pytest.mark.peers


@pytest.fixture
def bnb():
    import bitsandbytes.functional

    return bitsandbytes.functional


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 64), (128, 172), (3, 50), (300, 1024)])
def test_nf4_is_bitsandbytes_bit_for_bit(shape, dtype, bnb):
    torch.manual_seed(0)
    weight = (torch.randn(shape) * 0.05).to(dtype)
    weight[0] = 0  # whole blocks of zeros
    weight.view(-1)[-1] = 3.0  # an outlier
    for double in (False, True):
        packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=double)
        ours = quant.nf4_quantize(weight, 64, double)
        assert torch.equal(ours["packed"], packed.view(-1)) and torch.equal(
            ours["absmax"], state.absmax
        )
        if double:
            assert torch.equal(ours["nested_absmax"], state.state2.absmax) and torch.equal(
                ours["offset"], state.offset
            )
        assert torch.equal(
            quant.nf4_dequantize(ours, shape, 64, dtype), bnb.dequantize_4bit(packed, state)
        )


def test_eight_bit_scales_are_bitsandbytes_for_a_million_values(bnb):
    torch.manual_seed(0)
    x = torch.rand(1 << 20) * 2 - 1
    codes, state = bnb.quantize_blockwise(x, blocksize=256)
    ours, absmax = quant.dynamic_quantize(x)
    assert torch.equal(ours, codes) and torch.equal(absmax, state.absmax)
    assert torch.equal(quant.dynamic_map(), bnb.create_dynamic_map())


@pytest.mark.parametrize("double", [False, True])
def test_nf4_tensors_pass_to_bitsandbytes_and_back(double, bnb):
    torch.manual_seed(0)
    linear = nn.Linear(128, 48)
    layer = quant.NF4Linear.from_linear(linear, double=double)
    tensors = quant.write_bnb(layer, "q")
    state = bnb.QuantState.from_dict(
        {k: t for k, t in tensors.items() if k != "q.weight"}, device="cpu"
    )
    theirs = bnb.dequantize_4bit(tensors["q.weight"], state)
    assert torch.equal(theirs, layer.dequantize())
    packed, state = bnb.quantize_4bit(
        linear.weight.data, quant_type="nf4", compress_statistics=double
    )
    tensors = {"q.weight": packed} | {
        f"q.weight.{k}": t for k, t in state.as_dict(packed=True).items()
    }
    assert torch.equal(quant.read_bnb(tensors, "q", (48, 128)).dequantize(), layer.dequantize())


def test_transformers_opens_our_nf4_folder_and_computes_the_same(tmp_path):
    from transformers import AutoModelForCausalLM

    model = small_model()
    make.quantize(model, "nf4").save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(theirs.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    with torch.no_grad():
        difference = (theirs(ids()).logits - model(ids())).norm() / model(ids()).norm()
    assert difference < 5e-3  # its CPU product may run in bfloat16


def test_we_open_the_nf4_folder_that_transformers_writes(tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    small_model().save_pretrained(tmp_path / "plain")
    how = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=how, dtype=torch.float32
    )
    theirs.save_pretrained(tmp_path / "nf4")
    ours, expected = (
        Transformer.from_pretrained(tmp_path / "nf4"),
        make.quantize(small_model(), "nf4"),
    )
    assert torch.equal(ours(ids()), expected(ids()))


@pytest.mark.parametrize("sym,act_order", [(True, False), (False, True)])
def test_transformers_reads_our_gptq_config_and_the_tensors_have_its_layout(
    tmp_path, sym, act_order
):
    from safetensors.torch import load_file
    from transformers import AutoConfig, GPTQConfig

    model = make.gptq(small_model(), [ids()], 4, 32, act_order, sym=sym, log=lambda line: None)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path).quantization_config
    parsed = GPTQConfig.from_dict(config)
    assert (parsed.bits, parsed.group_size, parsed.sym, parsed.desc_act) == (4, 32, sym, act_order)
    assert config["checkpoint_format"] in ("gptq", "gptq_v2")
    tensors = load_file(tmp_path / "model.safetensors")
    words, zeros, scales, groups = (
        tensors[f"model.layers.0.self_attn.q_proj.{key}"]
        for key in ("qweight", "qzeros", "scales", "g_idx")
    )  # 64 -> 64
    assert (words.shape, zeros.shape, scales.shape, groups.shape) == (
        (8, 64),
        (2, 8),
        (2, 64),
        (64,),
    )
    assert (words.dtype, zeros.dtype, scales.dtype, groups.dtype) == (
        torch.int32,
        torch.int32,
        torch.float16,
        torch.int32,
    )
    # dequantized as AutoGPTQ's own torch code does: shifts of 0, 4, .. 28 along the packed dimension
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    codes = (words[:, None, :] >> shifts[None, :, None] & 15).reshape(64, 64)
    zero = (zeros[:, :, None] >> shifts & 15).reshape(2, 64) + (
        config["checkpoint_format"] == "gptq"
    )
    weight = scales[groups.long()].float() * (codes - zero[groups.long()])  # (K, N)
    assert torch.equal(weight.T, model.layers[0].self_attn.q_proj.dequantize())
