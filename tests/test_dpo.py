"""dpo.py: the losses by their papers' formulas, layouts and ids, prompts that are shared, the
cache, resuming, ranks, bad input."""

import contextlib
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from test_chat import Tok

import common
import dpo
from common import UserError
from dpo import Args, PairIds, Pairs, Preference, as_preference, preference_loss
from model import Config, Transformer, token_losses
from runtime import Runtime, latest_checkpoint
from tokenizer import Tokenizer
from training import toybox

CPU = Runtime(torch.device("cpu"), torch.float32, False)
PROMPT, ANSWERS = [{"role": "user", "content": "Who?"}], ["Me.", "You."]


# ----------------------------------------------------------------------------------------- the loss
def sig(x):
    return 1 / (1 + math.exp(-x))


def by_the_papers(kind, pc, pr, rc, rr, beta, smooth, nc, nr, gamma):
    """One pair, in plain arithmetic, as each paper writes it."""
    if kind == "sigmoid":
        chosen = math.log(math.exp(pc) / math.exp(rc))
        rejected = math.log(math.exp(pr) / math.exp(rr))
        p = sig(beta * (chosen - rejected))
        return -(1 - smooth) * math.log(p) - smooth * math.log(1 - p)
    if kind == "ipo":
        return ((pc - rc) / nc - (pr - rr) / nr - 1 / (2 * beta)) ** 2
    if kind == "simpo":
        return -math.log(sig(beta / nc * pc - beta / nr * pr - gamma))
    c, r = math.exp(pc / nc), math.exp(pr / nr)
    return -math.log(c) - beta * math.log(sig(math.log((c / (1 - c)) / (r / (1 - r)))))


@pytest.mark.parametrize(
    "kind, smooth", [("sigmoid", 0), ("sigmoid", 0.2), ("ipo", 0), ("simpo", 0), ("orpo", 0)]
)
def test_losses_are_those_of_the_papers(kind, smooth):
    numbers = [[-5.0, -2.5, -9.0], [-6.0, -7.5, -2.0], [-5.5, -4.0, -8.0], [-5.0, -6.0, -3.0]]
    tensors = [torch.tensor(n, dtype=torch.float64) for n in numbers]
    lengths = torch.tensor([[3.0, 5, 2], [4, 4, 7]], dtype=torch.float64)
    losses, chosen, rejected = preference_loss(
        *tensors, 0.3, smooth, kind, lengths=lengths, gamma=0.7
    )
    pairs = zip(*numbers, *lengths.tolist())
    expected = [
        by_the_papers(kind, pc, pr, rc, rr, 0.3, smooth, nc, nr, 0.7)
        for pc, pr, rc, rr, nc, nr in pairs
    ]
    assert losses.tolist() == pytest.approx(expected, rel=1e-9)
    free = kind in ("simpo", "orpo")
    margin = tensors[0] / lengths[0] if free else tensors[0] - tensors[2]
    assert chosen.tolist() == pytest.approx((0.3 * margin).tolist())
    assert rejected.shape == (3,) and not rejected.requires_grad


def test_equal_policy_and_reference_cost_ln_2_and_large_margins_nothing():
    same = torch.tensor([-3.0, -30.0])
    losses, *rewards = preference_loss(same, same - 1, same, same - 1)
    assert losses.tolist() == pytest.approx([math.log(2)] * 2, abs=1e-7)
    assert all(r.abs().max() == 0 for r in rewards)
    assert preference_loss(same + 1e4, same, same, same)[0].tolist() == [0, 0]
    assert torch.isfinite(preference_loss(same - 1e4, same, same, same)[0]).all()


def test_an_unknown_loss_and_smoothing_where_it_means_nothing_are_refused():
    zeros = [torch.zeros(1)] * 4
    with pytest.raises(UserError, match="unknown loss 'dpo': use sigmoid, ipo, simpo, orpo"):
        preference_loss(*zeros, loss_type="dpo")
    with pytest.raises(
        UserError, match="label smoothing is defined for sigmoid and simpo, not for ipo"
    ):
        preference_loss(*zeros, label_smoothing=0.1, loss_type="ipo")


