"""bitsandbytes (pip install bitsandbytes): its product of NF4 weights."""

import bitsandbytes as bnb
import torch


def nf4_arguments(x, N, K):
    """x (M, K) -> the arguments of nf4_product, over random weights (N, K)."""
    weight = torch.randn(N, K, device=x.device, dtype=x.dtype)
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4")
    return x, packed.t(), state


nf4_product = bnb.matmul_4bit
