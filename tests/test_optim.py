"""optim.py against torch's own optimizers and the definition of orthogonality."""
import pytest
import torch
import torch.nn as nn

from optim import MuonAdamW, adamw_step, muon_step, orthogonalize, schedule


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
    assert values.min() > 0.3 and values.max() < 1.3  # a random square matrix has a few tiny singular values
    U, _, V = torch.linalg.svd(G, full_matrices=False)
    cosine = (orthogonalize(G) * (U @ V)).sum() / (U @ V).norm() / orthogonalize(G).norm()
    assert cosine > 0.97


def test_matrices_go_to_muon_and_the_rest_to_adamw():
    model = nn.ModuleDict({"embed_tokens": nn.Embedding(10, 4), "layers": nn.ModuleList([nn.Linear(4, 4)])})
    optimizer = MuonAdamW(model)
    rules = {optimizer.names[p]: g["rule"] for g in optimizer.param_groups for p in g["params"]}
    assert rules == {"embed_tokens.weight": "adamw", "layers.0.weight": "muon", "layers.0.bias": "adamw"}
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
    cosine = [schedule(s, 100, warmup=10, kind="cosine", floor=0.1) for s in range(101)]
    assert cosine[10] == 1.0 and cosine[55] == pytest.approx(0.55) and cosine[100] == pytest.approx(0.1)
