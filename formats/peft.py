"""An adapter's folder as PEFT reads and writes it: adapter_config.json, adapter_model.safetensors.

A folder's module may hold several of our layers: GPT-2's q, k and v are one there, c_attn. Their
adapters are joined and split here.
"""

import hashlib
import math
import re
from pathlib import Path
from typing import NamedTuple

import torch

import common
from common import UserError
from formats.hub import GPT2_NAMES, open_weights, to_folder_names
from runtime import read_tensors, write_tensors

ATTENTION_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj")
QKV_LAYERS = ATTENTION_LAYERS[:3]
MLP_LAYERS = ("gate_proj", "up_proj", "down_proj")

# What LoraConfig can ask for besides LoRA and DoRA of linear layers: refused where it is set.
PEFT_EXTRAS = (
    "modules_to_save",
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "use_bdlora",
    "use_qalora",
)
# Initial weights that leave the base as it is; others (PiSSA and the like) change it.
PEFT_INITS = (True, False, None, "gaussian", "orthogonal", "eva")
ADAPTER_TENSOR = re.compile(
    r"base_model\.model\.(.+)\.(?:lora_([AB])\.weight|lora_(m)agnitude_vector(?:\.weight)?)"
)


class AdapterTensors(NamedTuple):
    """What an adapter has for one linear layer of ours: W' = W + scale B A."""

    A: torch.Tensor  # (r, K) float32
    B: torch.Tensor  # (N, r) float32
    scale: float
    magnitude: torch.Tensor | None  # DoRA's (N,) float32


def alpha_divisor(r, rslora):
    """scale = alpha / r (Hu et al. 2021, section 4.1), or alpha / sqrt(r), with which high ranks
    learn as fast as low ones (rsLoRA, Kalajdzievski 2023)."""
    return math.sqrt(r) if rslora else r


# ------------------------------------------------------------------------------ names and the base
def linear_layers(model):
    """{name: layer} of every linear layer of the blocks and the head: float, packed or adapted."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if name.endswith("_proj") or name == "lm_head"
    }


def folder_module(name, config):
    """Our name of a linear layer -> the name of the folder's module that holds it."""
    if name == "lm_head":
        return name
    if not config.is_gpt2:
        return "model." + name
    _, i, inner = name.split(".", 2)  # layers.3.self_attn.q_proj
    theirs = "attn.c_attn" if inner.endswith(QKV_LAYERS) else GPT2_NAMES[inner]
    return f"transformer.h.{i}.{theirs}"


def folder_modules(model):
    """{the folder's module: {our name: layer}}, in the model's order."""
    modules: dict[str, dict] = {}
    for name, layer in linear_layers(model).items():
        modules.setdefault(folder_module(name, model.config), {})[name] = layer
    return modules


def base_sha256(model):
    """sha256 over the names, types, shapes and bytes of the base's weights: of those in the folder
    it came from, whatever dtype or 4 bits they were loaded into, else of those in memory.

    It reads all of them, so whoever needs it more than once keeps it."""
    digest = hashlib.sha256()

    def add(name, tensor):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())

    if model.source is not None:
        for name, (file, key) in sorted(open_weights(model.source).items()):
            add(name, file.get_tensor(key))
        return digest.hexdigest()
    base = {
        name.replace(".base.", "."): tensor
        for name, tensor in model.state_dict().items()
        if not name.endswith((".A", ".B", ".m"))  # an adapter's own, lora.LoRALinear
    }
    for name, tensor in sorted(to_folder_names(base, model.config).items()):
        add(name, tensor)
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------- reading
def refuse_adapter(folder, wrong):
    if wrong:
        raise UserError(
            f"{folder}: only LoRA and DoRA of linear layers are supported, "
            f"not {', '.join(wrong[:4])}"
        )


