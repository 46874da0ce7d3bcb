"""optim.py against torch's own optimizers and the definition of orthogonality."""

import pytest
import torch
import torch.nn as nn

from training.optim import (
    MuonAdamW,
    adamw_step,
    muon_step,
    orthogonalize,
    pack_moment,
    schedule,
    unpack_moment,
)


def test_adamw_equals_torch_adamw():
    torch.manual_seed(0)
    ours = [torch.randn(5, 7), torch.randn(3)]
    theirs = [p.clone().requires_grad_() for p in ours]
    reference = torch.optim.AdamW(theirs, lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    means, squares = [torch.zeros_like(p) for p in ours], [torch.zeros_like(p) for p in ours]
    for step in range(1, 20):
        grads = [torch.randn_like(p) for p in ours]
        for p, g in zip(theirs, grads):
            p.grad = g.clone()
        reference.step()
        adamw_step(ours, grads, means, squares, step, 0.01, (0.9, 0.95), 1e-8, 0.1)
    for a, b in zip(ours, theirs):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 16)])
def test_muon_equals_torch_muon(shape):
    torch.manual_seed(0)
    ours = [torch.randn(shape), torch.randn(shape)]
    theirs = [p.clone().requires_grad_() for p in ours]
    reference = torch.optim.Muon(theirs, lr=0.02, momentum=0.95, weight_decay=0.1)
    momentums = [torch.zeros(shape), torch.zeros(shape)]
    for _ in range(5):
        grads = [torch.randn(shape) for _ in ours]
        for p, g in zip(theirs, grads):
            p.grad = g.clone()
        reference.step()
        muon_step(ours, grads, momentums, 0.02, 0.95, 0.1)
    for a, b in zip(ours, theirs):  # torch's iteration runs in bfloat16
        assert (a - b).abs().max() < 0.01
        assert (a - b).abs().max() < 0.05 * (a.abs().max())


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 16, 64), (2, 64, 16)])
def test_orthogonalized_singular_values_lie_near_one(shape):
    torch.manual_seed(0)
    G = torch.randn(shape)
    values = torch.linalg.svdvals(orthogonalize(G))
    assert (
        values.min() > 0.3 and values.max() < 1.3
    )  # a random square matrix has a few tiny singular values
    U, _, V = torch.linalg.svd(G, full_matrices=False)
    cosine = (orthogonalize(G) * (U @ V)).sum() / (U @ V).norm() / orthogonalize(G).norm()
    assert cosine > 0.97


def test_matrices_go_to_muon_and_the_rest_to_adamw():
    model = nn.ModuleDict(
        {"embed_tokens": nn.Embedding(10, 4), "layers": nn.ModuleList([nn.Linear(4, 4)])}
    )
    optimizer = MuonAdamW(model)
    rules = {optimizer.names[p]: g["rule"] for g in optimizer.param_groups for p in g["params"]}
    assert rules == {
        "embed_tokens.weight": "adamw",
        "layers.0.weight": "muon",
        "layers.0.bias": "adamw",
    }
    assert {g["rule"] for g in MuonAdamW(model, muon=False).param_groups} == {"adamw"}


def test_saved_state_continues_the_same_path():
    def problem():
        torch.manual_seed(0)
        return nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 6), nn.Linear(6, 4)])})

    def train(model, optimizer, steps):
        for i in range(steps):
            optimizer.set_lr(1.0)
            x = torch.full((2, 4), float(i % 3))
            model["layers"][1](model["layers"][0](x)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    whole = problem()
    train(whole, MuonAdamW(whole), 6)
    halves = problem()
    first = MuonAdamW(halves)
    train(halves, first, 3)
    second = MuonAdamW(halves)
    second.load_tensors(first.tensors())
    train(halves, second, 3)
    for a, b in zip(whole.parameters(), halves.parameters()):
        assert torch.equal(a, b)


def test_schedules_rise_hold_and_fall():
    wsd = [schedule(s, 100, warmup=10, kind="wsd", cooldown=0.5) for s in range(101)]
    assert wsd[0] == 0.1 and wsd[9] == 1.0 and wsd[50] == 1.0 and wsd[75] == 0.5 and wsd[100] == 0.0
    cosine = [schedule(s, 100, warmup=10, kind="cosine") for s in range(101)]
    assert (
        cosine[10] == 1.0 and cosine[55] == pytest.approx(0.5) and cosine[100] == pytest.approx(0.0)
    )


def regression(eight_bit, steps=150):
    """The losses of a two-layer network on a fixed problem."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
    x, truth = torch.randn(256, 64), torch.randn(64, 64) / 8
    opt, losses = MuonAdamW(net, adam_lr=3e-3, muon=False, eight_bit=eight_bit), []
    for step in range(steps):
        opt.zero_grad()
        loss = (net(x) - x @ truth).square().mean()
        loss.backward()
        opt.set_lr(schedule(step, steps))
        opt.step()
        losses.append(loss.item())
    return losses, opt


def test_adamw_with_8_bit_moments_trains_as_adamw_does_in_a_quarter_of_the_memory():
    exact, whole = regression(False)
    packed, small = regression(True)
    assert exact[-1] < 0.02 * exact[0]
    assert all(abs(a - b) < 0.05 * a + 2e-3 for a, b in zip(exact, packed))
    size = [
        sum(t.numel() * t.element_size() for s in o.state.values() for t in s.values())
        for o in (whole, small)
    ]
    assert size[1] < 0.28 * size[0]


def test_8_bit_moments_survive_saving_bit_for_bit():
    _, opt = regression(True, 5)
    again = regression(True, 0)[1]
    again.load_tensors(opt.tensors())
    assert {n: t.tolist() for n, t in again.tensors().items()} == {
        n: t.tolist() for n, t in opt.tensors().items()
    }


def test_a_packed_moment_is_within_its_rounding_and_a_square_is_never_zero():
    torch.manual_seed(0)
    x = torch.randn(1000, 3) * 10.0 ** torch.randint(-6, 1, (1000, 1))
    for signed, values in ((True, x), (False, x.square())):
        codes, tops = torch.empty(12, 256, dtype=torch.uint8), torch.empty(12, 1)
        pack_moment(values, codes, tops, signed)
        back, top = (
            unpack_moment(codes, tops, signed, values),
            tops.repeat_interleave(256)[:3000].view(1000, 3),
        )
        assert ((back - values).abs() <= 0.0075 * top + 1e-30).all()
        assert signed or (back > 0).all()
