"""Pre-training: text in, a model folder out.

    python train.py                                       # a character GPT on Shakespeare, minutes on a laptop CPU
    python train.py --data my.txt --layers 6 --dim 384    # your text, your shape
    python train.py --resume --out runs/shakespeare-char  # go on exactly where it stopped
"""
import dataclasses
import math
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import common
from common import UserError
from data import Batches, read_text, split_tokens, validation_rows
from generate import generate
from model import Config, Transformer
from optim import MuonAdamW, schedule
from tokenizer import Tokenizer


@dataclass
class Args:
    preset: str = "shakespeare-char"  # a row of the table below; every other flag overrides it
    data: str = "shakespeare"         # a named corpus or a UTF-8 text file
    data_dir: str = ""                # where to look for a local copy of a named corpus first
    tokenizer: str = "char"           # char, or a folder or tokenizer.json
    out: str = "runs/shakespeare-char"  # the model folder to write
    resume: bool = False              # go on with the run in --out, bit-exactly
    overwrite: bool = False           # throw away the run in --out
    init_from: str = ""               # start a new run from the weights (only) of this model folder
    # shape
    arch: str = "qwen3"               # qwen3 (RMSNorm, RoPE, QK-norm, SwiGLU), llama, or gpt2 (LayerNorm, learned positions, GELU)
    layers: int = 4                   # Transformer blocks
    dim: int = 128                    # width of the residual stream
    heads: int = 4                    # attention heads
    kv_heads: int = 0                 # key/value heads, fewer is grouped-query attention; 0 is as many as heads
    mlp: int = 0                      # width of the MLP; 0 is 2.5*dim with a gate, 4*dim for gpt2
    context: int = 64                 # tokens a row, and the most the model can look back
    tie: bool = False                 # one matrix for embedding and head: saves memory when the vocabulary is large
    dropout: float = 0.0              # for small texts and many epochs
    # optimization
    steps: int = 600                  # optimizer steps
    batch: int = 32                   # rows per optimizer step
    grad_accum: int = 1               # split the batch into so many forward passes, to save memory
    optimizer: str = "muon"           # muon (hidden matrices; AdamW for the rest) or adamw (everything)
    muon_lr: float = 0.02             # learning rate of the hidden matrices under Muon
    lr: float = 0.008                 # learning rate of everything under AdamW
    momentum: float = 0.9             # Muon's; longer runs like 0.95
    weight_decay: float = 0.0         # pull of the matrices towards zero, relative to the learning rate
    warmup: int = 0                   # steps of linear warm-up
    schedule: str = "wsd"             # wsd (stable, then linear to zero) or cosine
    cooldown: float = 0.6             # share of the steps in which wsd falls to zero
    grad_clip: float = 0.0            # clip the gradient's norm to this; 0 is off
    seed: int = 1                     # of the weights, the order of the data and dropout
    # housekeeping
    eval_every: int = 200             # steps between evaluations on the whole validation split
    save_every: int = 500             # steps between checkpoints; one is always written at the end and on Ctrl-C
    keep: int = 1                     # how many checkpoints to keep under state/
    sample: int = 400                 # tokens to print at the end
    device: str = "auto"              # auto, cpu, cuda, cuda:N, mps
    dtype: str = "auto"               # auto, float32, bfloat16, float16
    compile: str = "auto"             # torch.compile: auto, on, off


PRESETS = {  # what each reaches, measured: README.md and `python bench.py train`
    "shakespeare-char": dict(),  # 0.77M parameters, a minute on two CPU cores
    "shakespeare-char-fast": dict(out="runs/shakespeare-char-fast", dim=96, mlp=256, batch=16, steps=200, muon_lr=0.03,
                                  cooldown=0.5),  # 0.46M, a quarter of a minute
    "shakespeare-char-10m": dict(out="runs/shakespeare-char-10m", layers=6, dim=384, heads=6, mlp=1024, context=256, batch=64,
                                 steps=1000, dropout=0.2, muon_lr=0.02, weight_decay=0.05),  # for a GPU: nanoGPT's size
}
# what may differ between a run and its resumption without making it another run
HOUSEKEEPING = {"resume", "overwrite", "out", "data_dir", "eval_every", "save_every", "keep", "sample", "device", "compile"}
SHAPE = {"arch", "layers", "dim", "heads", "kv_heads", "mlp", "context", "tie", "data", "tokenizer", "init_from", "preset",
         "seed", "batch"}


