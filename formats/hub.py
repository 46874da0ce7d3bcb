"""Model folders: config.json and safetensors in Hugging Face's names <-> our Config and state dict."""

import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from common import UserError, read_json, write_json
from model import Config, Transformer
from runtime import write_tensors

ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


GPT2_KEYS = {
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "num_hidden_layers": "n_layer",
    "rms_norm_eps": "layer_norm_epsilon",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}  # in its config.json


ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def _read_rope(d, where):
    """rope_parameters (transformers 5) or rope_theta + rope_scaling (before) -> one dict, its type checked."""
    rope = dict(d.get("rope_parameters") or d.get("rope_scaling") or {})
    rope["rope_type"] = rope.get("rope_type") or rope.pop("type", None) or "default"
    rope.setdefault("rope_theta", float(d.get("rope_theta", 10000.0)))
    if rope["rope_type"] not in ROPE_TYPES or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(
            f"{where}: rope scaling {rope} is not supported; this program knows {', '.join(ROPE_TYPES)}"
        )
    if rope["rope_type"] != "default" and "factor" not in rope:
        raise UserError(f"{where}: rope scaling {rope['rope_type']!r} without its factor")
    if rope["rope_type"] in (
        "llama3",
        "yarn",
    ):  # the length the model was trained at before it was stretched
        rope.setdefault(
            "original_max_position_embeddings",
            d.get("original_max_position_embeddings") or d.get("max_position_embeddings"),
        )
    return rope


def _read_sliding(d, kind, n_layers):
    """The window and which layers have it: Mistral all, Qwen by layer_types or max_window_layers, the others none."""
    window = d.get("sliding_window", 4096 if kind == "mistral" else None)
    kinds = ["sliding_attention"] * n_layers
    if kind.startswith("qwen"):
        window = window if d.get("use_sliding_window", False) else None
        kinds = d.get("layer_types") or [
            "full_attention" if i < d.get("max_window_layers", 28) else "sliding_attention"
            for i in range(n_layers)
        ]
    if window is None or kind in ("llama", "gpt2"):
        return None, ()
    return window, tuple(i for i, k in enumerate(kinds) if k == "sliding_attention")


# Ours are Llama's without the leading "model."; GPT-2's folder has its own names, its matrices transposed (Conv1D) and the
# three attention inputs in one.
GPT2_NAMES = {
    "embed_tokens": "wte",
    "embed_positions": "wpe",
    "norm": "ln_f",
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "self_attn.q_proj": "attn.c_attn",
    "self_attn.k_proj": "attn.c_attn",
    "self_attn.v_proj": "attn.c_attn",
    "self_attn.o_proj": "attn.c_proj",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}


NAME = re.compile(
    r"(?:(?:layers|h)\.(\d+)\.)?(.+)\.(\w+)"
)  # "layers.3.mlp.up_proj.weight" -> "3", "mlp.up_proj", "weight"


PACKED = (
    "qweight",
    "qzeros",
    "scales",
    "g_idx",
)  # of quantized layers, whose outputs are the last dimension already


def to_folder_names(state, config):
    """Our state dict -> {name in the folder: tensor}; a tied head is left out (the reader ties it again)."""
    out = {}
    for name, tensor in state.items():
        if name.startswith("lm_head."):
            if not config.tie_word_embeddings or name != "lm_head.weight":
                out[name] = tensor
        elif not config.is_gpt2:
            out["model." + name] = tensor
        else:
            number, inner, leaf = NAME.fullmatch(name).groups()
            theirs = (
                "transformer." + (f"h.{number}." if number else "") + f"{GPT2_NAMES[inner]}.{leaf}"
            )
            tensor = (
                tensor.t() if number and tensor.ndim == 2 and leaf not in PACKED else tensor
            )  # (out, in) -> (in, out)
            if theirs not in out:
                out[theirs] = tensor
            elif leaf != "g_idx":  # k and v, behind q
                out[theirs] = torch.cat((out[theirs], tensor), -1)
    return out


def from_folder_names(name, tensor, config):
    """One tensor of a folder -> {our name: tensor}, the inverse of `to_folder_names`."""
    if not config.is_gpt2 or name.startswith("lm_head."):
        return {name.removeprefix("model."): tensor}
    number, inner, leaf = NAME.fullmatch(name.removeprefix("transformer.")).groups()
    ours = [name for name, theirs in GPT2_NAMES.items() if theirs == inner]
    parts = [tensor.clone() for _ in ours] if leaf == "g_idx" else tensor.chunk(len(ours), -1)
    if number and tensor.ndim == 2 and leaf not in PACKED:
        parts = [part.t() for part in parts]  # (in, out) -> (out, in)
    prefix = f"layers.{number}." if number else ""
    return {f"{prefix}{name}.{leaf}": part.contiguous() for name, part in zip(ours, parts)}


