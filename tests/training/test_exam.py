"""training/exam.py: what the checks verify, what is right, the intervals, the report."""

import json
from types import SimpleNamespace

import pytest

from common import UserError
from training import toybox
from training.exam import (
    CHECKS,
    Question,
    by_toybox,
    is_right,
    keeps,
    mark_answers,
    read_questions,
    wilson,
    write_marks,
)


def test_wilson_intervals_are_the_published_ones():
    """Newcombe 1998, table I, method 3."""
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
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
        ("keywords", ["红", "แดง"], "一个红苹果 สีแดงสด", "红"),
        ("forbidden", ["red"], "reddish", "Red!"),
        ("starts_with", "Yes", " Yes, it is", "No, yes"),
        ("ends_with", "bye.\n", "ok bye. ", "bye. ok"),
        ("lowercase", True, "abc 1", "aBc"),
        ("uppercase", True, "ABC 1", "ABc"),
        ("commas", False, "a b", "a, b"),
        ("quoted", True, '"a\nb"', '"a" b'),
        ("title", True, "<<Title>> x", "Title"),
        ("json", True, '```json\n{"a": 1}\n```', "{a: 1}"),
    ],
)
def test_checks_verify_what_they_say(kind, value, good, bad):
    assert type(value) is CHECKS[kind]
    assert keeps(good, kind, value)
    assert not keeps(bad, kind, value)
    assert not keeps(" \n", kind, value)


def test_toybox_questions_are_marked_by_its_own_checker():
    row = next(toybox.conversations("test", 1))
    question = Question(row["messages"][:-1], row["answer"], row["family"], [])
    assert is_right(question, row["answer"] + " ")
    assert not is_right(question, row["answer"] + "x")


@pytest.mark.parametrize(
    "family, asked",
    [
        ("add", "What is 3 plus 4?"),
        ("add", "What is x plus y?"),
        ("fact", "What is the capital of France?"),
        ("category", "Name the metal in this list:\nfox tea"),
        ("sort", "Arrange: b a"),
        ("copy", "Translate: fox"),
    ],
)
def test_a_question_of_yours_is_not_toyboxs_for_the_name_of_its_family(family, asked):
    question = Question([{"role": "user", "content": asked}], "It is so.", family, [])
    assert is_right(question, "It is so.")
    assert not is_right(question, "7")
    assert by_toybox(question, "7") is None


def test_other_questions_are_marked_by_equality_but_for_outer_space():
    assert is_right(Question([], "Yes. ", "", []), "Yes.")
    assert not is_right(Question([], "Yes", "", []), "yes")


CHECK = {"kind": "max_words", "value": 1}


def read_one(record, folder):
    """The question of a file that has only this record."""
    path = folder / "q.jsonl"
    path.write_text(json.dumps(record))
    args = SimpleNamespace(data=[str(path)], examples=1, ignore_keys="mood")
    [question] = read_questions(args)
    return question


def test_a_question_is_all_before_the_answer_and_a_null_is_as_good_as_absent(tmp_path):
    record = {"prompt": "q", "completion": "a", "family": None, "checks": [CHECK], "mood": 1}
    found = read_one(record, tmp_path)
    assert found == ([{"role": "user", "content": "q"}], "a", "", [("max_words", 1)], None)


@pytest.mark.parametrize(
    "record, told",
    [
        ({"checks": 5}, "record 1 has a check 5; known kinds"),
        ({"checks": [{**CHECK, "unit": "lines"}]}, "record 1 has a check .*'unit'"),
        ({"checks": [{"kind": "max_words", "value": True}]}, "record 1 has a check .*True"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "record 1 asks nothing"),
    ],
)
def test_a_question_that_cannot_be_marked_is_named(record, told, tmp_path):
    with pytest.raises(UserError, match=told):
        read_one({"messages": [{"role": "user", "content": "q"}], **record}, tmp_path)


EVIL = "<script>alert(1)</script> | red\n\nblue & green"


@pytest.fixture
def marked():
    """Four questions and the marks of somebody who always says red -> (questions, Marks)."""
    asked = [{"role": "user", "content": EVIL}]
    questions = [
        Question(asked, "red", "mine", [("max_words", 1), ("keywords", ["blue"])]),
        Question(asked, "blue", "mine", []),
        Question(asked, "red", "", []),
        Question(asked, None, "", [("json", False)]),
    ]
    return questions, mark_answers(questions, [("red", True)] * 4)


def test_marks_count_what_was_asked_for(marked):
    _, marks = marked
    assert marks.right == [True, False, True, None]
    assert marks.scores == {
        "ended by itself": (4, 4),
        "exact match": (2, 3),
        "exact match: mine": (1, 2),
        "check: all of an answer's": (1, 2),
        "check: json": (1, 1),
        "check: keywords": (0, 1),
        "check: max_words": (1, 1),
    }


def test_the_marks_are_written_as_a_report_as_lines_and_as_a_row(marked, tmp_path):
    questions, marks = marked
    write_marks(tmp_path, ["now", "before"], [marks, marks], questions, "the command")
    report = (tmp_path / "report.md").read_text()
    assert r"<script>alert(1)</script> \| red ⏎ blue & green" in report
    assert "| exact match | 3 | 66.7% (20.8% to 93.9%) |" in report
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    assert json.loads(lines[1])["right"] == {"now": False, "before": False}
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row["step"] == 0
    assert row["eval"]["exact match"] == pytest.approx(2 / 3)


def test_a_report_shows_forty_answers_and_all_scores(tmp_path):
    asked = [{"role": "user", "content": "q"}]
    questions = [Question(asked, "red", f"family {i}", []) for i in range(50)]
    marks = mark_answers(questions, [("red", True)] * 50)
    write_marks(tmp_path, ["now"], [marks], questions, "the command")
    report = (tmp_path / "report.md").read_text()
    assert report.count("| exact match: family ") == 50
    assert report.count("| q | red | ✓ red |") == 40
