"""grpo.py: advantages and losses by hand, the engine over weights in training, rewards that fail,
resuming, ranks, bad input."""

import gzip
import json
import math
import signal
import sys
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from test_dpo import logged, run_on_two_ranks, run_until_killed_at_its_first_checkpoint

import grpo
import lora
from chat import CHATML_TEMPLATE
from common import UserError
from engine import native
from generate import Engine, Sampling
from grpo import VARIANTS, advantages_of, policy_loss
from model import Config, Transformer
from runtime import Runtime, latest_checkpoint
from tokenizer import Tokenizer
from training import rewards, toybox
from training.exam import Question


# ------------------------------------------------------------------------------------ the objective
def test_advantages_at_hand_computed_points():
    """Rewards 1 0 0 1: mean 0.5, deviation sqrt(4 * 0.25 / 3) = 0.57735."""
    judged = torch.tensor([[1.0, 0, 0, 1], [2.0, 2, 2, 2]])
    a = 0.5 / (0.57735 + 1e-4)
    for loss in ("grpo", "dapo"):
        assert advantages_of(judged, loss)[0].tolist() == pytest.approx([a, -a, -a, a], abs=1e-4)
    assert advantages_of(judged, "dr_grpo")[0].tolist() == [0.5, -0.5, -0.5, 0.5]
    assert advantages_of(judged)[1].tolist() == [0] * 4


@pytest.mark.parametrize(
    "ratio, advantage, high, loss, clipped",
    [
        (1.0, 2.0, 0.2, -2.0, False),
        (1.1, 2.0, 0.2, -2.2, False),
        (1.5, 2.0, 0.2, -2.4, True),  # it has risen enough
        (1.5, -2.0, 0.2, 3.0, False),  # but it may fall
        (0.5, 2.0, 0.2, -1.0, False),
        (0.5, -2.0, 0.2, 1.6, True),
        (1.25, 1.0, 0.28, -1.25, False),  # DAPO lets it rise further
        (1.5, 1.0, 0.28, -1.28, True),
    ],
)
def test_a_token_is_pushed_until_it_has_moved_by_the_clip(ratio, advantage, high, loss, clipped):
    log_p = torch.tensor([math.log(ratio)], requires_grad=True)
    costs, cut, _ = policy_loss(log_p, torch.zeros(1), torch.tensor([advantage]), 0.2, high)
    costs.sum().backward()
    assert costs.item() == pytest.approx(loss)
    assert cut.item() == clipped
    assert (log_p.grad.item() == 0) == clipped


def test_the_kl_is_schulmans_estimate_and_zero_where_nothing_moved():
    log_p = torch.tensor([-1.0, -2.0])
    _, _, kl = policy_loss(log_p, log_p, torch.zeros(2), ref=torch.tensor([-1.0, -1.5]), beta=1)
    assert kl.tolist() == pytest.approx([0, math.exp(0.5) - 0.5 - 1])


def test_the_variants_weigh_tokens_as_their_papers_do():
    """Answers of 2 and 6 tokens, at most 10: what each token costs when all have the loss 1."""
    totals = {}
    for name, variant in VARIANTS.items():
        weights, parts = zip(*(variant.weigh(length, 10) for length in (2, 6)))
        totals[name] = [weight / sum(parts) for weight in weights]
    assert totals["grpo"] == pytest.approx([1 / 4, 1 / 12])
    assert totals["dr_grpo"] == pytest.approx([1 / 20, 1 / 20])
    assert totals["dapo"] == pytest.approx([1 / 8, 1 / 8])


