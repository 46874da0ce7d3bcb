"""Pre-training: text in, a model folder out.

python train.py                                       # a character GPT on Shakespeare, minutes on a laptop CPU
python train.py --data my.txt --layers 6 --dim 384    # your text, your shape
python train.py --resume --out runs/shakespeare-char  # go on exactly where it stopped
torchrun --nproc-per-node 8 train.py --preset 125m    # on several GPUs (DDP; --shard for FSDP2)
python train.py watch runs/x                          # look at a run: loss, tokens/s, time left
python train.py eval MODEL --data wikitext-2          # loss, perplexity per token and per word, bits per byte
"""

import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import common
from common import UserError
from data import Split, as_split, open_shards, split_tokens
from model import Config, Transformer
from runtime import resolve
from tokenizer import Tokenizer
from training.corpora import read_text
from training.loop import (
    LoopArgs,
    describe,
    evaluate,
    launch,
    read_args,
    sample_text,
    start_run,
    train,
)


@dataclass
class Args(LoopArgs):
    preset: str = "shakespeare-char"  # a row of the table below; every other flag overrides it
    data: str = "shakespeare"  # a named corpus, a UTF-8 text file or a folder of shards (data.py)
    tokenizer: str = "char"  # char, or a folder or tokenizer.json
    init_from: str = (
        ""  # start a new run from the weights (only) and the shape of this model folder
    )
    # shape
    arch: str = "qwen3"  # qwen3 (RMSNorm, RoPE, QK-norm, SwiGLU), llama, or gpt2 (LayerNorm, learned positions, GELU)
    layers: int = 4  # Transformer blocks
    dim: int = 128  # width of the residual stream
    heads: int = 4  # attention heads
    kv_heads: int = 0  # key/value heads, fewer is grouped-query attention; 0 is as many as heads
    mlp: int = 0  # width of the MLP; 0 is 2.5*dim with a gate, 4*dim for gpt2
    tie: bool = (
        False  # one matrix for embedding and head: saves memory when the vocabulary is large
    )
    dropout: float = 0.0  # for small texts and many epochs
    doc_mask: bool = False  # no attention across documents packed into one row


PRESETS = {  # what each reaches, measured: README.md and `python bench.py train`
    "shakespeare-char": dict(),  # 0.77M parameters, a minute on two CPU cores
    "shakespeare-char-fast": dict(
        out="runs/shakespeare-char-fast",
        dim=96,
        mlp=192,
        batch=16,
        steps=200,
        muon_lr=0.03,
        cooldown=0.5,
    ),  # 0.38M, seconds
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
        muon_lr=0.02,
        weight_decay=0.05,
    ),  # for a GPU: nanoGPT's size
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
    ),  # 1.05M
    "125m": dict(
        out="runs/125m",
        data="data/wikitext-103",
        tokenizer="",
        layers=12,
        dim=768,
        heads=6,
        mlp=2560,
        context=1024,
        tie=True,
        batch=512,
        steps=2000,
        muon_lr=0.02,
        lr=0.003,
        momentum=0.95,
        weight_decay=0.01,
        cooldown=0.5,
        eval_every=250,
        save_every=250,
        keep=2,
        sample_every=500,
        sample=150,
    ),  # 124.3M with a 32,768 vocabulary
}
SHAPE = {
    "arch": "model_type",
    "layers": "num_hidden_layers",
    "dim": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "mlp": "intermediate_size",
    "tie": "tie_word_embeddings",
}  # flag: field of Config