def read_adapter_config(folder):
    """-> adapter_config.json as a dict. What asks for more than LoRA or DoRA is refused by name."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise UserError(f"{folder}: no adapter_config.json, so not an adapter's folder")
    config = common.read_json(path)
    if not isinstance(config, dict):
        raise UserError(f"{path}: a {type(config).__name__}, not an object")
    wrong = [key for key in PEFT_EXTRAS if config.get(key)]
    if config.get("peft_type") != "LORA":
        wrong.append("peft_type")
    if config.get("bias") not in ("none", None):
        wrong.append("bias")
    if config.get("init_lora_weights") not in PEFT_INITS:
        wrong.append("init_lora_weights")
    for key, kind in (("r", int), ("lora_alpha", int | float), ("lora_dropout", int | float)):
        if not isinstance(config.get(key), kind) or config[key] < 0:
            wrong.append(key)
    refuse_adapter(folder, [f"{key} {config.get(key)!r}" for key in wrong])
    return config


def read_adapter_tensors(folder):
    """-> {the folder's module: {"A", "B", and "m" of DoRA: float32}}."""
    modules: dict[str, dict] = {}
    wrong = []
    for key, tensor in read_tensors(folder / "adapter_model.safetensors").items():
        found = ADAPTER_TENSOR.fullmatch(key)
        if found and tensor.is_floating_point() and tensor.ndim:
            module, matrix, magnitude = found.groups()
            modules.setdefault(module, {})[matrix or magnitude] = tensor.float()
        # PEFT adds a copy of the base's head, which nobody needs
        elif not key.endswith("lm_head.base_layer.weight"):
            wrong.append(f"tensor {key}")
    refuse_adapter(folder, wrong)
    return modules


def module_alpha(config, module):
    """A module's alpha. PEFT matches alpha_pattern's keys as regular expressions at the end of the
    module's name."""
    patterns = config.get("alpha_pattern") or {}
    try:
        for key, alpha in patterns.items():
            if re.match(rf"(.*\.)?({key})$", module):
                return float(alpha)
    except (re.error, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"adapter_config.json: alpha_pattern {patterns} cannot be read ({error})"
        ) from None
    return config["lora_alpha"]


def split_joined(A, B, sizes):
    """A joined module's A (r, K) and B (N, r) -> [(A, B)] of its layers, of `sizes` outputs each.

    Every layer has the whole A and its own rows of B; but where `write_layers` joined them, with
    zeros beside the diagonal of B, each has its own ranks back."""
    rows = B.split(sizes)
    r = len(A) // len(sizes)
    diagonal = [part[:, i * r : (i + 1) * r] for i, part in enumerate(rows)]
    if r * len(sizes) == len(A) and torch.equal(torch.block_diag(*diagonal), B):
        return list(zip(A.split(r), diagonal))
    return [(A, part) for part in rows]


def read_layers(folder, model, base_hash=None):
    """An adapter's folder, ours or PEFT's -> (its config, {our name of a layer: AdapterTensors}).

    base_hash: base_sha256(model) where the caller has it. Raises UserError where the adapter
    belongs to other base weights (by hash, which PEFT's own do not have) or does not fit."""
    folder = Path(folder)
    config = read_adapter_config(folder)
    theirs = config.get("base_sha256")
    ours = theirs and (base_hash or base_sha256(model))
    if theirs != ours:
        raise UserError(
            f"{folder}: trained on a base whose weights have sha256 {theirs}, this one's have "
            f"{ours}: use {config.get('base_model_name_or_path') or 'the base it was made for'}"
        )
    modules = folder_modules(model)
    found = {}
    for module, tensors in read_adapter_tensors(folder).items():
        if module not in modules:
            raise UserError(f"{folder}: {module}: the model has no such linear layer")
        layers = modules[module]
        check_shapes(folder, module, tensors, layers.values(), bool(config.get("use_dora")))
        r = len(tensors["A"])
        scale = module_alpha(config, module) / alpha_divisor(r, bool(config.get("use_rslora")))
        sizes = [layer.out_features for layer in layers.values()]
        magnitudes = tensors["m"].split(sizes) if "m" in tensors else [None] * len(sizes)
        parts = split_joined(tensors["A"], tensors["B"], sizes)
        for name, (A, B), magnitude in zip(layers, parts, magnitudes):
            found[name] = AdapterTensors(A, B, scale, magnitude)
    return config, found


def check_shapes(folder, module, tensors, layers, dora):
    """UserError where a module's tensors are not those of an adapter of the layers it holds."""
    r = len(tensors.get("A", ()))
    N = sum(layer.out_features for layer in layers)
    want = {"A": (r, next(iter(layers)).in_features), "B": (N, r)}
    if dora:
        want["m"] = (N,)
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    if r == 0 or shapes != want:
        raise UserError(f"{folder}: {module} has tensors of shapes {shapes}, should have {want}")


# ----------------------------------------------------------------------------------------- writing
def write_layers(folder, model, config, layers, base_hash=None):
    """Write both files as PEFT does, and one key more: the base's hash.

    config: r, lora_alpha, lora_dropout, use_rslora and use_dora as adapter_config.json has them;
    layers: {our name: AdapterTensors}. Layers of other rank or scale go into the patterns."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    modules = folder_modules(model)
    adapted = []
    tensors, ranks, alphas = {}, {}, {}
    for module, members in modules.items():
        parts = [layers[name] for name in members if name in layers]
        if not parts:
            continue
        adapted.append(module)
        # c_attn is q over k over v: their A stacked, their B along the diagonal, of rank 3r
        A = torch.cat([part.A for part in parts])
        B = torch.block_diag(*[part.B for part in parts])
        key = f"base_model.model.{module}.lora_"
        tensors[key + "A.weight"] = A
        tensors[key + "B.weight"] = B
        if config["use_dora"]:
            tensors[key + "magnitude_vector"] = torch.cat([part.magnitude for part in parts])
        alpha = parts[0].scale * alpha_divisor(len(A), config["use_rslora"])
        if len(A) != config["r"] or not math.isclose(alpha, config["lora_alpha"]):
            ranks[module] = len(A)
            alphas[module] = alpha
    write_tensors(folder / "adapter_model.safetensors", tensors)
    common.write_json(
        folder / "adapter_config.json",
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": str(model.source or ""),
            **config,
            "target_modules": target_modules(adapted, modules),
            "rank_pattern": ranks,
            "alpha_pattern": alphas,
            "bias": "none",
            "fan_in_fan_out": model.config.is_gpt2,
            "modules_to_save": None,
            "init_lora_weights": True,
            "inference_mode": True,
            "base_sha256": base_hash or base_sha256(model),
        },
    )


def target_modules(adapted, modules):
    """The shortest names for the adapted modules: "q_proj" where every q_proj is adapted."""

    def last(module):
        return module.rsplit(".", 1)[-1]

    partly = {last(module) for module in modules if module not in adapted}
    return sorted({module if last(module) in partly else last(module) for module in adapted})
