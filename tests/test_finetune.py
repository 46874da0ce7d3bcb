"""finetune.py: what is in the loss, packing, refusals, exact resume, the exam."""

import contextlib
import io
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_train import same_folder, saved_step, without_clock

import chat
import common
import finetune
from common import Metrics
from finetune import (
    Conversations,
    best_fit,
    encode_conversations,
    greedy_answers,
    open_model,
    packed_loss,
)
from model import Config, Transformer
from tokenizer import Tokenizer
from training.loop import backward, evaluate, passes

WORDS = (
    "red blue green apple pear plum lion fox one two three four list copy reverse say again please"
).split()


def talk(rng, turns=1, words=5):
    """A conversation of `turns` questions and answers."""
    messages = []
    for role in ("user", "assistant") * turns:
        text = " ".join(rng.choices(WORDS, k=rng.randint(1, words)))
        messages.append({"role": role, "content": text})
    return messages


def talks(n, seed=0, **kw):
    rng = random.Random(seed)
    return [talk(rng, **kw) for _ in range(n)]


def question_and_answer(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def write(path, conversations, **more):
    lines = [json.dumps({"messages": messages, **more}) + "\n" for messages in conversations]
    path.write_text("".join(lines))
    return path


def tiny(tok, **more):
    torch.manual_seed(0)
    fields = dict(
        vocab_size=tok.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=192,
    )
    model = Transformer(Config(**fields | more))
    # Output matrices too: init_weights begins with the identity, where attention does nothing.
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1) if p.ndim == 2 else torch.nn.init.ones_(p)
    return model


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A base model's folder, its tokenizer with chat tokens."""
    folder = tmp_path_factory.mktemp("base")
    tok = Tokenizer.train([" ".join(WORDS * 3)], 300)
    tok.save(folder)
    tiny(tok).save_pretrained(folder)
    return folder


@pytest.fixture
def tok(base):
    tok = Tokenizer.load(base)
    tok.chat_template = chat.CHATML_TEMPLATE
    return tok


def rows_of(messages):
    return ((None, m, None) for m in messages)


def encoded(tok, messages, context=64, counts=None):
    counts = Counter() if counts is None else counts
    return encode_conversations(tok, "x", rows_of(messages), context, counts)


def conversations(tok, n=40, context=64, **kw):
    return Conversations([(1.0, encoded(tok, talks(n, **kw), context))])


START = "--context 64 --batch 4 --eval-every 9 --save-every 5 --sample 8 --log-every 1".split()
START += ["--dtype", "float32"]


def command(base, out, flags):
    start = [] if "--resume" in flags else [base, *START, "--lr", 0.003]
    return [str(x) for x in ("finetune.py", *start, "--out", out, "--device", "cpu", *flags)]


def call(argv):
    """In this process -> (exit status, stdout, stderr)."""
    before, stdout, stderr, code = sys.argv, io.StringIO(), io.StringIO(), 0
    sys.argv = [str(x) for x in argv]
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            common.cli(finetune.main)
        except SystemExit as exit:
            code = exit.code
    sys.argv = before
    return code, stdout.getvalue(), stderr.getvalue()


def run(base, out, *flags):
    return call(command(base, out, flags))


def refused(base, out, *flags, argv=None):
    code, _, stderr = call(argv or command(base, out, flags))
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in stderr, stderr
    return lines[0]


# ---------------------------------------------------------------------------------------- the loss
def check_targets(tok, split):
    """The targets of the packed rows, decoded, are what the assistants said, each with its end."""
    said = Counter()
    for batch in split.validation(4, 160):
        for x, y, docs in zip(batch.x, batch.y, batch.docs):
            for doc in docs.unique():
                ids, targets = x[docs == doc], y[docs == doc]
                # a target is the next token of this conversation
                assert all(t in (-100, token) for t, token in zip(targets[:-1], ids[1:]))
                said[tok.decode(targets[targets != -100].tolist())] += 1
    del said[""]  # what fills a row
    wanted = Counter()
    for messages in talks(40, turns=2):
        wanted["".join(m["content"] + "<|im_end|>" for m in messages[1::2])] += 1
    assert said == wanted


