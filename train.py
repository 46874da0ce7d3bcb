"""Pre-training: text in, a model folder out.

python train.py                                       # a character GPT on Shakespeare, in minutes
python train.py --data my.txt --layers 6 --dim 384    # your text, your shape
python train.py --resume --out runs/shakespeare-char  # go on exactly where it stopped
torchrun --nproc-per-node 8 train.py --preset 125m    # on several GPUs (DDP; --shard for FSDP2)
python train.py eval MODEL --data data/wikitext-2     # loss, perplexity, bits per byte

The loop is `train`, on one screen. What it calls is in training/loop.py: `steps` evaluates and
saves (`save_run`), `backward` divides the gradient, `update` clips it and moves the weights.
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import common  # isort: skip  # before torch, whose threads read what it sets

import numpy as np
import torch

from common import UserError
from data import Split, open_shards, split_tokens
from formats.hub import config_from_dict, config_to_dict
from model import Config, Transformer
from runtime import resolve
from tokenizer import Tokenizer
from training.corpora import read_text
from training.loop import (
    LoopArgs,
    backward,
    describe,
    evaluate,
    launch,
    log_step,
    next_token_loss,
    passes,
    perplexity,
    print_sample,
    refuse_idle,
    start_run,
    steps,
    update,
)


@dataclass
class Args(LoopArgs):
    preset: str = "shakespeare-char"  # a row of PRESETS; every other flag overrides it
    data: str = "shakespeare"  # a named corpus, a UTF-8 text file or a folder of shards (data.py)
    tokenizer: str = "char"  # a folder or tokenizer.json; char is of characters, or the shards' own
    init_from: str = ""  # start a new run from this model folder: its shape, weights and tokenizer
    # shape
    arch: str = "qwen3"  # qwen3 (RMSNorm, RoPE, QK-norm, SwiGLU), llama, gpt2 (LayerNorm, GELU)
    layers: int = 4  # Transformer blocks
    dim: int = 128  # width of the residual stream
    heads: int = 4  # attention heads
    kv_heads: int = 0  # key/value heads; fewer is grouped-query attention, 0 is as many as heads
    mlp: int = 0  # width of the MLP; 0 is 2.5*dim with a gate, 4*dim for gpt2
    tie: bool = False  # one matrix for embedding and head: saves memory with a large vocabulary
    dropout: float = 0.0  # for small texts and many epochs
    doc_mask: bool = False  # no attention across documents packed into one row
    sample: int = 400  # tokens of the sample at the end


# What each reaches was measured: README.md and `python bench.py train`.
PRESETS: dict = {
    # 0.58M parameters, a minute on two CPU cores; its `out` is the default
    "shakespeare-char": dict(layers=3, steps=900, muon_lr=0.025, embed_lr=0.024, eval_every=500),
    # 0.20M, seconds
    "shakespeare-char-fast": dict(
        out="runs/shakespeare-char-fast",
        layers=2,
        dim=96,
        mlp=192,
        batch=16,
        steps=250,
        muon_lr=0.03,
        embed_lr=0.024,
        cooldown=0.5,
        eval_every=500,  # at the end alone
    ),
    # for a GPU: nanoGPT's size
    "shakespeare-char-10m": dict(
        out="runs/shakespeare-char-10m",
        layers=6,
        dim=384,
        heads=6,
        mlp=1024,
        context=256,
        batch=64,
        steps=1000,
        dropout=0.2,
        weight_decay=0.05,
    ),
    # 1.05M: the first stage of `make demo`
    "demo": dict(
        out="runs/demo",
        data="data/toybox/text.txt",
        tokenizer="runs/demo-tokenizer",
        heads=2,
        mlp=384,
        context=256,
        tie=True,
        batch=8,
        steps=750,
        muon_lr=0.01,
        lr=0.01,
        eval_every=250,
        save_every=250,
        sample=120,
    ),
    # 124.3M with a vocabulary of 32,768
    "125m": dict(
        out="runs/125m",
        data="data/wikitext-103",
        layers=12,
        dim=768,
        heads=6,
        mlp=2560,
        context=1024,
        tie=True,
        batch=512,
        steps=2000,
        lr=0.003,
        momentum=0.95,
        weight_decay=0.01,
        cooldown=0.5,
        eval_every=250,
        save_every=250,
        keep=2,
        sample=150,
    ),
}


# ----------------------------------------------------------------------------------- data and model
def open_corpus(args, source):
    """-> (tokenizer, training Split, validation Split): of shards, or of a text as one document.

    source: the folder whose tokenizer it is, or "char"."""
    if (Path(args.data) / "meta.json").is_file():
        tok = Tokenizer.load(args.data if source == "char" else source)
        splits = open_shards(args.data, tok)
        return tok, splits["train"], splits["val"]
    text = read_text(args.data)
    tok = Tokenizer.char(text) if source == "char" else Tokenizer.load(source)
    if tok.bos_id is not None:
        print(
            f"data     {args.data} is one document to the model; "
            f"`python data.py {args.data} --split-on S --tokenizer T --out D` makes many"
        )
    train_ids, val_ids = split_tokens(text_ids(text, tok), args.context)
    return tok, Split([train_ids], sha256=common.sha256(text.encode())), Split([val_ids])


def text_ids(text, tok):
    """A text as one document: (tokens,) uint16 or uint32, behind BOS if the tokenizer has one."""
    return np.array(tok.encode(text, bos=tok.bos_id is not None), tok.dtype)


# The flags of shape, and the fields of Config that they set.
SHAPE = {
    "arch": "model_type",
    "layers": "num_hidden_layers",
    "dim": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "mlp": "intermediate_size",
    "tie": "tie_word_embeddings",
}


def model_config(args, tok):
    """The flags of shape -> Config."""
    if args.dim % args.heads or (args.dim // args.heads) % 2:
        raise UserError(f"--dim {args.dim} / --heads {args.heads} must be an even whole number")
    gpt2 = args.arch == "gpt2"
    shape = {field: getattr(args, flag) for flag, field in SHAPE.items()}
    shape["num_key_value_heads"] = args.kv_heads or args.heads
    shape["intermediate_size"] = args.mlp or int(args.dim * (4 if gpt2 else 2.5))
    config = Config(
        **shape,
        vocab_size=tok.vocab_size,
        head_dim=args.dim // args.heads,
        max_position_embeddings=args.context,
        qkv_bias=gpt2,
        out_bias=gpt2,
        mlp_bias=gpt2,
        norm_eps=1e-5 if gpt2 else 1e-6,
        bos_token_id=tok.bos_id,
        eos_token_id=tok.eos_id,
        dropout=args.dropout,
    )
    # This checks it as any folder's config.
    config_from_dict(config_to_dict(config), "the flags of shape")
    return config


def build_model(args, checkpoint, tok, device):
    """A fresh model, or the weights of the checkpoint or of --init-from; float32, on the device."""
    torch.manual_seed(args.seed)
    source = checkpoint or args.init_from
    if not source:
        model = Transformer(model_config(args, tok))
        model.init_weights()
        return model.to(device)
    model = Transformer.from_pretrained(source, device, torch.float32, dropout=args.dropout)
    if not checkpoint:
        check_shape(args, model.config)
    return model


def check_shape(args, config):
    """UserError if a flag of shape was typed and is not what --init-from's model has."""
    for name, field in SHAPE.items():
        here = getattr(args, name)
        there = getattr(config, field)
        if name in args.typed and here != there:
            raise UserError(
                f"{common.flag(name)} {here}: the model of --init-from has {there}, and its shape "
                "needs no flags"
            )
    most = config.max_position_embeddings
    if args.context > most:
        raise UserError(f"--context {args.context:,}: use the {most:,} of --init-from, or less")


