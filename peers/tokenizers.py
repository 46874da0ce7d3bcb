"""HF tokenizers and tiktoken: the same byte-level BPE, trained and encoded by them."""

import os

import tokenizers
from tokenizers import Regex, models, pre_tokenizers, trainers

from tokenizer import PATTERNS


def train_hf(file, vocab_size, folder):
    """Train HF's BPE on a text file, with our pattern, into folder/tokenizer.json."""
    words = pre_tokenizers.Split(Regex(PATTERNS["gpt4"]), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(False, use_regex=False)
    tok = tokenizers.Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
    trainer = trainers.BpeTrainer(
        vocab_size=int(vocab_size),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tok.train([file], trainer)
    os.makedirs(folder)
    tok.save(f"{folder}/tokenizer.json")


def hf_encoder(folder):
    return tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json").encode


def tiktoken_encoder(tok):
    """tiktoken's encoder over our vocabulary."""
    import tiktoken

    encoding = tiktoken.Encoding(
        "same", pat_str=PATTERNS["gpt4"], mergeable_ranks=tok.vocab, special_tokens={}
    )
    return encoding.encode_ordinary
