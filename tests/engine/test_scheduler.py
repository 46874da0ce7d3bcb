"""Scheduler, runner and sampler: whatever the schedule, an answer is the one its request gets
alone."""

import gc
import random
import re
import weakref
from collections import Counter

import numpy as np
import pytest
import torch

import generate
import lora
from common import UserError
from engine.sampler import (
    Sampling,
    SamplingRow,
    draw_settings,
    draw_tokens,
    kept_tokens,
    mixed_bits,
    uniforms,
)
from generate import Engine, child_seed, load_engine_model
from model import Config, Transformer
from tokenizer import Tokenizer

TEXT = "abcdefghijklmnopqrstuvwxyz .,\n"


def make_model(folder, kind="qwen3", seed=0, context=64, head=None, **options):
    torch.manual_seed(seed)
    bias = kind == "gpt2"
    config = Config(
        kind,
        len(TEXT),
        16,
        32,
        2,
        4,
        4 if bias else 2,
        head or (4 if bias else 8),
        context,
        out_bias=bias,
        mlp_bias=bias,
        qkv_bias=bias or kind == "qwen2",
        eos_token_id=3,
        **({"rope": {}} if bias else {}),
        **options,
    )
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


def check_invariants(scheduler):
    """Blocks have as many references as tables name them, or are free; all is in order."""
    pool = scheduler.pool
    used = Counter()
    for seq in scheduler.running:
        used.update(seq.blocks)
        assert seq.computed < len(seq.ids)
        assert seq.published <= seq.computed // scheduler.block_size
        assert seq.computed <= len(seq.blocks) * scheduler.block_size
        assert len(set(seq.blocks)) == len(seq.blocks)
        assert all(pool.refs[block] == 1 for block in seq.blocks[seq.published :])
    for block, count in enumerate(pool.refs):
        assert count == used[block]
        assert (count == 0) == (block in pool.free)
    assert all(pool.hash_of[block] == key for key, block in pool.by_hash.items())
    assert sum(key is not None for key in pool.hash_of) == len(pool.by_hash)
    assert not any(seq.blocks or seq.computed for seq in scheduler.waiting)
    for queue in (scheduler.running, scheduler.waiting):
        arrivals = [seq.arrival for seq in queue]
        assert arrivals == sorted(arrivals)


class CheckedEngine(Engine):
    """Its scheduler's books are checked after every step."""

    def step(self):
        deltas = super().step()
        check_invariants(self.scheduler)
        return deltas


def engine_of(folder, device="cpu", **options):
    return CheckedEngine(folder, device, "float32", **{"block_size": 4, **options})


def random_request(rng, prefixes, block):
    new = rng.randint(1, 3 * block)
    prompt = (rng.choice(prefixes) if rng.random() < 0.6 else []) + [
        rng.randrange(4, len(TEXT)) for _ in range(new)
    ]
    hot = rng.random() < 0.4
    return prompt, Sampling(
        max_tokens=rng.randint(1, 4 * block),
        temperature=0.9 if hot else 0,
        seed=rng.randrange(1000),
        n=rng.choice([1, 1, 1, 2, 3]),
        top_k=rng.choice([0, 5]),
        top_p=rng.choice([1.0, 0.9]),
        repetition_penalty=rng.choice([1.0, 1.3]),
        ignore_eos=rng.random() < 0.3,
        stop=("ab", "z") if rng.random() < 0.2 else (),
    )


