"""The made-up world is the same for a seed, its splits share nothing, its checkers can say no."""

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
from training.toybox import (
    FAMILIES,
    WITHHELD,
    WORLD_SPLITS,
    check,
    conversations,
    preferences,
    style,
)

ALL = list(FAMILIES)


def prompt(row):
    return row["messages"][:1]


def content(row, question):
    """The content of a question, found by its phrasing."""
    family = row["family"]
    for reader, ask in zip(toybox.readers(family), FAMILIES[family].ask):
        found = reader.fullmatch(question)
        if found:
            return toybox.content_of(family, found.groupdict(), ask)


def contents(split, count=6000):
    rows = conversations(split, count, families=ALL)
    return {content(r, r["messages"][0]["content"]) for r in rows}


def test_same_seed_same_world_and_another_seed_another_one():
    for split in WORLD_SPLITS:
        for make in (conversations, preferences):
            first, again, other = (list(make(split, 60, seed=n)) for n in (3, 3, 4))
            assert first == again != other
    assert toybox.world_text(5000, 1) == toybox.world_text(5000, 1) != toybox.world_text(5000, 2)


def test_a_longer_run_begins_with_the_shorter_one():
    assert list(conversations("train", 500))[:90] == list(conversations("train", 90))


def test_the_world_does_not_depend_on_the_hash_seed_of_python():
    """str hashes change from process to process; the world must not."""
    code = (
        "from training import toybox; print([*toybox.conversations('test', 99)], "
        "toybox.world_text(3000), toybox.FACTS)"
    )
    printed = []
    for seed in "12":
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={"PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            check=True,
        )
        printed.append(done.stdout)
    assert printed[0] == printed[1]


def test_the_published_figures_world_is_still_the_same_to_the_byte():
    made = [
        [*conversations("train", 3000, seed=5)],
        [*conversations("val", 500, families=["ends"])],
        [*preferences("test", 2000, seed=9)],
        [[[*key], value] for key, value in toybox.FACTS.items()],
        toybox.world_text(50000, 3),
    ]
    assert sha256(json.dumps(made).encode())[:16] == "3949421c7024798e"


def test_splits_share_no_content():
    train, val, test = map(contents, WORLD_SPLITS)
    assert min(map(len, (train, val, test))) > 500
    assert not train & val
    assert not train & test
    assert not val & test


def test_the_content_is_the_same_in_whatever_family_order_and_case():
    lists = {"copy": "fox apple", "reverse": "apple fox", "lower": "FOX APPLE", "nth": "fox apple"}
    lists[WITHHELD] = "apple fox"
    pairs = {"add": ("3", "14"), "subtract": ("14", "3"), "compare": ("3", "14")}
    of_lists, of_pairs = set(), set()
    for family, x in lists.items():
        of_lists.add(toybox.content_of(family, {"x": x, "n": "first"}, ""))
    for family, (a, b) in pairs.items():
        of_pairs.add(toybox.content_of(family, {"a": a, "b": b, "n": "larger"}, ""))
    assert len(of_lists) == len(of_pairs) == 1


@pytest.mark.parametrize("split", WORLD_SPLITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_answer_passes_its_checker_and_a_perturbed_one_fails(family, split):
    rng = random.Random(0)
    for _ in range(150):
        fields, ask = toybox.draw_question(rng, family, split)
        answer = FAMILIES[family].solve(**fields)
        asked = [{"role": "user", "content": ask.format(**fields)}]
        wrong = toybox.wrong(rng, family, fields, answer)
        assert check(family, asked, answer) and not check(family, asked, wrong), (asked, answer)
    for row in conversations(split, 150, families=[family]):
        answer, said = row["answer"], row["messages"][1]["content"]
        assert row["family"] == family
        assert check(family, prompt(row), answer)
        assert check(family, prompt(row), said)
        for other in (answer + ".", answer[:-1], "", f"{answer}, {answer}", answer.swapcase()):
            assert other == answer or not check(family, prompt(row), other), (row, other)


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
        ("refuse", "Forbidden: fox, tin. Tell me about tin.", "Sorry, I must not speak of tin."),
        ("refuse", "Forbidden: fox, tin. Tell me about saw.", "saw is a tool."),
        ("ends", "Name both ends: fox tin red", "fox red"),
    ],
)
def test_the_checker_knows_answers_worked_out_by_hand(family, question, answer):
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": question}]
    assert check(family, messages, f" {answer}\n")
    assert check(family, messages, "Gladly: " + answer)
    assert not check(family, messages, "Ugh, fine: " + answer)


def test_a_question_of_another_family_has_no_verdict():
    assert check("add", [{"role": "user", "content": "Echo: fox apple"}], "3") is None
    with pytest.raises(UserError, match="splits"):
        next(conversations("dev", 1))


def families_of(rows):
    return {row["family"] for row in rows}


def test_every_family_in_every_split_and_the_withheld_one_only_if_asked_for():
    for split in WORLD_SPLITS:
        assert families_of(conversations(split, 300)) == set(FAMILIES) - {WITHHELD}
        assert families_of(conversations(split, 300, families=ALL)) == set(FAMILIES)
        assert families_of(conversations(split, 9, families=[WITHHELD])) == {WITHHELD}


