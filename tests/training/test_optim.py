"""optim.py against torch's own optimizers and the definition of orthogonality."""

import copy

import pytest
import torch
import torch.nn as nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from training import optim
from training.optim import (
    MuonAdamW,
    adamw_step,
    fused_adamw_step,
    muon_step,
    orthogonalize,
    pack_moments,
    schedule,
    unpack_moments,
)


def two_copies(*shapes):
    """Random parameters for our rule, and the same for torch's optimizer."""
    torch.manual_seed(0)
    ours = [torch.randn(shape) for shape in shapes]
    theirs = [p.clone().requires_grad_() for p in ours]
    return ours, theirs


def step_on_random_gradients(reference, theirs):
    grads = [torch.randn(p.shape) for p in theirs]
    for p, grad in zip(theirs, grads):
        p.grad = grad.clone()
    reference.step()
    return grads


def test_adamw_equals_torch_adamw():
    ours, theirs = two_copies((5, 7), (3,))
    betas = (0.9, 0.95)
    reference = torch.optim.AdamW(theirs, lr=0.01, betas=betas, eps=1e-10, weight_decay=0.1)
    means = [torch.zeros_like(p) for p in ours]
    squares = [torch.zeros_like(p) for p in ours]
    for step in range(1, 20):
        grads = step_on_random_gradients(reference, theirs)
        adamw_step(ours, grads, means, squares, step, 0.01, 0.1)
    for a, b in zip(ours, theirs):
        assert torch.allclose(a, b, atol=1e-6)


def test_the_kernel_that_a_gpu_takes_for_adamw_equals_its_plain_twin():
    ours, theirs = two_copies((5, 7), (3,))
    states = [[torch.zeros_like(p) for p in ours] for _ in range(4)]
    theirs = [p.detach() for p in theirs]
    for step in range(1, 10):
        grads = [torch.randn_like(p) for p in ours]
        settings = step, 0.01, 0.1
        adamw_step(ours, grads, *states[:2], *settings)
        fused_adamw_step(theirs, grads, *states[2:], *settings)
    for a, b in zip(ours, theirs):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 16)])
def test_muon_equals_torch_muon(shape):
    ours, theirs = two_copies(shape, shape)
    reference = torch.optim.Muon(theirs, lr=0.02, momentum=0.95, weight_decay=0.1)
    momentums = [torch.zeros(shape) for _ in ours]
    for _ in range(5):
        grads = step_on_random_gradients(reference, theirs)
        muon_step(ours, grads, momentums, 0.02, 0.95, 0.1)
    for a, b in zip(ours, theirs):  # torch's iteration runs in bfloat16
        off = (a - b).abs().max()
        assert off < 0.01
        assert off < 0.05 * a.abs().max()


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 16, 64), (2, 64, 16)])
def test_orthogonalized_singular_values_lie_near_one(shape):
    torch.manual_seed(0)
    G = torch.randn(shape)
    O = orthogonalize(G)
    values = torch.linalg.svdvals(O)
    assert values.min() > 0.3  # a random square matrix has a few tiny singular values
    assert values.max() < 1.3
    U, _, V = torch.linalg.svd(G, full_matrices=False)
    exact = U @ V
    cosine = (O * exact).sum() / exact.norm() / O.norm()
    assert cosine > 0.97


def test_matrices_go_to_muon_and_the_rest_to_adamw():
    layers = nn.ModuleList([nn.Linear(4, 4)])
    model = nn.ModuleDict({"embed_tokens": nn.Embedding(10, 4), "layers": layers})
    optimizer = MuonAdamW(model)
    rules = {}
    for group in optimizer.param_groups:
        rules |= {optimizer.names[p]: group["rule"] for p in group["params"]}
    assert rules == {
        "embed_tokens.weight": "adamw",
        "layers.0.weight": "muon",
        "layers.0.bias": "adamw",
    }
    without = MuonAdamW(model, kind="adamw")
    assert {group["rule"] for group in without.param_groups} == {"adamw"}


def test_embedding_norms_and_biases_may_have_a_rate_of_their_own():
    layers = nn.ModuleList([nn.Linear(4, 4), nn.RMSNorm(4)])
    head = nn.Linear(4, 10, bias=False)
    embedding = nn.Embedding(10, 4)
    model = nn.ModuleDict({"embed_tokens": embedding, "layers": layers, "lm_head": head})
    for embed_lr, rate in ((0.3, 0.3), (0.0, 0.1)):
        optimizer = MuonAdamW(model, 0.2, 0.1, embed_lr=embed_lr)
        rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert rates[embedding.weight] == rates[layers[0].bias] == rates[layers[1].weight] == rate
        assert (rates[head.weight], rates[layers[0].weight]) == (0.1, 0.2)


def test_only_matrices_are_pulled_towards_zero():
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 4)])})
    for kind in ("muon", "adamw"):
        groups = MuonAdamW(model, weight_decay=0.1, kind=kind).param_groups
        decays = {group["params"][0].ndim: group["weight_decay"] for group in groups}
        assert decays == {2: 0.1, 1: 0.0}


def test_saved_state_continues_the_same_path():
    def problem():
        torch.manual_seed(0)
        return nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 6), nn.Linear(6, 4)])})

    def train(model, optimizer, steps):
        for i in range(steps):
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
    assert [wsd[s] for s in (0, 9, 50, 75, 100)] == [0.1, 1.0, 1.0, 0.5, 0.0]
    long = [schedule(s, 100, warmup=80, kind="wsd", cooldown=0.5) for s in range(101)]
    assert max(abs(after - before) for before, after in zip(long, long[1:])) < 0.021  # no jump
    cosine = [schedule(s, 100, warmup=10, kind="cosine") for s in range(101)]
    assert [cosine[s] for s in (10, 55, 100)] == pytest.approx([1.0, 0.5, 0.0])