def fuzz(folder, schedules, first=0, block=4, device="cpu", alone=None, **options):
    """Random arrivals, a tiny pool, preemption, shared prefixes, aborts, chunked prefill;
    afterwards no block is in use."""
    options["block_size"] = block
    if alone is None:
        alone = engine_of(folder, device, prefix_cache=False, max_seqs=8, block_size=block)
    preemptions = hits = 0
    for number in range(first, first + schedules):
        rng = random.Random(number)
        prefixes = [
            [rng.randrange(4, len(TEXT)) for _ in range(block * rng.choice([4, 9, 16]) // 4)]
            for _ in range(2)
        ]
        max_seqs = rng.choice([3, 4, 8])
        engine = engine_of(
            folder,
            device,
            kv_tokens=block * rng.choice([11, 12, 16, 24]),
            max_seqs=max_seqs,
            step_tokens=rng.choice([1, 5, 9, 64]),
            prefix_cache=rng.random() < 0.8,
            **options,
        )
        todo = [random_request(rng, prefixes, block) for _ in range(rng.randint(1, 8))]
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
                assert got[i, output.index] == (
                    output.text,
                    output.token_ids,
                    output.finish_reason,
                ), (number, i)
    return preemptions, hits


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Shapes that forward.cpp knows."""
    return make_model(tmp_path_factory.mktemp("wide"), context=256, head=16)


def test_fuzzed_schedules_give_each_request_what_it_gets_alone(folder):
    preemptions, hits = fuzz(folder, 20)
    assert preemptions > 7 and hits > 40


def test_fuzzed_schedules_in_cpp_give_each_request_what_it_gets_alone(wide):
    preemptions, hits = fuzz(wide, 30, block=16)
    assert engine_of(wide, block_size=16).runner.native and preemptions > 10 and hits > 200


@pytest.mark.slow
@pytest.mark.parametrize("block", [4, 16])
def test_a_thousand_fuzzed_schedules(folder, wide, block):
    preemptions, hits = fuzz(wide if block == 16 else folder, 1000, first=100, block=block)
    assert preemptions > 400 and hits > 2000


def test_greedy_answers_equal_the_plain_generator(folder, tmp_path):
    for kind in ("qwen3", "llama", "gpt2", "qwen2", "mistral"):
        sliding = dict(sliding_window=9, sliding_layers=(0,)) if kind == "mistral" else {}
        make_model(tmp_path / kind, kind, seed=3, **sliding)
        model = Transformer.from_pretrained(tmp_path / kind)
        prompts = [[5, 6, 7], [9] * 20, list(range(4, 30))]
        outputs = engine_of(tmp_path / kind, step_tokens=7, max_seqs=4).generate(
            prompts, Sampling(max_tokens=30, temperature=0)
        )
        for prompt, output in zip(prompts, outputs):
            assert output.token_ids == list(model.generate(prompt, 30, temperature=0)), kind


def test_speculation_changes_no_answer(folder):
    """Greedy and sampled, in a tiny pool."""
    fuzz(folder, 12, first=5000, draft_tokens=3)


def test_drafts_right_and_wrong_change_no_answer(folder, monkeypatch):
    rng = random.Random(3)
    monkeypatch.setattr(
        generate, "lookup_draft", lambda ids, most: rng.choices(range(len(TEXT)), k=most)
    )
    fuzz(folder, 12, first=5000, draft_tokens=3)


def test_prompts_are_computed_beside_drafts(folder):
    engine = engine_of(folder, draft_tokens=8, step_tokens=8, max_seqs=4)
    engine.submit([5, 6, 7] * 3, Sampling(max_tokens=40, temperature=0, ignore_eos=True))
    for _ in range(3):
        engine.step()
    engine.submit([8, 9] * 5, Sampling(max_tokens=1))
    engine.step()
    assert len(engine.scheduler.running) == 2


def test_a_draft_that_is_right_saves_steps(folder):
    def steps(**options):
        engine, count = engine_of(folder, **options), 0
        engine.submit([5, 6, 7], Sampling(max_tokens=24, temperature=0, ignore_eos=True))
        while engine.has_work:
            engine.step()
            count += 1
        return count

    assert steps() == 24
    assert 7 <= steps(draft_tokens=3) < 24  # greedy text of a tiny model repeats itself


def test_speculative_sampling_follows_the_models_distribution(folder):
    """Chi-square of the second token's frequencies against the exact distribution."""
    model, prompt, count = Transformer.from_pretrained(folder), [5, 6, 7], 1500
    engine = engine_of(folder, draft_tokens=3, max_seqs=64)
    outputs = engine.generate(
        [prompt] * count, [Sampling(max_tokens=2, seed=i, ignore_eos=True) for i in range(count)]
    )
    with torch.no_grad():
        first = model(torch.tensor([prompt]))[0, -1].softmax(-1)
        rows = torch.cat(
            (torch.tensor([prompt]).repeat(len(TEXT), 1), torch.arange(len(TEXT))[:, None]), 1
        )
        expected = count * (first[:, None] * model(rows)[:, -1].softmax(-1)).sum(0)
    seen = torch.bincount(torch.tensor([o.token_ids[1] for o in outputs]), minlength=len(TEXT))
    large = expected >= 5
    chi = ((seen - expected)[large] ** 2 / expected[large]).sum()
    assert chi < large.sum() + 4 * (2 * large.sum()) ** 0.5  # mean k, variance 2k


def test_the_same_seed_gives_the_same_text_in_any_company(folder):
    engine = engine_of(folder, max_seqs=16, kv_tokens=2000)
    mine = Sampling(max_tokens=20, seed=7, top_p=0.95)
    others = [
        Sampling(max_tokens=20, temperature=t, top_k=k, min_p=p)
        for t, k, p in ((0.5, 3, 0.0), (0, 0, 0.0), (2.0, 0, 0.3))
    ]
    alone = engine.generate([4, 5, 6], mine)[0]
    company = engine.generate([[4, 5, 6], [7], [8, 9], [10]], [mine, *others])[0]
    assert alone.token_ids == company.token_ids
    assert (
        alone.token_ids
        != engine.generate([4, 5, 6], Sampling(max_tokens=20, seed=8, top_p=0.95))[0].token_ids
    )


def test_n_answers_equal_their_own_seeds_and_share_the_prompts_blocks(folder):
    engine = engine_of(folder, max_seqs=8, kv_tokens=400)
    request = engine.submit(
        list(range(4, 24)), Sampling(max_tokens=4, n=5, seed=1, ignore_eos=True)
    )
    engine.step()  # the first answer computes the prompt, 20 tokens in five blocks
    assert engine.stats()["blocks_used"] == 5 and len(engine.requests[request]) == 5
    engine.step()  # the others share four of them; the first one goes on in a sixth
    assert engine.stats()["blocks_used"] == 4 + 5 + 1
    together = engine.generate([4, 5], Sampling(max_tokens=6, n=3, seed=3, ignore_eos=True))
    for index, output in enumerate(together):
        own = Sampling(max_tokens=6, seed=child_seed(3, index), ignore_eos=True)
        assert engine.generate([4, 5], own)[0].token_ids == output.token_ids


def test_logprobs_are_the_models_own(folder):
    engine, model = engine_of(folder), Transformer.from_pretrained(folder)
    output = engine.generate(
        [5, 6], Sampling(max_tokens=5, temperature=0, logprobs=3, ignore_eos=True)
    )[0]
    with torch.no_grad():
        expected = model(torch.tensor([[5, 6] + output.token_ids]))[0, 1:-1].log_softmax(-1)
    for token, info, row in zip(output.token_ids, output.logprobs, expected):
        assert info.id == token and info.logprob == pytest.approx(row[token].item(), abs=1e-4)
        assert [i for i, _ in info.top] == row.topk(3).indices.tolist()


def test_stop_strings_across_tokens_are_never_shown(folder):
    engine = engine_of(folder)
    whole = engine.generate([5, 6], Sampling(max_tokens=20, temperature=0, ignore_eos=True))[0].text
    stop, at = whole[6:9], whole.find(whole[6:9])
    request, shown = (
        engine.submit(
            [5, 6], Sampling(max_tokens=20, temperature=0, ignore_eos=True, stop=(stop, "????"))
        ),
        [],
    )
    while request in engine.requests:
        shown += engine.step()
    assert "".join(d.text for d in shown) == whole[:at] and shown[-1].finish_reason == "stop"
    output = engine.generate(
        [5, 6], Sampling(max_tokens=7, temperature=0, ignore_eos=True, stop=(whole[6] + "?",))
    )[0]
    assert (
        output.text == whole[:7] and output.finish_reason == "length"
    )  # what was held back comes out in the end


def test_ends_and_lengths(folder):
    engine = engine_of(folder)
    free = engine.generate([5, 6], Sampling(max_tokens=12, temperature=0, ignore_eos=True))[
        0
    ].token_ids
    cut = engine.generate(
        [5, 6], Sampling(max_tokens=12, temperature=0, ignore_eos=True, stop_ids=(free[4],))
    )[0]
    assert cut.token_ids == free[: free.index(free[4])] and cut.finish_reason == "stop"
    late = engine.generate(
        [5, 6], Sampling(max_tokens=12, temperature=0, stop_ids=(free[4],), min_tokens=9)
    )[0]
    assert len(late.token_ids) >= 9
    full = engine.generate([5] * 60, Sampling(max_tokens=100, ignore_eos=True))[0]
    assert len(full.token_ids) == 4 and full.finish_reason == "length"  # the context is 64
    forced = engine.generate([5, 6], Sampling(max_tokens=5, logit_bias={9: 100.0}))[0]
    assert forced.token_ids == [9] * 5


def test_contradictory_constraints_end_with_a_reason(folder):
    engine = engine_of(folder)
    sampling = Sampling(min_tokens=1, stop_ids=tuple(range(len(TEXT))))
    output = engine.generate([5, 6], sampling)[0]
    assert output.finish_reason == "error" and "contradict" in output.error and not engine.has_work


def test_a_model_that_computes_no_numbers_ends_with_a_reason(folder):
    for value in (torch.nan, torch.inf):
        model = Transformer.from_pretrained(folder)
        with torch.no_grad():
            model.lm_head.weight.fill_(value)
        for temperature in (0, 1):
            sampling = Sampling(temperature=temperature)
            output = Engine.of(model, None, kv_tokens=64).generate([[5, 6]], sampling)[0]
            assert output.finish_reason == "error" and "inf or NaN" in output.error


def test_logits_are_edited_where_the_model_has_more_rows_than_the_tokenizer_ids(folder):
    model = Transformer.from_pretrained(folder)
    engine = Engine.of(model, Tokenizer.char(TEXT[:26]), kv_tokens=512)
    asked = [Sampling(max_tokens=2, logit_bias={i: 100.0}) for i in (9, 12)]
    asked.append(Sampling(max_tokens=2, repetition_penalty=1.3, temperature=0))
    outputs = engine.generate([[5], [6], [7]], asked)
    assert [output.token_ids for output in outputs[:2]] == [[9, 9], [12, 12]]


def test_constrained_answers_match_their_pattern(folder):
    from engine.grammar import Constraint, Vocabulary, regex_grammar

    engine = engine_of(folder, max_seqs=8)
    constraint = Constraint(regex_grammar("(abc|xy)+z,"), Vocabulary(engine.tok))
    for output in engine.generate(
        [[5, 6]] * 6, [Sampling(max_tokens=15, seed=i, constraint=constraint) for i in range(6)]
    ):
        assert re.fullmatch("(abc|xy)+z,", output.text) and output.finish_reason == "stop"
    constraint.advance(engine.tok.encode("q")[0])  # which breaks it
    broken = engine.generate([5, 6], Sampling(constraint=constraint))[0]
    assert broken.finish_reason == "error" and "doesn't satisfy the grammar" in broken.error
    constraint = Constraint(regex_grammar("[ab.]{50}"), Vocabulary(engine.tok))  # "." ends a turn
    cut = engine.generate([5, 6], Sampling(max_tokens=9, constraint=constraint))[0]
    assert re.fullmatch("[ab]{9}", cut.text) and cut.finish_reason == "length"


def test_a_shared_prefix_is_computed_once(folder):
    engine = engine_of(folder, kv_tokens=1000, max_seqs=8, step_tokens=16)
    prefix = [4 + i % 20 for i in range(41)]
    outputs = engine.generate(
        [prefix + [i] for i in range(4, 10)], Sampling(max_tokens=2, temperature=0, ignore_eos=True)
    )
    # also those that arrived while it was being computed
    assert engine.stats()["cache_hit_tokens"] == 5 * 40
    engine.generate(prefix + [4] + outputs[0].token_ids + [5, 6, 7], Sampling(max_tokens=1))
    assert engine.stats()["cache_hit_tokens"] == 6 * 40


@pytest.mark.parametrize(
    "kv_dtype,tolerance", [("bfloat16", 0.1), ("float16", 0.02), ("int8", 0.2)]
)
def test_smaller_caches_give_nearly_the_same_logprobs(folder, kv_dtype, tolerance):
    prompt = [4 + i % 20 for i in range(30)]
    sampling = Sampling(max_tokens=1, temperature=0, logprobs=10)
    exact, near = (
        engine_of(folder, kv_dtype=k, step_tokens=11, max_seqs=2)
        .generate(prompt, sampling)[0]
        .logprobs[0]
        .top
        for k in ("auto", kv_dtype)
    )
    near = dict(near)
    assert all(abs(near[i] - p) < tolerance for i, p in exact[:3])


@pytest.mark.parametrize(
    "quant,dtype,tolerance",
    [("int8", "float32", 0.3), (None, "float16", 0.02), ("int4", "float32", 3.0)],
)
def test_packed_weights_give_nearly_the_same_logprobs_and_no_row_depends_on_others(
    folder, quant, dtype, tolerance
):
    sampling = Sampling(max_tokens=6, temperature=0, logprobs=5, ignore_eos=True)
    exact = engine_of(folder).generate([5, 6, 7], sampling)[0].logprobs[0]
    engine = Engine(folder, "cpu", dtype, quant, block_size=4)
    near = dict(engine.generate([5, 6, 7], sampling)[0].logprobs[0].top)
    assert abs(near.get(exact.id, -9.0) - exact.logprob) < tolerance
    prompts = [[5, 6, 7], [9, 9], [20]]
    alone = [engine.generate(p, sampling)[0].token_ids for p in prompts]
    assert [o.token_ids for o in engine.generate(prompts, sampling)] == alone


def test_what_cannot_be_done_is_refused_at_once(folder, monkeypatch):
    engine = engine_of(folder, max_seqs=4, kv_tokens=40)
    for prompt, sampling, words in (
        ([], Sampling(), "no tokens"),
        ([4] * 40, Sampling(), "40 tokens"),
        ([99], Sampling(), "99"),
        ([4], Sampling(max_tokens=0), "max_tokens"),
        ([4], Sampling(temperature=-1), "temperature"),
        ([4], Sampling(temperature=float("nan")), "temperature"),
        ([4], Sampling(top_p=0), "top_p"),
        ([4], Sampling(min_tokens=9, max_tokens=3), "min_tokens"),
        ([4], Sampling(logit_bias={99: 1.0}), "logit_bias"),
        ([4], Sampling(logit_bias={4: 1e39}), "logit_bias adds 1e.39, no number of at most 1e.09"),
        ([4], Sampling(logit_bias={4: -(10**400)}), "logit_bias adds -1000"),
        ([4], Sampling(stop=("",)), "stop"),
        ("é", Sampling(), "é"),
    ):
        with pytest.raises(UserError, match=words):
            engine.submit(prompt, sampling)
    assert not engine.has_work
    assert len(engine.generate([4], Sampling(max_tokens=3, n=9))) == 9  # four at once
    assert (
        engine.generate([4], Sampling(max_tokens=3, temperature=1e6, ignore_eos=True))[
            0
        ].finish_reason
        == "length"
    )
    with pytest.raises(UserError, match="blocks fit; lower --kv-tokens to [1-9]"):
        engine_of(folder, kv_tokens=10**12)
    monkeypatch.setattr("engine.runner.free_memory", lambda device: 1000)
    with pytest.raises(UserError, match="at most 0 blocks fit; free some memory"):
        engine_of(folder)


def test_cancelling_frees_everything_and_ends_with_abort(folder):
    engine = engine_of(folder, max_seqs=4)
    ids = [
        engine.submit([4 + i] * 10, Sampling(max_tokens=20, n=2, ignore_eos=True)) for i in range(3)
    ]
    engine.step(), engine.step()
    for i in ids:
        engine.cancel(i), engine.cancel(i)
    ends = [(d.request_id, d.index, d.finish_reason) for d in engine.step()]
    assert sorted(ends) == [(i, k, "abort") for i in ids for k in range(2)] and not engine.has_work
    assert engine.stats()["blocks_used"] == 0


# ------------------------------------------------------------------------------------------ sampler
def row(sampling, output=(), prompt=()):
    return SamplingRow(sampling, list(output), list(prompt))


def test_filters_keep_what_their_definitions_say():
    logits = torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05]]).log()

    def left(**options):
        settings = draw_settings([row(Sampling(**options))], 0, 1)
        return kept_tokens(logits, settings)[0].nonzero()[:, 0].tolist()

    assert left(top_k=2) == [0, 1] and left(top_p=0.69) == [0, 1] and left(top_p=1e-6) == [0]
    assert left(min_p=0.25) == [0, 1, 2] and left(top_k=3, top_p=0.8) == [
        0,
        1,
    ]  # 0.5 + 0.2 of 0.85 is 0.82


