"""An adapter's folder as PEFT has it: adapter_config.json, adapter_model.safetensors."""

import hashlib
import math
import re
from pathlib import Path
from typing import NamedTuple

import regex
import torch

from common import (
    STUMBLES,
    UserError,
    keys_said,
    read_json,
    read_value,
    warn_of_unknown,
    write_json,
)
from formats.hub import folder_module, open_weights, read_weight, to_folder_names
from runtime import read_tensors, write_tensors

# What an adapter is besides its tensors.
SETTINGS = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora")
# What else LoraConfig can ask for, and the values with which it is LoRA or DoRA of linear layers:
# initial weights other than these change the base (PiSSA and the like).
PLAIN: dict = {
    "peft_type": ["LORA"],
    "bias": ["none", None],
    "init_lora_weights": [True, False, None, "gaussian", "orthogonal", "eva"],
    "use_rslora": [True, False, None],
    "use_dora": [True, False, None],
    **dict.fromkeys(
        """modules_to_save layer_replication alora_invocation_tokens arrow_config kasa_config
        use_bdlora use_qalora""".split(),
        [None, False, [], {}],
    ),
}
# What is applied below, what the tensors show, and what says nothing to a program that has them.
# Any other key is named in a warning.
ADAPTER_KEYS = """alpha_pattern auto_mapping base_model_name_or_path base_sha256 corda_config
    ensure_weight_tying eva_config exclude_modules fan_in_fan_out inference_mode layers_pattern
    layers_to_transform loftq_config lora_bias lora_ga_config megatron_config megatron_core
    peft_version qalora_group_size rank_pattern revision runtime_config target_modules
    target_parameters task_type trainable_token_indices""".split()
MOST_OF = {"r": 1 << 16, "lora_alpha": 1e6, "lora_dropout": 1.0}
# -> the folder's module; A or B; or m, as lora.py calls DoRA's magnitudes
ADAPTER_TENSOR = re.compile(
    r"base_model\.model\.(.+)\.(?:lora_([AB])\.weight|lora_(m)agnitude_vector(?:\.weight)?)"
)


MOST_PATTERNS = 1 << 12  # in alpha_pattern; the largest models have a thousand layers to adapt


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
    if model.config.is_gpt2:
        raise UserError(
            "adapters are not for GPT-2, whose folder has q, k and v in one matrix: "
            "train all of it, with finetune.py"
        )
    return {
        name: layer
        for name, layer in model.named_modules()
        if name.endswith("_proj") or name == "lm_head"
    }


def base_sha256(model):
    """sha256 over the names, types, shapes and bytes of the base's weights: of those in the folder
    it came from, whatever dtype or 4 bits they were loaded into, else of those in memory.

    It reads all of them, so whoever needs it more than once keeps it."""
    if model.source is not None:
        files = open_weights(model.source)
        tensors = ((name, read_weight(files, name)) for name in sorted(files))
    else:
        base = {
            name.replace(".base.", "."): tensor
            for name, tensor in model.state_dict().items()
            if not name.endswith((".A", ".B", ".m"))  # an adapter's own, lora.LoRALinear
        }
        tensors = sorted(to_folder_names(base, model.config).items())
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
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
    config = read_json(path)
    said = {key: config.get(key) for key in PLAIN}
    wrong = [f"{key} {said[key]!r}" for key in PLAIN if said[key] not in PLAIN[key]]
    refuse_adapter(folder, wrong)
    for key, most in MOST_OF.items():
        read_value(config, path, key, most)
    warn_of_unknown(keys_said(config) - {*PLAIN, *MOST_OF, *ADAPTER_KEYS}, path)
    return config


def read_module_tensors(folder):
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


def read_alphas(config, modules):
    """-> {module: alpha} of those of the folder's modules that have one of their own.

    As in PEFT: a key of alpha_pattern is a regular expression for the end of a module's name, and
    the first that matches counts."""
    patterns = config.get("alpha_pattern") or {}
    alphas: dict[str, float] = {}
    try:
        for key, alpha in patterns.items():
            if len(patterns) > MOST_PATTERNS or not 0 <= alpha <= 1e6:
                raise ValueError(f"{len(patterns):,} keys, {key[:40]!r} with {alpha!r}")
            pattern = regex.compile(rf"(.*\.)?({key})$")
            for module in modules:
                if pattern.match(module, timeout=1):
                    alphas.setdefault(module, float(alpha))
    except (regex.error, TimeoutError, *STUMBLES) as error:
        raise UserError(f"adapter_config.json: alpha_pattern cannot be read ({error})") from None
    return alphas


def read_layers(folder, model):
    """An adapter's folder, ours or PEFT's -> ({its SETTINGS}, {our name of a layer:
    AdapterTensors}).

    Raises UserError where the adapter belongs to other base weights (by hash, which PEFT's own do
    not have) or does not fit."""
    folder = Path(folder)
    config = read_adapter_config(folder)
    settings = {key: config.get(key, False) for key in SETTINGS}
    theirs = config.get("base_sha256")
    ours = theirs and base_sha256(model)
    if theirs != ours:
        raise UserError(
            f"{folder}: trained on a base whose weights have sha256 {theirs}, this one's have "
            f"{ours}: use {config.get('base_model_name_or_path') or 'the base it was made for'}"
        )
    modules = {folder_module(name): (name, layer) for name, layer in linear_layers(model).items()}
    alphas = read_alphas(config, modules)
    found = {}
    for module, tensors in read_module_tensors(folder).items():
        if module not in modules:
            raise UserError(f"{folder}: {module}: the model has no such linear layer")
        name, layer = modules[module]
        N, K = layer.out_features, layer.in_features
        r = len(tensors.get("A", ()))
        want: dict = {"A": (r, K), "B": (N, r)}
        if settings["use_dora"]:
            want["m"] = (N,)
        shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        if r == 0 or shapes != want:
            raise UserError(f"{folder}: {module} has tensors of shapes {shapes}, not {want}")
        alpha = alphas.get(module, config["lora_alpha"])
        scale = alpha / alpha_divisor(r, settings["use_rslora"])
        found[name] = AdapterTensors(tensors["A"], tensors["B"], scale, tensors.get("m"))
    return settings, found


# ----------------------------------------------------------------------------------------- writing
def write_layers(folder, model, settings, layers, base_hash=None):
    """Write both files as PEFT does, and one key more: the base's hash.

    settings: SETTINGS as adapter_config.json has them; layers: {our name: lora.LoRALinear}. Layers
    of other rank or scale go into the patterns."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    ranks = {}
    alphas = {}
    for name, layer in layers.items():
        module = folder_module(name)
        key = f"base_model.model.{module}.lora_"
        tensors[key + "A.weight"] = layer.A
        tensors[key + "B.weight"] = layer.B
        if settings["use_dora"]:
            tensors[key + "magnitude_vector"] = layer.m
        r = len(layer.A)
        alpha = layer.scale * alpha_divisor(r, settings["use_rslora"])
        if r != settings["r"] or not math.isclose(alpha, settings["lora_alpha"]):
            ranks[module] = r
            alphas[module] = alpha
    write_tensors(folder / "adapter_model.safetensors", tensors)
    write_json(
        folder / "adapter_config.json",
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": str(model.source or ""),
            **settings,
            "target_modules": list(map(folder_module, layers)),
            "rank_pattern": ranks,
            "alpha_pattern": alphas,
            "bias": "none",
            "base_sha256": base_hash or base_sha256(model),
        },
    )
