"""finetune.py: what is in the loss, packing, refusals, exact resume, the examination."""

import contextlib
import io
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from html.parser import HTMLParser

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
from training.exam import CHECKS, Question, is_right, wilson
from training.loop import backward, evaluate, passes

WORDS = "red blue green apple pear plum lion fox one two three four list copy reverse say again please".split()


def talk(rng, turns=1, words=5):
    """A conversation of `turns` questions and answers."""
    say = [" ".join(rng.choices(WORDS, k=rng.randint(1, words))) for _ in range(2 * turns)]
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(say)]


def talks(n, seed=0, **kw):
    rng = random.Random(seed)
    return [talk(rng, **kw) for _ in range(n)]


def write(path, conversations, **more):
    path.write_text(
        "".join(json.dumps({"messages": messages, **more}) + "\n" for messages in conversations)
    )
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
    for p in (
        model.parameters()
    ):  # output matrices too: init_weights begins with the identity, where attention does nothing
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


def conversations(tok, n=40, context=64, **kw):
    return Conversations([(1.0, encode_conversations(tok, "x", rows_of(talks(n, **kw)), context, Counter()))])


def command(base, out, flags):
    start = (
        []
        if "--resume" in flags
        else [
            base,
            "--context",
            64,
            "--batch",
            4,
            "--eval-every",
            9,
            "--save-every",
            5,
            "--sample",
            8,
            "--log-every",
            1,
            "--lr",
            0.003,
        ]
    )
    return [str(x) for x in ("finetune.py", *start, "--out", out, "--device", "cpu", *flags)]


def run(base, out, *flags, argv=None):
    """In this process -> (exit status, stdout, stderr)."""
    before, stdout, stderr, code = sys.argv, io.StringIO(), io.StringIO(), 0
    sys.argv = argv or command(base, out, flags)
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            common.cli(finetune.main)
        except SystemExit as exit:
            code = exit.code
    sys.argv = before
    return code, stdout.getvalue(), stderr.getvalue()


def refused(base, out, *flags, argv=None):
    code, _, stderr = run(base, out, *flags, argv=argv)
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in stderr, stderr
    return lines[0]


# ----------------------------------------------------------------------------------------- the loss
def check_targets(tok, split):
    """The targets of the packed rows, decoded, are exactly what the assistants said, each with its end."""
    said = Counter()
    for batch in split.validation(4, 160):
        for x, y, docs in zip(batch.x, batch.y, batch.docs):
            for doc in docs.unique():
                ids, targets = x[docs == doc], y[docs == doc]
                assert all(
                    target in (-100, token) for target, token in zip(targets[:-1], ids[1:])
                )  # the next of this conversation
                said[tok.decode(targets[targets != -100].tolist())] += 1
    del said[""]  # what fills a row
    assert said == Counter(
        "".join(m["content"] + "<|im_end|>" for m in messages[1::2])
        for messages in talks(40, turns=2)
    )


def test_targets_are_what_the_assistant_says_and_its_end(tok):
    check_targets(tok, conversations(tok, turns=2, context=160))


@pytest.mark.parametrize(
    "fault",
    [
        lambda ids, mask: (ids, [1] * len(ids)),  # the mask removed
        lambda ids, mask: (ids, [0, *mask[:-1]]),  # late by one
        lambda ids, mask: (ids, [*mask[1:], 0]),  # early by one
        lambda ids, mask: (ids, [m and i != 5 for i, m in zip(ids, mask)]),
    ],
)  # <|im_end|> left out
def test_a_wrong_mask_would_be_noticed(tok, monkeypatch, fault):
    right = chat.example
    assert tok.special["<|im_end|>"] == 5
    monkeypatch.setattr(chat, "example", lambda *a: fault(*right(*a)))
    with pytest.raises(AssertionError):
        check_targets(tok, conversations(tok, turns=2, context=160))


GPT2 = dict(
    model_type="gpt2", num_key_value_heads=2, qkv_bias=True, out_bias=True, mlp_bias=True
)  # knows where it is, not how far