def test_candidates_and_the_whole_vocabulary_agree(monkeypatch):
    from engine import sampler

    logits = (
        torch.randn(6, 3000, generator=torch.Generator().manual_seed(0))
        * torch.tensor([0.01, 1, 2, 4, 8, 8])[:, None]
    )
    filters = (0.9, 0, 0), (0.5, 0, 0), (1, 7, 0), (1, 0, 0.1), (0.9, 50, 0), (1, 2999, 0)
    rows = [row(Sampling(top_p=p, top_k=k, min_p=m)) for p, k, m in filters]
    settings = draw_settings(rows, 0, 6)
    wide = kept_tokens(logits, settings)
    monkeypatch.setattr(sampler, "CANDIDATES", 16)
    assert torch.equal(kept_tokens(logits, settings), wide)


def test_the_hash_of_a_position_is_splitmix64s():
    gamma = 0x9E3779B97F4A7C15
    states = np.array(
        [0, gamma, 1234567], np.uint64
    )  # the first two of seed 0, the first of 1234567
    first = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 6457827717110365317]  # the reference's
    assert mixed_bits(states).tolist() == first
    u = uniforms([5] * 1000 + list(range(-500, 500)), [*range(1000), *[5000] * 1000])
    assert len(set(u.tolist())) == 2000 and 0 <= u.min() and u.max() < 1