def regression(kind, steps=150):
    """The losses of a two-layer network on a fixed problem, and its optimizer."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
    x = torch.randn(256, 64)
    target = x @ (torch.randn(64, 64) / 8)
    optimizer = MuonAdamW(network, adam_lr=3e-3, kind=kind)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = (network(x) - target).square().mean()
        loss.backward()
        optimizer.step(schedule(step, steps))
        losses.append(loss.item())
    return losses, optimizer


def bytes_of(optimizer):
    tensors = [t for state in optimizer.state.values() for t in state.values()]
    return sum(t.numel() * t.element_size() for t in tensors)


def test_adamw_with_8_bit_moments_trains_as_adamw_does_in_a_quarter_of_the_memory():
    exact, whole = regression("adamw")
    packed, small = regression("adamw8bit")
    assert exact[-1] < 0.02 * exact[0]
    for a, b in zip(exact, packed):
        assert abs(a - b) < 0.05 * a + 2e-3
    assert bytes_of(small) < 0.28 * bytes_of(whole)


def test_8_bit_moments_survive_saving_bit_for_bit():
    _, optimizer = regression("adamw8bit", 5)
    _, again = regression("adamw8bit", 0)
    again.load_tensors(optimizer.tensors())
    restored = again.tensors()
    for name, tensor in optimizer.tensors().items():
        assert torch.equal(restored[name], tensor)


def test_packed_moments_are_within_their_rounding_and_a_square_is_never_zero():
    torch.manual_seed(0)
    x = torch.randn(12, 256) * 10.0 ** torch.randint(-6, 1, (12, 1))
    moments = torch.stack((x, x.square()))
    codes = torch.empty(2, 12, 256, dtype=torch.uint8)
    tops = torch.empty(2, 12, 1)
    pack_moments(moments.clone(), codes, tops)
    back = unpack_moments(codes, tops)
    assert ((back - moments).abs() <= 0.0075 * tops + 1e-30).all()
    assert (back[1] > 0).all()


def adapter_like(blocks, width, r):
    """The adapter of a Llama of so many blocks: A and B for each of seven matrices."""
    middle = 11 * width // 4
    shapes = [(width, width)] * 4 + [(width, middle)] * 2 + [(middle, width)]
    params = []
    for inputs, outputs in shapes * blocks:
        params += [torch.zeros(r, inputs), torch.zeros(outputs, r)]
    return nn.ParameterList(params)


VIEWS = "view select slice flatten reshape unbind split detach as_strided expand unsqueeze".split()


def launches(function):
    """How many operations, not views, torch runs in a call: on a GPU each would be a kernel."""
    with torch.profiler.profile() as profile:
        function()
    outer = [event.name for event in profile.events() if event.cpu_parent is None]
    return [name for name in outer if name.removeprefix("aten::") not in VIEWS]


def test_a_step_with_8_bit_moments_of_448_tensors_is_at_most_30_launches(monkeypatch):
    monkeypatch.setitem(optim.UNPACKED_AT_ONCE, "cpu", optim.UNPACKED_AT_ONCE["cuda"])
    model = adapter_like(blocks=32, width=512, r=8)
    optimizer = MuonAdamW(model, kind="adamw8bit")
    for p in model:
        p.grad = torch.ones_like(p)
    assert len(optimizer.state) == 448
    optimizer.step()  # makes the tables of values
    assert len(launches(optimizer.step)) <= 30


def test_a_parameter_of_any_size_keeps_its_moments_apart_from_its_neighbours(monkeypatch):
    """Together in one buffer they move as each does alone."""
    shapes = (70, 61), (64, 64), (5000,)
    found = []
    for at_once in (1, 1 << 20):
        monkeypatch.setitem(optim.UNPACKED_AT_ONCE, "cpu", at_once)
        torch.manual_seed(0)
        model = nn.ParameterList([torch.randn(shape) for shape in shapes])
        optimizer = MuonAdamW(model, weight_decay=0.1, kind="adamw8bit")
        for _ in range(5):
            for p in model:
                p.grad = torch.randn_like(p)
            optimizer.step()
        found.append(list(model))
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("kind", ["muon", "adamw8bit"])
def test_the_running_mean_equals_torchs_and_is_what_averaged_shows(kind):
    torch.manual_seed(0)
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(64, 64)])})
    optimizer = MuonAdamW(model, 0.1, 0.1, kind=kind, average=0.75)
    plain = AveragedModel(model)  # of the first four steps each counts as much
    for step in range(12):
        if step == 4:
            plain = AveragedModel(plain.module, multi_avg_fn=get_ema_multi_avg_fn(0.75))
            plain.n_averaged += 1
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        plain.update_parameters(model)
    live = {name: p.clone() for name, p in model.named_parameters()}
    with optimizer.averaged():
        shown = {name: p.clone() for name, p in model.named_parameters()}
    for name, p in plain.module.named_parameters():
        assert torch.allclose(shown[name], p, atol=1e-6)
        assert torch.equal(dict(model.named_parameters())[name], live[name])

    resumed = copy.deepcopy(model)  # as it is loaded from the folder that was saved
    resumed.load_state_dict(shown)
    other = MuonAdamW(resumed, 0.1, 0.1, kind=kind, average=0.75)
    other.load_tensors(optimizer.tensors())
    for name, p in resumed.named_parameters():
        assert torch.equal(p, live[name])
        assert torch.equal(other.means[p], shown[name])