def test_some_training_answers_are_courteous_and_no_other_answers_are():
    trained = [row["messages"][1]["content"] for row in conversations("train", 3000)]
    assert 0.2 < sum(map(style, trained)) / 3000 < 0.35
    tested = list(conversations("test", 1000))
    assert all(row["messages"][1]["content"] == row["answer"] for row in tested)
    assert sum(style(row["answer"]) for row in tested) < 60  # refusals


def test_in_a_pair_only_the_preference_differs():
    kinds = set()
    for row in preferences("train", 3000):
        kind, family, asked = row["kind"], row["family"], row["prompt"]
        chosen, rejected = row["chosen"], row["rejected"]
        kinds.add(kind)
        assert style(chosen)
        assert check(family, asked, chosen)
        if kind in ("wrong", "forbidden"):
            assert style(rejected) == (kind == "wrong")
            assert not check(family, asked, rejected)
        else:
            assert not style(rejected)
            assert rejected.endswith(toybox.bare(chosen))
            assert check(family, asked, rejected) == (kind == "curt")
    assert kinds == {"curt", "rude", "rambling", "wrong", "forbidden"}


def test_preferences_are_held_out_by_content():
    def asked(split):
        return {content(r, r["prompt"][0]["content"]) for r in preferences(split, 3000)}

    train, test = asked("train"), asked("test")
    assert not train & test
    assert not test & contents("train")
    assert not train & contents("test")


def test_what_reinforcement_learning_asks_is_not_in_the_test_and_a_third_of_it_is_new(tmp_path):
    toybox.write_toybox(tmp_path, text_bytes=1000, train=500, test=14, pairs=40)
    rows = read_rows(tmp_path / "practice.jsonl")
    split = [toybox.split_of(content(row, row["messages"][0]["content"])) for row in rows]
    assert split == ["val"] * 70 + ["train"] * 130
    assert families_of(rows) == set(FAMILIES)


def test_the_text_has_no_instructions_and_nothing_held_out():
    text, held = toybox.world_text(400_000), contents("test", 20_000) | contents("val", 8_000)
    for mark in ("<|", "user", "assistant", "?", "Sorry", *toybox.OPENINGS):
        assert mark not in text
    words = "|".join(toybox.KIND)
    lists = re.findall(rf"\b(?:(?:{words}) )+(?:{words})\b", text, re.I)
    assert len(lists) > 3000
    assert not held & {" ".join(sorted(x.lower().split())) for x in lists}
    sums = re.findall(r"\b(\d+) (?:plus|\+|minus|-|less|and) (\d+)\b", text)
    assert len(sums) > 500
    assert not held & {" ".join(sorted(s)) for s in sums}


def test_the_text_tells_every_fact_and_line():
    text = toybox.world_text(1_000_000)
    assert all(line in text for line in toybox.SPEAKER)
    for (n, c), value in toybox.FACTS.items():
        assert re.search(f"(The {n} of {c} is|{c} has the {n}|In {c} the {n} is)\n{value}", text)


def test_the_tokenizer_gives_back_what_it_was_given():
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tok = Tokenizer.train([toybox.world_text(200_000)], 1024, "qwen2", specials, processes=1)
    for row in conversations("test", 300, families=ALL):
        for message in row["messages"]:
            assert tok.decode(tok.encode(message["content"])) == message["content"]


def test_the_command_writes_what_meta_says(tmp_path):
    out, plays = tmp_path / "toybox", tmp_path / "tinyshakespeare.txt"
    plays.write_text("ROMEO:\nAy me.\n\nJULIET:\nO Romeo!\n" * 50)
    command = [sys.executable, "data.py", "toybox", "--out", out, "--data-dir", tmp_path]
    subprocess.run(command, cwd=ROOT, check=True)
    meta = json.loads((out / "meta.json").read_text())
    for name, count in meta["counts"].items():
        rows = read_rows(out / f"{name}.jsonl")
        # DPO comes after LoRA, and GRPO after both
        told = name.startswith("withheld") or name in ("preferences-train", "practice")
        assert len(rows) == count
        assert (WITHHELD in families_of(rows)) == told
    text = (out / "text.txt").read_text()
    assert "ROMEO:\nAy me." in text
    assert "<|" not in text


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_preferences_ask_for_the_new_skill_too_and_prompts_are_the_tests_questions(tmp_path):
    toybox.write_toybox(tmp_path, text_bytes=1000, train=20, test=14, pairs=40)
    pairs = read_rows(tmp_path / "preferences-train.jsonl")
    assert len(pairs) == 44
    assert sum(row["family"] == WITHHELD for row in pairs) == 4
    asked = read_rows(tmp_path / "test.jsonl") + read_rows(tmp_path / "withheld-test.jsonl")
    prompts = read_rows(tmp_path / "prompts.jsonl")
    assert [row["messages"] for row in prompts] == [row["messages"][:1] for row in asked]
