"""GGUF: what is written comes back, numbers keep their promise, and damaged files are refused in one line."""
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import gguf
from bpe import PATTERNS
from common import UserError
from model import Config, Transformer
from tokenizer import Tokenizer

LLAMA3 = dict(rope_type="llama3", rope_theta=50000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=128)
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=64)
SIZE = dict(model_type="llama", hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=64, max_position_embeddings=512)
GPT2 = SIZE | dict(model_type="gpt2", num_key_value_heads=4, norm_eps=1e-5, rope={}, qkv_bias=True, out_bias=True, mlp_bias=True)
FAMILIES = {
    "llama": SIZE, "untied": SIZE | dict(tie_word_embeddings=False), "gpt2": GPT2,
    "gpt2-untied": GPT2 | dict(tie_word_embeddings=False, intermediate_size=768),
    "biases": SIZE | dict(qkv_bias=True, out_bias=True, mlp_bias=True),
    "odd": SIZE | dict(hidden_size=96, intermediate_size=160, head_dim=24),          # rows of 96 and 160: no multiples of 256
    "llama3.1": SIZE | dict(rope=LLAMA3), "linear": SIZE | dict(rope=dict(rope_type="linear", rope_theta=10000.0, factor=4.0)),
    "yarn": SIZE | dict(rope=YARN), "yarn-scaled": SIZE | dict(rope=YARN | dict(mscale=1.0, mscale_all_dim=0.8, beta_fast=16)),
    "mistral": SIZE | dict(model_type="mistral", head_dim=48), "qwen2": SIZE | dict(model_type="qwen2", qkv_bias=True),
    "qwen3": SIZE | dict(model_type="qwen3", head_dim=32, tie_word_embeddings=False),
    "qwen3-yarn": SIZE | dict(model_type="qwen3", rope=YARN),
    "tiny": SIZE | dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
                        head_dim=32),
}
TEXT_PARTS = ["Hello", " world", " the", " a", "'s", "'LL", "n't", " 1234567", "42", " 3.14", "  ", "   ", "\n", "\n\n\n", " \n ", "\t", "\r\n",
              "...", "?!", " (x)", "foo_bar", "==", "</s>", "<s>", "<|im_start|>", "<EOS>", "é", "Zürich", "naïve", "日本語", "한국어", "Привет",
              "مرحبا", "🙂", "👩‍👩‍👧", "ﬁ", "½", "²", "e\u0301", "\u3000", "\u00a0", "▁", "𝔘", "\x00", "ᚠ", "I", "A", "ß", "_", "-", ",", "`", " $"]


def texts():
    return [p.read_text(encoding="utf-8") for p in sorted(Path(__file__).parent.glob("test_*.py"))[:4]] + TEXT_PARTS * 3


def train(pattern, **options):
    return lambda data_dir: Tokenizer.train(texts(), 700, pattern, **options)


def smollm(data_dir):
    tok = Tokenizer.train(texts(), 700, "gpt2")
    return Tokenizer("bytes", tok.vocab, tok.merges, patterns=[r"\p{N}", PATTERNS["gpt2"]], special=tok.special)


def with_added_tokens(data_dir):
    tok = Tokenizer.train(texts(), 700, "qwen2")
    return Tokenizer("bytes", tok.vocab, tok.merges, patterns=tok.patterns, special=tok.special,
                     added={"<think>": 700, "</s>": 701, "???": 705})


SPLIT_TOKENIZERS = {
    **{name: train(name) for name in ("gpt2", "gpt4", "llama3", "qwen2")}, "smollm": smollm, "added": with_added_tokens,
    "GPT-2's own": lambda data_dir: Tokenizer.load(data_dir / "gpt2-tokenizer" / "vocab.bpe"),
    "SentencePiece": lambda data_dir: Tokenizer.load(data_dir / "stories260K"),
}


def relative_error(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def make_folder(folder, family="llama", tok=None, eos=None):
    """A random model of that family with a tokenizer, saved -> (model, tokenizer)."""
    tok = tok or Tokenizer.train(TEXT_PARTS, 400)
    torch.manual_seed(0)
    config = Config(**{**FAMILIES[family], "vocab_size": tok.vocab_size + 8, "eos_token_id": eos or tok.eos_id, "bos_token_id": tok.bos_id})
    if config.model_type == "mistral":
        config.sliding_window, config.sliding_layers = 300, (0, 1, 2)
    model = Transformer(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=0.1 if p.ndim == 1 else 0.03).add_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    model.save_pretrained(folder)
    tok.save(folder)
    return model, tok
