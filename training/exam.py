"""An exam: questions with known answers or checkable demands, the marks of a model, the report.

    python finetune.py eval MODEL --data data/toybox --before BASE      # the command that holds one

This file knows no model: `examine` is given a function that answers prompts."""

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import chat
from common import Metrics, UserError, write_atomic
from training import toybox
from training.report import VERDICT, Table, write_page


# --------------------------------------------------------------------------------------- questions
class Check(NamedTuple):
    takes: type  # of the value that a record gives
    holds: Callable  # (answer, value) -> bool


# Demands whose keeping a rule can verify, in the manner of IFEval (Zhou et al. 2023). A record asks
# for them so: {"checks": [{"kind": "max_words", "value": 20}, ...]}.
CHECKS = {
    "min_words": Check(int, lambda text, n: len(text.split()) >= n),
    "max_words": Check(int, lambda text, n: len(text.split()) <= n),
    "max_characters": Check(int, lambda text, n: len(text.strip()) <= n),
    "sentences": Check(int, lambda text, n: count_of(r"[.!?]+(?=\s|$)", text) == n),
    "paragraphs": Check(int, lambda text, n: count_of(r"(?:^|\n\s*\n)\s*\S", text) == n),
    "bullets": Check(int, lambda text, n: count_of(r"(?m)^ *[-*•] ", text) == n),
    "placeholders": Check(int, lambda text, n: count_of(r"\[[^\[\]]+\]", text) >= n),
    "highlights": Check(int, lambda text, n: count_of(r"\*[^*\n]+\*", text) >= n),
    "keywords": Check(list, lambda text, words: all(has_word(text, w) for w in words)),
    "forbidden": Check(list, lambda text, words: not any(has_word(text, w) for w in words)),
    "starts_with": Check(str, lambda text, start: text.strip().startswith(start)),
    "ends_with": Check(str, lambda text, end: text.strip().endswith(end)),
    "lowercase": Check(bool, lambda text, yes: (text == text.lower()) == yes),
    "uppercase": Check(bool, lambda text, yes: (text == text.upper()) == yes),
    "commas": Check(bool, lambda text, yes: ("," in text) == yes),
    "quoted": Check(bool, lambda text, yes: is_quoted(text.strip()) == yes),
    "title": Check(bool, lambda text, yes: bool(re.search(r"<<[^<>\n]+>>", text)) == yes),
    "json": Check(bool, lambda text, yes: is_json(text) == yes),
}


def count_of(pattern, text):
    return len(re.findall(pattern, text))


def is_quoted(text):
    return len(text) > 1 and text[0] == text[-1] == '"'


def has_word(text, word):
    return re.search(rf"(?<!\w){re.escape(str(word))}(?!\w)", text, re.I) is not None


def is_json(text):
    """Is it JSON, bare or in a Markdown fence?"""
    try:
        json.loads(re.sub(r"^```(?:json)?\n(.*)\n```$", r"\1", text.strip(), flags=re.S))
        return True
    except (ValueError, RecursionError):
        return False


class Question(NamedTuple):
    messages: list  # up to the answer
    expected: str | None  # what should be said, if the record knows
    family: str
    checks: list  # of (kind, value)


def source_records(name, split, count):
    """(record, messages, tools)s of a source: a file, FOLDER/SPLIT.jsonl, or `count` that toybox
    makes."""
    if name == "toybox":
        families = [family for family in toybox.FAMILIES if family != toybox.WITHHELD]
        rows = toybox.conversations(split, count, families=families)  # families in equal shares
        return ((row, row["messages"], None) for row in rows)
    return chat.read_records(Path(name) / f"{split}.jsonl" if Path(name).is_dir() else name)


def read_questions(args):
    """args.data, at most args.examples of each source -> [Question]. What is asked is all before
    the last answer; a record may end with the user and have only checks."""
    questions = []
    for name in args.data:
        records = islice(source_records(name, "test", args.examples), args.examples)
        for n, (record, talk, _) in enumerate(records, 1):
            checks = read_checks(record, f"{name}: record {n}")
            asked, expected = talk, None
            if talk and talk[-1]["role"] == "assistant":
                asked, expected = talk[:-1], talk[-1]["content"]
            questions.append(Question(asked, expected, str(record.get("family", "")), checks))
    if not questions:
        raise UserError(f"{' '.join(args.data)}: no questions")
    return questions


def read_checks(record, where):
    """The checks of a record -> [(kind, value)]. UserError for an unknown kind, a value of another
    type."""
    checks = []
    for check in record.get("checks") or []:
        kind, value = check, None
        if isinstance(check, dict):
            kind, value = check.get("kind"), check.get("value")
        if str(kind) not in CHECKS or type(value) is not CHECKS[kind].takes:
            known = ", ".join(f"{name} ({rule.takes.__name__})" for name, rule in CHECKS.items())
            raise UserError(
                f"{where} has a check {kind!r} with {value!r}; known kinds and values: {known}"
            )
        checks.append((kind, value))
    return checks


