"""An exam: questions with known answers or checkable demands, the marks of a model, the report.

    python finetune.py eval MODEL --data data/toybox --before BASE      # the command that holds one

This file knows no model: it reads the questions, and marks the answers it is given."""

import json
import math
import operator
import re
from collections import defaultdict
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import chat
from common import RECORD_FILES, Metrics, UserError, without_gz
from training import toybox
from training.report import VERDICT, markdown_table, write_page

ANSWERS_SHOWN = 40  # in report.md

# --------------------------------------------------------------------------------------- questions
# Demands whose keeping a rule can verify, in the manner of IFEval (Zhou et al. 2023). A record asks
# for them so: {"checks": [{"kind": "max_words", "value": 20}, ...]}.
COUNTED = {  # kind: (how the count must compare with the value, a pattern of what is counted)
    "min_words": (operator.ge, r"\S+"),
    "max_words": (operator.le, r"\S+"),
    "max_characters": (operator.le, r"(?s:.)"),
    "sentences": (operator.eq, r"[.!?]+(?=\s|$)"),
    "paragraphs": (operator.eq, r"(?:^|\n\s*\n)\s*\S"),
    "bullets": (operator.eq, r"(?m)^ *[-*•] "),
    "placeholders": (operator.ge, r"\[[^\[\]]+\]"),
    "highlights": (operator.ge, r"\*[^*\n]+\*"),
}


def is_json(text):
    """Is it JSON, bare or in a Markdown fence?"""
    fenced = re.fullmatch(r"(?s)```(?:json)?\n(.*)\n```", text)
    try:
        json.loads(fenced[1] if fenced else text)
        return True
    except (ValueError, RecursionError):
        return False


YES_OR_NO = {
    "lowercase": lambda text: text == text.lower(),
    "uppercase": lambda text: text == text.upper(),
    "commas": lambda text: "," in text,
    "quoted": lambda text: len(text) > 1 and text[0] == text[-1] == '"',
    "title": lambda text: re.search(r"<<[^<>\n]+>>", text) is not None,
    "json": is_json,
}
CHECKS = {  # kind: type of its value
    **dict.fromkeys(COUNTED, int),
    **dict.fromkeys(YES_OR_NO, bool),
    **dict.fromkeys(("keywords", "forbidden"), list),
    **dict.fromkeys(("starts_with", "ends_with"), str),
}


# Scripts that put no space around a word: Thai to Burmese, Khmer, and from Chinese on.
NO_SPACES = re.compile("[\u0e00-\u109f\u1780-\u17ff\u2e80-\U0003ffff]")


def has_word(text, word):
    """Does a text have the word, whole and in any case? Of a script in NO_SPACES anywhere."""
    pattern = re.escape(word)
    if not NO_SPACES.search(word):
        pattern = rf"(?<!\w){pattern}(?!\w)"
    return re.search(pattern, text, re.I) is not None


def keeps(text, kind, value):
    """Does an answer keep to a check? An empty one keeps to none, as in IFEval."""
    text = text.strip()
    if not text:
        return False
    if kind in COUNTED:
        compare, pattern = COUNTED[kind]
        return compare(len(re.findall(pattern, text)), value)
    if kind in YES_OR_NO:
        return YES_OR_NO[kind](text) == value
    if kind == "starts_with":
        return text.startswith(value.lstrip())
    if kind == "ends_with":
        return text.endswith(value.rstrip())
    found = [has_word(text, str(word)) for word in value]
    return all(found) if kind == "keywords" else not any(found)


class Question(NamedTuple):
    messages: list  # up to the answer
    expected: str | None  # what should be said, if the record knows
    family: str
    checks: list  # of (kind, value)
    tools: list | None = None


def split_file(folder, split):
    """FOLDER/SPLIT.jsonl, or with another of RECORD_FILES' endings."""
    found = sorted(Path(folder).glob(f"{split}.*"))
    found = [path for path in found if without_gz(path).endswith(RECORD_FILES)]
    if len(found) > 1:
        raise UserError(f"{' and '.join(map(str, found))}: name the one that is meant")
    return found[0] if found else Path(folder, f"{split}.jsonl")


def has_val(name):
    """Whether a source brings questions of its own to validate on."""
    return name == "toybox" or split_file(name, "val").is_file()


def source_records(name, split, count, ignore=""):
    """Yield (record, messages, tools): of a file, of a FOLDER's split, or `count` of toybox's."""
    if name == "toybox":
        rows = toybox.conversations(split, count)
        return ((row, row["messages"], None) for row in rows)
    return chat.read_records(split_file(name, split) if Path(name).is_dir() else name, ignore)


def read_questions(args, split="test"):
    """args.data, at most args.examples of each source -> [Question]. What is asked is all before
    the last answer. A record may end with the user, and have only checks or something that a reward
    function of yours reads; without either, an exam only shows its answer."""
    questions = []
    for name in args.data:
        records = source_records(name, split, args.examples, args.ignore_keys)
        for n, (record, talk, tools) in enumerate(islice(records, args.examples), 1):
            where = f"{name}: record {n}"
            checks = read_checks(record, where)
            asked = chat.asked_in(talk)
            if not asked:
                raise UserError(f"{where} asks nothing")
            expected = None
            if len(asked) < len(talk):
                expected = talk[-1]["content"]
                more = ", ".join(talk[-1].keys() - {"role", "content"})
                if more:
                    raise UserError(f"{where}: an exam expects a text, not an answer's {more}")
            family = str(record.get("family") or "")
            questions.append(Question(asked, expected, family, checks, tools))
    if not questions:
        raise UserError(f"{' '.join(args.data)}: no questions")
    return questions


