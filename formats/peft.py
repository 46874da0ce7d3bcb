"""An adapter's folder as PEFT writes and reads it: adapter_config.json, adapter_model.safetensors."""

import hashlib
import math
import re
from pathlib import Path
from typing import NamedTuple

import torch

import common
from common import UserError
from formats.hub import GPT2_NAMES, open_weights, to_folder_names
from runtime import read_tensors


def folder_module(name, config):
    """Our name of a linear layer -> the name in the folder; GPT-2's q, k and v are one there."""
    if name == "lm_head" or not config.is_gpt2:
        return name if name == "lm_head" else "model." + name
    _, i, inner = name.split(".", 2)
    return f"transformer.h.{i}." + (
        "attn.c_attn" if inner[-6:] in ATTENTION[:3] else GPT2_NAMES[inner]
    )


def base_sha256(model):
    """sha256 over the names, types, shapes and bytes of the base's weights: those in the folder it came from, whatever dtype or
    4 bits they were loaded into, else those in memory. Read once."""
    if not hasattr(model, "base_sha256"):
        digest, source = hashlib.sha256(), getattr(model, "source", None)
        if source is None:
            state = {
                k.replace(".base.", "."): v
                for k, v in model.state_dict().items()
                if ".adapters." not in k
            }
            tensors = to_folder_names(state, model.config)
        else:
            tensors = open_weights(source)
        for name in sorted(tensors):
            tensor = (
                tensors[name] if source is None else tensors[name][0].get_tensor(tensors[name][1])
            )
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        model.base_sha256 = digest.hexdigest()
    return model.base_sha256


def read_adapter(folder):
    """adapter_config.json and the tensors -> (dict, {module of the folder: {"A", "B", "m"}}). What is not LoRA or DoRA on linear
    layers, or was trained from weights that are not the base's (PiSSA and the like), is refused."""
    folder = Path(folder)
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder}: no adapter_config.json, so not an adapter's folder")
    config, parts = common.read_json(folder / "adapter_config.json"), {}
    if not isinstance(config, dict):
        raise UserError(f"{folder}/adapter_config.json: a {type(config).__name__}, not an object")
    other = (
        "alora_invocation_tokens",
        "use_qalora",
        "use_bdlora",
        "layer_replication",
        "arrow_config",
        "kasa_config",
    )
    allowed: dict[str, list] = {
        "peft_type": ["LORA"],
        "bias": ["none", None],
        "modules_to_save": [None, []],
        "init_lora_weights": [True, False, None, "gaussian", "orthogonal", "eva"],
        **dict.fromkeys(other, [None, False]),
    }
    wrong = [
        f"{k} {config.get(k)!r}" for k, values in allowed.items() if config.get(k) not in values
    ]
    wrong += [
        f"{k} {config.get(k)!r}"
        for k in ("r", "lora_alpha", "lora_dropout")
        if not isinstance(config.get(k), (int, float)[: 1 + (k != "r")]) or config[k] < 0
    ]
    for key, tensor in read_tensors(folder / "adapter_model.safetensors").items():
        found = re.fullmatch(
            r"base_model\.model\.(.+)\.(?:lora_([AB])\.weight|lora_(m)agnitude_vector(?:\.weight)?)",
            key,
        )
        if found and tensor.is_floating_point() and tensor.ndim:
            parts.setdefault(found[1], {})[found[2] or found[3]] = tensor.float()
        elif not key.endswith(
            "lm_head.base_layer.weight"
        ):  # a copy of the base's head, which PEFT adds and nobody needs
            wrong.append(f"tensor {key}")
    if wrong:
        raise UserError(
            f"{folder}: only LoRA and DoRA of linear layers are supported, not {', '.join(wrong[:4])}"
        )
    return config, parts


def split_fused(parts, sizes):
    """The tensors of a folder's module -> [those of each layer that it holds], of `sizes` outputs. GPT-2's q, k and v get A whole
    and their rows of B; without the zeros where `save_adapter` stacked three."""
    B, r = parts["B"].split(sizes), len(parts["A"]) // len(sizes)
    A, diagonal = [parts["A"]] * len(B), [b[:, i * r : (i + 1) * r] for i, b in enumerate(B)]
    if r * len(B) == len(parts["A"]) and torch.equal(torch.block_diag(*diagonal), parts["B"]):
        A, B = parts["A"].split(r), diagonal
    own = {"A": A, "B": B} | ({"m": parts["m"].split(sizes)} if "m" in parts else {})
    return [dict(zip(own, tensors)) for tensors in zip(*own.values())]


def own_alpha(config, module):
    """alpha_pattern's value for a module, or None; PEFT matches the keys as regular expressions at the end of the name."""
    try:
        found = [
            a
            for key, a in (config.get("alpha_pattern") or {}).items()
            if re.match(rf"(.*\.)?({key})$", module)
        ]
        return float(found[0]) if found else None
    except (re.error, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"adapter_config.json: alpha_pattern {config['alpha_pattern']} cannot be read ({error})"
        ) from None


ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


class AdapterTensors(NamedTuple):
    """What a folder's adapter has for one linear layer of ours: W' = W + scale B A."""

    A: torch.Tensor  # (r, K) float32
    B: torch.Tensor  # (N, r) float32
    scale: float
    magnitude: torch.Tensor | None  # DoRA's (N,) float32


def linear_layers(model):
    """{name: layer} of every linear layer of the blocks and the head, float or packed; of adapted ones the base."""
    found = {}
    for name, layer in model.named_modules():
        if name.endswith("_proj") or name == "lm_head":
            found[name] = getattr(layer, "base", layer)
    return found


def read_layers(folder, model):
    """An adapter's folder, ours or PEFT's, checked against the model -> (its config, {layer: AdapterTensors}).

    Raises UserError where it belongs to other base weights (by hash, which PEFT's own do not have) or does not fit."""
    config, parts = read_adapter(folder)
    theirs, ours = config.get("base_sha256"), base_sha256(model)
    if theirs and theirs != ours:
        raise UserError(
            f"{folder}: trained on a base whose weights have sha256 {theirs}, this one's have {ours}: "
            f"use the base it was made for ({config.get('base_model_name_or_path') or 'not recorded'})"
        )
    dora, rslora = bool(config.get("use_dora")), bool(config.get("use_rslora"))
    modules = {}  # a folder's module: the layers of ours that it holds
    for name, layer in linear_layers(model).items():
        modules.setdefault(folder_module(name, model.config), {})[name] = layer
    found = {}
    for module, tensors in parts.items():
        if module not in modules:
            raise UserError(
                f"{folder}: {module} is adapted there, but this model has no such linear layer"
            )
        layers = modules[module]
        sizes = [layer.out_features for layer in layers.values()]
        r = len(tensors.get("A", ()))
        want = {"A": (r, next(iter(layers.values())).in_features), "B": (sum(sizes), r)}
        if dora:
            want["m"] = (sum(sizes),)
        shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        if not r or want != shapes:
            raise UserError(
                f"{folder}: {module} has tensors of shapes {shapes if r else tensors.keys()}, should have {want}"
            )
        alpha = own_alpha(config, module) or config["lora_alpha"]
        for name, own in zip(layers, split_fused(tensors, sizes)):
            scale = alpha / (math.sqrt(r) if rslora else r)
            found[name] = AdapterTensors(own["A"], own["B"], scale, own.get("m"))
    return config, found
