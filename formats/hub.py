"""Model folders: config.json and safetensors in Hugging Face's words <-> our Config and state dict.

    model = load_model("runs/shakespeare")   # what Transformer.from_pretrained calls
    save_model(model, "runs/copy")           # transformers, vLLM and llama.cpp's converter open it

A GPTQ or bitsandbytes folder is read and written with the help of formats.packed.
"""

import re
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from common import (
    UserError,
    keys_said,
    naming,
    read_json,
    read_value,
    warn,
    warn_of_unknown,
    write_json,
)
from model import Config, Transformer
from runtime import DTYPES, write_tensors


def two_columns(text):
    """A table of words -> {first: second}"""
    return dict(line.split() for line in text.strip().splitlines())


HF_CLASSES = two_columns("""
    gpt2     GPT2LMHeadModel
    llama    LlamaForCausalLM
    mistral  MistralForCausalLM
    qwen2    Qwen2ForCausalLM
    qwen3    Qwen3ForCausalLM
""")
ROPE_TYPES = "default linear llama3 yarn".split()
ROPE_KEYS = """rope_type rope_theta factor low_freq_factor high_freq_factor beta_fast beta_slow
    original_max_position_embeddings truncate mscale mscale_all_dim attention_factor
    partial_rotary_factor""".split()

# ------------------------------------------------------------------------------------- config.json
# Config's fields that every config.json has. For one that sets a size, the most that it may be, as
# files from outside are checked before memory is taken; else its type.
CONFIG_FIELDS = {
    "model_type": str,
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 24,
    "intermediate_size": 1 << 24,
    "num_hidden_layers": 1024,
    "num_attention_heads": 4096,
    "max_position_embeddings": 1 << 24,
    "norm_eps": float,
    "tie_word_embeddings": bool,
    "bos_token_id": int,
    "eos_token_id": int | list,
}
# Their names in the file, where these differ.
LLAMA_KEYS = {"norm_eps": "rms_norm_eps"}
GPT2_KEYS = two_columns("""
    hidden_size              n_embd
    intermediate_size        n_inner
    num_hidden_layers        n_layer
    num_attention_heads      n_head
    max_position_embeddings  n_positions
    norm_eps                 layer_norm_epsilon
""")
# What else is read below, by family: model_type without its number.
LLAMA_APPLIED = """num_key_value_heads head_dim attention_bias mlp_bias rope_parameters
    rope_theta rope_scaling original_max_position_embeddings""".split()
APPLIED_KEYS = {
    "gpt": [],
    "llama": LLAMA_APPLIED,
    "qwen": [
        *LLAMA_APPLIED,
        *"sliding_window use_sliding_window layer_types max_window_layers".split(),
    ],
    "mistral": [*LLAMA_APPLIED, "sliding_window"],
}
# What would change the computation: refused unless it has this value, or none.
PLAIN_VALUES: dict = {"activation_function": "gelu_new", "hidden_act": "silu"}
PLAIN_VALUES |= dict.fromkeys(
    """add_cross_attention alibi attention_multiplier attention_sinks attn_logit_softcapping
    clip_qkv compression_config final_logit_softcapping is_encoder_decoder no_rope_layers
    num_experts num_local_experts parallel_attn qk_layernorm quantization query_pre_attn_scalar
    rope_interleaved scale_attn_by_inverse_layer_idx use_mrope use_qk_norm""".split(),
    False,
)
PLAIN_VALUES |= dict.fromkeys(
    """embedding_multiplier logit_scale logits_scaling partial_rotary_factor residual_multiplier
    scale_attn_weights""".split(),
    1,
)
# What says nothing about what is computed, or only to a program that trains; so does a key that
# begins with an underscore. Any other key is named in a warning.
SILENT_KEYS = """architectures attention_dropout attn_pdrop dtype embd_pdrop gradient_checkpointing
    id2label initializer_range is_decoder is_llama_config label2id n_ctx
    n_inner output_attentions output_hidden_states pad_token_id pretraining_tp quantization_config
    reorder_and_upcast_attn resid_pdrop return_dict summary_activation summary_first_dropout
    summary_proj_to_labels summary_type summary_use_proj task_specific_params tokenizer_class
    torch_dtype transformers.js_config transformers_version unsloth_fixed unsloth_version
    use_cache""".split()