def read_checks(record, where):
    """A record's checks -> [(kind, value)]; UserError for a kind or a type that is unknown."""
    checks = []
    for check in chat.as_list(record.get("checks")):
        match check:
            case {"kind": str(kind), "value": value, **more} if not more and (
                type(value) is CHECKS.get(kind)
            ):
                checks.append((kind, value))
            case _:
                known = ", ".join(f"{kind} ({of.__name__})" for kind, of in CHECKS.items())
                raise UserError(f"{where} has a check {check}; known kinds and values: {known}")
    return checks


# ------------------------------------------------------------------------------------------- marks
class Marks(NamedTuple):
    """What one model made of the questions."""

    texts: list  # its answers
    right: list  # of True, False, or None where nothing was expected
    scores: dict  # {what: (how many, out of how many)}


def by_toybox(question, text):
    """toybox's verdict on a text, None where it did not ask: a question of yours may be of a family
    that is called like one of its own, but then its checker refuses what your record expects."""
    asked = question.family, question.messages
    if question.expected is None or toybox.check(*asked, question.expected):
        return toybox.check(*asked, text)
    return None


def is_right(question, text):
    """By the family's checker if toybox asked, else by equality but for outer space.

    None if nothing was expected."""
    if question.expected is None:
        return None
    verdict = by_toybox(question, text)
    return text.strip() == question.expected.strip() if verdict is None else verdict


def results_of(question, right, text, ended):
    """Yield (what, whether it was so) for everything that was asked of an answer."""
    yield "ended by itself", ended
    if right is not None:
        yield "exact match", right
        if question.family:
            yield f"exact match: {question.family}", right
    kept = [keeps(text, kind, value) for kind, value in question.checks]
    for (kind, _), yes in zip(question.checks, kept):
        yield f"check: {kind}", yes
    if kept:
        yield "check: all of an answer's", all(kept)


def mark_answers(questions, answers):
    """The questions, and a (text, did it end itself) for each -> Marks."""
    right = []
    results = defaultdict(list)
    for question, (text, ended) in zip(questions, answers):
        right.append(is_right(question, text))
        for what, yes in results_of(question, right[-1], text, ended):
            results[what].append(yes)
    order = sorted(results, key=lambda what: (":" in what, what))  # the general first
    scores = {what: (sum(results[what]), len(results[what])) for what in order}
    return Marks([text for text, _ in answers], right, scores)


def wilson(k, n, z=1.96):
    """The 95 % interval of a proportion k of n (Wilson 1927), good for few and near 0 and 1 too."""
    p = k / n
    shrink = 1 + z * z / n
    middle = (p + z * z / (2 * n)) / shrink
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / shrink
    return max(0.0, middle - half), min(1.0, middle + half)


# ------------------------------------------------------------------------------------------ report
def write_marks(out, names, marks, questions, command):
    """The marks of one or two models (the examined, what it was before) -> OUT/report.md,
    answers.jsonl, and for the first a row of metrics.jsonl."""
    answers, rows = [], []
    for i, q in enumerate(questions):
        texts = [m.texts[i] for m in marks]
        right = [m.right[i] for m in marks]
        verdicts = [VERDICT[yes] + text for yes, text in zip(right, texts)]
        answers.append([q.messages[-1]["content"], q.expected or "", *verdicts])
        row = {
            "messages": q.messages,
            "expected": q.expected,
            "family": q.family,
            "answers": dict(zip(names, texts)),
            "right": dict(zip(names, right)),
        }
        rows.append(row)
    scores = score_rows(marks)
    blocks = [
        f"# {names[0]}: {len(questions):,} questions",
        f"    {command}",
        "## Scores, with 95 % intervals",
        markdown_table(["", "questions", *names], scores),
        f"## Answers, the first {ANSWERS_SHOWN}; answers.jsonl has them all",
        markdown_table(["asked", "expected", *names], answers[:ANSWERS_SHOWN]),
    ]
    write_page(out, blocks)
    chat.write_records(out / "answers.jsonl", rows)
    metrics = Metrics(out, math.inf)
    shares = {what: k / n for what, (k, n) in marks[0].scores.items()}
    metrics.log(metrics.step, eval=shares)  # where the training that it tells of ended
    for what, count, *cells in scores:
        print(f"{what:36s}{count:>7s}  " + "  ".join(f"{cell:28s}" for cell in cells))
    print(f"wrote    {out}/report.md, answers.jsonl, metrics.jsonl")


def score_rows(marks):
    """[what, how many questions, the share of each model with its interval]"""
    rows = []
    for what, (_, n) in marks[0].scores.items():
        row = [what, f"{n:,}"]
        for m in marks:
            k, n = m.scores[what]
            low, high = wilson(k, n)
            row.append(f"{k / n:.1%} ({low:.1%} to {high:.1%})")
        rows.append(row)
    return rows