@pytest.mark.parametrize("shape", [{}, GPT2], ids=["qwen3", "gpt2"])
def test_packed_loss_equals_unpacked_loss(tok, shape):
    split, model = conversations(tok, turns=2, context=160), tiny(tok, **shape).double()
    alone = 0.0
    for ids, mask in split.pairs:
        logits = model(torch.tensor(ids[None].astype(np.int64)))[
            0
        ]  # (T, V): the model as it is, one conversation, no masks
        lost = -logits.double().log_softmax(-1)[range(len(ids) - 1), ids[1:].astype(np.int64)]
        alone += lost[torch.tensor(mask[1:])].sum().item()
    total, count = 0.0, 0
    for batch in split.validation(3, 160):
        total += packed_loss(model, batch, None).item()
        count += (batch.y != -100).sum().item()
    assert count == split.supervised and len(split.plan(160, 0, 0).order) < 30  # packed indeed
    assert total / count == pytest.approx(alone / count, abs=1e-6)


def test_the_loss_on_a_gpus_path_is_the_same_when_rows_without_a_target_are_not_left_out(tok):
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
        (gradient,) = torch.autograd.grad(
            logits[0, where].square().sum(), embedded, retain_graph=True
        )
        assert gradient[0, where].abs().sum() > 0
        assert gradient[0, ~where].abs().sum() == 0 and gradient[1].abs().sum() == 0


def test_a_batch_without_a_target_costs_nothing_and_divides_by_nothing(base, tmp_path):
    write(tmp_path / "a.jsonl", talks(40))
    args = finetune.Args(
        model=str(base),
        data=(str(tmp_path / "a.jsonl"),),
        out=str(tmp_path / "b"),
        context=64,
        batch=4,
        device="cpu",
    )
    with contextlib.redirect_stdout(io.StringIO()):
        state = finetune.prepare_finetuning(args, None)
    batch = state.batches.next()
    silent = batch._replace(y=torch.full_like(batch.y, -100))
    (part,) = passes(state, silent)
    loss = packed_loss(state.step_model, part, state.args)
    backward(state, loss, 0)
    assert loss.item() == 0.0
    assert all(p.grad is None or not p.grad.abs().sum() for p in state.model.parameters())


# ------------------------------------------------------------------------------------------ packing
def test_rows_hold_every_piece_once_and_none_is_too_full():
    rng = random.Random(3)
    for _ in range(20):
        context = rng.randint(10, 100)
        sizes = [rng.randint(1, context) for _ in range(rng.randint(1, 300))]
        rows = best_fit(sizes, context)
        assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
        assert all(sum(sizes[i] for i in row) <= context for row in rows)
        room = []  # the rule itself, done slowly
        for size in sizes:
            fits = [r for r, left in enumerate(room) if left >= size]
            if fits:
                room[min(fits, key=room.__getitem__)] -= size
            else:
                room.append(context - size)
        assert len(rows) == len(room)
    sizes = np.clip(np.random.default_rng(0).lognormal(4, 0.7, 5000).astype(int), 5, 512)
    assert sizes.sum() / (512 * len(best_fit(sizes.tolist(), 512))) > 0.98  # of the rows are full


def test_weights_say_how_often_an_epoch_takes_a_source(tok):
    parts = [encode_conversations(tok, "x", rows_of(talks(10, seed)), 64, Counter()) for seed in (1, 2)]
    split = Conversations([(2.5, parts[0]), (0.5, parts[1])])
    plans = [split.plan(64, 1, epoch) for epoch in (0, 1, 1)]
    starts = [np.concatenate([begins for begins, _ in plan.rows]) for plan in plans]
    taken = [Counter(np.searchsorted(split.begin, begins).tolist()) for begins in starts]
    assert all(
        sorted(c[i] for i in range(10)) == [2] * 5 + [3] * 5
        and sorted(c[i] for i in range(10, 20)) == [0] * 5 + [1] * 5
        for c in taken
    )
    assert taken[0] != taken[1] == taken[2]
    assert np.array_equal(starts[1], starts[2]) and np.array_equal(plans[1].order, plans[2].order)
    assert Conversations([(2.5, parts[0]), (1.0, parts[1])]).sha256 != split.sha256


def test_validation_scores_every_answer_once_whatever_the_ranks(tok):
    split = conversations(tok)
    for rows, world in ((1, 1), (3, 2), (4, 3)):
        ranks = [list(split.validation(rows, 64, None, rank, world)) for rank in range(world)]
        assert len({len(r) for r in ranks}) == 1
        assert sum((b.y != -100).sum().item() for r in ranks for b in r) == split.supervised