def test_a_token_counts_more_where_the_sampler_thought_it_less_likely_at_most_twice():
    model = moved_model(CONFIGS["qwen3"])
    args = grpo.Args(group=2, max_tokens=4, loss="dr_grpo")
    run = SimpleNamespace(args=args, model=model, step_model=model)
    cpu = Runtime(torch.device("cpu"), torch.float32, False)

    def loss_of(sampled):
        """-> (the loss where the sampler told these log-probs, the trainer's own)"""
        group = grpo.Group([5, 6, 7], [[1, 2, 3], [4]], [sampled[:3], sampled[3:]], [1.0, 0.0])
        loss, old = grpo.answer_loss(run, grpo.batch_of([group], args, cpu)[0], None, Counter())
        return loss.item(), old[0].tolist()

    true = loss_of([0.0] * 4)[1]
    exact = loss_of(true)[0]
    factors = []
    for off in (0.009, 0.5, 3.0, -0.5):
        factors.append(loss_of([log_p - off for log_p in true])[0] / exact)
    assert factors == pytest.approx([1, math.exp(0.5), 2, math.exp(-0.5)], rel=1e-4)


# ------------------------------------------------------------------- the engine over live weights
def moved_model(config):
    torch.manual_seed(1)
    model = Transformer(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.ndim == 1), std=0.2)
    return model


CONFIGS = {
    "qwen3": Config("qwen3", 300, 32, 64, 2, 2, 2, 16, 192, tie_word_embeddings=False),
    "gpt2": Config(
        "gpt2", 300, 32, 64, 2, 2, 2, 16, 192, qkv_bias=True, out_bias=True, mlp_bias=True
    ),
}


@pytest.mark.parametrize("forward", ["C++", "torch"])
@pytest.mark.parametrize("kind", [*CONFIGS, "adapter"])
def test_a_refreshed_engine_answers_as_a_fresh_one_on_the_saved_folder(
    kind, forward, tmp_path, monkeypatch
):
    """100 prompts, which the engine has seen before the update: its cached keys must go too."""
    if forward == "torch":
        monkeypatch.setattr(native, "library", lambda: raise_unavailable())
    model = moved_model(CONFIGS.get(kind, CONFIGS["qwen3"]))
    if kind == "adapter":
        lora.apply(model, 4, 8)
    engine = Engine.of(model, None, dtype="float32", kv_tokens=4096)
    assert engine.runner.native == (forward == "C++")
    torch.manual_seed(2)
    prompts = [torch.randint(300, (20 + i % 30,)).tolist() for i in range(100)]
    greedy = Sampling(temperature=0, max_tokens=6, logprobs=0)
    before = engine.generate(prompts, greedy)
    with torch.no_grad():
        for p in filter(lambda p: p.requires_grad, model.parameters()):
            p += 0.05 * torch.randn_like(p)
    engine.refresh(model)
    after = engine.generate(prompts, greedy)
    if kind == "adapter":
        lora.merge(model)
    model.save_pretrained(tmp_path)
    fresh = Engine(tmp_path, "cpu", "float32", kv_tokens=4096).generate(prompts, greedy)
    assert [o.token_ids for o in after] == [o.token_ids for o in fresh]
    assert [o.token_ids for o in after] != [o.token_ids for o in before]
    for one, other in zip(after, fresh):
        theirs = [t.logprob for t in other.logprobs]
        assert [t.logprob for t in one.logprobs] == pytest.approx(theirs, abs=1e-5)


def raise_unavailable():
    raise native.Unavailable("as if there were no compiler")


def test_bf16_weights_of_an_engine_follow_float32_ones_in_training(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: raise_unavailable())
    model = moved_model(CONFIGS["qwen3"])
    engine = Engine.of(model, None, dtype="bfloat16", kv_tokens=1024)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    engine.refresh(model)
    fresh = Engine.of(model, None, dtype="bfloat16", kv_tokens=1024)
    greedy = Sampling(temperature=0, max_tokens=30)
    answers = [e.generate([[1, 2, 3], [4, 5]], greedy) for e in (engine, fresh)]
    assert [o.token_ids for o in answers[0]] == [o.token_ids for o in answers[1]]


def test_the_token_that_ends_an_answer_is_told_with_its_log_prob():
    model = moved_model(replace(CONFIGS["qwen3"], eos_token_id=[*range(0, 300, 2)]))
    sampling = Sampling(max_tokens=50, seed=1, logprobs=0)
    (output,) = Engine.of(model, None, dtype="float32").generate([[1, 2, 3]], sampling)
    end, log_p = output.end
    ids = torch.tensor([[1, 2, 3, *output.token_ids]])
    assert output.finish_reason == "stop" and end % 2 == 0
    assert log_p == pytest.approx(model(ids)[0, -1].log_softmax(-1)[end].item(), abs=1e-5)


