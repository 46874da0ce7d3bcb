"""How much memory a training takes, by part, and the rows per pass that fit."""

import math

import torch

from common import UserError
from model import LOGITS_AT_ONCE
from runtime import free_memory


def estimate_memory(model, args, runtime, rows):
    """Bytes by part for one rank that passes `rows` rows at a time -> {part: bytes}. Eager mode; compiling saves some.

    Activations: what backward needs, per token and layer, counted from the operations in model.py: of width C the two
    norms' inputs and outputs, the residual sums and the attention's output (8), q, k, v before and after rotation (H*D each),
    of width M gate, up, silu and the product (4); in 4 bytes, or half of it for what a 16-bit product saves."""
    c, ranks = model.config, runtime.world if args.shard else 1
    size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    trained = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    matrices = sum(
        size
        for n, size in trained.items()
        if n.startswith("layers.") and model.get_parameter(n).ndim == 2
    )
    trained = sum(trained.values())
    state = (
        2 * trained
        if args.optimizer == "adamw8bit"
        else 8 * trained - (4 * matrices if args.optimizer == "muon" else 0)
    )
    width = (
        8 * c.hidden_size
        + 2 * (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
        + 4 * c.intermediate_size
    )
    layers = 1 if args.recompute else c.num_hidden_layers
    kept = c.num_hidden_layers * c.hidden_size * 4 if args.recompute else 0  # each layer's input
    value = 4 if runtime.dtype == torch.float32 else 3
    logits = (
        min(rows * args.context * c.vocab_size, LOGITS_AT_ONCE) * 4 * 3
    )  # logits, softmax and its gradient
    return {
        "weights": size // ranks,
        "gradients": 4 * trained // ranks,
        "optimizer": state // ranks,
        "activations": rows * args.context * (layers * width * value + kept),
        "logits": logits,
    }


def choose_micro_batch(model, args, runtime, before=0):
    """Rows per pass: --micro-batch, else the largest equal share of the rank's rows whose estimate fits; prints the estimate.

    before: what a resumed run had, which stays, as which random numbers dropout gets hangs on it, not on today's free memory."""
    if args.batch % runtime.world:
        raise UserError(f"--batch {args.batch} is not a multiple of the {runtime.world} ranks")
    share, free = args.batch // runtime.world, free_memory(runtime.device)
    if args.micro_batch and share % args.micro_batch:
        raise UserError(
            f"--micro-batch {args.micro_batch} does not divide the {share} rows of a rank (--batch {args.batch} "
            f"over {runtime.world})"
        )
    fixed = args.micro_batch or (before if before and share % before == 0 else 0)
    for rows in [fixed] if fixed else [r for r in range(share, 0, -1) if share % r == 0]:
        estimate = estimate_memory(model, args, runtime, rows)
        if fixed or free is None or sum(estimate.values()) < 0.85 * free:
            rows = runtime.smallest(
                rows
            )  # ranks see different amounts of free memory, and must pass the same rows
            print_estimate(estimate, rows, args, runtime)
            return rows
    raise UserError(
        f"this model needs about {sum(estimate.values()) / 2**30:.1f} GiB even for one row of {args.context:,} "
        f"tokens, {free / 2**30:.1f} GiB are free: use --recompute, --shard over more ranks, a shorter --context or "
        "fewer --layers"
    )


def print_estimate(estimate, rows, args, runtime):
    parts = ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in estimate.items())
    free = free_memory(runtime.device) or math.nan
    print(
        f"memory   {sum(estimate.values()) / 2**20:,.0f} MiB estimated ({parts}), {free / 2**20:,.0f} free; "
        f"{rows} rows a pass, {args.batch // runtime.world // rows} passes a step"
    )