# Of generation_config.json: the fields of Sampling that it gives defaults to, as in vLLM; and what
# says nothing to this program. vLLM does not ask do_sample either: temperature 0 is greedy.
SAMPLING_KEYS = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
}
SILENT_GENERATION = """bos_token_id cache_implementation do_sample eos_token_id max_length
    pad_token_id transformers_version use_cache""".split()


def config_from_dict(d, where="config.json"):
    """A parsed config.json -> Config. UserError for what this program would compute wrongly."""
    get = partial(read_value, d, where)
    kind = get("model_type", str)
    if kind not in HF_CLASSES:
        known = ", ".join(HF_CLASSES)
        raise UserError(f"{where}: model_type {kind!r} is not supported, only {known}")
    for key, plain in PLAIN_VALUES.items():
        value = d.get(key)
        if value not in (None, plain, [], {}):
            raise UserError(f"{where}: {key} {value!r:.80} is not supported, only {plain}")
    keys = GPT2_KEYS if kind == "gpt2" else LLAMA_KEYS
    known = {*PLAIN_VALUES, *SILENT_KEYS, *APPLIED_KEYS[kind.rstrip("23")]}
    known.update(keys.get(field, field) for field in CONFIG_FIELDS)
    warn_of_unknown(keys_said(d) - known, where)
    defaults: dict = {"norm_eps": 1e-6, "tie_word_embeddings": False}
    if kind == "gpt2":
        width = get("n_embd", 1 << 24)
        defaults = {"norm_eps": 1e-5, "tie_word_embeddings": True, "intermediate_size": 4 * width}
    fields = {}
    for field, bound in CONFIG_FIELDS.items():
        fields[field] = get(keys.get(field, field), bound, defaults.get(field))
    with naming(where):
        config = gpt2_config(fields) if kind == "gpt2" else llama_config(fields, d, get)
    warn_of_unknown(config.rope.keys() - ROPE_KEYS, f"{where}, rope_scaling or rope_parameters")
    config.eos_token_id = read_ends(config.eos_token_id, config, where)
    return config


def read_ends(ids, config, where):
    """The ids that end a text, checked: one, a list, or None. One that is beyond the vocabulary (in
    GPT-2's shape with fewer ids, say) never comes out: it is named and left out."""
    known = []
    for i in ids if isinstance(ids, list) else [ids]:
        if i is None:
            continue
        if type(i) is not int or i < 0:
            raise UserError(f"{where}: eos_token_id {i!r} is not an id")
        if i < config.vocab_size:
            known.append(i)
        else:
            warn(f"{where}: ignored: eos_token_id {i:,}, of {config.vocab_size:,} ids")
    if isinstance(ids, list) and (known or not ids):
        return known
    return next(iter(known), None)