# ------------------------------------------------------------------------------------------ layouts

TALK = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi!"}, *PROMPT]
SAID = [[{"role": "assistant", "content": a}] for a in ANSWERS]


@pytest.mark.parametrize(
    "record, prompt",
    [
        (dict(prompt="Who?", chosen="Me.", rejected="You."), PROMPT),
        (dict(prompt=PROMPT, chosen="Me.", rejected="You."), PROMPT),
        (dict(prompt=PROMPT, chosen=SAID[0], rejected=SAID[1]), PROMPT),
        (dict(prompt="Who?", chosen=TALK + SAID[0], rejected=TALK + SAID[1]), TALK),
        (dict(chosen=TALK + SAID[0], rejected=TALK + SAID[1]), TALK),
        (
            dict(
                conversations=[{"from": "human", "value": "Who?"}],
                chosen={"from": "gpt", "value": "Me."},
                rejected={"from": "gpt", "value": "You."},
            ),
            PROMPT,
        ),
        (
            dict(system="Be brief.", prompt="Who?", chosen="Me.", rejected="You."),
            [{"role": "system", "content": "Be brief."}, *PROMPT],
        ),
        (dict(instruction="Who?", input="", output="?", chosen="Me.", rejected="You."), PROMPT),
    ],
)
def test_every_layout_gives_the_same_prompt_and_answers(record, prompt):
    assert as_preference(record) == (prompt, *SAID[0], *SAID[1], None)


