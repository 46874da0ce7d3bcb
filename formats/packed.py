"""Quantized model folders: GPTQ's layout for integers and bitsandbytes' for NF4, both ways.

hub.save_model writes what `packed_state` gives it; hub.load_model asks `check_config` and
`expect_packed` what should be there, and `install_packed` puts the layers into the model.
"""

import json
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import STUMBLES, UserError, read_value, warn_of_unknown
from formats.hub import folder_module
from kernels import NF4
from quant import NESTED_BLOCK, GroupLinear, NF4Linear, QuantLinear, dynamic_map

NF4_MARK = "quant_state.bitsandbytes__nf4"
# Of quantization_config: what is applied, and what tells how the codes were found, or is for other
# programs' kernels.
QUANTIZATION_KEYS = """activations backend batch_size bits block_name_to_quantize
    cache_block_outputs checkpoint_format damp_auto_increment damp_percent dataset desc_act
    exllama_config format group_size lm_head load_in_4bit load_in_8bit max_input_length meta
    model_file_base_name model_name_or_path model_seqlen module_name_preceding_first_block
    modules_in_block_to_quantize modules_to_not_convert mse pack_dtype pad_token_id
    quant_method quantizer static_groups sym tokenizer true_sequential use_cuda_fp16
    use_exllama""".split()


# ------------------------------------------------------------------------------------------- GPTQ
# The layout that transformers, GPTQModel, AutoGPTQ and vLLM read. Codes are a stream of `bits` bits
# each, the lowest first, in int32 words; qweight's streams run down the inputs, qzeros' along the
# outputs:
#   qweight int32 (K*bits/32, N)    qzeros int32 (G, N*bits/32)
#   scales float16 (G, N)           g_idx int32 (K): each input's group
# Version 1 ("gptq") stores zero points less one, "gptq_v2" as they are. K and N are filled up to
# multiples of 32.
def to_words(codes, bits):
    """(K, N) integers below 2^bits -> int32 (ceil(K/32) * bits, N): 32 codes fill `bits` words."""
    K, N = codes.shape
    runs = F.pad(codes.long(), (0, 0, 0, -K % 32)).view(-1, 32, N)  # (K/32, 32, N)
    words = runs.new_zeros(len(runs), bits + 1, N)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        code = runs[:, i] << shift
        words[:, word] |= code
        words[:, word + 1] |= code >> 32  # what runs over into the next word
    return words[:, :bits].flatten(0, 1).int()  # their lower 32 bits


def from_words(words, bits, count):
    """The inverse -> uint8 (count, N)."""
    runs = (words.long() & 0xFFFFFFFF).view(-1, bits, words.size(1))  # (K/32, bits, N)
    codes = []
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        code = runs[:, word] >> shift
        if shift + bits > 32:
            code |= runs[:, word + 1] << 32 - shift
        codes.append((code & 2**bits - 1).to(torch.uint8))
    return torch.stack(codes, 1).flatten(0, 1)[:count]  # (K/32, 32, N) -> (count, N)


def write_gptq(layer, name, version):
    """GroupLinear -> {tensor name: tensor} in GPTQ's layout."""
    codes, scales, zeros, size, order, bits = layer.groups()
    groups = torch.arange(layer.in_features, device=codes.device) // size
    if order is not None:
        back = order.argsort()
        codes = codes[:, back]
        groups = groups[back]
    if version == "gptq":
        zeros = zeros - 1 & 2**bits - 1  # 0, which other programs write, becomes all bits
    return {
        f"{name}.qweight": to_words(codes.t(), bits),
        f"{name}.qzeros": to_words(zeros, bits).t(),
        f"{name}.scales": scales.half().t(),
        f"{name}.g_idx": groups.int(),
    }


