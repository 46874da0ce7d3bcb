"""The engine on CUDA: its kernels, its graphs, its start (make test-gpu)."""

import pytest
import torch
from test_scheduler import engine_of, fuzz, make_model

import kernels
from engine.sampler import Sampling
from model import Transformer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"), head=16, context=256)


@pytest.fixture(autouse=True)
def untuned(monkeypatch, tmp_path):
    """The first configuration serves: to time them all takes minutes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernels, "milliseconds", lambda launch, config: 1.0)
    kernels.tuning_table.cache_clear()


def test_fuzzed_schedules_on_a_gpu_give_each_request_what_it_gets_alone(folder):
    fuzz(folder, 8, block=16, device="cuda")


def test_greedy_answers_on_a_gpu_equal_the_plain_generator(folder):
    model = Transformer.from_pretrained(folder).cuda()
    prompts = [[5, 6, 7], [9] * 20, list(range(4, 30))]
    engine = engine_of(folder, "cuda", max_seqs=4, step_tokens=7, block_size=16)
    outputs = engine.generate(prompts, Sampling(max_tokens=30, temperature=0))
    for prompt, output in zip(prompts, outputs):
        assert output.token_ids == list(model.generate(prompt, 30, temperature=0))


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
    assert engine.stats()["longest_wait"] < 1.0