def open_weights(folder, device="cpu"):
    """{tensor name: (open safetensors file, its name in there)}, from model.safetensors or the sharded index's files.

    The two names differ in OpenAI's own GPT-2 upload, which lacks the "transformer." prefix.
    """
    folder, index = Path(folder), Path(folder) / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if not (folder / names[0]).is_file() and index.is_file():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
    files = {}
    for file in names:
        if Path(file).name != file:  # an index from outside must not lead out of its folder
            raise UserError(f"{index}: {file!r} is not a plain file name")
        try:
            handle = safe_open(folder / file, framework="pt", device=str(device))
        except OSError as error:  # safetensors says "not found" of what may not be read, too
            there, missing = (
                (folder / file).exists(),
                "not found (a model folder needs model.safetensors)",
            )
            raise UserError(
                f"{folder / file}: {'may not be read by this user' if there else missing}"
            ) from error
        except SafetensorError as error:
            size = (folder / file).stat().st_size
            raise UserError(
                f"{folder / file}: damaged or cut short at {size:,} bytes ({error}); fetch it again"
            ) from None
        for key in handle.keys():
            bare = key.startswith(("h.", "wte.", "wpe.", "ln_f."))
            files["transformer." + key if bare else key] = (handle, key)
    return files


def check_layers(config, files, folder):
    """The layer count against the files' names, before a module is built for each."""
    found = len(
        {n.split(".")[2] for n in files if n.startswith(("model.layers.", "transformer.h."))}
    )
    if found != config.num_hidden_layers:
        raise UserError(
            f"{folder}: config.json says {config.num_hidden_layers} layers, the weights have {found}"
        )


def check_tensors(expected, files, folder):
    """Names and shapes in the folder against the model's; one error that names every difference (the first 8 of each)."""
    ignorable = (
        ".rotary_emb.inv_freq",
        ".attn.bias",
        ".attn.masked_bias",
    )  # buffers that older writers saved
    shapes = {
        n: tuple(file.get_slice(key).get_shape())
        for n, (file, key) in files.items()
        if n in expected
    }
    differences = {
        "missing": [n for n in expected if n not in files],
        "not part of this model": [
            n
            for n in files
            if n not in expected and not n.endswith(ignorable) and n != "lm_head.weight"
        ],
        "of another shape": [
            f"{n} is {shape}, expected {tuple(expected[n].shape)}"
            for n, shape in shapes.items()
            if shape != tuple(expected[n].shape)
        ],
    }
    faults = [
        f"{len(names)} tensors {what}: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
        for what, names in differences.items()
        if names
    ]
    if (
        "lm_head.weight" in files and "lm_head.weight" not in expected
    ):  # tied, yet saved: fine only if it is the embedding
        tied = next(n for n in files if n.endswith(("embed_tokens.weight", "wte.weight")))
        head, embedding = (files[n][0].get_tensor(files[n][1]) for n in ("lm_head.weight", tied))
        if not torch.equal(head, embedding):
            faults.append(
                "lm_head.weight differs from the embedding that config.json says it is tied to"
            )
    if faults:
        raise UserError(f"{folder}: the weights do not fit config.json: {'; '.join(faults)}")


