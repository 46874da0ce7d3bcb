"""quant.py and formats/packed.py against what others wrote: bitsandbytes, transformers."""

import pytest
import torch
from test_quant import ids, small_model

import quant
from formats import packed
from model import Transformer

pytestmark = pytest.mark.peers


@pytest.fixture
def bnb():
    import bitsandbytes.functional

    return bitsandbytes.functional


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 64), (128, 172), (3, 50), (300, 1024)])
@pytest.mark.parametrize("double", [False, True])
def test_nf4_is_bitsandbytes_bit_for_bit(shape, dtype, double, bnb):
    torch.manual_seed(0)
    weight = (torch.randn(shape) * 0.05).to(dtype)
    weight[0] = 0  # whole blocks of zeros
    weight.view(-1)[-1] = 3.0  # an outlier
    theirs, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=double)
    ours = quant.nf4_quantize(weight)
    assert torch.equal(ours["packed"], theirs.view(-1))
    if not double:  # which we only read
        ours = {"packed": ours["packed"], "absmax": state.absmax}
    else:
        assert torch.equal(ours["absmax"], state.absmax)
        assert torch.equal(ours["nested_absmax"], state.state2.absmax)
        assert torch.equal(ours["offset"], state.offset)
    expected = bnb.dequantize_4bit(theirs, state)
    assert torch.equal(quant.NF4Linear(ours, shape).dequantize(dtype), expected)


def test_eight_bit_scales_are_bitsandbytes_for_a_million_values(bnb):
    torch.manual_seed(0)
    x = torch.rand(1 << 20) * 2 - 1
    codes, state = bnb.quantize_blockwise(x, blocksize=256)
    ours, absmax = quant.dynamic_quantize(x)
    assert torch.equal(ours, codes)
    assert torch.equal(absmax, state.absmax)
    assert torch.equal(quant.dynamic_map(), bnb.create_dynamic_map())


@pytest.mark.parametrize("double", [False, True])
def test_nf4_tensors_pass_from_bitsandbytes_and_back(double, bnb):
    torch.manual_seed(0)
    weight = torch.randn(48, 128)
    theirs, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=double)
    expected = bnb.dequantize_4bit(theirs, state)
    tensors = {"q.weight": theirs}
    for key, tensor in state.as_dict(packed=True).items():
        tensors[f"q.weight.{key}"] = tensor
    layer = packed.read_bnb(tensors, "q", (48, 128))
    assert torch.equal(layer.dequantize(), expected)
    tensors = packed.write_bnb(layer, "q")
    statistics = {key: tensor for key, tensor in tensors.items() if key != "q.weight"}
    state = bnb.QuantState.from_dict(statistics, device="cpu")
    assert torch.equal(bnb.dequantize_4bit(tensors["q.weight"], state), expected)


def wide_model():
    """Every width a multiple of 128, as bitsandbytes' kernels for CPUs with bf16 units want it."""
    return small_model(width=256, inner=512)


def test_transformers_opens_our_nf4_folder_and_computes_the_same(tmp_path):
    from transformers import AutoModelForCausalLM

    model = quant.quantize(wide_model(), "nf4")
    model.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(theirs.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    with torch.no_grad():
        expected = model(ids())
        difference = (theirs(ids()).logits - expected).norm() / expected.norm()
    # on a CPU with bf16 units its product rounds both sides to bfloat16; other codes differ by 0.1
    assert difference < 3e-2


def test_we_open_the_nf4_folder_that_transformers_writes(tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    wide_model().save_pretrained(tmp_path / "plain")
    how = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=how, dtype=torch.float32
    )
    theirs.save_pretrained(tmp_path / "nf4")
    ours = Transformer.from_pretrained(tmp_path / "nf4")
    expected = quant.quantize(wide_model(), "nf4")
    assert torch.equal(ours(ids()), expected(ids()))


@pytest.mark.parametrize("sym,act_order", [(True, False), (False, True)])
def test_transformers_reads_our_gptq_config(tmp_path, sym, act_order):
    from transformers import AutoConfig, GPTQConfig

    model = quant.gptq(small_model(), [ids()], 4, 32, act_order, sym=sym)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path).quantization_config
    parsed = GPTQConfig.from_dict(config)
    assert (parsed.bits, parsed.group_size, parsed.sym, parsed.desc_act) == (4, 32, sym, act_order)
    assert config["checkpoint_format"] in ("gptq", "gptq_v2")


@pytest.mark.parametrize("sym,act_order", [(True, False), (False, True)])
def test_gptq_tensors_have_the_layout_that_autogptq_unpacks(tmp_path, sym, act_order):
    """Dequantized as its own torch code does: shifts of 0, 4, .. 28 along the packed dimension."""
    from safetensors.torch import load_file

    model = quant.gptq(small_model(), [ids()], 4, 32, act_order, sym=sym)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    prefix = "model.layers.0.self_attn.q_proj"  # 64 -> 64
    layout = {
        "qweight": ((8, 64), torch.int32),
        "qzeros": ((2, 8), torch.int32),
        "scales": ((2, 64), torch.float16),
        "g_idx": ((64,), torch.int32),
    }
    own = {key: tensors[f"{prefix}.{key}"] for key in layout}
    assert {key: (tuple(t.shape), t.dtype) for key, t in own.items()} == layout
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    codes = (own["qweight"][:, None, :] >> shifts[None, :, None] & 15).reshape(64, 64)
    zeros = (own["qzeros"][:, :, None] >> shifts & 15).reshape(2, 64)
    zeros = zeros + (model.quantization["checkpoint_format"] == "gptq")
    groups = own["g_idx"].long()
    weight = own["scales"][groups].float() * (codes - zeros[groups])  # (K, N)
    assert torch.equal(weight.T, model.layers[0].self_attn.q_proj.dequantize())