# ------------------------------------------------------------------------------------- the training
def prepare_training(args, checkpoint):
    """The flags and the checkpoint's folder -> Run, or None after `--fit`, a flag of LoopArgs."""
    refuse_idle(args, not args.init_from, "a model without --init-from", "tokenizer")
    runtime = resolve(args.device, args.dtype, args.compile)
    tok, data, val = open_corpus(args, checkpoint or args.init_from or args.tokenizer)
    model = build_model(args, checkpoint, tok, runtime.device)
    describe(args, model, tok, data, val)
    return start_run(args, checkpoint, runtime, tok, model, data, val)


def train(run):
    """The loop of pre-training: next batch, loss, backward, optimizer, log."""
    for step, batch in steps(run):  # between two steps it evaluates, saves, or stops
        run.optimizer.zero_grad()
        count = run.runtime.sum((batch.y != -100).sum().item())  # targets, over all ranks
        total = 0.0  # loss of this rank; log_step adds up the ranks
        for part in passes(run, batch):  # as many rows at a time as fit into memory
            with run.runtime.autocast():
                loss = next_token_loss(run.step_model, part, run.args)  # summed, in nats
            backward(run, loss, count)  # adds the gradients of loss / count, those of ranks, too
            total += loss.detach()
        values = update(run, step)  # clips the gradient, then the optimizer's step
        log_step(run, step, total, count, **values)
    print_sample(run)