def read_gptq(tensors, name, shape, config, bias=None):
    """The inverse -> GroupLinear.

    UserError where a tensor is of another type, or g_idx not groups of the size in the config.
    """
    for key, tensor in tensors.items():
        if tensor.is_floating_point() != key.endswith(".scales"):
            raise UserError(f"{key} holds {tensor.dtype}, which is not GPTQ's: scales are floats")
    N, K = shape
    bits = config["bits"]
    group = K if config["group_size"] == -1 else config["group_size"]
    groups = tensors[f"{name}.g_idx"]
    order = groups.argsort(stable=True)
    straight = torch.arange(K, device=order.device)
    if not torch.equal(groups[order].long(), straight // group):
        raise UserError(
            f"{name}.g_idx: not {-(-K // group)} groups of {group} inputs, "
            "as quantization_config says"
        )
    codes = from_words(tensors[f"{name}.qweight"], bits, K)[order].t().contiguous()  # (N, K)
    zeros = from_words(tensors[f"{name}.qzeros"].t().contiguous(), bits, N)  # (N, G)
    if config["checkpoint_format"] == "gptq":
        zeros = zeros + 1 & 2**bits - 1
    scales = tensors[f"{name}.scales"].t().contiguous()
    if torch.equal(order, straight):
        order = None
    return GroupLinear(codes, scales, zeros, bits, group, order, bias)


# ----------------------------------------------------------------------------------- bitsandbytes
def write_bnb(layer, name):
    """NF4Linear -> {tensor name: tensor}, as bitsandbytes and transformers write and read them."""
    info = {
        "quant_type": "nf4",
        "blocksize": layer.block,
        "dtype": "float32",
        "shape": [layer.out_features, layer.in_features],
    }
    weight = f"{name}.weight"
    out = {
        weight: layer.packed[:, None],
        f"{weight}.absmax": layer.absmax,
        f"{weight}.quant_map": torch.tensor(NF4),
    }
    if layer.nested_absmax is not None:
        out[f"{weight}.nested_absmax"] = layer.nested_absmax
        out[f"{weight}.nested_quant_map"] = dynamic_map().clone()
        info["nested_blocksize"] = NESTED_BLOCK
        info["nested_dtype"] = "float32"
        info["nested_offset"] = layer.offset.item()
    text = json.dumps(info).encode()
    out[f"{weight}.{NF4_MARK}"] = torch.tensor(list(text), dtype=torch.uint8)
    return out


def read_bnb(tensors, name, shape, config=None, bias=None):
    """The inverse: {tensor name: tensor} with NAME.weight and its statistics -> NF4Linear.

    UserError where they do not fit the shape, or have other codes than NF4's.
    """
    weight = f"{name}.weight"
    state = {}
    try:
        info = json.loads(bytes(tensors[f"{weight}.{NF4_MARK}"].tolist()))
        block = info["blocksize"]
        # the bytes may be stored under another type, as FSDP-QLoRA wants (bnb_4bit_quant_storage)
        packed = tensors[weight].flatten().view(torch.uint8)
        absmax = tensors[f"{weight}.absmax"]
        facts = [
            block in [32 << i for i in range(8)],
            info["shape"] == list(shape),
            2 * packed.numel() == math.prod(shape),
            absmax.numel() == -(-2 * packed.numel() // block),
            tensors[f"{weight}.quant_map"].tolist() == torch.tensor(NF4).tolist(),
        ]
        if f"{weight}.nested_absmax" in tensors:
            nested = tensors[f"{weight}.nested_absmax"]
            state = {"nested_absmax": nested, "offset": torch.tensor(float(info["nested_offset"]))}
            facts += [
                info.get("nested_blocksize", NESTED_BLOCK) == NESTED_BLOCK,
                nested.numel() == -(-absmax.numel() // NESTED_BLOCK),
                tensors[f"{weight}.nested_quant_map"].tolist() == dynamic_map().tolist(),
            ]
    except STUMBLES as error:
        raise UserError(f"{weight}: damaged bitsandbytes statistics ({error!r})") from None
    if not all(facts):
        raise UserError(
            f"{weight}: sizes or code table are not those of an NF4 matrix of shape {tuple(shape)}"
        )
    return NF4Linear(state | {"packed": packed, "absmax": absmax}, shape, bias, block)


# ---------------------------------------------------------------------------------------- folders
def packed_state(model):
    """A quantized model's state dict as its folder has it.

    Packed layers have the layout's tensor names; the rest is as it is. UserError: a model that this
    layout has no place for.
    """
    config = model.config
    nf4 = model.quantization["quant_method"] == "bitsandbytes"
    if config.is_gpt2 and (nf4 or config.hidden_size % 32):
        raise UserError(
            "GPT-2 folders join q, k and v in one matrix: that needs int4 or gptq, and a width "
            f"({config.hidden_size}) in multiples of 32"
        )
    state = model.state_dict()
    for name, layer in model.named_modules():  # a head may be packed, too
        if isinstance(layer, QuantLinear):
            for key, _ in layer.named_buffers():
                state.pop(f"{name}.{key}", None)  # not there: a table that is never saved
            version = model.quantization.get("checkpoint_format")
            state |= write_bnb(layer, name) if nf4 else write_gptq(layer, name, version)
    return state


def check_config(config, where):
    """quantization_config of a folder from anywhere -> the same, its fields checked.

    UserError names what is not supported.
    """
    known = [key for key in config if key.startswith(("bnb_4bit_", "llm_int8_"))]
    warn_of_unknown(config.keys() - {*known, *QUANTIZATION_KEYS}, f"{where}, quantization_config")
    method = config.get("quant_method")
    # older writers say load_in_4bit, all of them the type of the 4 bits
    nf4 = config.get("load_in_4bit", True) and config.get("bnb_4bit_quant_type") == "nf4"
    if method == "bitsandbytes" and nf4:
        return config
    version = config.get("checkpoint_format") or config.get("format") or "gptq"
    if method != "gptq" or version not in ("gptq", "gptq_v2"):
        raise UserError(
            f"{where}: weights quantized as {method!r} ({str(config)[:200]}) are not supported; "
            "this program reads gptq, gptq_v2 and bitsandbytes NF4"
        )
    config = {"group_size": 128} | config | {"checkpoint_format": version}
    read_value(config, where, "bits", 8)
    if config["group_size"] != -1:  # which is a whole row
        read_value(config, where, "group_size", 1 << 24)
    return config


def expect_packed(model, config, files):
    """What a quantized folder should hold -> ({our tensor name: meta tensor}, {layer: (N, K)}).

    model: a Transformer on "meta"; files: as hub.open_weights gives them. A layer is packed where
    its folder says so; others may be left as they were.
    """
    gptq = config["quant_method"] == "gptq"
    mark = "qweight" if gptq else f"weight.{NF4_MARK}"
    state = model.state_dict()
    packed = {}
    for name, linear in model.named_modules():
        if not isinstance(linear, nn.Linear):
            continue
        there = folder_module(name)
        # GPT-2's folders have names of their own, and all of its layers are packed
        all_packed = gptq and model.config.is_gpt2 and name != "lm_head"
        if not all_packed and f"{there}.{mark}" not in files:
            continue
        N, K = linear.weight.shape
        packed[name] = (N, K)
        del state[f"{name}.weight"]
        if gptq:
            bits = config["bits"]
            group = config["group_size"]
            G = 1 if group == -1 else -(-K // group)
            shapes = {
                "qweight": (-(-K // 32) * bits, N),
                "qzeros": (G, -(-N // 32) * bits),
                "scales": (G, N),
                "g_idx": (K,),
            }
        else:  # as the file has them; read_bnb checks whether they fit (N, K)
            shapes = {}
            for key, (file, stored) in files.items():
                if key.startswith(f"{there}.weight"):
                    shapes[key.removeprefix(f"{there}.")] = file.get_slice(stored).get_shape()
        if f"{there}.bias" in files:
            # some writers store one of zeros where the architecture has none
            shapes["bias"] = (N,)
        for key, shape in shapes.items():
            state[f"{name}.{key}"] = torch.empty(shape, device="meta")
    return state, packed


def install_packed(model, config, state, packed):
    """Put packed layers, made of the folder's tensors in `state`, in place of the model's.

    The rest is left in `state`.
    """
    for name, shape in packed.items():
        own = {key: state.pop(key) for key in list(state) if key.startswith(f"{name}.")}
        bias = own.pop(f"{name}.bias", None)
        read = read_bnb if config["quant_method"] == "bitsandbytes" else read_gptq
        model.set_submodule(name, read(own, name, shape, config, bias))
    model.quantization = config