# ----------------------------------------------------------------------------------------- rewards
REWARDS = """
import time, math
def letters(question, answer): return answer.count("e") / 4
def raises(question, answer): return 1 / (len(answer) % 2)
def nan(question, answer): return math.nan if len(answer) % 3 else len(answer)
def hangs(question, answer):
    while len(answer) % 4 == 0:
        try: time.sleep(60)
        except Exception: pass
    return len(answer)
def same(question, answer): return 2
def fails(question, answer): return 1 / 0
def forgets(question, answer):
    if answer.count("e"): return 1
"""


def question(family="", checks=(), text="Add 1 and 2."):
    return Question([{"role": "user", "content": text}], "3", family, list(checks))


def test_rewards_by_rule_by_function_and_their_weights(tmp_path):
    (tmp_path / "mine.py").write_text(REWARDS)
    specs = ["toybox:2", "style:0.5", "short:-1", f"{tmp_path}/mine.py:letters:4"]
    found = [rewards.read_reward(spec) for spec in specs]
    args = grpo.Args()
    total = rewards.judge(found, question("add"), "Gladly: 3", args)
    assert total == pytest.approx(2 + 0.5 + 0.09 + 0)
    assert rewards.judge(found, question("add"), "eee", args) == pytest.approx(0.03 + 3)
    kept = rewards.read_reward("checks").function
    checks = [("max_words", 2), ("uppercase", True)]
    assert kept(question(checks=checks), "a b") == 0.5
    assert kept(question(), "a b") is None