# -------------------------------------------------------------------------------- scoring a text
@dataclass
class EvalArgs:
    model: str = ""  # model folder
    data: str = ""  # a UTF-8 text file, or a folder of shards
    split: str = ""  # which split of shards; val if it is not said
    context: int = 0  # tokens in a window; 0 is the model's context
    doc_mask: bool = False  # no attention across documents, as in training with --doc-mask
    stride: int = 0  # tokens a window scores, the rest is context; 0 is half of it
    device: str = "auto"  # auto, cpu, cuda, cuda:N, mps
    dtype: str = "auto"  # auto, float32, bfloat16, float16
    out: str = ""  # write the result into this .json file too


def open_scored_text(args, tok):
    """-> (Split, bytes, words) of --data. A line's end is a word, as in papers on WikiText:

    217,646 words in its validation split, 245,569 in its test split."""
    if (Path(args.data) / "meta.json").is_file():
        splits = open_shards(args.data, tok)
        name = args.split or "val"
        if name not in splits:
            raise UserError(f"{args.data}: no split {name!r}, only {', '.join(splits)}")
        counts = splits[name].counts
        return splits[name], counts["bytes"], counts["words"] + counts["lines"]
    if args.split:
        raise UserError(f"--split {args.split}: {args.data} has none, it is not a folder of shards")
    text = read_text(args.data)
    content = text.encode()  # bytes, whose words end where those of shards do
    words = len(content.split()) + content.count(b"\n")
    return Split([text_ids(text, tok)]), len(content), words


def eval_text(argv):
    """Loss on a whole text: nats and perplexity per token, perplexity per word, bits per byte."""
    args = EvalArgs(**common.parse_flags(EvalArgs, eval_text.__doc__, argv, ("model",)))
    runtime = resolve(args.device, args.dtype, "off")
    tok = Tokenizer.load(args.model)
    model = Transformer.from_pretrained(args.model, runtime.device, runtime.dtype)
    split, size, words = open_scored_text(args, tok)
    if not split.pair_ends[-1]:
        raise UserError(f"{args.data}: {len(split)} tokens leave nothing to predict")
    most = model.config.max_position_embeddings
    args.context = args.context or most
    if not 0 < args.context <= most:
        raise UserError(f"--context {args.context:,}: use 1 to {most:,}, or 0 for all")
    stride = args.stride or max(1, args.context // 2)
    nats, scored = evaluate(model, split, 8, args, runtime, stride)  # 8 windows at a time
    if not math.isfinite(nats):
        raise UserError(f"{args.model}: a loss of {nats} in {runtime.dtype}: try another --dtype")
    result = dict(
        tokens=scored,
        words=words,
        bytes=size,
        loss=nats / scored,
        perplexity=perplexity(nats / scored),
        word_perplexity=perplexity(nats / words),
        bits_per_byte=nats / math.log(2) / size,
    )
    print(json.dumps(result, indent=1))
    if args.out:
        common.write_json(args.out, result)


def main():
    if sys.argv[1:2] == ["eval"]:
        return eval_text(sys.argv[2:])
    # A flag is what was typed, else what the preset says, else the default in Args.
    launch(Args, __doc__, prepare_training, train, PRESETS)


if __name__ == "__main__":
    common.cli(main)