def config_from_dict(d: dict, where="config.json") -> Config:
    """A parsed config.json -> Config. Unknown model types and rope scalings are refused, not guessed at."""
    kind = d.get("model_type")
    if kind not in ARCHITECTURES:
        raise UserError(
            f"{where}: model_type {kind!r} is not supported; this program knows {', '.join(ARCHITECTURES)}"
        )
    gpt2 = kind == "gpt2"
    if gpt2 and (
        d.get("activation_function", "gelu_new") != "gelu_new"
        or d.get("scale_attn_by_inverse_layer_idx")
    ):
        raise UserError(
            f"{where}: only GPT-2's own activation (gelu_new) and attention scaling are supported"
        )
    if not gpt2 and d.get("hidden_act", "silu") != "silu":
        raise UserError(f"{where}: hidden_act {d['hidden_act']!r} is not supported, only silu")

    def need(key, high=1 << 24, default=None):
        key = GPT2_KEYS.get(key, key) if gpt2 else key
        value = default if d.get(key) is None else d[key]
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= high:
            raise UserError(f"{where}: {key} is {value!r}, expected an integer from 1 to {high:,}")
        return value

    C, H, L = (
        need("hidden_size"),
        need("num_attention_heads", 4096),
        need("num_hidden_layers", 1024),
    )
    if gpt2 and C % H:
        raise UserError(f"{where}: n_embd {C} is not a multiple of n_head {H}")
    bias = gpt2 or bool(d.get("attention_bias", False))
    window, sliding = _read_sliding(d, kind, L)
    config = Config(
        kind,
        need("vocab_size"),
        C,
        need("intermediate_size", default=4 * C if gpt2 else None),
        L,
        H,
        need("num_key_value_heads", 4096, H),
        need("head_dim", 4096, 128 if kind == "qwen3" else C // H),
        need("max_position_embeddings"),
        {} if gpt2 else _read_rope(d, where),
        window,
        sliding,
        d.get("layer_norm_epsilon", 1e-5) if gpt2 else d.get("rms_norm_eps", 1e-6),
        d.get("tie_word_embeddings", gpt2),
        qkv_bias=bias or kind == "qwen2",
        out_bias=bias and kind != "qwen2",
        mlp_bias=gpt2 or bool(d.get("mlp_bias", False)),
        bos_token_id=d.get("bos_token_id"),
        eos_token_id=d.get("eos_token_id"),
    )
    if H % config.num_key_value_heads:
        raise UserError(
            f"{where}: {H} attention heads cannot share {config.num_key_value_heads} key/value heads"
        )
    if config.head_dim % 2:
        raise UserError(
            f"{where}: head_dim {config.head_dim} is odd; rotary embeddings need an even one"
        )
    return config


def config_to_dict(config):
    """The config.json that transformers, vLLM and llama.cpp's converter read (also those before `rope_parameters`)."""
    kind, d = (
        config.model_type,
        {"architectures": [ARCHITECTURES[config.model_type]], "rms_norm_eps": config.norm_eps},
    )
    d |= {
        k: getattr(config, k)
        for k in (
            "model_type",
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
            "tie_word_embeddings",
            "bos_token_id",
            "eos_token_id",
        )
    }
    if config.is_gpt2:
        return {GPT2_KEYS.get(k, k): v for k, v in d.items()} | {"activation_function": "gelu_new"}
    scaling = {k: v for k, v in config.rope.items() if k != "rope_theta"}
    d |= {
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rope_parameters": config.rope,
        "rope_theta": config.rope["rope_theta"],
        "rope_scaling": scaling if scaling["rope_type"] != "default" else None,
    }
    own = {
        "llama": ("attention_bias", "mlp_bias"),
        "mistral": ("sliding_window",),
        "qwen2": ("sliding_window",),
        "qwen3": ("sliding_window", "attention_bias"),
    }[kind]
    d |= {k: config.qkv_bias if k == "attention_bias" else getattr(config, k) for k in own}
    if kind.startswith("qwen"):
        d |= {
            "use_sliding_window": bool(config.sliding_layers),
            "layer_types": [
                "sliding_attention" if i in config.sliding_layers else "full_attention"
                for i in range(config.num_hidden_layers)
            ],
        }
    return d


def save_model(model, folder: str | Path, state=None) -> None:
    """Write config.json, generation_config.json and model.safetensors, each all or nothing; config.json last.

    state: the state dict, where it is not simply this module's (gathered from shards, say).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = str(model.embed_tokens.weight.dtype).removeprefix("torch.")
    extra = {}
    if model.quantization:
        from formats.packed import packed_state

        state, extra = packed_state(model), {"quantization_config": model.quantization}
    write_tensors(
        folder / "model.safetensors", to_folder_names(state or model.state_dict(), model.config)
    )
    ids = {"bos_token_id": model.config.bos_token_id, "eos_token_id": model.config.eos_token_id}
    write_json(folder / "generation_config.json", {k: v for k, v in ids.items() if v is not None})
    write_json(
        folder / "config.json",
        config_to_dict(model.config) | {"dtype": dtype, "torch_dtype": dtype} | extra,
    )


def load_model(folder: str | Path, device="cpu", dtype=None, dropout: float = 0.0) -> Transformer:
    """Load a model folder: config.json and one or many safetensors files in bf16, fp16 or fp32.

    dtype None keeps the file's. Names and shapes are checked against the config from the files' headers before any
    tensor is read; tensors then come one by one, so loading needs about one copy of the weights.
    Raises UserError that names each missing, unexpected and misshapen tensor.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json, so not a model folder")
    raw, packed = read_json(folder / "config.json"), {}
    config = config_from_dict(raw, where=folder / "config.json")
    config.dropout = dropout
    files = open_weights(folder, device)
    check_layers(config, files, folder)
    with torch.device("meta"):
        model = Transformer(config)
    state = model.state_dict()
    if raw.get("quantization_config"):
        from formats.packed import check_config, expect_packed, install_packed

        quantization = check_config(raw["quantization_config"], folder / "config.json")
        state, packed = expect_packed(model, quantization, files)
    expected = to_folder_names(state, config)
    check_tensors(expected, files, folder)
    state = {}
    for name in expected:
        file, key = files[name]
        tensor = file.get_tensor(key)
        keep = (
            dtype is None
            or packed
            and name.split(".")[-1] not in ("weight", "bias")
            or not tensor.is_floating_point()
        )
        state.update(from_folder_names(name, tensor if keep else tensor.to(dtype), config))
    if packed:
        install_packed(model, quantization, state, packed)
    model.load_state_dict(
        state, strict=False, assign=True
    )  # completeness was checked above; the tied head is absent
    model.tie()
    model.source = folder  # an adapter says by its hash which weights it was trained on
    return model.to(device).eval()