# ------------------------------------------------------------------------------------------- marks
class Marks(NamedTuple):
    """What one model made of the questions."""

    texts: list  # its answers
    right: list  # of True, False, or None where nothing was expected
    scores: dict  # {what: (how many, out of how many)}
    perplexity: float  # of the expected answers, per token; nan without any


def is_right(question, text):
    """By the family's checker if toybox asked, else by equality but for outer space."""
    if question.family in toybox.FAMILIES:
        return toybox.check(question.family, question.messages, text)
    return text.strip() == question.expected.strip()


def examine(questions, tok, answer, perplexity=math.nan):
    """Put the questions to `answer`: prompts, lists of ids -> [(text, whether it ended)] ->
    Marks."""
    given = answer([chat.render(tok, q.messages, True)[0] for q in questions])
    # {what: [whether it was so, for each answer that was asked for it]}
    results = defaultdict(list)
    right = []
    for question, (text, ended) in zip(questions, given):
        results["ended by itself"].append(ended)
        right.append(None if question.expected is None else is_right(question, text))
        if right[-1] is not None:
            results["exact match"].append(right[-1])
            if question.family:
                results[f"exact match: {question.family}"].append(right[-1])
        kept = [CHECKS[kind].holds(text, value) for kind, value in question.checks]
        for (kind, _), yes in zip(question.checks, kept):
            results[f"check: {kind}"].append(yes)
        if kept:
            results["check: all of an answer's"].append(all(kept))
    # the general before the particular
    order = sorted(results, key=lambda what: (":" in what, what))
    scores = {what: (sum(results[what]), len(results[what])) for what in order}
    return Marks([text for text, _ in given], right, scores, perplexity)


def wilson(k, n, z=1.96):
    """The 95 % interval of a proportion k of n (Wilson 1927), good near 0 and 1 and for few, unlike
    the normal one."""
    p = k / n
    shrink = 1 + z * z / n
    middle = (p + z * z / (2 * n)) / shrink
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / shrink
    return max(0.0, middle - half), min(1.0, middle + half)


# ------------------------------------------------------------------------------------------ report
def write_marks(out, names, marks, questions, command):
    """The marks of one or two models (the examined, what it was before) -> OUT/report.md,
    report.html, answers.jsonl, and for the first a row of metrics.jsonl."""
    scores = score_table(names, marks, questions)
    title = f"# {names[0]}: {len(questions):,} questions"
    heading = "## Scores, with 95 % intervals"
    answers = answer_table(names, marks, questions)
    write_page(out, [title, f"    {command}", heading, scores, "## Answers", answers])
    lines = []
    for i, question in enumerate(questions):
        row = {
            "messages": question.messages,
            "expected": question.expected,
            "family": question.family,
            "answers": {name: m.texts[i] for name, m in zip(names, marks)},
            "right": {name: m.right[i] for name, m in zip(names, marks)},
        }
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    text = "".join(lines)
    write_atomic(out / "answers.jsonl", lambda path: path.write_text(text, encoding="utf-8"))
    log_scores(out / "metrics.jsonl", marks[0])
    for what, count, *cells in scores.rows:
        print(f"{what:36s}{count:>7s}  " + "  ".join(f"{cell:28s}" for cell in cells))
    print(f"wrote    {out}/report.md, report.html, answers.jsonl, metrics.jsonl")


def score_table(names, marks, questions):
    rows = []
    for what, (_, n) in marks[0].scores.items():
        rows.append([what, f"{n:,}", *(share_of(*m.scores[what]) for m in marks)])
    known = sum(question.expected is not None for question in questions)
    perplexities = [f"{m.perplexity:.3f}" for m in marks]
    rows.append(["perplexity of the expected answers", f"{known:,}", *perplexities])
    return Table(["", "questions", *names], rows)


def share_of(k, n):
    low, high = wilson(k, n)
    return f"{k / n:.1%} ({low:.1%} to {high:.1%})"


def answer_table(names, marks, questions):
    rows = []
    for i, question in enumerate(questions):
        said = [VERDICT[m.right[i]] + m.texts[i] for m in marks]
        rows.append([question.messages[-1]["content"], question.expected or "", *said])
    return Table(["asked", "expected", *names], rows)


def log_scores(path, marks):
    """Append the scores to metrics.jsonl, at the step where the training that it tells of ended."""
    rows = Metrics.read(path) if path.is_file() else []
    last = rows[-1] if rows else {"step": 0, "seconds": 0.0}
    values = {what: k / n for what, (k, n) in marks.scores.items()}
    if not math.isnan(marks.perplexity):
        values["perplexity"] = marks.perplexity
    row = {"step": last["step"], "seconds": last["seconds"], "eval": values}
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
