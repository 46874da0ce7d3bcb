"""Quantized folders: what is written comes back, and what is damaged is refused."""

import json

import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file
from test_quant import ids, small_model

import quant
from common import UserError
from formats import packed
from model import Transformer


@pytest.mark.parametrize("bits", range(2, 9))
def test_words_hold_any_codes_of_any_length(bits):
    codes = torch.randint(2**bits, (77, 5))
    words = packed.to_words(codes, bits)
    assert words.shape == (3 * bits, 5)
    assert words.dtype == torch.int32
    assert torch.equal(packed.from_words(words, bits, 77), codes.to(torch.uint8))


@pytest.mark.parametrize(
    "zeros,version,stored",
    [
        ([8], "gptq", 0x77777777),
        ([8], "gptq_v2", 0x88888888 - (1 << 32)),
        ([0], "gptq_v2", 0),
        ([15], "gptq", 0xEEEEEEEE - (1 << 32)),
        ([1], "gptq", 0),
        ([0, 8], "gptq", 0x7F7F7F7F),
    ],
)
def test_version_1_stores_zero_points_less_one_and_version_2_as_they_are(zeros, version, stored):
    codes, scales = torch.randint(16, (32, 32), dtype=torch.uint8), torch.ones(32, 1)
    zeros = torch.tensor(zeros * (32 // len(zeros)))[:, None]
    layer = quant.GroupLinear(codes, scales, zeros, 4, 32)
    tensors = packed.write_gptq(layer, "q", version)
    assert (tensors["q.qzeros"] == stored).all()
    config = {"bits": 4, "group_size": 32, "checkpoint_format": version}
    back = packed.read_gptq(tensors, "q", (32, 32), config)
    assert torch.equal(back.dequantize(), layer.dequantize())


def test_a_zero_point_of_zero_is_never_written_as_version_1():
    model = small_model()
    model.layers[0].self_attn.q_proj.weight.data.abs_()  # all positive: the zero point is code 0
    quant.quantize(model, "int4", 32, sym=False)
    assert model.quantization["checkpoint_format"] == "gptq_v2"
    assert quant.quantize(small_model(), "int4", 32).quantization["checkpoint_format"] == "gptq"


def quantized(kind, format, recipe):
    model = small_model(kind)
    if format != "gptq":
        return quant.quantize(model, format, 48, **recipe)
    return quant.gptq(model, ids().split(2), group_size=48, **recipe)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "format,recipe",
    [
        ("int8", {}),
        ("int4", {}),
        ("int4", dict(sym=False)),
        ("nf4", {}),
        ("gptq", dict(bits=4, act_order=True)),
        ("gptq", dict(bits=3)),
        ("gptq", dict(bits=8, sym=False)),
        ("gptq", dict(bits=5)),
    ],
)
def test_a_quantized_folder_comes_back_as_it_was(kind, format, recipe, tmp_path):
    model = quantized(kind, format, recipe)
    if kind == "gpt2" and format == "nf4":
        with pytest.raises(UserError, match="GPT-2"):
            model.save_pretrained(tmp_path)
        return
    model.save_pretrained(tmp_path)
    again = Transformer.from_pretrained(tmp_path)
    expected = model(ids())
    assert torch.equal(again(ids()), expected)
    assert again.quantization == model.quantization
    assert isinstance(again.layers[0].mlp.up_proj, quant.QuantLinear)
    half = Transformer.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.allclose(half(ids()), expected, rtol=0.3, atol=0.3)


def test_a_packed_head_comes_back_as_it_was(tmp_path):
    """As a folder of other programs may have it (lm_head: true)."""
    model = quant.quantize(small_model(), "int4", 32)
    model.lm_head = quant.GroupLinear.from_linear(model.lm_head, 4, 32)
    model.save_pretrained(tmp_path)
    again = Transformer.from_pretrained(tmp_path)
    assert isinstance(again.lm_head, quant.GroupLinear)
    assert torch.equal(again(ids()), model(ids()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("format", quant.FORMATS)
def test_a_quantized_folder_is_read_onto_the_gpu(format, tmp_path):
    model = quant.quantize(small_model(), format, 32)
    model.save_pretrained(tmp_path)
    again = Transformer.from_pretrained(tmp_path, device="cuda")
    weight = again.layers[0].mlp.up_proj.dequantize().cpu()
    assert torch.equal(weight, model.layers[0].mlp.up_proj.dequantize())


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32, torch.int8])
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_nf4_may_be_stored_under_another_type(storage, dtype, tmp_path):
    """As FSDP-QLoRA saves it: the same bytes, and bnb_4bit_quant_storage says their type."""
    model = quant.quantize(small_model(), "nf4")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.dtype == torch.uint8 and name.endswith(".weight"):
            tensors[name] = tensor.flatten().view(storage)[:, None]
    save_file(tensors, tmp_path / "model.safetensors")
    again = Transformer.from_pretrained(tmp_path, dtype=dtype)
    assert torch.equal(again(ids()), model(ids()))


def test_the_version_may_be_named_format_alone(tmp_path):
    model = small_model()
    model.layers[0].self_attn.q_proj.weight.data.abs_()  # which needs version 2
    quant.quantize(model, "int4", 32, sym=False).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    said = config["quantization_config"]
    said["format"] = said.pop("checkpoint_format")
    assert said["format"] == "gptq_v2"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(Transformer.from_pretrained(tmp_path)(ids()), model(ids()))


# --------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    "change,words",
    [
        ({"bits": 3}, "qweight is .* expected"),
        ({"group_size": 64}, "qzeros is .* expected"),
        ({"bits": 99}, "bits is 99"),
        ({"bits": 4.0}, "bits is 4.0"),
        ({"group_size": True}, "group_size is True"),
        ({"quant_method": "fp8"}, "'fp8'"),
        ({"checkpoint_format": "marlin"}, "marlin"),
        ({"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "fp4"}, "'bitsandbytes' .*'fp4'"),
        ({"quant_method": "bitsandbytes"}, "'bitsandbytes' .* are not supported"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": False}, "'load_in_4bit': False"),
        ({"quant_method": "awq", "version": "gemm"}, "'awq' .*'gemm'"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "pack-quantized"),
        ({"quant_method": "mxfp4"}, "'mxfp4'"),
        ("int4", "quantization_config is 'int4', expected dict"),
    ],
)
def test_damaged_folders_are_refused(tmp_path, change, words):
    quant.quantize(small_model(), "int4", 32).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = (
        config["quantization_config"] | change if isinstance(change, dict) else change
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=words):
        Transformer.from_pretrained(tmp_path)


def test_groups_of_another_size_and_tensors_of_another_type_are_refused():
    layer = quant.GroupLinear.from_linear(nn.Linear(64, 32), 4, 32)
    good = packed.write_gptq(layer, "q", "gptq")
    config = {"bits": 4, "group_size": 32, "checkpoint_format": "gptq"}
    for change, words in (
        ({"q.g_idx": torch.zeros(64, dtype=torch.int32)}, "2 groups of 32"),
        ({"q.qzeros": good["q.qzeros"].float()}, "q.qzeros holds torch.float32"),
        ({"q.scales": good["q.scales"].int()}, "q.scales holds torch.int32"),
    ):
        with pytest.raises(UserError, match=words):
            packed.read_gptq(good | change, "q", (32, 64), config)


def test_damaged_bitsandbytes_statistics_are_refused():
    layer = quant.pack_linear(nn.Linear(64, 64), "nf4", 64)
    good = packed.write_bnb(layer, "q")
    statistics = f"q.weight.{packed.NF4_MARK}"
    for key, value in (
        ("q.weight", good["q.weight"][:-1]),
        ("q.weight.absmax", good["q.weight.absmax"][:-1]),
        ("q.weight.quant_map", torch.arange(16.0)),
        (statistics, torch.tensor(list(b'{"blocksize": 1e99'), dtype=torch.uint8)),
        (statistics, torch.tensor(list(b"[]"), dtype=torch.uint8)),
    ):
        with pytest.raises(UserError, match="q.weight"):
            packed.read_bnb(good | {key: value}, "q", (64, 64))