def test_draws_follow_the_distribution():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    rows = [row(Sampling(temperature=0.5))] * 8000
    u = uniforms([3] * 8000, range(8000))
    tokens, failed = draw_tokens(logits.repeat(8000, 1), rows, u)
    assert (
        torch.allclose(
            torch.bincount(tokens, minlength=4) / 8000, (logits * 2).softmax(0), atol=0.02
        )
        and not failed.any()
    )


def test_a_curve_that_rises_where_nothing_is_allowed_draws_nothing_from_there(monkeypatch):
    """As CUDA's does, which adds in trees."""
    rising = torch.tensor([[0.5, 0.5 + 2**-24, 1.0]])
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda p, axis: rising)
    logits = torch.tensor([[1.0, -torch.inf, 1.0]])
    tokens, _ = draw_tokens(logits, [row(Sampling())], torch.tensor([0.5]))
    assert tokens.tolist() == [0]


def test_penalties_lower_what_was_said():
    sampling = Sampling(
        repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25, temperature=0
    )
    logits = torch.tensor([[4.0, 3.0, -1.0, 1.0]])
    draw_tokens(logits, [row(sampling, output=[0, 0, 2], prompt=[3])], torch.zeros(1))
    assert logits.tolist() == [[4 / 2 - 0.5 - 2 * 0.25, 3.0, -2 - 0.5 - 0.25, 0.5]]


