"""model.py: what the network computes, and what it refuses to load."""

import json
import math
import shutil
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, within
from safetensors.torch import load_file, save_file

from common import UserError
from formats.hub import config_from_dict
from model import (
    Config,
    FloatLinear,
    RMSNorm,
    Transformer,
    attention_mask,
    block_mask,
    cross_entropy_sum,
    draw,
    flex,
    one_product,
    rotate,
    takes_onednn,
)

SHAPES = {
    "qwen3": Config("qwen3", 50, 32, 64, 2, 4, 2, 16, 64),
    "first slides": Config(
        "qwen2", 50, 32, 64, 2, 4, 2, 8, 64, qkv_bias=True, sliding_window=8, sliding_layers=(0,)
    ),
    "sliding": Config(
        "mistral", 50, 32, 64, 2, 4, 2, 8, 64, sliding_window=8, sliding_layers=(0, 1)
    ),
    "gpt2": Config(
        "gpt2",
        50,
        32,
        64,
        2,
        4,
        4,
        8,
        64,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        rope={},
        norm_eps=1e-5,
    ),
    "untied": Config("llama", 50, 32, 64, 2, 4, 4, 8, 64, tie_word_embeddings=False),
}


def random_model(config, seed=0):
    torch.manual_seed(seed)
    model = Transformer(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2)
    return model


def tokens(B, T, seed=1):
    return torch.randint(0, 50, (B, T), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=SHAPES)
def model(request):
    return random_model(SHAPES[request.param])


@pytest.mark.parametrize(
    "V, C, tied", [(65, 128, True), (65, 128, False), (32768, 768, True), (8192, 1024, False)]
)
def test_fresh_model_guesses_uniformly(V, C, tied):
    torch.manual_seed(0)
    model = Transformer(
        Config(vocab_size=V, hidden_size=C, num_hidden_layers=1, tie_word_embeddings=tied)
    )
    model.init_weights()
    ids = torch.randint(0, V, (4, 64))
    assert abs(model(ids, ids.roll(-1, 1)).item() / ids.numel() - math.log(V)) < 0.25


def test_future_tokens_change_nothing(model):
    ids = tokens(1, 40)
    other = ids.clone()
    other[0, 20:] = 7
    with torch.no_grad():
        assert torch.allclose(model(ids)[:, :20], model(other)[:, :20], atol=1e-5)
        assert not torch.allclose(model(ids)[:, 20:], model(other)[:, 20:], atol=1e-2)


@pytest.mark.parametrize("pieces", [[40], [1] * 40, [13, 1, 1, 20, 5]])
def test_cached_logits_equal_uncached_in_any_pieces(model, pieces):
    ids = tokens(1, 40)
    caches = model.empty_caches(40)
    with torch.no_grad():
        out = [model(piece, caches=caches) for piece in ids.split(pieces, dim=1)]
        assert torch.allclose(torch.cat(out, 1), model(ids), atol=1e-4)


def test_sliding_window_hides_what_is_far():
    mask = attention_mask(torch.arange(10), window=3)
    assert mask.sum(1).tolist() == [1, 2, 3, 3, 3, 3, 3, 3, 3, 3]
    assert mask[9].nonzero()[:, 0].tolist() == [7, 8, 9]


def test_a_text_may_begin_at_any_position():
    """RoPE turns all of it by the same angle, and the window counts from wherever the query is."""
    model = random_model(SHAPES["first slides"])
    ids = tokens(1, 20)
    with torch.no_grad():
        later = model(ids, positions=torch.arange(30, 50))
        assert torch.allclose(later, model(ids), atol=1e-4)


def test_only_layers_that_slide_need_a_mask_of_a_plain_text():
    model = random_model(SHAPES["first slides"])
    full, sliding = model.masks(20, 0, None, torch.arange(20))
    assert full is None and sliding.shape == (20, 20)
    assert model.masks(8, 0, None, torch.arange(8)) == (None, None)


