"""generate.py: sampling, and the command as a user runs it."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from common import UserError
from engine.sampler import Sampling
from generate import Engine
from model import Config, Transformer, sample
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


def counts(logits, **options):
    generator = torch.Generator().manual_seed(0)
    draws = sample(torch.tensor(logits).repeat(4000, 1), generator=generator, **options)
    return torch.bincount(draws, minlength=len(logits)) / 4000


def test_sampling_follows_the_distribution():
    logits = [2.0, 1.0, 0.0, -1.0]
    assert torch.allclose(counts(logits), torch.tensor(logits).softmax(0), atol=0.03)
    assert torch.allclose(
        counts(logits, temperature=0.5), (torch.tensor(logits) * 2).softmax(0), atol=0.03
    )


def test_top_k_and_top_p_cut_the_tail():
    assert counts([2.0, 1.0, 0.0, -1.0], top_k=2)[2:].sum() == 0
    shares = counts(
        [2.0, 1.0, 0.0, -1.0], top_p=0.7
    )  # 0.64 + 0.24: the second is needed to reach 0.7
    assert shares[2:].sum() == 0 and shares[1] > 0
    assert counts([2.0, 1.0, 0.0, -1.0], top_p=0.5)[0] == 1
    assert counts([2.0, 1.0, 0.0], top_p=1e-9)[0] == 1
    assert sample(torch.tensor([[0.0, 3.0, 1.0]]), temperature=0).tolist() == [1]


def test_same_seed_same_text_and_other_seed_other_text(folder):
    model = Transformer.from_pretrained(folder)
    a, b, c = (list(model.generate([1, 2, 3], 40, seed=s)) for s in (1, 1, 2))
    assert a == b != c


def test_text_goes_on_past_the_context(folder):
    """The model remembers 16 tokens; 60 come out, and each is what the model says of the text it
    then holds."""
    model = Transformer.from_pretrained(folder)
    ids = list(range(10))
    new = list(model.generate(ids, 60, temperature=0))
    assert len(new) == 60
    with torch.no_grad():
        assert new[5] == model(torch.tensor([ids + new[:5]]))[0, -1].argmax().item()


def test_generation_stops_at_the_end_of_text(folder):
    model = Transformer.from_pretrained(folder)
    new = list(model.generate([1], 10, temperature=0))
    model.config.eos_token_id = [99, new[4]]
    assert list(model.generate([1], 10, temperature=0)) == new[: new.index(new[4])]


def test_ids_that_the_tokenizer_does_not_have_never_come_out(folder):
    model = Transformer.from_pretrained(folder)
    assert max(model.generate([1], 200, temperature=5.0, vocab_size=6)) == 5
    assert max(model.generate([1], 200, temperature=5.0)) > 5


def test_empty_prompt_is_refused(folder):
    with pytest.raises(UserError, match="no tokens"):
        next(Transformer.from_pretrained(folder).generate([], 5))


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
    import json

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
    assert command(*arguments).returncode == 0
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
    assert all(row.pop("seconds") >= 0 for row in (*rows.values(), *again.values()))
    assert again == rows
