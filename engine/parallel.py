"""A model over several ranks: each computes some heads and some channels (Megatron-LM)."""

import copy
from dataclasses import replace

import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from common import UserError
from quant import GroupLinear, NF4Linear


class Parted(nn.Module):
    """A linear layer of which each rank has a part; every rank gets the whole result."""

    def __init__(self, linear, ranks, outputs=None):
        """outputs: how many in all, where each rank has some of them; None where each has some of the inputs."""
        super().__init__()
        self.linear, self.ranks, self.outputs = linear, ranks, outputs

    def forward(self, x):
        y = self.linear(x).contiguous()
        if self.outputs is None:  # (..., N), partial sums
            dist.all_reduce(y)
            return y
        y = F.pad(
            y, (0, -(-self.outputs // self.ranks) - y.size(-1))
        )  # (..., N / ranks); the last part may be smaller
        parts = y.new_empty(self.ranks, *y.shape)
        dist.all_gather(list(parts), y)
        return parts.movedim(0, -2).flatten(-2)[
            ..., : self.outputs
        ]  # (ranks, ..., n) -> (..., ranks * n) -> (..., N)


def part(linear, name, runtime, by_input=False):
    """This rank's rows (outputs) of a linear layer, float or packed, or with by_input its columns -> a layer like it."""
    rank, ranks, new = runtime.rank, runtime.world, copy.copy(linear)
    columns = linear.in_features // ranks if by_input else linear.in_features
    if isinstance(linear, NF4Linear):
        raise UserError(
            f"{name}: NF4's blocks run on from row to row, {ranks} ranks cannot share them; use int8, int4 or gptq"
        )
    if by_input and isinstance(linear, GroupLinear):
        unit = linear.group if linear.scales.size(1) > 1 else 2  # two codes a byte
        if linear.order is not None:
            raise UserError(
                f"{name}: GPTQ's act-order mixes its inputs, {ranks} ranks cannot share them; add --static-groups"
            )
        if columns % unit or columns % 2:
            raise UserError(
                f"{name}: {columns:,} of {linear.in_features:,} inputs for each of {ranks} ranks would cut a group of "
                f"{unit}; use fewer ranks, or a --group-size of which {columns:,} is a multiple"
            )
        new.group = min(linear.group, columns)
    new._parameters, new._buffers, new.fast_product = dict(linear._parameters), dict(linear._buffers), None
    for store in (new._parameters, new._buffers):
        for key, tensor in store.items():
            if (
                tensor is None
                or key == "order"
                or by_input
                and (tensor.ndim == 1 or tensor.size(1) == 1)
            ):
                continue  # nothing of it lies along what is cut: a bias, scales of whole rows
            each = -(-tensor.shape[by_input] // ranks)
            piece = tensor[
                (slice(None),) * by_input + (slice(rank * each, (rank + 1) * each),)
            ].contiguous()
            store[key] = (
                nn.Parameter(piece, requires_grad=False) if store is new._parameters else piece
            )
    if by_input and rank:
        new._parameters["bias"] = None  # the sum over ranks has it once
    new.in_features, new.out_features = columns, linear.out_features if by_input else len(piece)
    return new


def divide(model, runtime, dtype):
    """Leave of a model what this rank computes, on its device (Megatron-LM: Shoeybi et al. 2019, section 3).

    A rank has some key/value heads, their query heads and some channels of the MLP: the rows of q, k, v, gate and up that make them
    and the columns of o and down that read them, so only the outputs of o and down are to be summed over ranks. Of the head it has
    some of the vocabulary's rows, a view of the embedding where they are tied. Embeddings and norms are whole.
    """
    c, ranks = model.config, runtime.world
    H, K, M = c.num_attention_heads, c.num_key_value_heads, c.intermediate_size
    if K % ranks or M % ranks:
        fits = ", ".join(str(n) for n in range(1, K + 1) if K % n == 0 and M % n == 0)
        raise UserError(
            f"{ranks} ranks cannot share {H} heads, {K} key/value heads and {M:,} MLP channels evenly; "
            f"--nproc-per-node can be {fits}"
        )
    for name, linear in [(n, m) for n, m in model.named_modules() if n.endswith("_proj")]:
        by_input = name.endswith(("o_proj", "down_proj"))
        own = part(linear, name, runtime, by_input)
        model.set_submodule(name, Parted(own, ranks) if by_input else own)
    model.embed_tokens.to(runtime.device, dtype)
    model.lm_head = Parted(part(model.lm_head, "lm_head", runtime), ranks, c.vocab_size)
    for p in model.parameters():
        p.data = p.data.to(runtime.device, dtype)
    model.to(runtime.device)  # packed weights keep their types
    model.config = replace(
        c,
        num_attention_heads=H // ranks,
        num_key_value_heads=K // ranks,
        intermediate_size=M // ranks,
    )
    for block in model.layers:
        block.self_attn.H, block.self_attn.K = H // ranks, K // ranks
    print(
        f"ranks    {ranks}, each with {H // ranks} of {H} heads, {K // ranks} of {K} key/value heads, {M // ranks:,} of {M:,} "
        "MLP channels"
    )