def test_a_long_conversation_keeps_its_start_and_no_end_it_did_not_reach(tok):
    long = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "blue " * 100}]
    prompt = [{"role": "user", "content": "red " * 100}, {"role": "assistant", "content": "blue"}]
    counts = Counter()
    ((ids, mask),) = encode_conversations(tok, "x", rows_of([long, prompt]), 32, counts)
    whole = chat.example(tok, long)
    assert (
        ids.tolist() == whole[0][:33]
        and mask.tolist() == [bool(m) for m in whole[1][:33]]
        and mask[-1]
    )
    assert tok.special["<|im_end|>"] not in ids[mask]
    assert counts == {"cut to the context": 2, "left out: the prompt alone fills the context": 1}


def test_text_has_its_share_of_the_rows_and_is_learned_whole(tok, base, tmp_path):
    (tmp_path / "text.txt").write_text(" ".join(random.Random(0).choices(WORDS, k=4000)))
    args = finetune.Args(
        model=str(base), text=str(tmp_path / "text.txt"), text_share=0.25, context=64
    )
    pairs = encode_conversations(tok, "x", rows_of(talks(100)), 64, Counter())
    split = Conversations([(1.0, pairs)], finetune.load_text(args, tok), 0.25)
    plan = split.plan(64, 1, 0)
    of_text = [plan.row(r)[0].min() >= len(split) for r in range(len(plan.order))]
    assert sum(of_text) / len(of_text) == pytest.approx(0.25, abs=0.02)
    batch = split.fill([plan.row(of_text.index(True))], 64)
    text = tok.encode((tmp_path / "text.txt").read_text())
    at = plan.row(of_text.index(True))[0][0] - len(split)
    assert (
        batch.x[0].tolist() == text[at : at + 64] and batch.y[0].tolist() == text[at + 1 : at + 65]
    )
    (short := tmp_path / "short.txt").write_text("red fox")
    assert "do not fill one row" in refused(
        base, tmp_path / "run", "--data", write(tmp_path / "a.jsonl", talks(40)), "--text", short
    )


# ---------------------------------------------------------------------------------------- the model
def test_a_base_model_without_chat_tokens_gets_them_as_the_mean_of_the_others(tmp_path, capsys):
    tok = Tokenizer.char("".join(WORDS) + " \nsystemuserassistant")
    for tied in (True, False):
        folder = tmp_path / f"base-{tied}"
        tok.save(folder)
        before = tiny(tok, tie_word_embeddings=tied, eos_token_id=3)
        before.save_pretrained(folder)
        grown, model = open_model(folder, "cpu")
        assert "has no <|im_start|> and <|im_end|>: added" in capsys.readouterr().out
        assert grown.special == {"<|im_start|>": tok.vocab_size, "<|im_end|>": tok.vocab_size + 1}
        assert (
            grown.encode("red fox") == tok.encode("red fox")
            and model.config.vocab_size == tok.vocab_size + 2
        )
        for now, was in (
            (model.embed_tokens.weight, before.embed_tokens.weight),
            (model.lm_head.weight, before.lm_head.weight),
        ):
            assert torch.equal(now[:-2], was) and torch.allclose(
                now[-2:], was.mean(0).expand(2, -1)
            )
        assert (model.lm_head.weight is model.embed_tokens.weight) == tied
        assert model.config.eos_token_id == [tok.vocab_size + 1, 3]
    data = write(tmp_path / "a.jsonl", talks(40))
    assert run(folder, tmp_path / "run", "--data", data, "--steps", 2)[0] == 0
    saved, model = open_model(tmp_path / "run", "cpu")
    assert saved.chat_template == chat.CHATML_TEMPLATE and saved.special == grown.special
    assert json.loads((tmp_path / "run" / "generation_config.json").read_text())[
        "eos_token_id"
    ] == [tok.vocab_size + 1, 3]
    assert "added" not in capsys.readouterr().out  # the second time there is nothing to add


def test_padded_embeddings_are_not_grown_and_not_averaged(tmp_path):
    tok = Tokenizer.char("".join(WORDS) + " \nsystemuserassistant")
    tok.save(tmp_path)
    before = tiny(tok, vocab_size=64)
    before.save_pretrained(tmp_path)
    grown, model = open_model(tmp_path, "cpu")
    assert model.config.vocab_size == 64
    new = model.embed_tokens.weight[list(grown.special.values())]
    assert torch.allclose(new, before.embed_tokens.weight[: tok.vocab_size].mean(0).expand(2, -1))


