"""Our Transformer against transformers', for every family: logits, gradients, folders both ways."""

import pytest
import torch

from model import Config, Transformer

pytestmark = pytest.mark.peers
T = 300  # past the sliding windows (64) and past the original rope lengths (128) below
SIZE = dict(
    vocab_size=160,
    hidden_size=64,
    intermediate_size=112,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=None,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=50000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=128,
)
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=128)
LINEAR = dict(rope_type="linear", rope_theta=10000.0, factor=4.0)
GPT2 = dict(vocab_size=160, n_embd=64, n_layer=3, n_head=4, n_positions=512)
FAMILIES = {
    "gpt2": ("GPT2Config", GPT2),
    "gpt2-untied": ("GPT2Config", GPT2 | dict(n_layer=2, n_inner=96, tie_word_embeddings=False)),
    "llama2": ("LlamaConfig", SIZE | dict(num_key_value_heads=4)),
    "llama-biases": (
        "LlamaConfig",
        SIZE | dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    ),
    "llama3.1": ("LlamaConfig", SIZE | dict(rope_parameters=LLAMA3)),
    "llama-linear": ("LlamaConfig", SIZE | dict(rope_parameters=LINEAR)),
    "llama-yarn": ("LlamaConfig", SIZE | dict(rope_parameters=YARN)),
    "llama-yarn-mscale": (
        "LlamaConfig",
        SIZE | dict(rope_parameters=YARN | dict(mscale=1.0, mscale_all_dim=0.8, truncate=False)),
    ),
    "smollm": (
        "LlamaConfig",
        SIZE
        | dict(
            tie_word_embeddings=True, num_attention_heads=6, num_key_value_heads=3, hidden_size=96
        ),
    ),
    "mistral": ("MistralConfig", SIZE | dict(sliding_window=64, head_dim=24)),
    "mistral-no-window": ("MistralConfig", SIZE | dict(sliding_window=None)),
    "qwen2": ("Qwen2Config", SIZE | dict(tie_word_embeddings=True)),
    "qwen2-sliding": (
        "Qwen2Config",
        SIZE | dict(use_sliding_window=True, sliding_window=64, max_window_layers=1),
    ),
    "qwen3": ("Qwen3Config", SIZE | dict(head_dim=32)),
    "qwen3-yarn": (
        "Qwen3Config",
        SIZE | dict(head_dim=32, rope_parameters=YARN | dict(mscale=0.7)),
    ),
}


def theirs(family, folder, attention="eager"):
    """A random transformers model of the family, saved to the folder.

    Biases and norms are shaken off their trivial values."""
    import transformers

    torch.manual_seed(0)
    name, options = FAMILIES[family]
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, name)(**options), attn_implementation=attention
    )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.1 if p.ndim == 1 else 0.02))
    model.eval().save_pretrained(folder)
    return model


def relative_error(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers_in_both_directions(family, tmp_path):
    import transformers

    reference = theirs(family, tmp_path / "theirs")
    ids = torch.randint(0, 160, (2, T), generator=torch.Generator().manual_seed(1))
    ours = Transformer.from_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        expected = reference(ids).logits
        assert relative_error(ours(ids), expected) < 1e-5
        ours.save_pretrained(tmp_path / "ours")
        back = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "ours", attn_implementation="eager"
        )
        assert relative_error(back(ids).logits, expected) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_decoding_equals_the_whole_forward_pass(family, tmp_path):
    """Greedy tokens from our cache == transformers' generate."""
    reference = theirs(family, tmp_path)
    prompt = torch.randint(3, 160, (1, 90), generator=torch.Generator().manual_seed(2))
    reference.generation_config.eos_token_id = None
    expected = reference.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=60,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )[0, 90:].tolist()
    ours = Transformer.from_pretrained(tmp_path)
    ours.config.eos_token_id = None
    assert list(ours.generate(prompt[0].tolist(), 60, temperature=0)) == expected


def test_gradients_equal_transformers(tmp_path):
    reference = theirs("qwen3", tmp_path)
    ours = Transformer.from_pretrained(tmp_path)
    ids = torch.randint(0, 160, (2, T), generator=torch.Generator().manual_seed(1))
    reference(ids, labels=ids).loss.backward()
    (ours(ids[:, :-1], ids[:, 1:]) / (2 * (T - 1))).backward()
    grads = {n.removeprefix("model."): p.grad for n, p in reference.named_parameters()}
    for name, p in ours.named_parameters():
        assert relative_error(p.grad, grads[name]) < 1e-5, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_sharded_folders_load(dtype, tmp_path):
    reference = theirs("llama2", tmp_path / "whole").to(dtype)
    reference.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    ours = Transformer.from_pretrained(tmp_path / "shards")
    assert ours.embed_tokens.weight.dtype == dtype
    expected = reference.state_dict()
    for name, tensor in ours.state_dict().items():
        theirs_name = name if name.startswith("lm_head") else "model." + name
        assert torch.equal(tensor, expected[theirs_name]), name


def test_presets_open_in_transformers(tmp_path):
    import transformers

    torch.manual_seed(0)
    for kind in ("qwen3", "llama", "gpt2"):
        bias = kind == "gpt2"
        biases = dict(qkv_bias=bias, out_bias=bias, mlp_bias=bias)
        ours = Transformer(Config(kind, 65, 48, 96, 2, 4, 4, 12, 64, **biases))
        ours.init_weights()
        ours.save_pretrained(tmp_path / kind)
        back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / kind)
        ids = torch.randint(0, 65, (1, 64))
        with torch.no_grad():
            assert relative_error(back(ids).logits, ours.eval()(ids)) < 1e-5


def test_stories260k_writes_the_same_150_tokens(data_dir):
    import transformers

    folder = data_dir / "stories260K"
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder)
    prompt = [1, 403, 407, 261, 378]  # "Once upon a time"
    expected = reference.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, 5, dtype=torch.int64),
        max_new_tokens=150,
        do_sample=False,
    )[0, 5:].tolist()
    ours = Transformer.from_pretrained(folder)
    assert list(ours.generate(prompt, 150, temperature=0)) == expected
    assert len(expected) == 150
