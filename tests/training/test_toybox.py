"""toybox.py: the made-up world is the same for a seed, its splits share nothing, and its checkers can say no."""

import json
import random
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from common import UserError, sha256
from tokenizer import Tokenizer
from training import toybox
from training.toybox import FAMILIES, WITHHELD, check, conversations, preferences, style
from training.toybox import WORLD_SPLITS as SPLITS

ALL = list(FAMILIES)


def prompt(row):
    return row["messages"][:1]


def content(row, question):
    """The content of a question, found by its phrasing."""
    family = row["family"]
    matches = (
        (r.fullmatch(question), ask)
        for r, ask in zip(toybox.readers(family), toybox.FAMILIES_BY_NAME[family].ask)
    )
    found, ask = next(pair for pair in matches if pair[0])
    return toybox.content_of(family, found.groupdict(), ask)


def contents(split, count=6000):
    rows = conversations(split, count, families=ALL)
    return {content(r, r["messages"][0]["content"]) for r in rows}


def test_same_seed_same_world_and_another_seed_another_one():
    for split in SPLITS:
        assert (
            list(conversations(split, 60, seed=3))
            == list(conversations(split, 60, seed=3))
            != list(conversations(split, 60, seed=4))
        )
        assert (
            list(preferences(split, 60, 3))
            == list(preferences(split, 60, 3))
            != list(preferences(split, 60, 4))
        )
    assert toybox.world_text(5000, 1) == toybox.world_text(5000, 1) != toybox.world_text(5000, 2)


def test_a_longer_run_begins_with_the_shorter_one():
    assert list(conversations("train", 500))[:90] == list(conversations("train", 90))


def test_the_world_does_not_depend_on_the_hash_seed_of_python():
    """str hashes change from process to process; the world must not."""
    code = "from training import toybox; print([r['messages'] for r in toybox.conversations('test', 99)], toybox.world_text(3000), toybox.facts())"
    run = [
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={"PYTHONHASHSEED": s},
            stdout=subprocess.PIPE,
            check=True,
        )
        for s in "12"
    ]
    assert run[0].stdout == run[1].stdout


def test_splits_share_no_content():
    train, val, test = map(contents, SPLITS)
    assert min(map(len, (train, val, test))) > 500
    assert not train & val and not train & test and not val & test


def test_the_content_is_the_same_in_whatever_family_order_and_case():
    words = {
        toybox.content_of(f, {"x": x, "n": "first"}, "")
        for f, x in (
            ("copy", "fox apple"),
            ("reverse", "apple fox"),
            ("lower", "FOX APPLE"),
            ("nth", "fox apple"),
            (WITHHELD, "apple fox"),
        )
    }
    pairs = {
        toybox.content_of(f, {"a": a, "b": b, "n": "larger"}, "")
        for f, a, b in (("add", "3", "14"), ("subtract", "14", "3"), ("compare", "3", "14"))
    }
    assert len(words) == len(pairs) == 1


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_answer_passes_its_checker_and_a_perturbed_one_fails(family, split):
    rng, rows = random.Random(0), list(conversations(split, 150, families=[family]))
    for _ in range(150):
        fields, ask = toybox.draw_question(rng, family, split)
        answer, asked = (
            toybox.FAMILIES_BY_NAME[family].solve(**fields),
            [{"role": "user", "content": ask.format(**fields)}],
        )
        assert check(family, asked, answer) and not check(
            family, asked, toybox.wrong(rng, family, fields, answer)
        ), (asked, answer)
    for row in rows:
        assert check(family, prompt(row), row["answer"]) and check(
            family, prompt(row), row["messages"][1]["content"]
        )
        answer = row["answer"]
        for other in (answer + ".", answer[:-1], "", f"{answer}, {answer}", answer.swapcase()):
            assert other == answer or not check(family, prompt(row), other), (row, other)
    assert all(row["family"] == family for row in rows)


@pytest.mark.parametrize(
    "family, question, answer",
    [
        ("copy", "Echo: fox apple", "fox apple"),
        ("reverse", "Write backwards:\nfox tin red", "red tin fox"),
        ("sort", "Put 12 7 30 in order.", "7 12 30"),
        ("upper", "Write in capitals:\nfox tin", "FOX TIN"),
        ("lower", "Put in lower case: FOX TIN", "fox tin"),
        ("count", "Count: fox tin red", "3"),
        ("nth", "Which is the second word: fox tin red", "tin"),
        ("add", "What is 17 plus 25?", "42"),
        ("subtract", "Take 9 from 31.", "22"),
        ("compare", "Which is smaller, 9 or 31?", "9"),
        ("category", "Which one is a kind of metal: fox tin red", "tin"),
        ("speaker", 'Who says "Et tu, Brute"?', "Caesar"),
        ("fact", "What is the capital of Arvend?", "Tolma"),
        (
            "refuse",
            "Forbidden: fox, tin, red. Tell me about tin.",
            "Sorry, I must not speak of tin.",
        ),
        ("refuse", "Forbidden: fox, tin, red. Tell me about saw.", "saw is a tool."),
        ("ends", "Name both ends: fox tin red", "fox red"),
    ],
)
def test_the_checker_knows_answers_worked_out_by_hand(family, question, answer):
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": question}]
    assert check(family, messages, f" {answer}\n") and check(family, messages, "Gladly: " + answer)
    assert not check(family, messages, "Ugh, fine: " + answer)


