"""A model over several ranks: each computes some heads and some channels.

Shoeybi et al. 2019, "Megatron-LM", section 3. tests/engine/test_parallel.py: two answer as one.
"""

import copy
from dataclasses import replace

import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from common import UserError
from quant import GroupLinear, NF4Linear


class ShardedLinear(nn.Module):
    """A linear layer of which each rank has a shard; every rank gets the whole result."""

    def __init__(self, linear, ranks, outputs=None):
        """outputs: how many there are, if ranks share those; None if they share the inputs."""
        super().__init__()
        self.linear = linear
        self.ranks = ranks
        self.outputs = outputs

    def forward(self, x):
        y = self.linear(x).contiguous()
        if self.outputs is None:  # (..., N), partial sums
            dist.all_reduce(y)
            return y
        width = -(-self.outputs // self.ranks)
        y = F.pad(y, (0, width - y.size(-1)))  # (..., width); the last shard may be smaller
        shards = y.new_empty(self.ranks, *y.shape)
        dist.all_gather(list(shards), y)
        whole = shards.movedim(0, -2).flatten(-2)  # (ranks, ..., width) -> (..., ranks * width)
        return whole[..., : self.outputs]


def check_shardable(linear, name, ranks, by_input):
    """UserError for a packed layer whose format cannot be cut there."""
    if isinstance(linear, NF4Linear):
        raise UserError(
            f"{name}: NF4's blocks run on from row to row, {ranks} ranks cannot share them; "
            "use int8, int4 or gptq"
        )
    if not by_input or not isinstance(linear, GroupLinear):
        return
    if linear.order is not None:
        raise UserError(
            f"{name}: GPTQ's act-order mixes its inputs, {ranks} ranks cannot share them; "
            "leave --act-order out when you quantize it"
        )
    columns = linear.in_features // ranks
    unit = linear.group if linear.scales.size(1) > 1 else 2  # two codes a byte
    if columns % unit or columns % 2:
        raise UserError(
            f"{name}: {columns:,} of {linear.in_features:,} inputs for each of {ranks} ranks would "
            f"cut a group of {unit}; use fewer ranks, or a --group-size of which {columns:,} is a "
            "multiple"
        )


def shard_of(linear, name, runtime, by_input=False):
    """This rank's rows (outputs) of a linear layer, float or packed, or its columns -> a layer."""
    rank, ranks = runtime.rank, runtime.world
    check_shardable(linear, name, ranks, by_input)
    axis = int(by_input)  # weights and all that lies along them are (N, K), (N, G) or (N,)

    def own(tensor):
        if tensor is None or tensor.ndim <= axis or by_input and tensor.size(1) == 1:
            return tensor  # nothing of it lies along what is cut: a bias, scales of whole rows
        size = -(-tensor.size(axis) // ranks)
        mine = slice(rank * size, (rank + 1) * size)  # the last ones may be shorter, or empty
        return (tensor[:, mine] if by_input else tensor[mine]).contiguous()

    shard = copy.copy(linear)
    shard._parameters = {}
    for key, p in linear._parameters.items():
        shard._parameters[key] = p if p is None else nn.Parameter(own(p), requires_grad=False)
    shard._buffers = {
        key: buffer if key == "order" else own(buffer) for key, buffer in linear._buffers.items()
    }
    if not by_input:
        rows = linear.out_features
        size = -(-rows // ranks)
        shard.out_features = max(0, min(size, rows - rank * size))
        return shard
    shard.in_features = linear.in_features // ranks
    if isinstance(linear, GroupLinear):
        shard.group = min(linear.group, shard.in_features)
    if rank:
        shard._parameters["bias"] = None  # the sum over ranks has it once
    return shard


def shard_model(model, runtime, dtype):
    """Leave of a model, in place, what this rank computes, on its device.

    A rank has some key/value heads, their query heads and some channels of the MLP: the rows of q,
    k, v, gate and up that make them and the columns of o and down that read them. So only the
    outputs of o and down are summed over ranks. Of the head it has some of the vocabulary's rows, a
    view of the embedding where they are tied. Embeddings and norms are whole.
    """
    c = model.config
    ranks = runtime.world
    H, K, M = c.num_attention_heads, c.num_key_value_heads, c.intermediate_size
    parts = f"{H} heads, {K} key/value heads and {M:,} MLP channels"
    if K % ranks or M % ranks:
        fits = ", ".join(str(n) for n in range(1, K + 1) if K % n == 0 and M % n == 0)
        raise UserError(
            f"{ranks} ranks cannot share {parts} evenly; --nproc-per-node can be {fits}"
        )
    for name, linear in list(model.named_modules()):
        if name.endswith(("o_proj", "down_proj")):
            shard = ShardedLinear(shard_of(linear, name, runtime, by_input=True), ranks)
        elif name.endswith("_proj"):
            shard = shard_of(linear, name, runtime)
        else:
            continue
        model.set_submodule(name, shard)
    model.embed_tokens.to(runtime.device, dtype)
    model.lm_head = ShardedLinear(shard_of(model.lm_head, "lm_head", runtime), ranks, c.vocab_size)
    for p in model.parameters():
        p.data = p.data.to(runtime.device, dtype)
    model.to(runtime.device)  # packed weights keep their types
    model.config = replace(
        c,
        num_attention_heads=H // ranks,
        num_key_value_heads=K // ranks,
        intermediate_size=M // ranks,
    )
    print(f"ranks    {ranks} share {parts}")
