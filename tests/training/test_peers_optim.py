"""training/optim.py against bitsandbytes."""

import pytest
import torch

from training.optim import MuonAdamW

pytestmark = pytest.mark.peers


def test_adamw_with_8_bit_moments_walks_with_bitsandbytes():
    import bitsandbytes as bnb

    torch.manual_seed(0)
    net = torch.nn.Linear(64, 128, bias=False)
    w = torch.nn.Parameter(net.weight.detach().clone())
    theirs = bnb.optim.AdamW8bit([w], lr=1e-2, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.1)
    ours = MuonAdamW(net, adam_lr=1e-2, weight_decay=0.1, kind="adamw8bit")
    x = torch.randn(20, 64)
    for step in range(
        20
    ):  # gradients of both at the same place, theirs: what differs then is the step alone
        net.weight.data.copy_(w.data)
        w.grad = torch.autograd.grad((x @ w.t()).tanh().sum(), w)[0] + 0.1 * torch.randn_like(w)
        net.weight.grad, before = w.grad.clone(), w.detach().clone()
        theirs.step()
        ours.step()
        moved = (w - before).norm()
        assert (w - net.weight).norm() < 0.02 * moved, step
    same = (
        (ours.state[net.weight]["mean"].view(-1) == theirs.state[w]["state1"].view(-1))
        .float()
        .mean()
    )
    assert same > 0.97
