"""Before the first request all is tuned and recorded; a GPU is played by what needs none."""

import random
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_scheduler import engine_of, fuzz, make_model, random_request
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from engine.forward import TorchForward
from engine.graphs import Graphs
from engine.runner import StepBatch
from engine.sampler import (
    Sampling,
    SamplingRow,
    draw_by_settings,
    draw_kind,
    draw_settings,
    draw_tokens,
    uniforms,
)
from generate import Engine
from quant import QuantLinear


class PlayedGraphs(Graphs):
    """What a recorded function launches is what it does, once more."""

    replays = 0

    def record(self, function):

        def replay():
            self.replays += 1
            function()

        return SimpleNamespace(replay=replay)


@pytest.fixture
def played(monkeypatch):
    """Every torch forward pass gets PlayedGraphs -> the list of them."""
    made = []
    allocate = TorchForward.allocate

    def allocate_and_play(self, *sizes):
        allocate(self, *sizes)
        self.graphs = PlayedGraphs()
        made.append(self.graphs)

    monkeypatch.setattr(TorchForward, "allocate", allocate_and_play)
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def keys(monkeypatch):
    """The keys that kernels asked `tuned` for, each of which the twin then computes."""
    if kernels.triton is None:
        pytest.skip("no Triton")
    asked = []

    def tuned(key, configs, launch, device):
        asked.append(key)

    product = QuantLinear.product

    def asking(self, rows):
        if len(rows) <= kernels.FUSED_ROWS:
            assert kernels.product(rows, self.tiles(), self.bias) is None
        return product(self, rows)

    monkeypatch.setattr(QuantLinear, "product", asking)
    monkeypatch.setattr(kernels, "use_kernel", lambda x: True)
    monkeypatch.setattr(kernels, "tuned", tuned)
    for name in ("add_norm", "store_heads", "swiglu"):
        monkeypatch.setattr(kernels, name, getattr(kernels, f"{name}_twin"))
    return asked


def serve_some(engine, requests, seed):
    rng = random.Random(seed)
    prefixes = [[rng.randrange(4, 20) for _ in range(20)] for _ in range(2)]
    for _ in range(requests):
        engine.submit(*random_request(rng, prefixes, 4))
        for _ in range(rng.choice([0, 1, 5])):
            engine.step()
    while engine.has_work:
        engine.step()


@pytest.mark.parametrize("max_seqs,step_tokens", [(3, 9), (9, 64), (16, 30)])
def test_no_request_asks_for_a_kernel_that_the_warm_up_did_not_tune(
    folder, keys, played, max_seqs, step_tokens
):
    limits = dict(max_seqs=max_seqs, step_tokens=step_tokens, kv_tokens=600)
    engine = engine_of(folder, quant="int8", **limits)
    engine.warm_up()
    known = set(keys)
    recorded = dict(engine.runner.forward.graphs.known)
    keys.clear()
    for seed in range(4):
        serve_some(engine, 12, seed)
    assert len(keys) > 900 and {key.split()[0] for key in keys} == {"attention", "product"}
    assert set(keys) <= known
    assert engine.runner.forward.graphs.known == recorded


class Launches(TorchDispatchMode):
    """Counts torch's operations but views and allocations, and what stands for Triton's kernels."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += not (operation.is_view or "empty" in str(operation))
        return operation(*args, **(kwargs or {}))

    def __getitem__(self, grid):
        def launch(*inputs, **options):
            self.count += 1

        return launch


def test_a_layer_takes_six_launches_beside_its_four_products(folder, monkeypatch):
    if kernels.triton is None:
        pytest.skip("no Triton")
    forward = engine_of(folder, block_size=8).runner.forward
    launches = Launches()
    for name in ("_add_norm", "_store_heads", "_attend", "_combine", "_swiglu"):
        monkeypatch.setattr(kernels, name, launches)
    monkeypatch.setattr(kernels, "use_kernel", lambda x: True)
    monkeypatch.setattr(kernels, "tuned", lambda key, configs, launch, _: launch(configs[0]))
    batch = StepBatch()
    batch.add(range(17), [5], 60, [0])  # a table so long that the context is divided
    counts = []
    for _ in range(2):
        launches.count = 0
        with launches, torch.inference_mode():
            forward(batch)
        counts.append(launches.count)
        del forward.layers[1:]
    assert counts[0] - counts[1] == 4 + 6


def test_steps_launched_ahead_of_their_tokens_give_each_request_what_it_gets_alone(
    folder, played, monkeypatch
):
    """Graphs replayed, tokens drawn in them, sequences that end while the next step runs: equal to
    the plain loop, which looks at a step's tokens before it schedules the next."""
    ahead = []
    launch_next = Engine.launch_next

    def counting(self, launched):
        following = launch_next(self, launched)
        ahead.append(following is not None)
        return following

    def seldom_edited(rng, prefixes, block):
        prompt, sampling = random_request(rng, prefixes, block)
        return prompt, replace(sampling, repetition_penalty=rng.choice([1.0] * 9 + [1.3]))

    alone = engine_of(folder, prefix_cache=False, max_seqs=8)
    alone.launch_next = lambda launched: None
    monkeypatch.setattr(Engine, "launch_next", counting)
    monkeypatch.setattr("test_scheduler.random_request", seldom_edited)
    fuzz(folder, 15, alone=alone)
    assert sum(graphs.replays for graphs in played) > 700 and sum(ahead) > 60