def test_targets_are_what_the_assistant_says_and_its_end(tok):
    check_targets(tok, conversations(tok, turns=2, context=160))


FAULTS = {
    "the mask removed": lambda ids, mask: (ids, [1] * len(ids)),
    "late by one": lambda ids, mask: (ids, [0, *mask[:-1]]),
    "early by one": lambda ids, mask: (ids, [*mask[1:], 0]),
    "<|im_end|> left out": lambda ids, mask: (ids, [m and i != 5 for i, m in zip(ids, mask)]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_mask_would_be_noticed(tok, monkeypatch, fault):
    right = chat.example
    assert tok.special["<|im_end|>"] == 5
    monkeypatch.setattr(chat, "example", lambda *a: FAULTS[fault](*right(*a)))
    with pytest.raises(AssertionError):
        check_targets(tok, conversations(tok, turns=2, context=160))


GPT2 = dict(  # knows where it is, not how far
    model_type="gpt2", num_key_value_heads=2, qkv_bias=True, out_bias=True, mlp_bias=True
)


def loss_alone(model, ids, mask):
    """The summed loss of one conversation: the model as it is, no rows, no masks."""
    ids = torch.tensor(ids.astype(np.int64))
    logits = model(ids[None])[0]  # (1, T) -> (T, V)
    losses = -logits.double().log_softmax(-1)[range(len(ids) - 1), ids[1:]]
    return losses[torch.tensor(mask[1:])].sum().item()


@pytest.mark.parametrize("shape", [{}, GPT2], ids=["qwen3", "gpt2"])
def test_packed_loss_equals_unpacked_loss(tok, shape):
    split, model = conversations(tok, turns=2, context=160), tiny(tok, **shape).double()
    alone = sum(loss_alone(model, ids, mask) for ids, mask in split.pairs)
    total, count = 0.0, 0
    for batch in split.validation(3, 160):
        total += packed_loss(model, batch, None).item()
        count += (batch.y != -100).sum().item()
    assert count == split.supervised
    assert len(split.plan(160, 0, 0).order) < 30  # packed indeed
    assert total / count == pytest.approx(alone / count, abs=1e-6)


def test_the_loss_is_the_same_when_rows_without_a_target_are_not_left_out(tok):
    """As on a GPU, where the product of all rows is cheaper than to choose some."""
    model, (batch, *_) = tiny(tok).double(), list(conversations(tok).validation(4, 64))
    hidden = model.hidden(batch.x, positions=batch.positions, docs=batch.docs)
    logits = model.lm_head(hidden).flatten(0, 1)
    whole = torch.nn.functional.cross_entropy(
        logits, batch.y.flatten(), ignore_index=-100, reduction="sum"
    )
    assert packed_loss(model, batch, None).item() == pytest.approx(whole.item(), rel=1e-6)


def test_no_conversation_sees_another(tok):
    model, batch = tiny(tok), next(conversations(tok).validation(2, 160))
    embedded = model.embed_tokens(batch.x).detach().requires_grad_()  # (B, T, C)
    model.embed_tokens.forward = lambda ids: embedded
    logits = model.lm_head(model.hidden(batch.x, positions=batch.positions, docs=batch.docs))
    assert batch.docs[0].unique().numel() > 3
    for doc in batch.docs[0].unique()[:-1]:
        where = batch.docs[0] == doc
        score = logits[0, where].square().sum()
        (gradient,) = torch.autograd.grad(score, embedded, retain_graph=True)
        assert gradient[0, where].abs().sum() > 0
        assert gradient[0, ~where].abs().sum() == 0
        assert gradient[1].abs().sum() == 0


def test_a_batch_without_a_target_costs_nothing_and_divides_by_nothing(base, tmp_path):
    data = (str(write(tmp_path / "a.jsonl", talks(40))),)
    out = str(tmp_path / "b")
    args = finetune.Args(model=str(base), data=data, out=out, context=64, batch=4)
    args.device, args.dtype = "cpu", "float32"
    with contextlib.redirect_stdout(io.StringIO()):
        state = finetune.prepare_finetuning(args, None)
    batch = state.batches.next()
    (part,) = passes(state, batch._replace(y=torch.full_like(batch.y, -100)))
    loss = packed_loss(state.step_model, part, args)
    backward(state, loss, 0)
    assert loss.item() == 0.0
    gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
    assert not any(gradient.abs().sum() for gradient in gradients)


# ----------------------------------------------------------------------------------------- packing
def best_fit_simply(sizes, context):
    """The rule itself, done slowly: each piece into the fullest row with room for it."""
    room = []
    for size in sizes:
        fits = [r for r, left in enumerate(room) if left >= size]
        if fits:
            room[min(fits, key=room.__getitem__)] -= size
        else:
            room.append(context - size)
    return room


def test_rows_hold_every_piece_once_and_none_is_too_full():
    rng = random.Random(3)
    for _ in range(20):
        context = rng.randint(10, 100)
        sizes = [rng.randint(1, context) for _ in range(rng.randint(1, 300))]
        rows = best_fit(sizes, context)
        assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
        room = [context - sum(sizes[i] for i in row) for row in rows]
        assert min(room) >= 0
        assert sorted(room) == sorted(best_fit_simply(sizes, context))
    sizes = np.clip(np.random.default_rng(0).lognormal(4, 0.7, 5000).astype(int), 5, 512)
    assert sizes.sum() / (512 * len(best_fit(sizes.tolist(), 512))) > 0.98  # of the rows are full


def test_weights_say_how_often_an_epoch_takes_a_source(tok):
    parts = [encoded(tok, talks(10, seed)) for seed in (1, 2)]
    split = Conversations([(2.5, parts[0]), (0.5, parts[1])])
    taken = []
    for epoch in (0, 1, 1):
        plan = split.plan(64, 1, epoch)
        rows = [plan.row(r)[0] for r in range(len(plan.order))]
        taken.append(np.searchsorted(split.begin, np.concatenate(rows)).tolist())
        times = [taken[-1].count(i) for i in range(20)]
        assert sorted(times[:10]) == [2] * 5 + [3] * 5
        assert sorted(times[10:]) == [0] * 5 + [1] * 5
    assert Counter(taken[0]) != Counter(taken[1])
    assert taken[1] == taken[2]
    assert Conversations([(2.5, parts[0]), (1.0, parts[1])]).sha256 != split.sha256


def test_validation_scores_every_answer_once_whatever_the_ranks(tok):
    split = conversations(tok)
    for rows, world in ((1, 1), (3, 2), (4, 3)):
        ranks = [list(split.validation(rows, 64, None, rank, world)) for rank in range(world)]
        assert len({len(batches) for batches in ranks}) == 1
        scored = [(batch.y != -100).sum().item() for batches in ranks for batch in batches]
        assert sum(scored) == split.supervised


def test_a_long_conversation_keeps_its_start_and_no_end_it_did_not_reach(tok):
    long = question_and_answer("red", "blue " * 100)
    prompt = question_and_answer("red " * 100, "blue")
    counts = Counter()
    ((ids, mask),) = encoded(tok, [long, prompt], 32, counts)
    whole_ids, whole_mask = chat.example(tok, long)
    assert ids.tolist() == whole_ids[:33]
    assert mask.tolist() == [bool(m) for m in whole_mask[:33]]
    assert mask[-1]
    assert tok.special["<|im_end|>"] not in ids[mask]
    left_out = "left out: the prompt alone fills the context"
    assert counts == {"cut to the context": 1, left_out: 1}


def test_text_has_its_share_of_the_rows_and_is_learned_whole(tok, base, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(" ".join(random.Random(0).choices(WORDS, k=4000)))
    args = finetune.Args(model=str(base), text=str(path), text_share=0.25, context=64)
    pairs = encoded(tok, talks(100))
    split = Conversations([(1.0, pairs)], finetune.load_text(args, tok), 0.25)
    few = Conversations([(1.0, pairs[:2])], split.text, 0.1)
    assert len(few.plan(64, 1, 0).rows) == 2  # a row of text however few there are beside it
    plan = split.plan(64, 1, 0)
    of_text = [plan.row(r)[0].min() >= len(split) for r in range(len(plan.order))]
    assert sum(of_text) / len(of_text) == pytest.approx(0.25, abs=0.02)
    row = plan.row(of_text.index(True))
    batch = split.fill([row], 64)
    text = tok.encode(path.read_text())
    at = row[0][0] - len(split)
    assert batch.x[0].tolist() == text[at : at + 64]
    assert batch.y[0].tolist() == text[at + 1 : at + 65]


def test_a_text_of_less_than_a_row_is_refused(base, tmp_path):
    (tmp_path / "short.txt").write_text("red fox")
    data = write(tmp_path / "a.jsonl", talks(40))
    told = refused(base, tmp_path / "run", "--data", data, "--text", tmp_path / "short.txt")
    assert "do not fill one row" in told


# --------------------------------------------------------------------------------------- the model
LETTERS = "".join(WORDS) + " \nsystemuserassistant"


@pytest.mark.parametrize("tied", [True, False])
def test_a_base_model_without_chat_tokens_gets_them_as_the_mean_of_the_others(
    tied, tmp_path, capsys
):
    tok = Tokenizer.char(LETTERS)
    tok.save(tmp_path)
    before = tiny(tok, tie_word_embeddings=tied, eos_token_id=3)
    before.save_pretrained(tmp_path)
    grown, model = open_model(tmp_path, "cpu")
    assert "has no <|im_start|> and <|im_end|>: added" in capsys.readouterr().out
    assert grown.special == {"<|im_start|>": tok.vocab_size, "<|im_end|>": tok.vocab_size + 1}
    assert grown.encode("red fox") == tok.encode("red fox")
    assert model.config.vocab_size == tok.vocab_size + 2
    for layer in ("embed_tokens", "lm_head"):
        now, was = getattr(model, layer).weight, getattr(before, layer).weight
        assert torch.equal(now[:-2], was)
        assert torch.allclose(now[-2:], was.mean(0).expand(2, -1))
    assert (model.lm_head.weight is model.embed_tokens.weight) == tied
    assert model.config.eos_token_id == [tok.vocab_size + 1, 3]


def test_the_tokens_that_a_base_model_got_are_saved_with_it(tmp_path, capsys):
    tok = Tokenizer.char(LETTERS)
    tok.save(tmp_path)
    tiny(tok, eos_token_id=3).save_pretrained(tmp_path)
    data = write(tmp_path / "a.jsonl", talks(40))
    out = tmp_path / "run"
    assert run(tmp_path, out, "--data", data, "--steps", 2)[0] == 0
    saved, _ = open_model(out, "cpu")
    assert "added" not in capsys.readouterr().out  # there is nothing to add
    assert saved.chat_template == chat.CHATML_TEMPLATE
    assert saved.special == {"<|im_start|>": tok.vocab_size, "<|im_end|>": tok.vocab_size + 1}
    settings = json.loads((out / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [tok.vocab_size + 1, 3]


def test_padded_embeddings_are_not_grown_and_not_averaged(tmp_path):
    tok = Tokenizer.char(LETTERS)
    tok.save(tmp_path)
    before = tiny(tok, vocab_size=64)
    before.save_pretrained(tmp_path)
    grown, model = open_model(tmp_path, "cpu")
    assert model.config.vocab_size == 64
    new = model.embed_tokens.weight[list(grown.special.values())]
    mean = before.embed_tokens.weight[: tok.vocab_size].mean(0)
    assert torch.allclose(new, mean.expand(2, -1))


# ------------------------------------------------------------------------------------- the program
def test_killed_in_an_epoch_and_resumed_equals_never_stopped_to_the_bit(base, tmp_path):
    first = write(tmp_path / "a.jsonl", talks(60))
    second = write(tmp_path / "b.jsonl", talks(30, 1))
    flags = ["--data", first, f"{second}:1.5", "--steps", 60, "--seed", 3]
    code, stdout, stderr = run(base, tmp_path / "whole", *flags)
    assert code == 0, stderr
    for told in ("«", "of the tokens are in the loss", "ended by themselves"):
        assert told in stdout
    process = subprocess.Popen(
        [sys.executable, *command(base, tmp_path / "cut", flags)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    while saved_step(tmp_path / "cut") < 15:
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.kill()
    process.communicate()
    state = json.loads((max((tmp_path / "cut" / "state").iterdir()) / "state.json").read_text())
    assert 15 <= state["step"] < 60 and state["batches"]["row"] > 0  # in the middle of an epoch
    code, _, stderr = run(base, tmp_path / "cut", "--resume")
    assert code == 0, stderr
    assert same_folder(tmp_path / "whole", tmp_path / "cut")
    whole, cut = (Metrics.read(tmp_path / name / "metrics.jsonl") for name in ("whole", "cut"))
    assert [without_clock(r) for r in whole] == [without_clock(r) for r in cut]
    assert whole[-1]["epoch"] > 1
    assert whole[-1]["val_loss"] < whole[0]["loss"] - 1


def losses_of(folder):
    """(loss or None, validation loss or None) of each row of metrics."""
    rows = Metrics.read(folder / "metrics.jsonl")
    return [(row.get("loss"), row.get("val_loss")) for row in rows]


def test_two_ranks_train_as_one(base, tmp_path):
    data = write(tmp_path / "a.jsonl", talks(60))
    flags = ["--data", data, "--steps", 12, "--optimizer", "adamw"]
    assert run(base, tmp_path / "one", *flags)[0] == 0
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    done = subprocess.run(
        [sys.executable, *torchrun, *command(base, tmp_path / "two", flags)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    one, two = losses_of(tmp_path / "one"), losses_of(tmp_path / "two")
    assert len(one) == len(two) == 14
    for left, right in zip(one, two):
        assert left == pytest.approx(right, abs=1e-5)


def test_a_folder_brings_its_own_validation_and_toybox_makes_its_data(base, tmp_path):
    for name, n in (("train", 40), ("val", 7)):
        write(tmp_path / f"{name}.jsonl", talks(n))
    code, stdout, stderr = run(base, tmp_path / "run", "--data", tmp_path, "--fit")
    assert code == 0 and "40 to train on and 7 to validate on" in stdout, stderr
    toys = "--data toybox --examples 100 --fit --context 96".split()
    code, stdout, stderr = run(base, tmp_path / "toys", *toys)
    assert code == 0 and "100 to train on and 500 to validate on" in stdout, stderr


BAD = [
    ([{"role": "user", "content": "red"}], "no assistant turn"),
    (question_and_answer("red", " "), "empty assistant turn"),
    (question_and_answer("", "red"), "empty user turn"),
    (question_and_answer("red " * 99, "red"), "the prompt alone fills"),
]
UNREADABLE = [
    ({"messages": []}, "a conversation is a non-empty list"),
    ({"text": "red", "label": 1}, "its keys are 'text', 'label'; known layouts: {messages}, Share"),
    (["red"], "bad.jsonl: record 1: the record is a str, not an object"),
    (
        {"messages": [{"role": "bot", "content": "red"}]},
        "bad.jsonl:1: message 0: unknown role 'bot'",
    ),
    (
        {"messages": question_and_answer("red", "blue"), "mood": 1},
        "bad.jsonl:1: beside messages the record has the",
    ),
]


@pytest.mark.parametrize(
    "record, reason", [({"messages": messages}, reason) for messages, reason in BAD] + UNREADABLE
)
def test_a_file_of_nothing_usable_is_refused_by_reason(record, reason, base, tmp_path):
    (tmp_path / "bad.jsonl").write_text(json.dumps(record) + "\n")
    message = refused(base, tmp_path / "run", "--data", tmp_path / "bad.jsonl")
    assert reason in message
    assert "bad.jsonl" in message


def test_unusable_conversations_among_good_ones_are_counted_by_reason(base, tmp_path):
    bad = [messages for messages, _ in BAD]
    data = write(tmp_path / "a.jsonl", talks(40) + bad * 2)
    code, stdout, _ = run(base, tmp_path / "run", "--data", data, "--fit")
    assert code == 0
    for _, reason in BAD:
        assert f"2 left out: {reason}" in stdout


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--data nowhere.jsonl", "nowhere.jsonl"),
        ("--data a.jsonl:x", "after the colon"),
        ("--data a.jsonl:0", "none of the 38 conversations"),
        ("--data a.jsonl:nan", "above 0"),
        ("--data a.jsonl:0.01", "none of the 38 conversations"),
        ("--data a.jsonl --val-share 0.99", "none of the 0 conversations"),
        ("--data a.jsonl --val-share 0", "nothing to validate on"),
        ("--data a.jsonl --val-share 1", "--val-share"),
        ("--data empty.jsonl", "empty.jsonl: nothing to train on in 0 conversations (it is empty)"),
        ("--data a.jsonl --batch 999", "a step takes 999"),
        ("--data a.jsonl --text a.jsonl --text-share 1", "--text-share 1.0"),
        ("--data a.jsonl --text-share 0.2", "--text-share is for --text"),
        ("--data a.jsonl --examples 9", "--examples is for --data toybox"),
        ("--data a.jsonl --val a.jsonl --val-share 0.2", "--val-share is for data without --val"),
        ("--data a.jsonl --steps 3 --epochs 2", "--epochs is for a run without --steps"),
        ("", "give a model folder and conversations"),
    ],
)
def test_mistakes_are_one_line(flags, message, base, tmp_path):
    write(tmp_path / "a.jsonl", talks(40))
    write(tmp_path / "empty.jsonl", [])
    flags = flags.replace("a.jsonl", f"{tmp_path}/a.jsonl")
    flags = flags.replace("empty.jsonl", f"{tmp_path}/empty.jsonl")
    assert message in refused(base, tmp_path / "run", *flags.split())


def test_the_context_is_at_most_the_models_and_it_is_said(base, tmp_path):
    data = write(tmp_path / "a.jsonl", talks(60))
    code, stdout, _ = run(base, tmp_path / "run", "--data", data, "--fit", "--context", 1000)
    assert code == 0
    assert "context  192 tokens a row, not 1,000" in stdout


def test_the_help_shows_every_flag_with_its_comment():
    code, stdout, _ = call(["finetune.py", "--help"])
    assert code == 0
    assert "--data str [str ...]" in stdout
    assert "FOLDER (its train.jsonl" in stdout
    assert "--muon-lr" in stdout


# ---------------------------------------------------------------------------------------- the exam
def test_greedy_answers_are_those_of_the_plain_loop(base, capsys):
    tok, model = open_model(base, "cpu")
    prompts = [chat.render(tok, messages[:1], True)[0] for messages in talks(30, words=3)]

    def plainly(prompt):
        new = list(model.generate(prompt, 12, temperature=0))
        return tok.decode(new, skip_special=True), len(new) < 12

    for ends in (model.config.eos_token_id, list(range(0, 300, 7))):
        model.config.eos_token_id = ends  # the second: some answers end early and others do not
        given = greedy_answers(model, tok, prompts, 12, dtype="float32")
        assert given == [plainly(prompt) for prompt in prompts]
    assert 0 < sum(ended for _, ended in given) < 30
    assert greedy_answers(model, tok, [[7] * 200], 5) == [("", False)]
    assert "0 of 1: the other prompts leave no room" in capsys.readouterr().out


def test_answering_and_evaluating_leave_training_mode_and_random_numbers_alone(base, tok):
    tok, model = open_model(base, "cpu")
    model.train()
    state = torch.get_rng_state()
    greedy_answers(model, tok, [[7, 8]], 3)
    args, split = finetune.Args(context=64), conversations(tok)
    evaluate(model, split, 4, args, finetune.resolve("cpu", "float32"), loss=packed_loss)
    assert model.training
    assert torch.equal(state, torch.get_rng_state())


def exam(folder, data, *flags):
    cpu = ["--device", "cpu", "--dtype", "float32"]
    return ["finetune.py", "eval", folder, "--data", data, *cpu, *flags]


def test_the_exam_marks_a_model_and_writes_it_down(base, tmp_path):
    data, out = tmp_path / "test.jsonl", tmp_path / "report"
    asked = talks(11)
    words, keywords = ("max_words", 1000), ("keywords", ["impossible"])
    checks = [{"kind": kind, "value": value} for kind, value in (words, keywords)]
    write(data, asked, family="mine", checks=checks)
    with open(data, "a") as file:
        only = [{"role": "user", "content": "only checked"}]
        file.write(json.dumps({"messages": only, "checks": [{"kind": "json", "value": False}]}))
    code, _, stderr = call(exam(base, data, "--before", base, "--out", out, "--max-tokens", 6))
    assert code == 0, stderr
    row = Metrics.read(out / "metrics.jsonl")[-1]["eval"]
    lines = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    said = sum(bool(next(iter(line["answers"].values())).strip()) for line in lines[:11])
    assert row["check: max_words"] == pytest.approx(said / 11)
    assert row["check: keywords"] == 0
    assert row["check: all of an answer's"] == pytest.approx(1 / 12)
    assert {"exact match", "exact match: mine", "ended by itself"} <= row.keys()
    assert "| exact match: mine | 11 |" in (out / "report.md").read_text()
    assert len(lines) == 12
    assert lines[-1]["expected"] is None
    assert lines[0]["expected"] == asked[0][1]["content"]


def test_a_memorised_set_scores_full_marks(base, tmp_path):
    """All the way: trained to know eight answers by heart, a model gives them and stops."""
    data, out = write(tmp_path / "a.jsonl", talks(8, words=2)), tmp_path / "run"
    rates = "--steps 60 --batch 3 --lr 0.02 --muon-lr 0.02".split()
    code, _, stderr = run(base, out, "--data", f"{data}:4", "--val", data, *rates)
    assert code == 0, stderr
    assert call(exam(out, data))[0] == 0
    row = Metrics.read(out / "metrics.jsonl")[-1]
    assert row["step"] == 60
    assert row["eval"]["exact match"] == row["eval"]["ended by itself"] == 1


@pytest.mark.parametrize(
    "checks, message",
    [
        ([{"kind": "rhymes", "value": 1}], "a check {'kind': 'rhymes', 'value': 1}; known"),
        ([{"kind": "max_words", "value": "5"}], "a check {'kind': 'max_words', 'value': '5'}"),
        (["max_words"], "has a check max_words; known"),
    ],
)
def test_unknown_checks_are_refused(checks, message, base, tmp_path):
    data = write(tmp_path / "a.jsonl", talks(1), checks=checks)
    assert message in refused(base, tmp_path, argv=exam(base, data))


@pytest.mark.parametrize("flags", [("--max-tokens", 0), ("--examples", 0)])
def test_an_exam_of_nothing_is_refused(flags, base, tmp_path):
    told = refused(base, tmp_path, argv=exam(base, "toybox", *flags))
    assert "{} {} must be at least 1".format(*flags) in told