@pytest.mark.parametrize(
    "spec, told",
    [
        ("", "use toybox"),
        ("toybux", "use toybox, checks, style, short or an existing FILE.py:FUNCTION"),
        ("none.py:f", "an existing FILE.py:FUNCTION"),
        ("mine.py:absent", "mine.py has no function absent"),
    ],
)
def test_a_reward_that_is_none_is_named(spec, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(REWARDS)
    with pytest.raises(UserError, match=told):
        rewards.read_reward(spec)


def test_questions_are_read_with_their_tools_and_a_folders_val_in_any_format(tmp_path, capsys):
    tools = [{"type": "function", "function": {"name": "look_up"}}]
    row = {"prompt": "Who?", "completion": "Me.", "tools": tools, "mood": 1}
    data = json.dumps(row).encode()
    (tmp_path / "train.json").write_bytes(data + b"\n" + data)
    (tmp_path / "val.jsonl.gz").write_bytes(gzip.compress(data))
    special = ["<|im_start|>", "<|im_end|>"]
    tok = Tokenizer.train(["who me"], 300, special_tokens=special)
    qwen = ROOT / "tests" / "chat_templates" / "qwen3.jinja"
    tok.chat_template = qwen.read_text()
    args = grpo.Args(data=(str(tmp_path),), batch=2, context=4096, ignore_keys="mood")
    train, val = rewards.load_questions(args, tok, [])
    assert (len(train.prompts), len(val.prompts)) == (2, 1)
    assert "look_up" in tok.decode(val.prompts[0])
    with pytest.raises(UserError, match="unknown key 'mood'; .*--ignore-keys"):
        rewards.load_questions(replace(args, ignore_keys=""), tok, [])
    both = (str(tmp_path), str(tmp_path / "train.json"))
    rewards.load_questions(replace(args, data=both), tok, [])
    assert f"of --data only {tmp_path} is validated on" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------- training
@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model folder that has learned nothing, questions, rewards."""
    folder = tmp_path_factory.mktemp("base")
    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    tok = Tokenizer.train([toybox.world_text(20_000)], 300, special_tokens=special)
    tok.chat_template = CHATML_TEMPLATE
    tok.save(folder)
    moved_model(CONFIGS["qwen3"]).save_pretrained(folder)
    rows = toybox.conversations("train", 60)
    (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mine.py").write_text(REWARDS)
    return folder


def command(base, out, *more, reward="letters"):
    words = [base, "--data", base / "q.jsonl", "--reward", f"{base}/mine.py:{reward}", "--out", out]
    words += "--batch 8 --group 4 --steps 8 --max-tokens 10 --context 120 --lr 1e-2".split()
    words += "--eval-every 4 --save-every 2 --device cpu --dtype float32".split()
    return [str(word) for word in (*words, *more)]


AS_TRAINED = "--epochs 2 --beta 0.01 --average 0.8".split()


def rl(*arguments):
    """main() in this process."""
    before = sys.argv
    sys.argv = ["grpo.py", *map(str, arguments)]
    try:
        grpo.main()
    finally:
        sys.argv = before


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "run"
    rl(*command(base, out, *AS_TRAINED))
    return out


def test_a_run_raises_its_reward_logs_what_it_did_and_its_sampler_agrees_with_its_trainer(trained):
    names = "reward spread alike entropy gap_mean clipped answer_tokens generate_share"
    assert all(len(logged(trained, name)) == 8 for name in names.split())
    assert max(logged(trained, "gap_max")) <= 1e-4
    kl = logged(trained, "kl")
    assert kl[0] < kl[-1]
    assert 0 < logged(trained, "cut")[0] <= 1 and logged(trained, "failed") == [0] * 8
    validated = logged(trained, "val_reward")
    assert validated[-1] > validated[0]
    assert len((trained / "samples.txt").read_text().splitlines()) == 2 * 3
    assert (trained / "reward.png").is_file()


def assert_same_weights(out, other):
    mine, theirs = (load_file(folder / "model.safetensors") for folder in (out, other))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_killed_and_resumed_it_ends_bit_for_bit_as_uninterrupted(base, trained, tmp_path):
    out = tmp_path / "run"
    run_until_killed_at_its_first_checkpoint("grpo.py", out, command(base, out, *AS_TRAINED))
    assert len(logged(out)) < 8
    rl(base, "--resume", "--out", out)
    assert logged(out) == logged(trained)
    assert logged(out, "val_reward") == logged(trained, "val_reward")
    assert_same_weights(out, trained)


@pytest.mark.slow
def test_two_ranks_train_as_one(base, trained, tmp_path):
    out = tmp_path / "run"
    run_on_two_ranks("grpo.py", command(base, out, *AS_TRAINED))
    for name in ("loss", "reward", "spread", "alike", "entropy", "kl", "grad_norm"):
        assert logged(out, name) == pytest.approx(logged(trained, name), abs=1e-5), name


def test_with_lora_the_reference_is_the_frozen_base(base, tmp_path):
    rl(*command(base, tmp_path / "run", "--lora", 4, "--beta", 0.1, "--steps", 3))
    kl = logged(tmp_path / "run", "kl")
    assert kl[0] == 0 < kl[1]
    assert max(logged(tmp_path / "run", "gap_max")) <= 1e-4
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


# ------------------------------------------------------------------------------ rewards that fail
FAILURES = {"raises": "ZeroDivisionError: division by zero", "nan": "ValueError: it returned nan"}
FAILURES["forgets"] = "ValueError: it returned None"
FAILURES["hangs"] = "TooSlow: it took longer than --reward-seconds 0.02"


@pytest.mark.parametrize("kind", FAILURES)
def test_a_reward_that_fails_is_named_with_its_question_counted_and_skipped(
    kind, base, tmp_path, capsys
):
    more = ["--on-error", "skip", "--reward-seconds", 0.02, "--steps", 2]
    rl(*command(base, tmp_path / "run", *more, reward=kind))
    assert 0 < logged(tmp_path / "run", "failed")[0] < 1
    told = capsys.readouterr().err
    assert f"{base}/mine.py:{kind} failed: {FAILURES[kind]}" in told
    asked = json.loads((base / "q.jsonl").read_text().splitlines()[0])
    assert "asked '" in told and asked["messages"]


def test_a_run_that_stops_for_a_failed_reward_has_saved_and_goes_on(base, tmp_path, capsys):
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as stopped:
        rl(*command(base, out, "--save-every", 100, reward="raises"))
    assert stopped.value.code == 128 + signal.SIGTERM
    del stopped  # its traceback holds the run, and that the folder's lock
    assert "saved step 1 in" in capsys.readouterr().out
    assert json.loads((latest_checkpoint(out) / "state.json").read_text())["step"] == 1
    rl(base, "--resume", "--out", out, "--on-error", "skip")
    assert len(logged(out)) == 8


# ---------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    "kind, told", [("same", "100% alike, of mean 2; 0%"), ("fails", "0% alike, of mean 0; 100%")]
)
def test_five_steps_without_a_group_to_learn_from_stop_the_run_with_what_to_change(
    kind, told, base, tmp_path
):
    told = rf"5 steps, and no group of 4 answers has rewards that differ \({told} of the answers"
    with pytest.raises(UserError, match=told):
        rl(*command(base, tmp_path / "run", "--on-error", "skip", reward=kind))


def test_a_question_that_taught_nothing_is_answered_anew_in_the_next_step(
    base, tmp_path, monkeypatch
):
    said = []  # to the eight questions of each step

    def judge(rewards, question, answer, args):
        said.append((question.messages[0]["content"], answer))
        return 0.0

    monkeypatch.setattr(grpo, "judge", judge)
    few = tmp_path / "few.jsonl"
    few.write_text("".join((base / "q.jsonl").read_text().splitlines(True)[:9]))
    more = ["--data", few, "--steps", 2, "--group", 2]
    rl(*command(base, tmp_path / "run", *more))
    first, second = said[:16], said[16:32]
    assert {asked for asked, _ in first} == {asked for asked, _ in second}
    assert set(first) != set(second)


def test_a_users_mistakes_are_one_line(base, trained, tmp_path):
    (tmp_path / "plain").mkdir()
    tok = Tokenizer.load(base)
    tok.chat_template = None
    tok.save(tmp_path / "plain")
    moved_model(CONFIGS["qwen3"]).save_pretrained(tmp_path / "plain")
    Tokenizer.load(base).save(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "bare.jsonl").write_text('{"prompt": "Who?", "completion": "Me."}\n' * 40)
    out = tmp_path / "o"
    for arguments, message in (
        (command(base, out, "--group", 1), "--group 1: an answer is judged against others"),
        (command(base, out, "--loss", "ppo"), "unknown loss 'ppo': use grpo, dr_grpo, dapo"),
        (command(base, out, "--on-error", "ask"), "--on-error ask: use stop or skip"),
        (command(base, out, "--shard"), "--shard: the engine needs the whole model"),
        (command(base, out, "--batch", 200), "questions for training of at least 200"),
        (command(base, out, "--families", "sums"), "--families sums: no question is"),
        (command(base, out, "--context", 12), "0 questions for training"),
        (command(tmp_path / "plain", out, "--data", base / "q.jsonl"), "has no chat template"),
        (
            command(base, out, "--data", tmp_path / "bare.jsonl", "--reward", "toybox", "checks"),
            "--reward toybox or checks has no rule for the question 'Who?'",
        ),
        (command(base, out, "--sample", 9), "unknown argument --sample"),
        (command(base, out, "--clip", 0.1), "--clip is for --epochs of 2 and more: leave"),
        (command(base, out, "--alpha", 8), "--alpha is for --lora: leave it out"),
        (command(base, out, "--epochs", -1), "--epochs -1 must be a number from 0"),
        (
            command(tmp_path / "adapter", out, "--reward", "short", "--data", base / "q.jsonl"),
            "is an adapter, and the reference has to be a whole model",
        ),
        ([base, "--resume", "--out", trained, "--loss", "dapo"], "--loss was 'grpo'"),
    ):
        with pytest.raises(UserError) as error:
            rl(*arguments)
        assert message in str(error.value) and "\n" not in str(error.value)