def test_drafts_reserve_nothing_behind_the_context(folder, played):
    """A graph's block tables have no room for it."""
    engine = engine_of(folder, draft_tokens=5)
    output = engine.generate([[5, 6, 7] * 20], Sampling(max_tokens=9, ignore_eos=True))[0]
    assert len(output.token_ids) == 4 and played[0].replays  # the context is 64


def test_who_comes_while_steps_are_launched_ahead_waits_for_one_of_them(folder, played):
    engine = engine_of(folder)
    long = Sampling(max_tokens=50, ignore_eos=True)
    first = engine.submit([5, 6], long)
    for _ in range(3):
        engine.step()
    assert engine.launched
    second = engine.submit([7, 8], long)
    assert [d.request_id for d in engine.step()] == [first]
    assert sorted(d.request_id for d in engine.step()) == [first, second]
    engine.cancel(first)
    engine.cancel(second)
    assert [d.finish_reason for d in engine.step()] == ["abort"] * 2
    assert not engine.launched and not engine.has_work and engine.stats()["blocks_used"] == 0


def test_what_cannot_be_recorded_costs_a_line_and_is_computed(folder, played, capsys):
    engine = engine_of(folder, max_seqs=4)
    (graphs,) = played
    record = graphs.record

    def small_only(function):
        if len(graphs.known) > 2:
            return record(function)
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate more")

    graphs.record = small_only
    engine.warm_up()
    (line,) = capsys.readouterr().err.splitlines()
    assert "4 sequences" in line and "out of memory" in line
    assert graphs.known.pop("4 sequences") is graphs.known.pop("2 sequences") is None
    kinds = "greedy", "drawn", "filtered"
    assert [*graphs.known] == ["1 sequences", *(f"{kind} tokens of 1" for kind in kinds)]
    assert all(graphs.known.values())
    sampling = Sampling(max_tokens=9, temperature=0)
    together = engine.generate([[5, 6], [7], [8], [9]], sampling)
    assert together[0].token_ids == engine.generate([5, 6], sampling)[0].token_ids


def test_a_step_without_memory_costs_a_line_and_others_are_warmed_up(
    folder, played, monkeypatch, capsys
):
    compute = TorchForward.compute

    def small_only(self, longs, ints, S, T, *how):
        if T > 20:
            raise torch.OutOfMemoryError
        return compute(self, longs, ints, S, T, *how)

    monkeypatch.setattr(TorchForward, "compute", small_only)
    engine = engine_of(folder, max_seqs=2, step_tokens=64)
    engine.warm_up(tune=False)
    assert not played[0].known
    engine.warm_up()
    (line,) = capsys.readouterr().err.splitlines()
    assert "31 new tokens of 1 texts; lower --kv-tokens" in line and played[0].count() == 8


def test_a_draw_without_python_is_the_draw():
    """The chain of operations that a CUDA graph holds, against draw_tokens."""
    torch.manual_seed(0)
    logits = 3 * torch.randn(8, 500)
    logits[7] = -torch.inf
    plain = [Sampling(temperature=0), Sampling(temperature=0.7), Sampling(temperature=2.0)]
    limited = [Sampling(top_k=9), Sampling(top_p=0.6), Sampling(min_p=0.1, temperature=1.3)]
    for several in (plain[:1], plain, plain + limited):
        rows = [SamplingRow(several[i % len(several)]) for i in range(8)]
        kind = draw_kind(rows)
        for seed in range(40):
            u = uniforms([seed] * 8, range(8))
            settings = draw_settings(rows, u, 10)[:8]
            tokens, failed = draw_by_settings(kind, logits, settings)
            expected, nothing = draw_tokens(logits.clone(), rows, u)
            assert failed.tolist() == nothing.tolist() == [0] * 7 + [1]
            assert tokens[:7].tolist() == expected[:7].tolist()


def test_the_longest_wait_is_between_steps_and_not_between_requests(folder, monkeypatch):
    engine = engine_of(folder)
    engine.generate([5], Sampling(max_tokens=2, ignore_eos=True))
    quick = engine.stats()["longest_wait"]
    time.sleep(quick + 0.3)  # nobody waits
    engine.submit([5], Sampling(max_tokens=2, ignore_eos=True))
    engine.step()
    assert engine.stats()["longest_wait"] < quick + 0.3
    time.sleep(quick + 0.4)
    engine.step()
    assert engine.stats()["longest_wait"] >= quick + 0.4
