"""How much memory a training takes, by part, and the rows per pass that fit."""

import math

import torch

from common import UserError, warn
from model import logits_at_once
from runtime import free_memory


def estimate_memory(model, args, runtime, rows):
    """Bytes by part for one rank that passes `rows` rows at a time. Eager mode; compiling saves
    some.

    Activations are what backward needs, per token and layer, counted from the operations in
    model.py. Of width C: the two norms' inputs and outputs, the residual sums, the attention's
    output (8). q, k, v before and after rotation (H*D each). Of width M: gate, up, silu and the
    product (4). Each takes 4 bytes, or about 3 where products save 16 bits."""
    config = model.config
    size = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    trained = 0
    state = 0
    for name, p in model.named_parameters():
        if p.requires_grad:
            trained += p.numel()
            muon = args.optimizer == "muon" and p.ndim == 2 and name.startswith("layers.")
            moments = 1 if muon else 2
            state += moments * p.numel() * (1 if args.optimizer == "adamw8bit" else 4)
    if args.average:
        state += 4 * trained
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    width = 8 * config.hidden_size + 2 * heads * config.head_dim + 4 * config.intermediate_size
    layers = config.num_hidden_layers
    per_token = width * (4 if runtime.dtype == torch.float32 else 3)
    if args.recompute:  # one layer's, and each layer's input
        per_token += layers * config.hidden_size * 4
    else:
        per_token *= layers
    logits = min(rows * args.context * config.vocab_size, logits_at_once(runtime.device))
    ranks = runtime.world if args.shard else 1
    return {
        "weights": size // ranks,
        "gradients": 4 * trained // ranks,
        "optimizer": state // ranks,
        "activations": rows * args.context * per_token,
        "logits": logits * 4 * 3,  # logits, softmax and its gradient
    }


def choose_micro_batch(model, args, runtime, before=0):
    """Rows per pass: --micro-batch, else the most whose estimate fits; prints the estimate.

    before: what a resumed run had, and keeps where it divides the batch of as many ranks: which
    random numbers dropout draws depends on it."""
    if args.batch % runtime.world:
        raise UserError(f"--batch {args.batch} is not a multiple of the {runtime.world} ranks")
    if args.shard and runtime.world == 1:
        warn("--shard spreads a model over ranks, and this one, the only one, holds all of it")
    share = args.batch // runtime.world
    free = free_memory(runtime.device)
    small = [rows for rows in range(1, math.isqrt(share) + 1) if share % rows == 0]
    divisors = sorted({*small, *(share // rows for rows in small)}, reverse=True)
    fixed = args.micro_batch or before
    if fixed in divisors:
        divisors = [fixed]
    elif args.micro_batch:
        raise UserError(f"--micro-batch {fixed} does not divide the {share} rows of a rank")
    for rows in divisors:
        total = sum(estimate_memory(model, args, runtime, rows).values())
        if rows == fixed or free is None or total < 0.85 * free:
            rows = runtime.smallest(rows)  # ranks may see different amounts of free memory
            print_estimate(estimate_memory(model, args, runtime, rows), rows, args, runtime)
            return rows
    raise UserError(
        f"this model needs about {total / 2**30:.1f} GiB even for one row of {args.context:,} "
        f"tokens, {free / 2**30:.1f} GiB are free: use --recompute, --shard over more ranks, "
        "a shorter --context or fewer --layers"
    )


def print_estimate(estimate, rows, args, runtime):
    parts = ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in estimate.items())
    free = free_memory(runtime.device) or math.nan
    print(
        f"memory   {sum(estimate.values()) / 2**20:,.0f} MiB estimated ({parts}), "
        f"{free / 2**20:,.0f} free; {rows} rows a pass, "
        f"{args.batch // runtime.world // rows} passes a step"
    )
