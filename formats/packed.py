"""Packed weights: NF4, int8 and groups of 2 to 8 bits as linear layers with a fast product on each device; their folders.

quant.py makes them; GPTQ's layout on disk, and bitsandbytes' for NF4, are what other programs open.
"""

import json

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import UserError
from kernels import NF4
from quant import NESTED_BLOCK, GroupLinear, Int8Linear, NF4Linear, QuantLinear, dynamic_map

# ---------------------------------------------------------------------------------------------- NF4


# ----------------------------------------------------------------------------------------- integers


# ------------------------------------------------------------------------------------ linear layers


# ------------------------------------------------------------------------------------------ folders
# GPTQ's layout, which transformers, GPTQModel, AutoGPTQ and vLLM read. Codes are a stream of `bits` bits each, the lowest
# first, in int32 words; qweight's streams run down the inputs, qzeros' along the outputs:
#   qweight int32 (K*bits/32, N)   qzeros int32 (G, N*bits/32)   scales float16 (G, N)   g_idx int32 (K): each input's group
# Version 1 stores zero points less one, "gptq_v2" as they are. K and N are filled up to multiples of 32.
def to_words(codes, bits):
    """(K, N) integers below 2^bits -> int32 (ceil(K/32) * bits, N): 32 codes fill `bits` words."""
    codes = F.pad(codes.long(), (0, 0, 0, -codes.size(0) % 32)).view(
        -1, 32, codes.size(1)
    )  # (K/32, 32, N)
    words = codes.new_zeros(codes.size(0), bits + 1, codes.size(2))
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        words[:, word] |= codes[:, i] << shift & 0xFFFFFFFF
        words[:, word + 1] |= codes[:, i] << shift >> 32  # what runs over into the next word
    return words[:, :bits].flatten(0, 1).int()


def from_words(words, bits, count):
    """The inverse -> uint8 (count, N)."""
    words, codes = (words.long() & 0xFFFFFFFF).view(-1, bits, words.size(1)), []
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        code = words[:, word] >> shift
        if shift + bits > 32:
            code |= words[:, word + 1] << 32 - shift
        codes.append((code & 2**bits - 1).to(torch.uint8))
    return torch.stack(codes, 1).flatten(0, 1)[:count]  # (K/32, 32, N) -> (count, N)


def write_gptq(layer, name, version):
    """Int8Linear or GroupLinear -> {tensor name: tensor} in GPTQ's layout."""
    codes, scales, zeros, group, order, bits = layer.groups()
    groups = torch.arange(layer.in_features, device=codes.device) // group
    if order is not None:
        codes, groups = codes[:, order.argsort()], groups[order.argsort()]
    out = {
        "qweight": to_words(codes.t(), bits),
        "qzeros": to_words(zeros - int(version == "gptq"), bits).t(),
        "scales": scales.half().t(),
        "g_idx": groups.int(),
    }
    return {f"{name}.{key}": tensor for key, tensor in out.items()}