def test_packed_documents_do_not_see_each_other(model):
    a, b = tokens(1, 12, 1), tokens(1, 20, 2)
    docs = torch.tensor([[0] * 12 + [1] * 20])
    positions = torch.cat([torch.arange(12), torch.arange(20)])
    if model.config.sliding_layers:  # else this would say nothing about the window
        assert model.config.sliding_window < 12
    with torch.no_grad():
        packed = model(torch.cat([a, b], 1), docs=docs, positions=positions)
        assert torch.allclose(packed[:, :12], model(a), atol=1e-4)
        assert torch.allclose(packed[:, 12:], model(b), atol=1e-4)


@pytest.mark.filterwarnings("ignore")  # flex_attention warns that it is slow uncompiled
@pytest.mark.parametrize("window", [None, 5])
def test_flex_attention_of_documents_equals_the_dense_mask(window):
    torch.manual_seed(0)
    docs = torch.tensor([[0] * 40 + [1] * 60 + [2] * 28, [0] * 128])
    q = torch.randn(2, 4, 128, 16)
    k = torch.randn(2, 2, 128, 16)
    v = torch.randn(2, 2, 128, 16)
    at = torch.arange(128)
    mask = attention_mask(at, window, docs)
    dense = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, attn_mask=mask)
    assert torch.allclose(flex(q, k, v, block_mask(at, window, docs)), dense, atol=1e-5)


def test_where_flex_attention_fails_a_dense_mask_computes_the_same_and_says_so_once(
    monkeypatch, capsys
):
    """As on a GPU, whose block mask is made for documents whatever then becomes of it."""
    model = random_model(SHAPES["first slides"])
    docs = torch.tensor([[0] * 12 + [1] * 20])
    want = model(tokens(1, 32), docs=docs)

    def block_masks(T, past, docs, positions):
        return block_mask(positions, None, docs), block_mask(positions, 8, docs)

    def no_compiler(*_):
        raise RuntimeError("no Triton here\nlong story")

    monkeypatch.setattr(model, "masks", block_masks)
    monkeypatch.setattr("model.flex", no_compiler)
    assert torch.allclose(model(tokens(1, 32), docs=docs), want, atol=1e-5)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith("dense masks instead of FlexAttention: no Triton here long story")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention is for GPUs")
@pytest.mark.parametrize(
    "head_dim, dropout, flex", [(8, 0, False), (16, 0.1, False), (16, 0, True)]
)
def test_documents_with_small_heads_or_dropout_take_a_dense_mask(head_dim, dropout, flex):
    config = Config("qwen3", 50, 32, 64, 1, 2, 2, head_dim, 64, dropout=dropout)
    model = random_model(config).cuda().train()
    ids = tokens(1, 32).cuda()
    model(ids, ids, docs=torch.zeros_like(ids)).backward()
    assert config.flex == flex


def test_what_is_turned_in_16_bits_stays_there():
    """The angles are float32; queries and keys would take twice the memory, and so backward."""
    cos, sin = torch.rand(2, 6, 1, 8)
    x = torch.randn(2, 6, 3, 8)
    half = rotate(x.bfloat16(), cos, sin)
    assert half.dtype == torch.bfloat16
    assert torch.allclose(half.float(), rotate(x, cos, sin), atol=0.03)


def test_a_rotation_is_a_product_of_complex_numbers():
    model = Transformer(Config(head_dim=8))
    x = torch.randn(2, 6, 3, 8)
    positions = torch.arange(6)
    cos, sin = model.cos_and_sin(positions[:, None])  # (T, 1, D)
    angle = positions[:, None] * model.rope_frequency  # (T, D/2)
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones(()), angle)[:, None]
    expected = torch.cat((turned.real, turned.imag), -1)
    assert torch.allclose(rotate(x, cos, sin), expected, atol=1e-6)


def test_a_model_in_16_bits_turns_by_the_same_angles():
    model = Transformer(Config(head_dim=64))
    position = torch.tensor([5000])
    exact = model.cos_and_sin(position)
    assert all(map(torch.equal, model.bfloat16().cos_and_sin(position), exact))


@pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="no oneDNN")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("outputs", [40, 56])
def test_onednns_products_are_torchs(outputs, bias, learns, monkeypatch):
    layer = FloatLinear(48, outputs, bias).requires_grad_(learns)
    x = torch.randn(4, 64, 48)
    g = torch.randn(4, 64, outputs)
    results = []
    for faster in (True, False):
        monkeypatch.setattr("model.onednn_is_faster", lambda: faster)
        leaf = x.clone().requires_grad_()
        layer.zero_grad()
        y = layer(leaf)
        assert type(y.grad_fn).__name__.startswith("OneDNN") == faster
        y.backward(g)
        results.append([y, leaf.grad, *(p.grad for p in layer.parameters() if learns)])
    for ours, reference in zip(*results):
        assert torch.allclose(ours, reference, atol=1e-4)
    assert all(p.grad is None for p in layer.parameters()) != learns


def test_only_training_in_float32_takes_onednns_products(monkeypatch):
    monkeypatch.setattr("model.onednn_is_faster", lambda: True)
    weight = torch.zeros(8, 8)
    x = torch.zeros(2, 128, 8)
    assert takes_onednn(x, weight)
    assert not takes_onednn(x[:, 1:], weight)  # fewer rows than are worth it
    assert not takes_onednn(x.double(), weight.double())
    assert not takes_onednn(x.to("meta"), weight)
    with torch.inference_mode():
        assert not takes_onednn(x, weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert not takes_onednn(x, weight)


def test_layers_that_read_the_same_are_one_product():
    layers = [torch.nn.Linear(8, n) for n in (6, 4, 4)]
    x = torch.randn(2, 5, 8)
    for together, layer in zip(one_product(x, layers), layers):
        assert torch.allclose(together, layer(x), atol=1e-6)
    sum(y.square().sum() for y in one_product(x, layers)).backward()
    assert all(layer.weight.grad.any() and layer.bias.grad.any() for layer in layers)


def test_a_norm_of_16_bits_stays_there_whatever_its_weights_are():
    norm = RMSNorm(32, 1e-6)
    x = torch.randn(4, 32).bfloat16()
    with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's own warns that it is not fused
        y = norm(x)
    assert y.dtype == torch.bfloat16
    assert torch.allclose(y.float(), norm(x.float()), atol=0.02)


def test_folder_round_trip_is_exact(model, tmp_path):
    model.save_pretrained(tmp_path)
    back = Transformer.from_pretrained(tmp_path)
    assert back.config == model.config
    for (name, a), b in zip(model.state_dict().items(), back.state_dict().values()):
        assert torch.equal(a, b), name
    assert (back.lm_head.weight is back.embed_tokens.weight) == model.config.tie_word_embeddings


def test_counts_agree_with_arithmetic():
    config = Config("qwen3", 50, 32, 64, 2, 4, 2, 16, 64)
    model = random_model(config)
    layer = 32 * 64 + 2 * 32 * 32 + 64 * 32 + 3 * 32 * 64 + 2 * 32 + 2 * 16
    assert model.num_params() == 2 * layer + 50 * 32 + 32
    matmul = 2 * (layer - 2 * 32 - 2 * 16) + 50 * 32
    assert model.flops_per_token(10) == 6 * matmul + 12 * 2 * 4 * 16 * 10


def test_stories260k_tells_its_story(data_dir):
    """The published greedy continuation of "Once upon a time"; sentencepiece makes it text."""
    import sentencepiece

    spm = sentencepiece.SentencePieceProcessor(str(data_dir / "stories260K" / "tokenizer.model"))
    model = Transformer.from_pretrained(data_dir / "stories260K")
    ids = list(model.generate([1] + spm.encode("Once upon a time"), 50, temperature=0))
    assert spm.decode(ids).startswith(
        ", there was a little girl named Lily. She loved to play outside in the park. "
        "One day, she saw a big, red ball."
    )


# --------------------------------------------------------------------------------------- generation
@pytest.fixture
def short():
    """A model with a context of 16 tokens whose ids go up to 27."""
    torch.manual_seed(0)
    model = Transformer(Config("qwen3", 28, 16, 32, 2, 2, 2, 8, 16))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    return model


def shares(logits, temperature=1.0, top_k=0):
    """How often each token is drawn, of 4,000 times."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor(logits)
    draws = [draw(logits, temperature, top_k, generator) for _ in range(4000)]
    return torch.bincount(torch.tensor(draws), minlength=len(logits)) / 4000


@pytest.mark.parametrize("temperature", [0, 5e-324, 1e-46, 1e-40, 1e-38])
def test_a_temperature_next_to_nothing_is_greedy(temperature):
    from engine.sampler import Sampling, SamplingRow, draw_tokens

    logits = torch.tensor([0.1, 9.0, 8.9, -torch.inf])
    assert draw(logits, temperature, 0, torch.Generator()) == 1
    row = SamplingRow(Sampling(temperature=temperature, top_p=0.9))
    tokens, failed = draw_tokens(logits[None].clone(), [row], torch.tensor([0.99]))
    assert tokens.tolist() == [1]
    assert failed.tolist() == [False]


def test_sampling_follows_the_distribution():
    logits = [2.0, 1.0, 0.0, -1.0]
    assert torch.allclose(shares(logits), torch.tensor(logits).softmax(0), atol=0.03)
    colder = (torch.tensor(logits) * 2).softmax(0)
    assert torch.allclose(shares(logits, temperature=0.5), colder, atol=0.03)


def test_top_k_cuts_the_tail_and_temperature_0_takes_the_likeliest():
    found = shares([2.0, 1.0, 0.0, -1.0], top_k=2)
    assert found[1] > 0 and found[2:].sum() == 0
    assert shares([0.0, 3.0, 1.0], temperature=0)[1] == 1


def test_same_seed_same_text_and_other_seed_other_text(short):
    first, again, other = [list(short.generate([1, 2, 3], 40, seed=seed)) for seed in (1, 1, 2)]
    assert first == again != other


def test_text_goes_on_past_the_context(short):
    """60 tokens come out of a context of 16, each what the model says of the text that it holds."""
    ids = list(range(10))
    new = list(short.generate(ids, 60, temperature=0))
    assert len(new) == 60
    with torch.no_grad():
        assert new[5] == short(torch.tensor([ids + new[:5]]))[0, -1].argmax().item()


def test_a_context_of_one_token_goes_on_too():
    bigram = random_model(Config("qwen3", 50, 16, 32, 1, 2, 2, 8, 1))
    assert len(list(bigram.generate([1, 2, 3], 5))) == 5


def test_generation_stops_at_the_end_of_text(short):
    new = list(short.generate([1], 10, temperature=0))
    short.config.eos_token_id = [99, new[4]]
    assert list(short.generate([1], 10, temperature=0)) == new[: new.index(new[4])]


def test_a_prompt_without_tokens_is_refused(short):
    with pytest.raises(UserError, match="no tokens"):
        next(short.generate([], 5))


# ---------------------------------------------------------------------------------------- bad input
@pytest.fixture
def folder(tmp_path):
    random_model(SHAPES["qwen3"]).save_pretrained(tmp_path)
    return tmp_path


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def refused(folder, *words):
    with pytest.raises(UserError) as error:
        Transformer.from_pretrained(folder)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value), str(error.value)


def test_unknown_model_type_is_refused(folder):
    edit_config(folder, model_type="mamba")
    refused(folder, "'mamba'", "qwen3")


def test_unknown_rope_scaling_is_refused(folder):
    edit_config(folder, rope_parameters={"rope_type": "longrope", "factor": 2.0})
    refused(folder, "longrope", "yarn")


GPT2 = {"model_type": "gpt2", "vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4}
LLAMA = {"model_type": "llama", "vocab_size": 50, "hidden_size": 32, "intermediate_size": 64}
LLAMA |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}


@pytest.mark.parametrize(
    "content, words",
    [
        (GPT2 | {"n_positions": 64, "n_head": 5}, "n_embd 32 is not a multiple of n_head 5"),
        (GPT2 | {"activation_function": "relu"}, "gelu_new"),
        (GPT2, "n_positions is None, expected int from 1 to 16,777,216"),
        (LLAMA | {"head_dim": 9}, "head_dim 9 is odd"),
        (LLAMA | {"num_key_value_heads": True}, "num_key_value_heads is True"),
        (LLAMA | {"rope_scaling": {"type": "linear"}}, "factor is None"),
        (LLAMA | {"rope_parameters": {"partial_rotary_factor": 0.5}}, "is not supported"),
        (LLAMA | {"rope_parameters": 5}, "rope_parameters is 5, expected dict"),
        (LLAMA | {"rope_theta": float("nan")}, "rope_theta is nan"),
        (LLAMA | {"rope_parameters": {"rope_type": "linear", "factor": 0}}, "factor is 0"),
        (LLAMA | {"rms_norm_eps": "x"}, "rms_norm_eps is 'x'"),
        (LLAMA | {"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'"),
        (LLAMA | {"eos_token_id": ["x"]}, "eos_token_id 'x' is not an id"),
        (LLAMA | {"model_type": []}, r"model_type is \[\], expected str"),
        (LLAMA | {"model_type": "mistral", "sliding_window": "x"}, "sliding_window is 'x'"),
        (LLAMA | {"model_type": "mistral", "sliding_window": -5}, "sliding_window is -5"),
        (LLAMA | {"model_type": "qwen2", "use_sliding_window": True, "layer_types": 5}, "list"),
    ],
)
def test_config_that_cannot_be_is_refused_in_its_own_words(content, words):
    with pytest.raises(UserError, match=words):
        config_from_dict(content)


def test_gpt2s_own_defaults_are_read():
    config = config_from_dict(GPT2 | {"n_positions": 64, "n_inner": None})
    assert config.intermediate_size == 128 and config.tie_word_embeddings
    assert config.norm_eps == 1e-5 and config.qkv_bias and config.rope == {}


def test_config_that_lies_about_shapes_is_refused_by_name(folder):
    edit_config(folder, hidden_size=48)
    refused(folder, "model.embed_tokens.weight is (50, 32), expected (50, 48)")


@pytest.mark.parametrize("layers", [1, 3, 1000])
def test_config_that_lies_about_depth_is_refused(folder, layers):
    edit_config(folder, num_hidden_layers=layers)
    refused(folder, f"{layers} layers", "have 2")


@pytest.mark.parametrize(
    "key, value",
    [
        ("hidden_size", 1 << 40),
        ("vocab_size", -1),
        ("num_hidden_layers", 10**9),
        ("num_attention_heads", "four"),
        ("num_key_value_heads", 3),
        ("hidden_act", "relu"),
    ],
)
def test_absurd_config_values_are_refused(folder, key, value):
    edit_config(folder, **{key: value})
    refused(folder, str(value))


def test_missing_extra_and_misshapen_tensors_are_all_named(folder):
    def change(t):
        del t["model.norm.weight"]
        t["model.surprise.weight"] = torch.zeros(3)
        t["model.layers.0.mlp.up_proj.weight"] = torch.zeros(5, 5)

    edit_weights(folder, change)
    refused(
        folder,
        "model.norm.weight is missing",
        "model.surprise.weight is not part of this model",
        "model.layers.0.mlp.up_proj.weight is (5, 5), expected (64, 32)",
    )


def test_a_tensor_in_two_shards_is_refused(folder):
    shards = ["a.safetensors", "b.safetensors"]
    for name in shards:
        shutil.copy(folder / "model.safetensors", folder / name)
    (folder / "model.safetensors").unlink()
    index = {"weight_map": dict(enumerate(shards))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "b.safetensors: ", "is in another shard too")


def test_an_index_without_a_map_of_names_is_one_line(folder):
    (folder / "model.safetensors").unlink()
    for index in ("[]", "{}", '{"weight_map": 5}', '{"weight_map": {"a": [1]}}'):
        (folder / "model.safetensors.index.json").write_text(index)
        refused(folder, "index.json")


@pytest.mark.parametrize("dtype", [torch.int32, torch.float64, torch.bool])
def test_weights_that_are_no_floats_are_refused_by_name(folder, dtype):
    edit_weights(folder, lambda t: t.update({"model.norm.weight": torch.ones(32).to(dtype)}))
    refused(folder, f"norm.weight holds {dtype}, expected float32")


@pytest.mark.parametrize("size", [1 << 62, 99 << 20, 5])
def test_a_safetensors_header_that_lies_is_refused_in_bounds(folder, size):
    path = folder / "model.safetensors"
    path.write_bytes(size.to_bytes(8, "little") + b'{"a": [' + b"[]," * (33 << 20))
    with within():
        refused(folder, "damaged or cut short")


@pytest.mark.parametrize("keep", [0, 4, 100, -10])
def test_truncated_safetensors_is_refused(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(folder, "damaged or cut short")


def test_tied_head_that_differs_is_refused(folder):
    edit_weights(folder, lambda t: t.update({"lm_head.weight": torch.ones(50, 32)}))
    refused(folder, "lm_head.weight differs")


def test_spare_head_without_its_embedding_is_refused(folder):
    def change(t):
        t["lm_head.weight"] = t.pop("model.embed_tokens.weight")

    edit_weights(folder, change)
    refused(folder, "model.embed_tokens.weight is missing")


def test_folder_without_files_is_refused(tmp_path, folder):
    refused(tmp_path / "nowhere", "no config.json")
    (folder / "model.safetensors").unlink()
    refused(folder, "model.safetensors: not found")


def test_index_that_leads_out_of_the_folder_is_refused(folder):
    (folder / "model.safetensors").rename(folder / "elsewhere.safetensors")
    index = {"weight_map": {"a": "../../etc/passwd"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "not a plain file name")


def test_more_tokens_than_the_context_are_refused():
    with pytest.raises(UserError, match="65 tokens, but this model's context is 64"):
        random_model(SHAPES["qwen3"])(tokens(1, 65))


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_loading_takes_about_one_copy_of_the_weights(tmp_path):
    """40M parameters in float32 are 160 MB: the process's peak grows by at most 1.3 times that."""
    torch.manual_seed(0)
    config = Config("qwen3", 20000, 512, 1536, 6, 8, 8, 64, 64, tie_word_embeddings=False)
    Transformer(config).save_pretrained(tmp_path)
    code = textwrap.dedent(f"""
        import sys; sys.path.insert(0, {str(ROOT)!r})
        from model import Transformer
        def peak():
            return 1024 * int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
        before = peak()
        model = Transformer.from_pretrained({str(tmp_path)!r})
        sum(p.sum() for p in model.parameters())  # safetensors may read the file only on use
        print((peak() - before) / (4 * model.num_params()))
    """)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 0.5 < float(done.stdout) < 1.3, done.stdout


@pytest.mark.parametrize("rows", [1, 7, 32])
def test_chunked_cross_entropy_equals_plain_in_value_and_gradients(rows, monkeypatch):
    torch.manual_seed(0)
    hidden = torch.randn(40, 16, dtype=torch.float64)
    weight = torch.randn(50, 16, dtype=torch.float64)
    targets = torch.randint(0, 50, (40,))
    targets[::5] = -100
    results = []
    for at_once in (10**6, rows):
        monkeypatch.setattr("model.LOGITS_AT_ONCE", 50 * at_once)
        h = hidden.clone().requires_grad_()
        w = weight.clone().requires_grad_()
        loss = cross_entropy_sum(h, w, targets)
        (loss / 32).backward()
        results.append((loss.double(), h.grad, w.grad))
    for plain, chunked in zip(*results):
        assert torch.allclose(plain, chunked, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert abs(cross_entropy_sum(hidden, weight, targets) - results[0][0]) < 1e-3


def test_a_target_that_is_no_id_is_refused_in_chunks_too(monkeypatch):
    for at_once in (100, 15):
        monkeypatch.setattr("model.LOGITS_AT_ONCE", at_once)
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            cross_entropy_sum(torch.randn(8, 4), torch.randn(5, 4), torch.full((8,), -1))


def test_a_batch_without_targets_costs_nothing(monkeypatch):
    hidden = torch.randn(8, 4, requires_grad=True)
    weight = torch.randn(5, 4, requires_grad=True)
    for rows in (100, 3):
        monkeypatch.setattr("model.LOGITS_AT_ONCE", 5 * rows)
        loss = cross_entropy_sum(hidden, weight, torch.full((8,), -100))
        loss.backward()
        assert loss == 0 and hidden.grad.abs().sum() == 0 and weight.grad.abs().sum() == 0


def test_recomputed_activations_change_no_gradient_and_no_text(model):
    ids = tokens(2, 30)
    grads = []
    texts = []
    for recompute in (False, True):
        model.train().recompute = recompute
        model.zero_grad()
        model(ids, ids).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
        texts.append(list(model.generate([1, 2, 3], 9, temperature=0)))
    assert all(torch.equal(a, b) for a, b in zip(*grads))
    assert texts[0] == texts[1]