# -------------------------------------------------------------------------------------- the program
def test_killed_in_an_epoch_and_resumed_equals_never_stopped_to_the_bit(base, tmp_path):
    data = [
        write(tmp_path / "a.jsonl", talks(60)),
        f"{write(tmp_path / 'b.jsonl', talks(30, 1))}:1.5",
    ]
    flags = ["--data", *data, "--steps", 60, "--seed", 3]
    code, stdout, stderr = run(base, tmp_path / "whole", *flags)
    assert code == 0, stderr
    assert (
        "«" in stdout
        and "of the tokens are in the loss" in stdout
        and "ended by themselves" in stdout
    )
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
    assert whole[-1]["epoch"] > 1 and whole[-1]["val_loss"] < whole[0]["loss"] - 1


def test_two_ranks_train_as_one(base, tmp_path):
    data = write(tmp_path / "a.jsonl", talks(60))
    flags = ["--data", data, "--steps", 12, "--optimizer", "adamw"]
    assert run(base, tmp_path / "one", *flags)[0] == 0
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            *command(base, tmp_path / "two", flags),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    one, two = (
        [
            (r.get("loss"), r.get("val_loss"))
            for r in Metrics.read(tmp_path / name / "metrics.jsonl")
        ]
        for name in ("one", "two")
    )
    assert len(one) == len(two) == 14
    assert all(
        a == pytest.approx(b, abs=1e-5)
        for left, right in zip(one, two)
        for a, b in zip(left, right)
        if a is not None
    )


def test_a_folder_brings_its_own_validation_and_toybox_makes_its_data(base, tmp_path):
    for name, n in (("train", 40), ("val", 7)):
        write(tmp_path / f"{name}.jsonl", talks(n))
    code, stdout, stderr = run(base, tmp_path / "run", "--data", tmp_path, "--fit")
    assert code == 0 and "40 to train on and 7 to validate on" in stdout, stderr
    code, stdout, stderr = run(
        base, tmp_path / "toys", "--data", "toybox", "--examples", 100, "--fit", "--context", 96
    )
    assert code == 0 and "100 to train on and 500 to validate on" in stdout, stderr


BAD = [
    ({"messages": [{"role": "user", "content": "red"}]}, "no assistant turn"),
    (
        {"messages": [{"role": "user", "content": "red"}, {"role": "assistant", "content": " "}]},
        "empty assistant turn",
    ),
    (
        {"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "red"}]},
        "empty user turn",
    ),
    ({"messages": [{"role": "bot", "content": "red"}]}, "unknown role 'bot'"),
    (
        {
            "messages": [
                {"role": "user", "content": "red " * 99},
                {"role": "assistant", "content": "red"},
            ]
        },
        "the prompt alone fills",
    ),
]


@pytest.mark.parametrize(
    "record, reason",
    [
        *BAD,
        ({"messages": []}, "a conversation is a non-empty list"),
        (
            {"text": "red", "label": 1},
            "its keys are 'text', 'label'; known layouts: {messages}, ShareGPT {conversations",
        ),
        (["red"], "record 1 cannot be read as a conversation: it is a str, not an object"),
    ],
)
def test_a_file_of_nothing_usable_is_refused_by_reason(record, reason, base, tmp_path):
    (tmp_path / "bad.jsonl").write_text(json.dumps(record) + "\n")
    message = refused(base, tmp_path / "run", "--data", tmp_path / "bad.jsonl")
    assert reason in message and "bad.jsonl" in message


def test_unusable_conversations_among_good_ones_are_counted_by_reason(base, tmp_path):
    write(tmp_path / "a.jsonl", talks(40))
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write("".join(json.dumps(record) + "\n" for record, _ in BAD * 2))
    code, stdout, _ = run(base, tmp_path / "run", "--data", tmp_path / "a.jsonl", "--fit")
    assert code == 0 and all(
        f"2 left out: {reason}" in stdout or f"2 left out: message 0: {reason}" in stdout
        for _, reason in BAD
    )


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--data", "a.jsonl:x"], "after the colon"),
        (["--data", "a.jsonl:0"], "above 0"),
        (["--data", "a.jsonl:nan"], "above 0"),
        (["--data", "a.jsonl", "--val-share", "1"], "--val-share"),
        (["--data", "empty.jsonl"], "empty.jsonl: nothing to train on in 0 conversations"),
        (["--data", "a.jsonl", "--batch", "999"], "a step takes 999"),
        (["--data", "a.jsonl", "--text", "a.jsonl", "--text-share", "1"], "--text-share 1.0"),
        ([], "give a model folder and conversations"),
    ],
)
def test_mistakes_are_one_line(flags, message, base, tmp_path):
    write(tmp_path / "a.jsonl", talks(40))
    write(tmp_path / "empty.jsonl", [])
    assert message in refused(
        base,
        tmp_path / "run",
        *(str(tmp_path / f) if f.startswith(("a.j", "empty")) else f for f in flags),
    )


