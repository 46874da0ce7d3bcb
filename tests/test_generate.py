"""generate.py: the command as a user runs it."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import generate
from common import UserError
from engine.sampler import Sampling
from generate import Engine
from model import Config, Transformer
from tokenizer import Tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    text = "abcdefghijklmnopqrstuvwxyz \n"
    model = Transformer(Config("qwen3", len(text), 16, 32, 2, 2, 2, 8, 16))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    model.save_pretrained(folder)
    Tokenizer.char(text).save(folder)
    return folder


@pytest.mark.parametrize("top_k", [0, 3])
def test_the_engine_draws_from_the_same_distribution_as_the_plain_generator(folder, top_k):
    """Both against the exact probabilities of one token: temperature, then top-k."""
    model, count, prompt = Transformer.from_pretrained(folder), 1500, [1, 2, 3]
    with torch.no_grad():
        logits = model(torch.tensor([prompt]))[0, -1] / 0.7
    if top_k:
        logits[logits < logits.topk(top_k).values[-1]] = -torch.inf
    expected = logits.softmax(0)
    samplings = [
        Sampling(max_tokens=1, temperature=0.7, top_k=top_k, seed=i, ignore_eos=True)
        for i in range(count)
    ]
    engine = Engine.of(model, None, kv_tokens=4096)
    ours = [output.token_ids[0] for output in engine.generate([prompt] * count, samplings)]
    plain = [next(model.generate(prompt, 1, 0.7, top_k, seed=i)) for i in range(count)]
    for tokens in (ours, plain):
        shares = torch.bincount(torch.tensor(tokens), minlength=len(expected)) / count
        assert (shares - expected).abs().max() < 4 * (0.25 / count) ** 0.5
        assert not shares[expected == 0].any()


def command(*arguments):
    return subprocess.run(
        [sys.executable, ROOT / "generate.py", *map(str, arguments)], capture_output=True, text=True
    )


def test_command_streams_text(folder):
    done = command(folder, "abc", "--max-tokens", 7, "--device", "cpu")
    assert done.returncode == 0 and "abc" in done.stdout and "7 tokens" in done.stderr


def test_unknown_character_is_one_line_that_names_it(folder):
    done = command(folder, "abc?", "--device", "cpu")
    assert (
        done.returncode == 2
        and "'?'" in done.stderr
        and "28" in done.stderr
        and done.stderr.count("\n") == 1
    )


def test_a_batch_is_answered_in_its_own_file_and_goes_on_after_a_crash(folder, tmp_path):
    lines = [
        {"prompt": "abc", "id": "first"},
        {"prompt": [1, 2], "n": 2, "temperature": 0},
        {"prompt": "?"},
        {"text": "abc"},
        {"prompt": "b", "max_tokens": 3},
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\nnot json\n")
    out = tmp_path / "out.jsonl"
    arguments = [
        folder,
        "--batch",
        tmp_path / "in.jsonl",
        "--out",
        out,
        "--max-tokens",
        5,
        "--device",
        "cpu",
    ]
    done = command(*arguments)
    assert done.returncode == 0 and "6 lines, 3 with errors" in done.stdout
    whole = out.read_text()
    rows = {row["line"]: row for row in map(json.loads, whole.splitlines())}
    assert len(rows) == 6 and rows[1]["id"] == "first" and rows[5]["answers"][0]["tokens"] == 3
    assert rows[2]["answers"][0] == rows[2]["answers"][1]
    assert "'?'" in rows[3]["error"] and "prompt" in rows[4]["error"] and "JSON" in rows[6]["error"]
    out.write_text(
        "\n".join(whole.splitlines()[:3]) + "\n" + whole.splitlines()[3][:9]
    )  # the crash cut a line
    assert command(*arguments).returncode == 0
    again = {row["line"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert again == rows
    mended = [*lines[:2], {"prompt": "abc"}, *lines[3:]]  # a line that had an error is asked again
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, mended)))
    assert "2 lines, 1 with errors" in command(*arguments).stdout
    *_, mended = map(json.loads, out.read_text().splitlines())
    assert mended["line"] == 3 and mended["answers"][0]["tokens"] == 5


@pytest.mark.parametrize("content", ['{"prompt": "abc"}', '{"prompt": "abc"}\n{"pro', "5", "text"])
def test_a_file_that_is_not_the_answers_of_a_batch_stays_as_it_is(content, tmp_path):
    """Also one without a newline at its end, which is not half a line of an answer."""
    (tmp_path / "in.jsonl").write_text(content)
    with pytest.raises(UserError, match="not answers of a batch"):
        generate.answered_lines(tmp_path / "in.jsonl")
    assert (tmp_path / "in.jsonl").read_text() == content


@pytest.mark.parametrize(
    "flags",
    [
        ["abc", "--batch", "in", "--out", "out"],
        ["--chat", "--batch", "in", "--out", "out"],
        ["abc", "--out", "out"],
        ["--chat", "--ignore-keys", "a"],
    ],
)
def test_flags_that_would_do_nothing_are_refused(flags, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["generate.py", "runs/x", *flags])
    with pytest.raises(UserError, match="go with --batch, a prompt and --chat without it"):
        generate.main()


def test_a_folders_tokenizer_of_more_ids_than_its_model_has_is_refused(folder, tmp_path):
    """In a training, whose model may be about to grow, they only never come out."""
    more = Tokenizer.char("abcdefghijklmnopqrstuvwxyz \n.,")
    model = Transformer.from_pretrained(folder)
    model.save_pretrained(tmp_path)
    more.save(tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path}: the tokenizer has 30 ids, the model only 28"):
        Engine(tmp_path)
    assert Engine.of(model, more, kv_tokens=64).vocab_size == 28


def test_nothing_is_guessed_beyond_the_end_of_an_answer(folder, monkeypatch):
    rooms = []
    monkeypatch.setattr(
        generate, "lookup_draft", lambda ids, most: rooms.append(most) or [1] * most
    )
    engine = Engine(folder, "cpu", draft_tokens=8)
    engine.generate([1, 2, 3], Sampling(max_tokens=4, temperature=0, ignore_eos=True))
    assert rooms[0] == 2  # of four tokens one is there, and the step draws one behind its guesses


def test_generation_config_gives_what_no_flag_says(folder, tmp_path, monkeypatch, capsys):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0, "eos_token_id": [1, 2]}')

    def said(*flags):
        words = ["generate.py", tmp_path, "abc", "--max-tokens", 7, "--device", "cpu", *flags]
        monkeypatch.setattr(sys, "argv", list(map(str, words)))
        generate.main()
        return capsys.readouterr()

    first = said("--seed", 1)
    assert "sampling {'temperature': 0}, as generation_config.json says" in first.err
    assert said("--seed", 2).out.endswith(first.out.splitlines()[-1] + "\n")  # greedy
    hot = said("--seed", 2, "--temperature", 50)
    assert hot.out.splitlines()[-1] != first.out.splitlines()[-1] and "sampling" not in hot.err
    assert Engine(tmp_path, "cpu").eos == {1, 2}