def model_config(args, tok):
    """The flags of shape -> Config."""
    if args.dim % args.heads or (args.dim // args.heads) % 2:
        raise UserError(f"--dim {args.dim} / --heads {args.heads} must be an even whole number")
    bias = args.arch == "gpt2"
    config = Config(
        args.arch,
        tok.vocab_size,
        args.dim,
        args.mlp or int(args.dim * (4 if bias else 2.5)),
        args.layers,
        args.heads,
        args.kv_heads or args.heads,
        args.dim // args.heads,
        args.context,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        norm_eps=1e-5 if bias else 1e-6,
        tie_word_embeddings=args.tie,
        bos_token_id=tok.bos_id,
        eos_token_id=tok.eos_id,
        dropout=args.dropout,
    )
    flags = " ".join(f"--{flag.replace('_', '-')} {getattr(args, flag)}" for flag in SHAPE)
    Config.from_dict(
        config.to_dict(), where=flags
    )  # the bounds that hold for a folder's config hold for ours
    return config


def load_data(args, checkpoint):
    """-> (tokenizer, training Split, validation Split): shards, or a text that fits in memory as one document."""
    source = checkpoint or args.init_from or args.tokenizer
    if (Path(args.data) / "meta.json").is_file():
        tok = Tokenizer.load(args.data if source in ("", "char") else source)
        splits = open_shards(args.data, tok.sha256)
        return tok, splits["train"], splits["val"]
    text, _ = read_text(args.data)
    tok = Tokenizer.load(source) if source not in ("", "char") else Tokenizer.char(text)
    if tok.bos_id is not None:
        print(
            f"data     {args.data} is one document to the model; `python data.py {args.data} --tokenizer T --out D` makes many"
        )
    train, val = split_tokens(
        np.array(tok.encode(text, bos=tok.bos_id is not None), tok.dtype), args.context
    )
    return tok, Split([train], sha256=common.sha256(text.encode())), as_split(val)


def build_model(args, checkpoint, tok, device):
    """A fresh model, or the weights of the checkpoint or of --init-from, on the device in float32."""
    torch.manual_seed(args.seed)
    if not (source := checkpoint or args.init_from):
        model = Transformer(model_config(args, tok))
        model.init_weights()
        return model.to(device)
    model = Transformer.from_pretrained(source, device, torch.float32, dropout=args.dropout)
    there = (
        {} if checkpoint else {flag: getattr(model.config, field) for flag, field in SHAPE.items()}
    )
    differs = [
        f"{flag.replace('_', '-')} {value} there, {here} here"
        for flag, value in there.items()
        if (here := getattr(args, flag)) not in (value, getattr(Args, flag))
    ]
    if args.context > (most := model.config.max_position_embeddings):
        differs.append(f"context {most:,} there, {args.context:,} here")
    if differs:
        raise UserError(
            f"--init-from {source} has another shape: {'; '.join(differs)}; its shape needs no flags"
        )
    return model


# ----------------------------------------------------------------------------------------- training


def prepare(args, checkpoint):
    """Everything from the flags and the checkpoint -> Run, or None after `--fit`."""
    runtime = resolve(args.device, args.dtype, args.compile)
    tok, data, val = load_data(args, checkpoint)
    model = build_model(args, checkpoint, tok, runtime.device)
    describe(args, model, tok, data, val)
    return start_run(args, checkpoint, runtime, tok, model, data, val)


def main():
    if sys.argv[1:2] in (["watch"], ["eval"]):
        return {"watch": watch, "eval": eval_command}[sys.argv[1]](sys.argv[2:])
    launch(*read_args(Args, __doc__, PRESETS), prepare, train_and_sample)


def train_and_sample(run):
    train(run)
    if run.metrics and not run.args.shard and run.args.sample:
        print(sample_text(run) + "\n")


# ------------------------------------------------------------------------ looking at a model, a run


def watch(argv):
    """Draw a run's losses in the terminal, again every two seconds until it ends or its process is gone."""
    parser = common.Parser(prog="train.py watch", description=watch.__doc__)
    parser.add_argument("run", help="the run's folder")
    parser.add_argument("--once", action="store_true", help="draw once and stop")
    args = parser.parse_args(argv)
    if not (Path(args.run) / "metrics.jsonl").is_file():
        raise UserError(f"{args.run}: no metrics.jsonl, so no run there (yet)")
    while True:
        total = common.read_json(Path(args.run) / "args.json")["steps"]
        rows = common.Metrics.read(Path(args.run) / "metrics.jsonl")
        print("" if args.once else "\x1b[2J\x1b[H", end="")
        print(
            common.draw_curve(
                [(r["step"], r["loss"]) for r in rows if "loss" in r],
                [(r["step"], r["val_loss"]) for r in rows if "val_loss" in r],
            )
        )
        step, rate = (
            rows[-1]["step"] if rows else 0,
            next((r["tokens_per_s"] for r in reversed(rows) if "tokens_per_s" in r), 0),
        )
        pace = rows[-1]["seconds"] / step if step else 0
        print(
            f"step {step:,} of {total:,}   {rate:,} tokens/s   {(total - step) * pace / 60:.1f} minutes left"
        )
        if args.once or step >= total or not common.is_locked(args.run):
            return
        time.sleep(2)


def eval_command(argv):
    """Loss on the whole of a text: nats and perplexity per token, perplexity per word, bits per byte.

    A line's end counts as a word, as in papers on WikiText: 217,646 in its validation split, 245,569 in its test split."""
    parser = common.Parser(prog="train.py eval", description=eval_command.__doc__)
    parser.add_argument("model", help="model folder")
    parser.add_argument("--data", required=True, help="a UTF-8 text file, or a folder of shards")
    parser.add_argument("--split", default="val", help="which split of the shards [val]")
    parser.add_argument(
        "--context", type=int, default=0, help="tokens in a window [the model's context]"
    )
    parser.add_argument(
        "--doc-mask",
        action="store_true",
        help="no attention across documents, as in training with --doc-mask",
    )
    parser.add_argument(
        "--stride",
        type=int,
        default=0,
        help="tokens a window scores; the rest is context [half of it]",
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", help="write the result into this .json file too")
    args = parser.parse_args(argv)
    runtime = resolve(args.device, args.dtype, "off")
    tok, model = (
        Tokenizer.load(args.model),
        Transformer.from_pretrained(args.model, runtime.device, runtime.dtype),
    )
    if (Path(args.data) / "meta.json").is_file():
        splits = open_shards(args.data, tok.sha256)
        if args.split not in splits:
            raise UserError(f"{args.data}: no split {args.split!r}, only {', '.join(splits)}")
        split = splits[args.split]
        size, words = split.counts["bytes"], split.counts["words"] + split.counts["lines"]
    else:
        text, _ = read_text(args.data)
        split = as_split(np.array(tok.encode(text, bos=tok.bos_id is not None), tok.dtype))
        size, words = len(text.encode()), len(text.split()) + text.count("\n")
    if len(split) < 2:
        raise UserError(f"{args.data}: {len(split)} tokens leave nothing to predict")
    args.context = args.context or model.config.max_position_embeddings
    nats, scored = evaluate(
        model, split, 8, args, runtime, args.stride or max(1, args.context // 2)
    )
    result = dict(
        tokens=scored,
        words=words,
        bytes=size,
        loss=nats / scored,
        perplexity=math.exp(nats / scored),
        word_perplexity=math.exp(min(700.0, nats / words)),
        bits_per_byte=nats / math.log(2) / size,
    )
    print(json.dumps(result, indent=1))
    if args.out:
        common.write_json(args.out, result)


if __name__ == "__main__":
    common.cli(main)