def test_the_context_is_at_most_the_models_and_it_is_said(base, tmp_path):
    code, stdout, _ = run(
        base,
        tmp_path / "run",
        "--data",
        write(tmp_path / "a.jsonl", talks(60)),
        "--fit",
        "--context",
        1000,
    )
    assert code == 0 and "context  192 tokens a row, not 1,000" in stdout


# ---------------------------------------------------------------------------------- the examination
def test_batched_answers_are_those_of_one_prompt_at_a_time(base, tok):
    tok, model = open_model(base, "cpu")
    prompts = [chat.render(tok, messages[:1], True)[0] for messages in talks(30, words=3)]
    given = greedy_answers(model, tok, prompts, 12, dtype="float32")
    for prompt, (text, ended) in zip(prompts, given):
        alone = list(model.generate(prompt, 12, temperature=0, vocab_size=tok.vocab_size))
        assert text == tok.decode(alone, skip_special=True) and ended == (len(alone) < 12)
    model.config.eos_token_id = list(
        range(0, 300, 7)
    )  # so that rows leave their batch early and others stay
    given = greedy_answers(model, tok, prompts, 12, dtype="float32")
    alone = [
        list(model.generate(prompt, 12, temperature=0, vocab_size=tok.vocab_size))
        for prompt in prompts
    ]
    assert given == [(tok.decode(new, skip_special=True), len(new) < 12) for new in alone]
    assert 0 < sum(ended for _, ended in given) < 30
    assert greedy_answers(model, tok, [[7] * 200], 5) == [("", False)]  # no room for it


def test_wilson_intervals_are_the_published_ones():
    assert wilson(81, 263) == pytest.approx(
        (0.2553, 0.3662), abs=1e-4
    )  # Newcombe 1998, table I, method 3
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0, 0.1611), abs=1e-4)
    assert wilson(29, 29) == pytest.approx((0.8830, 1), abs=1e-4)


@pytest.mark.parametrize(
    "kind, value, good, bad",
    [
        ("min_words", 3, "a b c", "a b"),
        ("max_words", 2, "a b", "a b c"),
        ("max_characters", 3, "abc", "abcd"),
        ("sentences", 2, "One. Two!", "One. 2.5 two? Three."),
        ("paragraphs", 2, "a\n\nb\n", "a\nb"),
        ("bullets", 2, "- a\n* b", "- a\nb - c"),
        ("placeholders", 1, "Dear [name]", "Dear name"),
        ("highlights", 1, "*so*", "so"),
        ("keywords", ["red", "c++"], "Red c++.", "reddish c++"),
        ("forbidden", ["red"], "reddish", "Red!"),
        ("starts_with", "Yes", " Yes, it is", "No, yes"),
        ("ends_with", "bye.", "ok bye. ", "bye. ok"),
        ("lowercase", True, "abc 1", "aBc"),
        ("uppercase", True, "ABC 1", "ABc"),
        ("commas", False, "a b", "a, b"),
        ("quoted", True, '"a\nb"', '"a" b'),
        ("title", True, "<<Title>> x", "Title"),
        ("json", True, '```json\n{"a": 1}\n```', "{a: 1}"),
    ],
)
def test_checks_verify_what_they_say(kind, value, good, bad):
    of, rule = CHECKS[kind]
    assert type(value) is of and rule(good, value) and not rule(bad, value)