def read_gptq(tensors, name, shape, config, bias=None):
    """The inverse -> Int8Linear or GroupLinear. UserError where g_idx is not groups of the size that the config states."""
    qweight, qzeros, scales, g_idx = (
        tensors[f"{name}.{key}"] for key in ("qweight", "qzeros", "scales", "g_idx")
    )
    (N, K), bits = shape, config["bits"]
    group = K if config["group_size"] == -1 else config["group_size"]
    order = g_idx.argsort(stable=True)
    if not torch.equal(g_idx[order].long(), torch.arange(K, device=g_idx.device) // group):
        raise UserError(
            f"{name}.g_idx: not {-(-K // group)} groups of {group} inputs, as quantization_config says"
        )
    codes = from_words(qweight, bits, K)[order].t().contiguous()  # (N, K)
    zeros = from_words(qzeros.t().contiguous(), bits, N)
    if config["checkpoint_format"] == "gptq":
        zeros = (zeros + 1) & 2**bits - 1  # a writer that had 0 to store less one left all bits set
    scales = scales.t().contiguous()
    if bits == 8 and group == K and (zeros == 128).all() and not config.get("desc_act"):
        return Int8Linear(codes, scales, bias, config.get("activations") == "int8")
    straight = torch.equal(order, torch.arange(K, device=order.device))
    return GroupLinear(codes, scales, zeros, bits, group, None if straight else order, bias)


def write_bnb(layer, name, dtype=torch.float32):
    """NF4Linear -> {tensor name: tensor} of a folder, as bitsandbytes and transformers write and read them."""
    info = {
        "quant_type": "nf4",
        "blocksize": layer.block,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": [layer.out_features, layer.in_features],
    }
    out = {"": layer.packed[:, None], ".absmax": layer.absmax, ".quant_map": torch.tensor(NF4)}
    if "nested_absmax" in layer._buffers:
        out |= {".nested_absmax": layer.nested_absmax, ".nested_quant_map": dynamic_map().clone()}
        info |= {
            "nested_blocksize": NESTED_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": layer.offset.item(),
        }
    out[".quant_state.bitsandbytes__nf4"] = torch.tensor(
        list(json.dumps(info).encode()), dtype=torch.uint8
    )
    return {f"{name}.weight{key}": tensor for key, tensor in out.items()}


def read_bnb(tensors, name, shape, bias=None):
    """The inverse: {tensor name: tensor} with NAME.weight and its statistics -> NF4Linear. Other codes than NF4 are refused."""
    own = {
        key.removeprefix(name + ".weight").lstrip("."): t
        for key, t in tensors.items()
        if key.startswith(name + ".weight")
    }
    try:
        info = json.loads(bytes(own["quant_state.bitsandbytes__nf4"].tolist()))
        block, weights, state = (
            info["blocksize"],
            shape[0] * shape[1],
            {"packed": own[""].reshape(-1), "absmax": own["absmax"]},
        )
        fits = [
            block in (32, 64, 128, 256, 512, 1024, 2048, 4096),
            tuple(info["shape"]) == tuple(shape),
            own[""].dtype == torch.uint8 and own[""].numel() * 2 == weights,
            own["absmax"].numel() == -(-weights // block),
            torch.equal(own["quant_map"].float(), torch.tensor(NF4)),
        ]
        if "nested_absmax" in own:
            fits += [
                info.get("nested_blocksize", NESTED_BLOCK) == NESTED_BLOCK,
                own["nested_absmax"].numel() == -(-own["absmax"].numel() // NESTED_BLOCK),
                torch.equal(own["nested_quant_map"], dynamic_map()),
            ]
            state |= {
                "nested_absmax": own["nested_absmax"],
                "offset": torch.tensor(float(info["nested_offset"])),
            }
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise UserError(
            f"{name}.weight: damaged bitsandbytes statistics ({type(error).__name__}: {error})"
        ) from None
    if not all(fits):
        raise UserError(
            f"{name}.weight: sizes or code table are not those of an NF4 matrix of shape {tuple(shape)}"
        )
    return NF4Linear(state, shape, bias, block)


def packed_state(model):
    """A quantized model's state dict as its folder has it: packed layers by the layout's tensor names, the rest as is."""
    layers = {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, QuantLinear) and name != "lm_head"
    }
    inside = tuple(name + "." for name in layers)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith((*inside, "lm_head."))}
    if not model.config.tie_word_embeddings:
        if isinstance(model.lm_head, QuantLinear):
            raise UserError(
                "a folder keeps the output head as it was: save before quantizing the head"
            )
        state["lm_head.weight"] = model.lm_head.weight
    nf4 = model.quantization["quant_method"] == "bitsandbytes"
    if nf4 and model.config.is_gpt2:
        raise UserError(
            "GPT-2 folders join q, k and v in one transposed matrix, which NF4 blocks cannot follow; use int4 or gptq"
        )
    if model.config.is_gpt2 and model.config.hidden_size % 32:
        raise UserError(
            f"a GPT-2 folder joins q, k and v; their width {model.config.hidden_size} is not a multiple of 32"
        )
    for name, layer in layers.items():
        state |= (
            write_bnb(layer, name)
            if nf4
            else write_gptq(layer, name, model.quantization["checkpoint_format"])
        )
        if layer.bias is not None:
            state[f"{name}.bias"] = layer.bias
    return state


def check_config(config, where):
    """quantization_config of a folder from anywhere -> the same, its fields checked; UserError names what is not supported."""
    config = dict(config) if isinstance(config, dict) else {}
    method = config.get("quant_method")
    if (
        method == "bitsandbytes"
        and config.get("load_in_4bit")
        and config.get("bnb_4bit_quant_type") == "nf4"
    ):
        return config
    config.setdefault("checkpoint_format", "gptq")
    bits, group = config.get("bits"), config.get("group_size", 128)
    if method != "gptq" or config["checkpoint_format"] not in ("gptq", "gptq_v2"):
        raise UserError(
            f"{where}: weights quantized as {method!r} ({config.get('checkpoint_format')}) are not supported; "
            "this program reads gptq, gptq_v2 and bitsandbytes NF4"
        )
    if not (
        isinstance(bits, int)
        and 2 <= bits <= 8
        and isinstance(group, int)
        and (group == -1 or group > 0)
    ):
        raise UserError(
            f"{where}: bits {bits!r} and group_size {group!r}: expected 2 to 8 and a positive number or -1"
        )
    return config | {"group_size": group}


def expect_packed(model, config, files):
    """What a quantized folder should hold -> ({our tensor name: meta tensor}, {packed layer: (N, K)}).

    files: as `model.open_weights` gives them. A layer is packed where its folder says so; others may be left as they were.
    """

    def there(name):
        return name if name.startswith("lm_head") else "model." + name

    gptq_layout = config["quant_method"] == "gptq"
    mark = ".qweight" if gptq_layout else ".weight.quant_state.bitsandbytes__nf4"
    state, packed = model.state_dict(), {}
    for name, linear in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]:
        fused = (
            model.config.is_gpt2 and gptq_layout and name.startswith("layers.")
        )  # GPT-2's folders have their own names
        if not fused and there(name + mark) not in files:
            continue
        (N, K), packed[name] = linear.weight.shape, tuple(linear.weight.shape)
        del state[f"{name}.weight"]
        if (
            there(f"{name}.bias") in files
        ):  # some writers store one of zeros where the architecture has none
            state[f"{name}.bias"] = torch.empty(N, device="meta")
        if gptq_layout:
            bits, G = (
                config["bits"],
                1 if config["group_size"] == -1 else -(-K // config["group_size"]),
            )
            shapes = {
                "qweight": (-(-K // 32) * bits, N),
                "qzeros": (G, -(-N // 32) * bits),
                "scales": (G, N),
                "g_idx": (K,),
            }
        else:
            own = [
                key for key in files if key.startswith(there(f"{name}.weight"))
            ]  # `read_bnb` checks what there is
            shapes = {
                key.removeprefix(there(f"{name}.")): files[key][0]
                .get_slice(files[key][1])
                .get_shape()
                for key in own
            }
        state |= {
            f"{name}.{key}": torch.empty(shape, device="meta") for key, shape in shapes.items()
        }
    return state, packed


def install_packed(model, config, state, packed):
    """Put packed layers, made of the folder's tensors in `state`, in place of the model's; the rest is left in `state`."""
    for name, shape in packed.items():
        own = {key: state.pop(key) for key in [k for k in state if k.startswith(name + ".")]}
        bias = own.pop(f"{name}.bias", None)
        if config["quant_method"] == "bitsandbytes":
            layer = read_bnb(own, name, shape, bias)
        else:
            layer = read_gptq(own, name, shape, config, bias)
        model.set_submodule(name, layer)
    model.quantization = config