@pytest.mark.parametrize(
    "record, message",
    [
        (
            dict(question="Who?", best="Me."),
            "its keys are 'question', 'best'; known layouts: {prompt, chosen, rejected}",
        ),
        (dict(prompt="Who?", completion="Me."), "its keys are 'prompt', 'completion'"),
        (["Who?"], "a list, not an object"),
        (dict(chosen="Me.", rejected="You."), "there must be a prompt"),
        (
            dict(chosen=TALK + SAID[0], rejected=PROMPT + SAID[1]),
            "differ before their last message",
        ),
        (dict(prompt="Who?", chosen=PROMPT, rejected=PROMPT), "answer of the assistant's"),
    ],
)
def test_what_is_no_preference_is_named(record, message, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(
        json.dumps(dict(prompt="Who?", chosen="Me.", rejected="You."))
        + "\n"
        + json.dumps(record)
        + "\n"
    )
    with pytest.raises(UserError) as error:
        list(dpo.read_preferences(path))
    said = str(error.value)
    assert message in said and "p.jsonl:2: " in said and "\n" not in said


def test_a_line_that_is_no_json_is_named(tmp_path):
    (tmp_path / "p.jsonl").write_text(
        '{"prompt": "Who?", "chosen": "Me.", "rejected": "You."}\n{"prompt":\n'
    )
    with pytest.raises(UserError, match="p.jsonl:2: not valid JSON"):
        list(dpo.read_preferences(tmp_path / "p.jsonl"))


def test_the_real_pairs_are_read(data_dir):
    rows = list(dpo.read_preferences(data_dir / "instruct" / "preference-data.json"))
    assert len(rows) == 1100
    assert rows[1].chosen["content"] == "He goes to the park every day."
    assert rows[1].rejected["content"] == "He goes to the stupid park every single day."
    asked = "Edit the following sentence for grammar.\n\n### Input:\nHe go"
    assert rows[1].prompt[0]["content"].startswith(asked)


# ---------------------------------------------------------------------------------------------- ids
def preferred(prompt, *answers):
    """A Preference of two texts."""
    return Preference(prompt, *({"role": "assistant", "content": text} for text in answers))


def ids_of(prompt=PROMPT, answers=ANSWERS, context=100):
    """-> (tokenizer, the prompt's ids, [each answer's])"""
    tok = Tok()
    head, *ends = dpo.pair_ids(tok, preferred(prompt, *answers), context, Counter())
    return tok, head, ends


def test_answers_share_the_prompts_ids_and_end_in_one_end_token():
    tok, head, ends = ids_of()
    assert tok.decode(head) == "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    assert [tok.decode(e) for e in ends] == ["Me.<|im_end|>", "You.<|im_end|>"]
    _, _, typed = ids_of(answers=["Me.<|im_end|>", ""])  # in the text it is text
    assert [e.count(tok.special["<|im_end|>"]) for e in typed] == [1, 1] and len(typed[1]) == 1


def test_an_earlier_answer_belongs_to_the_prompt():
    tok, head, ends = ids_of(TALK)
    assert tok.decode(head).count("Hi!") == 1 and tok.decode(ends[0]) == "Me.<|im_end|>"


def test_a_long_prompt_loses_its_beginning_and_an_answer_nothing():
    _, whole, ends = ids_of()
    longest = max(map(len, ends))
    assert ids_of(context=longest + 3)[1:] == (whole[-3:], ends)
    with pytest.raises(UserError, match=f"an answer alone fills the context of {longest} tokens"):
        ids_of(context=longest)


def test_what_is_cut_or_cannot_be_used_is_counted(capsys):
    answers = [ANSWERS, ["Me.", "Me."], ["x" * 200, "y"], ["\nMe.", "You."], ANSWERS]
    records = [preferred(PROMPT, *pair) for pair in answers]
    records.append(preferred([{"role": "user", "content": "Who? " * 20}], *ANSWERS))
    assert len(dpo.usable_pairs(Tok(), records, 60, "p.jsonl")) == 3
    told = capsys.readouterr().out
    for line in (
        "1 skipped: chosen and rejected are the same",
        "1 skipped: an answer alone fills",
        "1 skipped: the answer's tokens do not follow the prompt's: the tokenizer",
        "1 cut: of a prompt longer than --context only the end is left",
    ):
        assert "pairs    p.jsonl: " + line in told


# ----------------------------------------------------------------------------------- shared prompts
def tiny(kind="qwen3", window=None, seed=0):
    torch.manual_seed(seed)
    gpt2 = kind == "gpt2"
    config = Config(
        kind,
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4 if gpt2 else 2,
        head_dim=8,
        max_position_embeddings=32,
        qkv_bias=gpt2,
        out_bias=gpt2,
        mlp_bias=gpt2,
        rope={} if gpt2 else {"rope_type": "default", "rope_theta": 10000.0},
        sliding_window=window,
        sliding_layers=(0, 1) if window else (),
    )
    model = Transformer(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.ndim == 1), std=0.2)
    return model


def some_pairs(count=4, seed=0):
    torch.manual_seed(seed)

    def ids(n):
        return torch.randint(61, (n,)).tolist()

    return [PairIds(ids(1 + 4 * i), ids(2 + i), ids(9 - 2 * i)) for i in range(count)]


def test_a_row_has_the_prompt_once_and_each_answer_begins_with_its_last_token():
    rows = Pairs([PairIds([7, 8], [1, 2], [3])])
    batch = dpo.trimmed(rows.fill([0], 0))
    for found, row in (
        (batch.x, [7, 8, 1, 8]),
        (batch.y, [-100, 1, 2, 3]),
        (batch.docs, [-1, 0, 0, 1]),
        (batch.positions, [0, 1, 2, 1]),
    ):
        assert found.tolist()[0][:4] == row
    assert (batch.docs[0, 4:] == dpo.PADDING).all() and (batch.y[0, 4:] == -100).all()