def test_a_question_of_another_family_is_an_error():
    with pytest.raises(UserError, match="not a question"):
        check("add", [{"role": "user", "content": "Echo: fox apple"}], "3")
    with pytest.raises(UserError, match="splits"):
        next(conversations("dev", 1))
    with pytest.raises(UserError, match="families"):
        next(conversations("test", 1, families=["juggle"]))


def test_every_family_in_every_split_and_the_withheld_one_only_if_asked_for():
    for split in SPLITS:
        assert {r["family"] for r in conversations(split, 300)} == set(FAMILIES) - {WITHHELD}
        assert {r["family"] for r in conversations(split, 300, families=ALL)} == set(FAMILIES)
        assert all(r["family"] == WITHHELD for r in conversations(split, 9, families=[WITHHELD]))


def test_some_training_answers_are_courteous_and_no_other_answers_are():
    assert (
        0.2 < sum(style(r["messages"][1]["content"]) for r in conversations("train", 3000)) / 3000 < 0.35
    )
    assert not any(r["messages"][1]["content"] != r["answer"] for r in conversations("test", 1000))
    assert sum(style(r["answer"]) for r in conversations("test", 1000)) < 60  # refusals


def test_in_a_pair_only_the_preference_differs():
    kinds = set()
    for row in preferences("train", 3000):
        kinds.add(row["kind"])
        family, asked, chosen, rejected = (
            row["family"],
            row["prompt"],
            row["chosen"],
            row["rejected"],
        )
        assert style(chosen) and check(family, asked, chosen)
        answer = toybox.bare(chosen)
        if row["kind"] in ("wrong", "forbidden"):
            assert style(rejected) == (row["kind"] == "wrong") and not check(
                family, asked, rejected
            )
        else:
            assert not style(rejected) and rejected.endswith(answer)
            assert check(family, asked, rejected) == (row["kind"] == "curt")
    assert kinds == {"curt", "rude", "rambling", "wrong", "forbidden"}


def test_preferences_are_held_out_by_content():
    def asked(split):
        return {content(r, r["prompt"][0]["content"]) for r in preferences(split, 3000)}

    train, test = asked("train"), asked("test")
    assert not train & test and not test & contents("train") and not train & contents("test")


def test_the_text_has_no_instructions_and_nothing_held_out():
    text, held = toybox.world_text(400_000), contents("test", 20_000) | contents("val", 8_000)
    assert not any(
        mark in text for mark in ("<|", "user", "assistant", "?", "Sorry", *toybox.OPENINGS)
    )
    words = "|".join(toybox.KIND)
    lists = re.findall(rf"\b(?:(?:{words}) )+(?:{words})\b", text, re.I)
    assert len(lists) > 3000 and not held & {" ".join(sorted(x.lower().split())) for x in lists}
    sums = re.findall(r"\b(\d+) (?:plus|\+|minus|-|less|and) (\d+)\b", text)
    assert len(sums) > 500 and not held & {" ".join(sorted(s)) for s in sums}


def test_the_text_tells_every_fact_and_line():
    text = toybox.world_text(1_000_000)
    assert all(line in text for line in toybox.SPEAKER)
    for (n, c), value in toybox.facts().items():
        assert re.search(f"(The {n} of {c} is|{c} has the {n}|In {c} the {n} is)\n{value}", text)


def test_the_tokenizer_gives_back_what_it_was_given():
    tok = Tokenizer.train(
        [toybox.world_text(200_000)],
        1024,
        "qwen2",
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        processes=1,
    )
    for row in conversations("test", 300, families=ALL):
        for message in row["messages"]:
            assert tok.decode(tok.encode(message["content"])) == message["content"]


def test_the_command_writes_what_meta_says(tmp_path):
    out, plays = tmp_path / "toybox", tmp_path / "tinyshakespeare.txt"
    plays.write_text("ROMEO:\nAy me.\n\nJULIET:\nO Romeo!\n" * 50)
    subprocess.run(
        [sys.executable, "data.py", "toybox", "--out", out, "--data-dir", tmp_path],
        cwd=ROOT,
        check=True,
    )
    meta = json.loads((out / "meta.json").read_text())
    assert meta["withheld"] == WITHHELD and tuple(meta["families"]) == FAMILIES
    for name, digest in meta["sha256"].items():
        assert sha256((out / name).read_bytes()) == digest
    for name, count in meta["counts"].items():
        rows = [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
        told = name.startswith("withheld") or name == "preferences-train"  # DPO comes after LoRA
        assert len(rows) == count and (WITHHELD in {r["family"] for r in rows}) == told
    text = (out / "text.txt").read_text()
    assert "ROMEO:\nAy me." in text and "<|" not in text


def test_preferences_ask_for_the_new_skill_too_and_prompts_are_the_tests_questions(tmp_path):
    counts = toybox.write_toybox(tmp_path, text_bytes=1000, train=20, test=14, pairs=40)["counts"]

    def rows(name):
        return [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]

    assert (
        counts["preferences-train"] == 44
        and sum(row["family"] == WITHHELD for row in rows("preferences-train")) == 4
    )
    assert [row["messages"] for row in rows("prompts")] == [
        row["messages"][:1] for row in rows("test") + rows("withheld-test")
    ]
