"""The engine and a training on CUDA: kernels, graphs, the start, what waits (make test-gpu).

Without a GPU one test here runs this file in a process that pretends one (tests/pretended.py).
"""

import contextlib
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from test_scheduler import engine_of, fuzz, make_model
from test_train import TEXT

import kernels
import train
from engine.sampler import Sampling
from model import Transformer

here = torch.cuda.is_available()
pretended = "pretended" in sys.modules  # and all times are a CPU's
gpu = pytest.mark.skipif(not here, reason="runs inside the test of all on a pretended GPU")


@pytest.mark.skipif(here, reason="the tests run right here")
def test_what_a_gpu_refuses_is_not_done():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "pretended"]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run([*command, __file__], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout


@contextlib.contextmanager
def no_waiting():
    """Context: that the CPU waits for the GPU is an error, unless it waits for an event."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"), head=16, context=256)


@pytest.fixture(autouse=True)
def untuned(monkeypatch, tmp_path):
    """The first configuration serves: to time them all takes minutes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernels, "milliseconds", lambda launch, config: 1.0)
    kernels.tuning_table.cache_clear()


@gpu
def test_fuzzed_schedules_on_a_gpu_give_each_request_what_it_gets_alone(folder):
    fuzz(folder, 8, block=16, device="cuda")


@gpu
def test_greedy_answers_on_a_gpu_equal_the_plain_generator(folder):
    model = Transformer.from_pretrained(folder).cuda()
    prompts = [[5, 6, 7], [9] * 20, list(range(4, 30))]
    engine = engine_of(folder, "cuda", max_seqs=4, step_tokens=7, block_size=16)
    outputs = engine.generate(prompts, Sampling(max_tokens=30, temperature=0))
    for prompt, output in zip(prompts, outputs):
        assert output.token_ids == list(model.generate(prompt, 30, temperature=0))


@gpu
def test_64_requests_right_after_the_start_wait_for_no_tuning_and_no_graph(folder):
    engine = engine_of(folder, "cuda", max_seqs=64, block_size=16)
    engine.warm_up()
    graphs = engine.runner.forward.graphs.known
    recorded = dict(graphs)
    assert (
        all(recorded.values()) and "64 sequences" in recorded and "drawn tokens of 64" in recorded
    )
    table = kernels.tuning_table(engine.runner.forward.embedding.device)
    tuned = dict(table.choices)
    asked = [Sampling(max_tokens=40, seed=i, top_p=0.9 if i % 3 else 1.0) for i in range(64)]
    engine.generate([[4 + i % 20] * (1 + 3 * i) for i in range(64)], asked)
    assert table.closed and table.choices == tuned and graphs == recorded
    assert engine.stats()["longest_wait"] < (20 if pretended else 1.0)


@gpu
@pytest.mark.parametrize("how", [dict(temperature=0), dict(top_p=0.9), dict(stop=("zz",))])
def test_a_step_of_decodes_waits_for_the_tokens_of_the_step_before_alone(folder, how):
    engine = engine_of(folder, "cuda", max_seqs=8, block_size=16)
    engine.warm_up()
    for i in range(8):
        engine.submit([5, 6, 7 + i], Sampling(max_tokens=40, ignore_eos=True, seed=i, **how))
    engine.step()  # reads the prompts
    engine.step()
    with no_waiting():
        deltas = [delta for _ in range(20) for delta in engine.step()]
    assert len(deltas) == 20 * 8


@gpu
def test_a_training_step_waits_for_nothing_that_it_computes(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text(TEXT * 3)
    norms = []  # their running mean

    def passes(run, batch):
        with no_waiting():
            yield from train_passes(run, batch)

    def update(run, step):
        with no_waiting():
            values = train_update(run, step)
        norms.append(run.guard.mean)
        return values

    train_passes, train_update = train.passes, train.update
    monkeypatch.setattr(train, "passes", passes)
    monkeypatch.setattr(train, "update", update)
    tiny = "--layers 2 --dim 32 --heads 2 --context 32 --batch 8 --sample 0 --compile off".split()
    how = "--device cuda --steps 6 --eval-every 6 --log-every 99".split()
    files = ["--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["train.py", *files, *tiny, *how])
    train.main()
    assert len(norms) == 6 and all(0 < norm < 10 for norm in norms[1:])
