"""engine.py, runner.py, sampler.py: whatever the schedule, every answer is the one its request gets alone."""
import random

import pytest
import torch

from common import UserError
from generate import Engine, Sampling, generate
from model import Config, Transformer
from sampler import Row, draw, kept, uniform
from tokenizer import Tokenizer

TEXT = "abcdefghijklmnopqrstuvwxyz .,\n"


def make_model(folder, kind="qwen3", seed=0, context=64, **options):
    torch.manual_seed(seed)
    bias = kind == "gpt2"
    config = Config(kind, len(TEXT), 16, 32, 2, 4, 4 if bias else 2, 4 if bias else 8, context, qkv_bias=bias, out_bias=bias,
                    mlp_bias=bias, eos_token_id=3, **({"rope": {}} if bias else {}), **options)
    model = Transformer(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=0.5).add_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    model.save_pretrained(folder)
    Tokenizer.char(TEXT).save(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


def engine_of(folder, **options):
    return Engine(folder, "cpu", "float32", **{"block_size": 4, "debug_invariants": True, **options})


def random_request(rng, prefixes):
    prompt = (rng.choice(prefixes) if rng.random() < 0.6 else []) + [rng.randrange(4, len(TEXT)) for _ in range(rng.randint(1, 12))]
    hot = rng.random() < 0.4
    return prompt, Sampling(max_tokens=rng.randint(1, 16), temperature=0.9 if hot else 0, seed=rng.randrange(1000),
                            n=rng.choice([1, 1, 1, 2, 3]), top_k=rng.choice([0, 5]), top_p=rng.choice([1.0, 0.9]),
                            repetition_penalty=rng.choice([1.0, 1.3]), ignore_eos=rng.random() < 0.3,
                            stop=("ab", "z") if rng.random() < 0.2 else ())


def fuzz(folder, schedules, first=0, **options):
    """Random arrivals, a tiny pool, preemption, shared prefixes, aborts, chunked prefill; afterwards no block is in use."""
    alone = engine_of(folder, prefix_cache=False, max_seqs=8)
    preemptions = hits = 0
    for number in range(first, first + schedules):
        rng = random.Random(number)
        prefixes = [[rng.randrange(4, len(TEXT)) for _ in range(rng.choice([4, 9, 16]))] for _ in range(2)]
        max_seqs = rng.choice([3, 4, 8])
        engine = engine_of(folder, kv_tokens=rng.choice([44, 48, 64, 96]), max_seqs=max_seqs, step_tokens=rng.choice([1, 5, 9, 64]),
                           prefix_cache=rng.random() < 0.8, **options)
        todo = [random_request(rng, prefixes) for _ in range(rng.randint(1, 8))]
        asked, got, live = {}, {}, set()
        while todo or engine.has_work:
            while todo and (rng.random() < 0.5 or not engine.has_work):
                prompt, sampling = todo.pop()
                i = engine.submit(prompt, sampling)
                asked[i], _ = (prompt, sampling), live.add(i)
            if live and rng.random() < 0.03:
                i = rng.choice(sorted(live))
                engine.cancel(i), live.discard(i), asked.pop(i)
            for d in engine.step():
                text, ids, reason = got.get((d.request_id, d.index), ("", [], None))
                assert reason is None, "a delta after the end"
                got[d.request_id, d.index] = text + d.text, ids + d.token_ids, d.finish_reason
                if d.request_id not in engine.requests:
                    live.discard(d.request_id)
        assert engine.stats()["blocks_used"] == 0 and not engine.requests
        preemptions += engine.stats()["preemptions"]
        hits += engine.stats()["cache_hit_tokens"]
        for i, (prompt, sampling) in asked.items():
            alone.max_model_len = engine.max_model_len
            for output in alone.generate(prompt, sampling):
                assert got[i, output.index] == (output.text, output.token_ids, output.finish_reason), (number, i)
    return preemptions, hits


def test_fuzzed_schedules_give_each_request_what_it_gets_alone(folder):
    preemptions, hits = fuzz(folder, 30)
    assert preemptions > 10 and hits > 50


@pytest.mark.slow
def test_a_thousand_fuzzed_schedules(folder):
    preemptions, hits = fuzz(folder, 1000, first=100)
    assert preemptions > 400 and hits > 2000