def test_adapters_share_a_batch_and_change_only_their_own_requests(folder, tmp_path):
    merged, prompt = {}, [5, 6, 7]
    for i, name in enumerate(("one", "two")):
        model = lora.apply(Transformer.from_pretrained(folder), r=2, targets="all")
        with torch.no_grad():
            for n, p in model.named_parameters():
                if n.endswith(".B"):
                    p.normal_(std=0.5, generator=torch.Generator().manual_seed(i))
        lora.save_adapter(model, tmp_path / name)
        merged[name] = lora.merge(model)
    merged[None] = Transformer.from_pretrained(folder)
    engine = engine_of(folder, adapters={name: tmp_path / name for name in ("one", "two")})
    greedy = Sampling(max_tokens=12, temperature=0)
    asked = {
        engine.submit(prompt, greedy, adapter=name): name for name in (None, "one", "two", "one")
    }
    got = {i: [] for i in asked}
    while engine.has_work:
        for d in engine.step():
            got[d.request_id] += d.token_ids
    for i, name in asked.items():
        assert got[i] == list(merged[name].generate(prompt, 12, temperature=0)), name
    assert len({tuple(ids) for ids in got.values()}) == 3
    with pytest.raises(UserError, match="one, two"):
        engine.submit(prompt, Sampling(), adapter="three")