def gpt2_config(fields):
    """GPT-2 has a bias everywhere, and neither RoPE nor grouped heads."""
    C = fields["hidden_size"]
    H = fields["num_attention_heads"]
    if C % H:
        raise UserError(f"n_embd {C} is not a multiple of n_head {H}")
    fields |= dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias"), True)
    return Config(**fields, num_key_value_heads=H, head_dim=C // H, rope={})


def llama_config(fields, d, get):
    """The Config of Llama's family: Llama, Mistral, Qwen2 and Qwen3.

    get(key, kind_or_most, default) is common.read_value of d."""
    kind = fields["model_type"]
    H = fields["num_attention_heads"]
    K = get("num_key_value_heads", 4096, H)
    D = 128 if kind == "qwen3" else fields["hidden_size"] // H
    D = get("head_dim", 4096, D)
    if H % K:
        raise UserError(f"{H} attention heads cannot share {K} key/value heads")
    if D % 2:
        raise UserError(f"head_dim {D} is odd; rotary embeddings need an even one")
    window, sliding_layers = sliding_from_dict(d, get)
    bias = get("attention_bias", bool, False)
    return Config(
        **fields,
        num_key_value_heads=K,
        head_dim=D,
        rope=rope_from_dict(d, get),
        sliding_window=window,
        sliding_layers=sliding_layers,
        qkv_bias=bias or kind == "qwen2",
        out_bias=bias and kind != "qwen2",
        mlp_bias=get("mlp_bias", bool, False),
    )


def rope_from_dict(d, get):
    """rope_parameters (transformers 5), rope_theta and rope_scaling (before) -> one dict.

    Folders may have all three, each for other readers; they must agree."""
    scaling = get("rope_scaling", dict, {})
    parameters = get("rope_parameters", dict, {})
    rope: dict = {}
    for key, value in (("rope_theta", d.get("rope_theta")), *scaling.items(), *parameters.items()):
        if key == "type":  # its name long ago
            key = "rope_type"
        if value is None:
            continue
        if key in rope and rope[key] != value:
            raise UserError(
                f"{key} is both {rope[key]!r} and {value!r}: write the same into "
                "rope_theta or rope_scaling and into rope_parameters, or keep one of them"
            )
        rope[key] = value
    rope = {"rope_type": "default", "rope_theta": 10000.0} | rope
    kind = rope["rope_type"]
    if kind not in ROPE_TYPES or rope.get("partial_rotary_factor", 1) != 1:
        known = ", ".join(ROPE_TYPES)
        raise UserError(f"rope scaling {rope} is not supported, only {known}")
    if kind in ("llama3", "yarn"):  # they need the length before it was stretched
        length = d.get("original_max_position_embeddings") or d.get("max_position_embeddings")
        rope.setdefault("original_max_position_embeddings", length)
    if kind != "default":
        read_value(rope, "rope_scaling", "factor", 1e12)
    for key in rope.keys() & ROPE_KEYS[1:]:  # without rope_type
        value = read_value(rope, "rope_scaling", key, bool if key == "truncate" else float)
        if value == 0 and key in ("rope_theta", "factor"):
            raise UserError(f"{key} is {value}, expected a number above 0")
    return rope


def sliding_from_dict(d, get):
    """(window, the layers that have it): all of Mistral's, some of Qwen's, none of Llama's."""
    kind = d["model_type"]
    if kind == "llama" or d.get("sliding_window", 4096) is None:  # null is not the default
        return None, ()
    window = get("sliding_window", 1 << 24, 4096)
    layers = tuple(range(d["num_hidden_layers"]))
    if kind == "mistral":
        sliding = layers
    elif not get("use_sliding_window", bool):
        sliding = ()
    elif d.get("layer_types"):
        kinds = get("layer_types", list)
        other = {*map(str, kinds)} - {"sliding_attention", "full_attention"}
        if other or len(kinds) != len(layers):
            raise UserError(
                f"{len(kinds)} layer_types for {len(layers)} layers, of which "
                f"{other or 'none'} are not supported"
            )
        sliding = tuple(i for i in layers if kinds[i] == "sliding_attention")
    else:
        sliding = layers[get("max_window_layers", int, 28) :]
    return (window, sliding) if sliding else (None, ())


def config_to_dict(config):
    """-> config.json's content, also for readers of before transformers 5 (rope_theta)."""
    keys = GPT2_KEYS if config.is_gpt2 else LLAMA_KEYS
    d = {keys.get(field, field): getattr(config, field) for field in CONFIG_FIELDS}
    d["architectures"] = [HF_CLASSES[config.model_type]]
    if config.is_gpt2:
        return d | {"activation_function": "gelu_new"}
    scaling = {key: value for key, value in config.rope.items() if key != "rope_theta"}
    d |= {
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": config.out_bias,  # Qwen2's biases of q, k and v go without saying
        "mlp_bias": config.mlp_bias,
        "rope_parameters": config.rope,
        "rope_theta": config.rope["rope_theta"],
        "rope_scaling": None if scaling["rope_type"] == "default" else scaling,
    }
    if config.model_type != "llama":
        d["sliding_window"] = config.sliding_window
    if config.model_type.startswith("qwen"):
        most = CONFIG_FIELDS["num_hidden_layers"]  # whoever reads more refuses it
        kinds = ["full_attention"] * min(config.num_hidden_layers, most)
        for i in config.sliding_layers:
            kinds[i] = "sliding_attention"
        d |= {"use_sliding_window": bool(config.sliding_layers), "layer_types": kinds}
    return d


# ------------------------------------------------------------------------------------ tensor names
# Ours are Llama's without the leading "model.". GPT-2's folder has its own names, its matrices
# transposed (Conv1D) and the three attention inputs in one.
GPT2_NAMES = two_columns("""
    embed_tokens              wte
    embed_positions           wpe
    norm                      ln_f
    input_layernorm           ln_1
    post_attention_layernorm  ln_2
    self_attn.q_proj          attn.c_attn
    self_attn.k_proj          attn.c_attn
    self_attn.v_proj          attn.c_attn
    self_attn.o_proj          attn.c_proj
    mlp.up_proj               mlp.c_fc
    mlp.down_proj             mlp.c_proj
""")
# "layers.3.mlp.up_proj.weight" -> "3", "mlp.up_proj", "weight"
TENSOR_NAME = re.compile(r"(?:layers\.(\d+)\.)?(.+)\.(\w+)")


def folder_module(name):
    """Our name of a layer or a tensor -> its name in a folder of any family but GPT-2."""
    return name if name.startswith("lm_head") else "model." + name


def folder_name(name, config):
    """Our name of a tensor -> that of the tensor in the folder that it is, or is a part of."""
    if not config.is_gpt2 or name.startswith("lm_head."):
        return folder_module(name)
    number, inner, leaf = TENSOR_NAME.fullmatch(name).groups()
    layer = f"h.{number}." if number else ""
    return f"transformer.{layer}{GPT2_NAMES[inner]}.{leaf}"


def turned(name, tensor, config):
    """A matrix of GPT-2's layers, ours (out, in), the folder's (in, out), the other way round; any
    other tensor, GPTQ's packed ones too, as it is."""
    matrix = tensor.ndim == 2 and name.startswith("layers.") and name.endswith(".weight")
    return tensor.t() if config.is_gpt2 and matrix else tensor


def to_folder_names(state, config):
    """Our state dict -> {name in the folder: tensor}; a tied head is left to the reader to tie."""
    out = {}
    for name, tensor in state.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        theirs = folder_name(name, config)
        tensor = turned(name, tensor, config)
        if theirs in out and not name.endswith(
            ".g_idx"
        ):  # k and v go behind q, whose g_idx is all's
            tensor = torch.cat((out[theirs], tensor), -1)
        out[theirs] = tensor
    return out


def from_folder_name(tensor, names, config):
    """A tensor of a folder -> {our name: tensor}, the inverse of `to_folder_names`."""
    parts = [tensor] * len(names)
    if len(names) > 1 and not names[0].endswith(".g_idx"):
        parts = tensor.chunk(len(names), -1)  # (in, 3 * out) -> three of (in, out)
    return {n: turned(n, part, config).contiguous() for n, part in zip(names, parts)}


# ---------------------------------------------------------------------------------------- loading
def load_model(folder, device="cpu", dtype=None, dropout=0.0):
    """Load a model folder: config.json and safetensors in bf16, fp16 or fp32 -> Transformer.

    dtype None keeps the file's. Names and shapes are checked against the config from the files'
    headers before any tensor is read; tensors then come one by one, so loading needs about one copy
    of the weights. UserError names each missing, unexpected and misshapen tensor.
    """
    folder = Path(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: no config.json, so not a model folder")
    content = read_json(path)
    config = config_from_dict(content, where=path)
    read_generation(folder / "generation_config.json", config)
    config.dropout = dropout
    files = open_weights(folder, device)
    # The number of layers is checked before a module is built for each.
    layers = config.num_hidden_layers
    inside = [n for n in files if n.startswith(("model.layers.", "transformer.h."))]
    found = len({n.split(".")[2] for n in inside})
    if found != layers:
        raise UserError(f"{folder}: config.json says {layers} layers, the weights have {found}")
    with naming(path), torch.device("meta"):
        model = Transformer(config)
    ours = model.state_dict()  # {our name: meta tensor}
    packed = {}
    quantization = read_value(content, path, "quantization_config", dict)
    if quantization:
        from formats.packed import check_config, expect_packed, install_packed

        quantization = check_config(quantization, path)
        ours, packed = expect_packed(model, quantization, files)
    expected = to_folder_names(ours, config)
    with naming(folder):
        check_tensors(expected, files)
    parts: dict = {}  # {the folder's name: ours of the tensors that are joined there}
    for name in ours:
        parts.setdefault(folder_name(name, config), []).append(name)
    state = {}
    for name in expected:
        tensor = read_weight(files, name)
        layer, _, leaf = parts[name][0].rpartition(".")
        # dtype is not for what a packed layer consists of: its scales, and its bytes, which some
        # folders store as floats
        plain = leaf == "bias" or (leaf == "weight" and layer not in packed)
        if dtype is not None and plain and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        state |= from_folder_name(tensor, parts[name], config)
    if packed:
        install_packed(model, quantization, state, packed)
    for name, tensor in state.items():
        if tensor.dtype not in DTYPES.values():
            raise UserError(f"{folder}: {name} holds {tensor.dtype}, expected {', '.join(DTYPES)}")
    model.load_state_dict(state, strict=False, assign=True)  # complete, but for a tied head
    model.tie()
    model.source = folder
    return model.to(device).eval()


def read_generation(path, config):
    """What generation_config.json says goes before config.json: the ids that end a text, and the
    defaults of sampling, which every stage hands on with the model."""
    if not path.is_file():
        return
    content = read_json(path)
    for key, kind in SAMPLING_KEYS.items():
        read_value(content, path, key, kind)
    warn_of_unknown(keys_said(content) - {*SAMPLING_KEYS, *SILENT_GENERATION}, path)
    ends = read_ends(content.pop("eos_token_id", None), config, path)
    if ends is not None:
        config.eos_token_id = ends
    content.pop("bos_token_id", None)
    config.generation = content


def open_weights(folder, device="cpu"):
    """{tensor name: (open safetensors file, its name in there)}, of one file or a sharded index's.

    The two names differ in OpenAI's own GPT-2 upload, which lacks the "transformer." prefix.
    """
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if not (folder / names[0]).is_file() and index.is_file():
        with naming(index):
            names = sorted(set(read_json(index)["weight_map"].values()))
    files = {}
    for name in names:
        if Path(str(name)).name != name:  # an index from outside must not lead out of its folder
            raise UserError(f"{index}: {name!r} is not a plain file name")
        path = folder / name
        try:
            file = safe_open(path, framework="pt", device=str(device))
        except OSError:  # safetensors says "not found" of what may not be read, too
            raise UserError(f"{path}: not found (a model needs it), or not readable") from None
        except SafetensorError as error:
            raise UserError(f"{path}: damaged or cut short ({error}); fetch it again") from None
        for key in file.keys():
            bare = key.startswith(("h.", "wte.", "wpe.", "ln_f."))
            full = "transformer." + key if bare else key
            if full in files:
                raise UserError(f"{path}: {key} is in another shard too; fetch the folder again")
            files[full] = (file, key)
    return files


def read_weight(files, name):
    file, key = files[name]
    return file.get_tensor(key)


# Buffers that older writers saved; they hold no weights.
OLD_BUFFERS = ".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias"


def compare_shapes(expected, found):
    """{name: shape} of a model and of its file. UserError names what is extra, missing or other."""
    faults = [f"{name} is not part of this model" for name in found if name not in expected]
    for name, shape in expected.items():
        if name not in found:
            faults.append(f"{name} is missing")
        elif found[name] != shape:
            faults.append(f"{name} is {found[name]}, expected {shape}")
    if faults:
        raise UserError(f"its tensors have {len(faults)} faults: {'; '.join(faults[:8])}")


def check_tensors(expected, files):
    """Names and shapes in the folder against the model's; one error for all."""
    shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    found = {}
    for name, (file, key) in files.items():
        if not name.endswith(OLD_BUFFERS):
            found[name] = tuple(file.get_slice(key).get_shape())
    head = "lm_head.weight"
    spare = head not in expected and found.pop(head, None)
    compare_shapes(shapes, found)
    embedding = next(iter(expected))  # every model's first tensor
    if spare and not torch.equal(read_weight(files, head), read_weight(files, embedding)):
        raise UserError(f"{head} differs from the embedding it is tied to in config.json")


# ----------------------------------------------------------------------------------------- saving
def save_model(model, folder, state=None):
    """Write model.safetensors, generation_config.json and, last, config.json: each all or nothing.

    state: the state dict, where it is not simply this module's (gathered from shards, say); a
    quantized model is never trained, nor sharded.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config
    content = config_to_dict(config)
    content["dtype"] = str(model.embed_tokens.weight.dtype).removeprefix("torch.")
    content["torch_dtype"] = content["dtype"]  # its name before transformers 5
    if model.quantization:
        from formats.packed import packed_state

        state = packed_state(model)
        content["quantization_config"] = model.quantization
    elif state is None:
        state = model.state_dict()
    write_tensors(folder / "model.safetensors", to_folder_names(state, config))
    ends = {n: content[n] for n in ("bos_token_id", "eos_token_id") if content[n] is not None}
    write_json(folder / "generation_config.json", ends | config.generation)
    write_json(folder / "config.json", content)
