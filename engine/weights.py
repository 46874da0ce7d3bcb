"""What forward.py and forward.cpp both make of a model: rope tables and stacks of adapters."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


def rope_tables(model, dtype=torch.float32):
    """-> cos, sin (P, D) of model.rotate for all P positions, or (None, None) without rotations."""
    config = model.config
    if config.is_gpt2:
        return None, None
    device = model.rope_frequency.device
    positions = torch.arange(config.max_position_embeddings, device=device)
    cos, sin = model.cos_and_sin(positions)  # (P, D)
    return cos.to(dtype), sin.to(dtype)


@dataclass
class AdapterStack:
    """All LoRA adapters of one layer, stacked along the rank, so that rows of a batch may differ.

    A token of adapter a gets B (rank_scale[a] * (A x)) added to the layer's output: row a of
    `rank_scale` has the adapter's scale at its own ranks and zeros elsewhere; the last row is that
    of no adapter.
    """

    A: torch.Tensor  # (R, K), R the sum of all ranks
    B: torch.Tensor  # (N, R)
    rank_scale: torch.Tensor  # (adapters + 1, R)

    def change(self, x, adapters):
        """x (T, K), adapters (T,) int64, -1 is none -> (T, N), what is added to the output."""
        low = F.linear(x, self.A) * self.rank_scale[adapters]  # (T, R)
        return F.linear(low, self.B)


def stack_adapters(model, adapters, dtype=torch.float32):
    """adapters {name: {layer's name: peft.AdapterTensors}} -> {layer: AdapterStack}, of dtype."""
    stacks = {}
    for name, layer in model.named_modules():
        A, B, scales = [], [], []
        for tensors_of in [*adapters.values(), {}]:  # the last row is that of no adapter
            scales.append(torch.empty(1, 0))
            if name in tensors_of:
                tensors = tensors_of[name]
                A.append(tensors.A)
                B.append(tensors.B)
                scales[-1] = torch.full((1, len(tensors.A)), float(tensors.scale))
        if A:
            device = model.embed_tokens.weight.device
            parts = torch.cat(A), torch.cat(B, 1), torch.block_diag(*scales)
            stacks[layer] = AdapterStack(*(part.to(device, dtype) for part in parts))
    return stacks