@pytest.mark.parametrize("kind, window", [("qwen3", None), ("gpt2", None), ("mistral", 6)])
def test_answers_behind_one_prompt_have_the_log_probs_they_have_alone(kind, window):
    model, pairs = tiny(kind, window), some_pairs()
    rows = Pairs(pairs)
    batch = dpo.trimmed(rows.fill([2, 0, 3, 1], 0))
    _, policy, _, lengths = dpo.log_probs(model, batch)
    policy.square().sum().backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    order, total = sorted(range(4), key=lambda r: rows.ends[r]), 0
    for i, r in enumerate(order):
        prompt, *answers = pairs[r]
        for side, answer in enumerate(answers):
            ids = torch.tensor([prompt + answer])
            each = model(ids)[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])  # (T - 1, 1)
            alone = each[-len(answer) :].sum()
            assert lengths[side, i] == len(answer)
            torch.testing.assert_close(policy[side, i], alone, atol=2e-5, rtol=1e-6)
            total += alone.square()
    total.backward()
    for one, other in zip(grads, (p.grad for p in model.parameters() if p.grad is not None)):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-4)


def test_losses_per_token_add_up_and_parts_change_nothing(monkeypatch):
    model, ids = tiny(), torch.randint(61, (3, 12))
    targets = torch.where(torch.rand(3, 12) < 0.4, torch.randint(61, (3, 12)), -100)
    whole = model(ids, targets, per_token=True)
    assert whole.shape == (3, 12) and (whole[targets == -100] == 0).all()
    torch.testing.assert_close(whole.sum(), model(ids, targets))
    hidden = model.hidden(ids).detach().requires_grad_()
    grads = []
    for most in (1 << 26, 61 * 4):
        monkeypatch.setattr("model.LOGITS_AT_ONCE", most)
        squares = token_losses(hidden, model.lm_head, targets) ** 2
        grads += torch.autograd.grad(squares.sum(), hidden)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("loss", dpo.PREFERENCE_LOSSES)
def test_neither_passes_nor_filling_rows_change_loss_and_gradient(loss):
    args, model = Args(loss=loss, beta=0.3, sft_weight=0.5), tiny()
    rows = Pairs(some_pairs())
    rows.ref = -torch.rand(len(rows.ref)).numpy() * 5
    seen = []
    for size in (4, 1, 3):
        model.zero_grad()
        totals, total = Counter(), 0
        for batch in rows.validation(size, 0):
            part, sums = dpo.pair_loss(model, batch, args)
            part.backward()
            total += part.item()
            totals.update(sums)
        grad = model.layers[0].mlp.up_proj.weight.grad.clone()
        seen.append((total, grad, dpo.pair_means(totals, args, CPU)))
    for total, grad, means in seen[1:]:
        assert total == pytest.approx(seen[0][0], rel=1e-5)
        assert means == pytest.approx(seen[0][2], rel=1e-4, abs=1e-6)
        torch.testing.assert_close(grad, seen[0][1], atol=1e-4, rtol=1e-4)