class Page(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.tags, self.text = Counter(), ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.tags.update(name for name, _ in attrs if name.startswith(("on", "src", "href")))

    def handle_data(self, data):
        self.text += data


def test_the_examination_marks_a_model_and_writes_it_down(base, tmp_path):
    data, out = tmp_path / "test.jsonl", tmp_path / "report"
    evil = "<script>alert(1)</script> | red\n\nblue & green"
    asked = [
        [{"role": "user", "content": evil}, {"role": "assistant", "content": "red"}],
        *talks(10),
    ]
    write(
        data,
        asked,
        family="mine",
        checks=[
            {"kind": "max_words", "value": 1000},
            {"kind": "keywords", "value": ["impossible"]},
        ],
    )
    with open(data, "a") as file:
        only = [{"role": "user", "content": "only checked"}]
        file.write(json.dumps({"messages": only, "checks": [{"kind": "json", "value": False}]}))
    argv = [
        "finetune.py",
        "eval",
        str(base),
        "--data",
        str(data),
        "--before",
        str(base),
        "--out",
        str(out),
        "--max-tokens",
        "6",
    ]
    code, stdout, stderr = run(base, out, argv=argv)
    assert code == 0, stderr
    row = Metrics.read(out / "metrics.jsonl")[-1]["eval"]
    assert row["check: max_words"] == 1 and row["check: keywords"] == 0
    assert row["check: all of an answer's"] == pytest.approx(1 / 12)
    assert {"exact match", "exact match: mine", "ended by itself", "perplexity"} <= row.keys()
    tok, model = open_model(base, "cpu")
    split = Conversations([(1.0, encode_conversations(tok, "x", rows_of(asked), 192, Counter()))])
    total = sum(packed_loss(model, batch, None).item() for batch in split.validation(1, 192))
    assert row["perplexity"] == pytest.approx(np.exp(total / split.supervised), rel=1e-4)
    page = Page((out / "report.html").read_text())
    assert evil in page.text and not page.tags.keys() & {
        "script",
        "link",
        "img",
        "src",
        "href",
        "onload",
    }
    assert page.tags["tr"] == 1 + len(row) + 1 + 12
    report = (out / "report.md").read_text()
    assert (
        "| exact match: mine | 11 |" in report
        and r"<script>alert(1)</script> \| red ⏎ blue & green" in report
    )
    lines = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert len(lines) == 12 and lines[0]["expected"] == "red" and lines[-1]["expected"] is None


def test_a_memorised_set_scores_full_marks(base, tmp_path):
    """All the way: trained to know eight answers by heart, a model gives them and stops."""
    data = write(tmp_path / "a.jsonl", talks(8, words=2))
    code, _, stderr = run(
        base,
        tmp_path / "run",
        "--data",
        f"{data}:4",
        "--val",
        data,
        "--steps",
        60,
        "--batch",
        3,
        "--lr",
        0.02,
        "--muon-lr",
        0.02,
    )
    assert code == 0, stderr
    argv = ["finetune.py", "eval", str(tmp_path / "run"), "--data", str(data), "--device", "cpu"]
    assert run(base, tmp_path, argv=argv)[0] == 0
    row = Metrics.read(tmp_path / "run" / "metrics.jsonl")[-1]
    assert row["step"] == 60 and row["eval"]["exact match"] == row["eval"]["ended by itself"] == 1
    assert row["eval"]["perplexity"] < 1.2


@pytest.mark.parametrize(
    "record, message",
    [
        ({"checks": [{"kind": "rhymes", "value": 1}]}, "has a check 'rhymes' with 1; known kinds"),
        ({"checks": [{"kind": "max_words", "value": "5"}]}, "'max_words' with '5'"),
        ({"checks": ["max_words"]}, "'max_words' with None"),
    ],
)
def test_unknown_checks_are_refused(record, message, base, tmp_path):
    data = write(tmp_path / "a.jsonl", talks(1), **record)
    assert message in refused(
        base, tmp_path, argv=["finetune.py", "eval", str(base), "--data", str(data)]
    )


def test_toybox_questions_are_marked_by_its_own_checker():
    from training import toybox

    row = next(toybox.conversations("test", 1))
    question = Question(row["messages"][:-1], row["answer"], row["family"], [])
    assert is_right(question, row["answer"] + " ") and not is_right(
        question, row["answer"] + "x"
    )
    assert is_right(Question([], "Yes. ", "", []), "Yes.") and not is_right(
        Question([], "Yes", "", []), "yes"
    )


def test_evaluating_leaves_training_mode_and_random_numbers_alone(base, tok):
    tok, model = open_model(base, "cpu")
    model.train()
    state = torch.get_rng_state()
    greedy_answers(model, tok, [[7, 8]], 3)
    evaluate(
        model,
        conversations(tok),
        4,
        finetune.Args(context=64),
        finetune.resolve("cpu"),
        loss=packed_loss,
    )
    assert model.training and torch.equal(state, torch.get_rng_state())


def test_the_help_shows_every_flag_with_its_comment(base, tmp_path):
    code, stdout, _ = run(base, tmp_path, argv=["finetune.py", "--help"])
    assert (
        code == 0
        and "--data str [str ...]" in stdout
        and "FOLDER (its train.jsonl" in stdout
        and "--muon-lr" in stdout
    )
