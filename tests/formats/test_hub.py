"""config.json and generation_config.json: every key is applied, refused by name, or named."""

import contextlib
import io
import json

import pytest
from conftest import within
from hypothesis import given, settings
from hypothesis import strategies as st

from common import UserError
from formats import packed
from formats.hub import config_from_dict, config_to_dict
from generate import Engine
from model import Config, Transformer

LLAMA = dict(
    model_type="llama",
    vocab_size=50,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
)
QWEN = LLAMA | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8}
GPT2 = dict(model_type="gpt2", vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64)


def read(content):
    """-> (Config, what was warned of)"""
    with contextlib.redirect_stderr(io.StringIO()) as told:
        config = config_from_dict(content)
    return config, told.getvalue()


@pytest.mark.parametrize(
    "content, words",
    [
        (LLAMA | {"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6', expected float"),
        (LLAMA | {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        (LLAMA | {"rms_norm_eps": True}, "rms_norm_eps is True"),
        (LLAMA | {"hidden_size": 32.0}, "hidden_size is 32.0, expected int"),
        (LLAMA | {"hidden_size": "32"}, "hidden_size is '32'"),
        (LLAMA | {"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'"),
        (LLAMA | {"tie_word_embeddings": 1}, "tie_word_embeddings is 1, expected bool"),
        (LLAMA | {"attention_bias": "true"}, "attention_bias is 'true'"),
        (LLAMA | {"rope_theta": "10000"}, "rope_theta is '10000'"),
        (LLAMA | {"rope_theta": -1}, "rope_theta is -1"),
        (LLAMA | {"rope_scaling": "linear"}, "rope_scaling is 'linear', expected dict"),
        (LLAMA | {"rope_scaling": {"type": "linear", "factor": "2"}}, "factor is '2'"),
        (LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        (
            LLAMA | {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 1e4}},
            "500000.0 and 10000.0",
        ),
        (LLAMA | {"model_type": ["llama"]}, "model_type is"),
        (LLAMA | {"eos_token_id": "2"}, "eos_token_id is '2', expected an id or a list"),
        (LLAMA | {"eos_token_id": 2.0}, "eos_token_id is 2.0"),
        (LLAMA | {"eos_token_id": [2, -1]}, "eos_token_id -1 is not an id"),
        (LLAMA | {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        (LLAMA | {"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0"),
        (LLAMA | {"logit_scale": 0.5}, "logit_scale 0.5"),
        (LLAMA | {"num_local_experts": 8}, "num_local_experts 8"),
        (LLAMA | {"quantization": {"bits": 4}}, "quantization {'bits': 4}"),
        (QWEN | {"sliding_window": "8"}, "sliding_window is '8'"),
        (QWEN | {"layer_types": ["full_attention"]}, "layer_types"),
        (QWEN | {"layer_types": ["linear_attention"] * 2}, "linear_attention"),
        (QWEN | {"use_sliding_window": "yes"}, "use_sliding_window is 'yes'"),
        (QWEN | {"use_sliding_window": True, "max_window_layers": -1}, "max_window_layers is -1"),
        (GPT2 | {"scale_attn_weights": False}, "scale_attn_weights False"),
        (GPT2 | {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        (GPT2 | {"add_cross_attention": True}, "add_cross_attention"),
    ],
)
def test_a_value_that_cannot_be_meant_or_computed_is_one_line(content, words):
    with pytest.raises(UserError) as error:
        read(content)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_an_end_beyond_the_vocabulary_is_named_and_left_out():
    config, told = read(LLAMA | {"eos_token_id": [2, None, 50]})
    assert config.eos_token_id == [2] and "ignored: eos_token_id 50, of 50 ids" in told
    config, told = read(GPT2 | {"eos_token_id": 50256})
    assert config.eos_token_id is None and "50,256" in told


def test_null_is_the_default_and_what_published_folders_say_is_no_news():
    nulls = dict.fromkeys(
        "rms_norm_eps rope_theta rope_scaling head_dim tie_word_embeddings sliding_window".split()
    )
    assert read(LLAMA | nulls) == read(LLAMA) == (read(LLAMA)[0], "")
    published = {
        "_name_or_path": "x",
        "architectures": ["LlamaForCausalLM"],
        "attention_dropout": 0.0,
        "pretraining_tp": 1,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "rope_interleaved": False,
        "is_llama_config": True,
    }
    assert read(LLAMA | published) == (read(LLAMA)[0], "")
    for kind in ("gpt2", "llama", "mistral", "qwen2", "qwen3"):
        config = Config(kind, rope={} if kind == "gpt2" else Config().rope)
        assert read(config_to_dict(config))[1] == ""


def test_what_is_added_to_rope_scaling_by_hand_is_applied_or_refused():
    """A folder of ours says rope_parameters too; readers of it must see the same."""
    content = config_to_dict(Config())
    yarn = {"rope_type": "yarn", "factor": 4.0}
    with pytest.raises(UserError, match="rope_type is both 'yarn' and 'default'"):
        read(content | {"rope_scaling": yarn})
    content["rope_parameters"] = yarn | {"rope_theta": 1e4, "beta_fast": None}
    assert read(content | {"rope_scaling": yarn | {"beta_fast": 16}})[0].rope["beta_fast"] == 16


def test_code_of_its_own_that_a_folder_brings_is_named():
    assert "ignored: 'auto_map'" in read(LLAMA | {"auto_map": {"AutoConfig": "x.Config"}})[1]


VALUES = st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=4) | st.just([1])
KEYS = st.text("abcdefgh_ \n", min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(KEYS, VALUES, st.sampled_from(["config", "gpt2", "rope", "quantization"]))
def test_no_key_of_a_config_is_dropped_without_a_word(key, value, level):
    with contextlib.redirect_stderr(io.StringIO()) as told:
        try:
            if level == "rope":
                config_from_dict(LLAMA | {"rope_parameters": {key: value, "rope_type": "default"}})
            elif level == "quantization":
                packed.check_config({"quant_method": "gptq", "bits": 4, key: value}, "config.json")
            else:
                config_from_dict((GPT2 if level == "gpt2" else LLAMA) | {key: value})
        except UserError as error:
            told.write(repr(key) + " refused" if key in str(error) else "")
    assert repr(key) in told.getvalue() or key.startswith("_") or value is None


# ------------------------------------------------------------------------- generation_config.json
@pytest.fixture
def folder(tmp_path):
    config = config_from_dict(LLAMA | {"eos_token_id": 3, "tie_word_embeddings": True})
    Transformer(config).save_pretrained(tmp_path)
    return tmp_path


def generation(folder, **content):
    (folder / "generation_config.json").write_text(json.dumps(content))
    return Transformer.from_pretrained(folder)


@pytest.mark.parametrize(
    "said, ends", [([3, 5], [3, 5]), (7, 7), (None, 3), ([], []), ([2, 3, 4], [2, 3, 4]), ([99], 3)]
)
def test_the_ends_of_generation_are_those_of_generation_config(folder, said, ends):
    model = generation(folder, eos_token_id=said)
    assert model.config.eos_token_id == ends
    engine = Engine.of(model, None, kv_tokens=256)
    assert engine.eos == frozenset(ends if isinstance(ends, list) else [ends])
    model.save_pretrained(folder / "again")
    assert Transformer.from_pretrained(folder / "again").config.eos_token_id == ends


def test_defaults_of_sampling_are_the_engines_and_are_handed_on(folder):
    said = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.05}
    model = generation(folder, **said, do_sample=True, min_p=None, pad_token_id=0, num_beams=4)
    assert Engine.of(model, None, kv_tokens=256).sampling_defaults == said
    model.save_pretrained(folder / "again")
    content = json.loads((folder / "again/generation_config.json").read_text())
    assert content.items() >= (said | {"eos_token_id": 3, "num_beams": 4}).items()


def test_what_generation_config_asks_for_in_vain_is_named(folder, capsys):
    generation(folder, num_beams=4, guidance_scale=1.5, typical_p=None, max_length=20)
    assert "ignored: 'guidance_scale', 'num_beams'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content, words",
    [
        ({"temperature": "0.7"}, "temperature is '0.7', expected float"),
        ({"top_k": 2.5}, "top_k is 2.5, expected int"),
        ({"top_k": 1 << 40}, "top_k is 1099511627776, expected int"),
        ({"top_k": -1}, "top_k is -1, expected int"),
        ({"top_p": -0.5}, "top_p is -0.5"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"eos_token_id": [3, "5"]}, "eos_token_id '5' is not an id"),
        ({"eos_token_id": True}, "eos_token_id True"),
    ],
)
def test_a_generation_config_that_cannot_be_meant_is_one_line(folder, content, words):
    with pytest.raises(UserError) as error:
        Engine.of(generation(folder, **content), None, kv_tokens=256)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_billion_layers_are_refused_before_they_take_memory():
    config = Config("qwen3", 16, 16, 16, 10**9, 1, 1, 16, 16)
    with within(memory=100 << 20), pytest.raises(UserError, match="from 1 to 1,024"):
        config_from_dict(config_to_dict(config))