def read_args():
    """Flags -> (Args, path of the checkpoint to resume or None). A resumed run inherits every flag that is not typed."""
    typed = common.parse_flags(Args, __doc__)
    args = common.from_preset(Args, PRESETS, typed)
    checkpoint = common.latest_checkpoint(args.out)
    if not args.resume:
        if checkpoint and not args.overwrite:
            raise UserError(f"{args.out} already holds a run ({checkpoint.name}): continue it with --resume, throw it away "
                            "with --overwrite, or choose another --out")
        return args, None
    if checkpoint is None:
        raise UserError(f"--resume: no checkpoint in {args.out}/state; drop --resume to start a run there")
    saved = common.read_json(checkpoint / "state.json")["args"]
    changed = {k: (saved[k], v) for k, v in typed.items() if k in saved and saved[k] != v and k not in HOUSEKEEPING}
    for name, (old, new) in changed.items():
        if name in SHAPE:
            raise UserError(f"--resume: --{name.replace('_', '-')} was {old!r} in {args.out}, now {new!r}; a resumed run keeps "
                            "it (a new run from these weights: --init-from)")
        print(f"resume   {name} changed from {old} to {new}: no longer the same run bit for bit")
    return Args(**{**saved, **typed}), checkpoint


def model_config(args, tok):
    """The flags of shape -> Config."""
    if args.arch not in ("qwen3", "llama", "gpt2"):
        raise UserError(f"--arch {args.arch}: use qwen3, llama or gpt2")
    for name in ("layers", "dim", "heads", "context", "batch", "grad_accum", "eval_every", "save_every", "keep"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    if args.steps < 0 or not 0 <= args.dropout < 1 or args.optimizer not in ("muon", "adamw"):
        raise UserError(f"--steps {args.steps} must be >= 0, --dropout {args.dropout} in [0, 1), "
                        f"--optimizer {args.optimizer} muon or adamw")
    if args.batch % args.grad_accum:
        raise UserError(f"--batch {args.batch} is not a multiple of --grad-accum {args.grad_accum}")
    if args.dim % args.heads or (args.dim // args.heads) % 2:
        raise UserError(f"--dim {args.dim} / --heads {args.heads} must be an even whole number")
    kv, bias = args.kv_heads or args.heads, args.arch == "gpt2"
    if args.heads % kv:
        raise UserError(f"--heads {args.heads} is not a multiple of --kv-heads {kv}")
    return Config(args.arch, tok.vocab_size, args.dim, args.mlp or int(args.dim * (4 if bias else 2.5)), args.layers,
                  args.heads, kv, args.dim // args.heads, args.context, qkv_bias=bias, out_bias=bias, mlp_bias=bias,
                  norm_eps=1e-5 if bias else 1e-6, tie_word_embeddings=args.tie, bos_token_id=tok.bos_id,
                  eos_token_id=tok.eos_id, dropout=args.dropout)


def load_data(args):
    """-> (tokenizer, training tokens, validation tokens, characters per validation token, sha256 of the text)."""
    text, _ = read_text(args.data, args.data_dir or None)
    source = args.init_from if args.init_from and args.tokenizer == "char" else args.tokenizer
    tok = Tokenizer.char(text) if source == "char" else Tokenizer.load(source)
    tokens = np.array(tok.encode(text), dtype=np.uint16 if tok.vocab_size <= 1 << 16 else np.uint32)
    train, val = split_tokens(tokens, args.context)
    return tok, train, val, common.sha256(text.encode())


def set_up(args, checkpoint, tok, data_sha, runtime):
    """Model and optimizer, fresh, from --init-from, or from the checkpoint -> (model, optimizer, state.json or {})."""
    torch.manual_seed(args.seed)
    config, state = model_config(args, tok), {}
    source = checkpoint or args.init_from
    if source:
        model = Transformer.from_pretrained(source, runtime.device, torch.float32, dropout=args.dropout)
        differs = [f"{k} {getattr(model.config, k)} there, {v} here" for k, v in dataclasses.asdict(config).items()
                   if getattr(model.config, k) != v]
        if differs:
            raise UserError(f"{source} has another shape: {'; '.join(differs)}")
        theirs = Tokenizer.load(source).sha256
        if theirs != tok.sha256:
            raise UserError(f"{source} was trained with tokenizer {theirs[:12]}, this run has {tok.sha256[:12]}; "
                            "the ids would mean other text: use its own --tokenizer")
    else:
        model = Transformer(config).to(runtime.device)
        model.init_weights()
    optimizer = MuonAdamW(model, args.muon_lr, args.lr, args.weight_decay, args.momentum, muon=args.optimizer == "muon")
    if checkpoint:
        state = common.read_json(checkpoint / "state.json")
        if state["data_sha256"] != data_sha:
            raise UserError(f"--resume: the text's sha256 was {state['data_sha256'][:12]}, now {data_sha[:12]}; restore the "
                            f"text, or start a new run on it: --init-from {args.out}")
        optimizer.load_tensors(common.read_tensors(checkpoint / "optimizer.safetensors"))
        common.set_rng_state(common.read_tensors(checkpoint / "rng.safetensors"))
    return model, optimizer, state


@torch.no_grad()
def evaluate(model, loss_fn, inputs, targets, rows, runtime):
    """Mean loss over the whole split, (N, T) inputs and targets, in nats per token. Draws no random numbers."""
    model.eval()
    total = 0.0
    for i in range(0, len(inputs), rows):
        x, y = inputs[i:i + rows], targets[i:i + rows]
        if len(x) < rows:  # the last batch is filled up with rows that do not count: a compiled model sees one shape
            pad = (0, 0, 0, rows - len(x))
            x, y = torch.nn.functional.pad(x, pad), torch.nn.functional.pad(y, pad, value=-100)
        with runtime.autocast():
            total += loss_fn(x.to(runtime.device), y.to(runtime.device)).item()
    model.train()
    return total / (targets != -100).sum().item()


def main():
    args, checkpoint = read_args()
    runtime = common.resolve(args.device, args.dtype, args.compile)
    tok, train, val, data_sha = load_data(args)
    out = Path(args.out)
    if not checkpoint and args.overwrite:
        shutil.rmtree(out, ignore_errors=True)
    model, optimizer, state = set_up(args, checkpoint, tok, data_sha, runtime)
    rows, tokens_per_step = args.batch // args.grad_accum, args.batch * args.context
    batches = Batches(train, rows, args.context, args.seed)
    val_rows = validation_rows(val, args.context)
    start = state.get("step", 0)
    if state:
        batches.load_state(state["batches"])
    out.mkdir(parents=True, exist_ok=True)
    metrics = common.Metrics(out, start if checkpoint else None)
    print(f"model    {args.arch} {args.layers} layers, {args.dim} wide: {model.num_params():,} parameters, "
          f"{model.flops_per_token(args.context) / 1e6:.1f} MFLOP a token")
    print(f"data     {len(train):,} training and {len(val):,} validation tokens of {tok.vocab_size:,} kinds; "
          f"{args.steps:,} steps of {tokens_per_step:,} = {args.steps * tokens_per_step / len(train):.1f} epochs; "
          f"a guess costs ln V = {math.log(tok.vocab_size):.3f}")

    def save(step):
        def save_model(folder):
            tok.save(folder)
            model.save_pretrained(folder)  # config.json last: with it the folder is complete
        common.save_checkpoint(out, step, save_model, optimizer.tensors(), keep=args.keep, info={
            "args": dataclasses.asdict(args), "data_sha256": data_sha, "tokenizer_sha256": tok.sha256,
            "batches": batches.state()})

    def trial(compiled):
        with runtime.autocast():
            compiled(*(rows[:args.batch // args.grad_accum].to(runtime.device) for rows in val_rows)).backward()
        optimizer.zero_grad(set_to_none=True)
    model.train()
    loss_fn = common.compile_or_say_why(model.loss, runtime, trial)
    with common.Interrupt() as interrupt, tqdm(total=args.steps, initial=start, unit="step", disable=None) as bar:
        for step in range(start, args.steps + 1):
            last = step == args.steps
            if (step % args.eval_every == 0 or last) and (step > start or not checkpoint):
                val_loss = evaluate(model, loss_fn, *val_rows, rows, runtime)
                metrics.log(step, val_loss=val_loss, epoch=batches.epoch)
                bar.write(f"step {step:6,}  validation loss {val_loss:.4f} (whole split)", file=sys.stdout)
            if last or interrupt.signal or (step % args.save_every == 0 and step > start):
                save(step)
            if last or interrupt.signal:
                break
            total = torch.zeros((), device=runtime.device)
            for _ in range(args.grad_accum):
                x, y = batches.next()
                with runtime.autocast():
                    loss = loss_fn(x.to(runtime.device), y.to(runtime.device)) / tokens_per_step
                loss.backward()
                total += loss.detach()
            if args.grad_clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
            factor = schedule(step, args.steps, args.warmup, args.schedule, args.cooldown)
            optimizer.set_lr(factor)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            bar.update()
            if step % 10 == 0:
                metrics.log(step, loss=total.item(), lr=factor)
                bar.set_postfix(loss=f"{total.item():.3f}", tok_s=f"{(bar.format_dict['rate'] or 0) * tokens_per_step:,.0f}")
    if interrupt.signal:
        print(f"{interrupt.signal.name}: saved step {step:,} in {out}; go on with: python train.py --resume --out {out}")
        sys.exit(128 + interrupt.signal)
    common.plot_losses(out, f"{out.name}: {model.num_params() / 1e6:.2f}M parameters")
    print(f"wrote    {out}/ (model folder), {out}/loss.png, {out}/metrics.jsonl\n")
    model.eval()
    prompt = tok.encode("\n")
    stream = tok.stream()
    for token in generate(model, prompt, args.sample, temperature=0.8, seed=args.seed):
        print(stream.push(token), end="", flush=True)
    print(stream.flush())


if __name__ == "__main__":
    common.cli(main)