def test_an_engine_over_a_model_in_memory_leaves_it_as_it_was(folder):
    """Its parameters stay the same objects with the same values, and an optimizer can go on."""
    for dtype in (torch.float32, torch.bfloat16):
        model = Transformer.from_pretrained(folder, dtype=dtype)
        parameters = list(model.parameters())
        values = [p.clone() for p in parameters]
        engine = Engine.of(model, Tokenizer.load(folder), dtype="float32", kv_tokens=512)
        output = engine.generate([5, 6, 7], Sampling(max_tokens=12, temperature=0))[0]
        assert all(p is q for p, q in zip(parameters, model.parameters(), strict=True))
        assert all(p.dtype == dtype for p in parameters)
        assert all(map(torch.equal, parameters, values))
        twin = model.float()
        assert output.token_ids == list(twin.generate([5, 6, 7], 12, temperature=0))
        model(torch.tensor([[5, 6]])).sum().backward()
        assert all(p.grad is not None for p in parameters)


def test_an_engine_calls_layers_that_it_does_not_know(folder):
    model = lora.apply(Transformer.from_pretrained(folder), r=2, targets="attn")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(".B"):
                p.normal_(std=0.5)
    output = Engine.of(model, None, kv_tokens=512).generate(
        [5, 6, 7], Sampling(max_tokens=12, temperature=0)
    )[0]
    assert output.token_ids == list(model.generate([5, 6, 7], 12, temperature=0))
    plain = Transformer.from_pretrained(folder)
    assert output.token_ids != list(plain.generate([5, 6, 7], 12, temperature=0))


def test_an_engine_made_from_a_folder_holds_the_weights_once(folder, wide, monkeypatch):
    loaded = []

    def load(*arguments, **options):
        found = load_engine_model(*arguments, **options)
        loaded.append(weakref.ref(found[0]))
        return found

    monkeypatch.setattr(generate, "load_engine_model", load)
    for path in (folder, wide):
        engine = Engine(path, "cpu", "float32", kv_tokens=512)
        gc.collect()
        assert loaded[-1]() is None and engine.runner.forward.weight_bytes > 0


def test_dora_is_refused_in_a_line(folder, tmp_path):
    model = lora.apply(Transformer.from_pretrained(folder), r=2, dora=True)
    lora.save_adapter(model, tmp_path)
    with pytest.raises(UserError, match="merge it first: python lora.py merge"):
        engine_of(folder, adapters={"d": tmp_path})