# ----------------------------------------------------------------------------------------- training
@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model folder that has learned nothing, and pairs in a file."""
    folder = tmp_path_factory.mktemp("base")
    tok = Tokenizer.train(
        [toybox.world_text(20_000)],
        300,
        special_tokens=["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
    )
    tok.save(folder)
    torch.manual_seed(0)
    model = Transformer(
        Config("qwen3", tok.vocab_size, 32, 64, 2, 2, 2, 16, 192, tie_word_embeddings=False)
    )
    model.init_weights()
    model.save_pretrained(folder)
    (folder / "prefs.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in toybox.preferences("train", 80))
    )
    return folder


def flags(base, out, *more):
    words = [base, "--data", base / "prefs.jsonl", "--out", out]
    words += "--steps 12 --batch 8 --lr 3e-3 --warmup 0 --eval-every 6 --save-every 3".split()
    words += "--log-every 1 --device cpu --dtype float32".split()
    return [str(word) for word in (*words, *more)]


def tune(*arguments):
    """main() in this process -> what it prints."""
    argv, told = sys.argv, io.StringIO()
    sys.argv = ["dpo.py", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(told):
            dpo.main()
    finally:
        sys.argv = argv
    return told.getvalue()


def start(script, ranks, arguments):
    launch = f"-m torch.distributed.run --standalone --nproc-per-node {ranks}".split()
    # sums differ in their last bits with the number of threads
    threads = 1 if ranks > 1 else torch.get_num_threads()
    return subprocess.Popen(
        [sys.executable, *(launch if ranks > 1 else ()), str(ROOT / script), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        start_new_session=True,
    )


def run_on_two_ranks(script, arguments):
    process = start(script, 2, arguments)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr


def run_until_killed_at_its_first_checkpoint(script, out, arguments):
    process = start(script, 1, arguments)
    while latest_checkpoint(out) is None:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def logged(out, key="loss"):
    rows = common.Metrics.read(out / "metrics.jsonl")
    return [row[key] for row in rows if key in row]


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("tuned") / "run"
    return out, tune(*flags(base, out))


def test_training_starts_at_ln_2_says_so_and_raises_the_held_out_margin(tuned):
    out, told = tuned
    assert "start    loss 0.693147 (DPO's is ln 2 = 0.693147), KL " in told
    rows = common.Metrics.read(out / "metrics.jsonl")
    assert rows[0]["val_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[0]["val_rewards/margins"] == pytest.approx(0, abs=1e-6)
    names = {
        "loss",
        "kl",
        "logps/chosen",
        "logps/rejected",
        *("rewards/" + n for n in ("chosen", "rejected", "margins", "accuracies")),
    }
    assert (
        all(names <= r.keys() for r in rows if "loss" in r)
        and {"val_" + n for n in names} <= rows[-1].keys()
    )
    margins = [r["val_rewards/margins"] for r in rows if "val_loss" in r]
    assert margins[0] < margins[1] < margins[2] and rows[-1]["val_kl"] > 0
    assert Transformer.from_pretrained(out).config.vocab_size == 300


@pytest.mark.parametrize("off, loss", [(1e-2, "sigmoid"), (1e-2, "ipo"), (1e-5, "sigmoid")])
def test_at_step_0_a_policy_off_the_reference_by_more_than_rounding_is_refused(
    off, loss, base, tmp_path, monkeypatch
):
    fill = dpo.fill_reference

    def fill_wrongly(pairs, *others):
        fill(pairs, *others)
        pairs.ref -= off * (pairs.ref < -5)

    monkeypatch.setattr(dpo, "fill_reference", fill_wrongly)
    arguments = flags(base, tmp_path / "a", "--steps", 0, "--beta", 5, "--loss", loss)
    refused = pytest.raises(UserError, match="the policy is not the reference")
    with refused if off == 1e-2 else contextlib.nullcontext():
        tune(*arguments)


def test_speed_counts_the_tokens_of_rows_as_long_as_they_are(base, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(
        dpo, "log_step", lambda run, step, total, count, tokens, **_: told.append(tokens)
    )
    tune(*flags(base, tmp_path / "a", "--steps", 2))
    tok = Tokenizer.load(base)
    pairs = dpo.usable_pairs(tok, dpo.read_preferences(base / "prefs.jsonl"), 192, "")
    rows = [len(pair.prompt) - 1 + len(pair.chosen) + len(pair.rejected) for pair in pairs]
    assert len(told) == 2 and all(min(rows) < tokens < max(rows) < 192 for tokens in told)


def test_what_is_tried_out_is_as_wide_as_the_longest_row_is_on_a_gpu():
    shapes = []

    def model(x, y, **_):
        shapes.append(x.shape)
        return x

    for width in (7, 128, 129, 1471):
        dpo.full_rows_loss(width)(model, SimpleNamespace(x=torch.zeros(3)), None)
    assert shapes == [(3, 128), (3, 128), (3, 256), (3, 2048)]


def assert_same(out, other):
    assert logged(out) == logged(other)
    left, right = (
        {p.name: load_file(p) for p in folder.glob("*.safetensors")} for folder in (out, other)
    )
    assert left.keys() == right.keys() and left
    assert all(torch.equal(left[f][k], right[f][k]) for f in left for k in right[f])


@pytest.mark.parametrize("how", [[], pytest.param(["--lora", 4], marks=pytest.mark.slow)])
def test_killed_and_resumed_it_ends_bit_for_bit_as_uninterrupted(how, base, tuned, tmp_path):
    whole = tuned[0]
    if how:
        tune(*flags(base, whole := tmp_path / "whole", *how))
    out = tmp_path / "run"
    run_until_killed_at_its_first_checkpoint("dpo.py", out, flags(base, out, *how))
    assert len(logged(out)) < 12
    tune(base, "--resume", "--out", out)
    assert_same(out, whole)


@pytest.mark.slow
def test_two_ranks_train_as_one(base, tuned, tmp_path):
    alone = tuned[0]
    run_on_two_ranks("dpo.py", flags(base, tmp_path / "run"))
    assert logged(tmp_path / "run") == pytest.approx(logged(alone), abs=1e-5)
    theirs, ours = (common.Metrics.read(o / "metrics.jsonl")[-1] for o in (alone, tmp_path / "run"))
    assert (
        ours.pop("seconds")
        and theirs.pop("seconds")
        and ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    )


# ---------------------------------------------------------------------------------------- bad input
def test_a_users_mistakes_are_one_line(base, tuned, tmp_path):
    out = tmp_path / "o"
    (tmp_path / "same.jsonl").write_text(
        json.dumps(dict(prompt="Who?", chosen="Me.", rejected="Me.")) + "\n"
    )
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    for arguments, message in (
        (flags(base, out, "--loss", "dpo"), "unknown loss 'dpo': use sigmoid"),
        (flags(base, out, "--sample", 9), "unknown argument --sample"),
        (flags(base, out, "--beta", 0), "--beta 0.0 must be above 0"),
        (flags(base, out, "--beta", 0, "--loss", "ipo"), "--beta 0.0 must be above 0"),
        (flags(base, out, "--label-smoothing", 0.5), "--label-smoothing 0.5 below 0.5"),
        (flags(base, out, "--label-smoothing", -0.2), "-0.2 must be a number from 0"),
        (flags(base, out, "--gamma", 1), "--gamma is for --loss simpo: leave it out"),
        (flags(base, out, "--targets", "attn"), "--targets is for --lora: leave it out"),
        (flags(base, out, "--pairs", 9), "--pairs is for --data toybox: leave it out"),
        (
            flags(base, out, "--val", base / "prefs.jsonl", "--val-share", 0.2),
            "--val-share is for a file of --data without --val: leave it out",
        ),
        (
            flags(base, out, "--val", tmp_path / "same.jsonl"),
            "same.jsonl, held out: 0 usable pairs",
        ),
        (flags(base, out, "--loss", "kto"), "unknown loss 'kto': use sigmoid, ipo, simpo, orpo"),
        (
            flags(base, out, "--data", tmp_path / "same.jsonl"),
            "same.jsonl, to train on: 0 usable pairs",
        ),
        (flags(base, out, "--context", 4), "to train on: 0 usable pairs of at least 2"),
        (
            flags(base, out, "--loss", "ipo", "--label-smoothing", 0.1),
            "label smoothing is defined for sigmoid and simpo",
        ),
        (
            flags(tmp_path / "adapter", out),
            "is an adapter, and the reference has to be a whole model: merge it first",
        ),
        (flags(base, out, "--lora", 4, "--targets", "nothing"), "nothing"),
        ([base, "--resume", "--out", tuned[0], "--loss", "ipo"], "--loss was 'sigmoid'"),
    ):
        with pytest.raises(UserError) as error:
            tune(*arguments)
        assert message in str(error.value) and "\n" not in str(error.value)
