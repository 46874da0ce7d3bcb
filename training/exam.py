"""Questions put to a model, the marks it gets, and the report of them."""

import json
import math
import re
from typing import NamedTuple

from common import Metrics, write_atomic
from training import report

# Instructions whose keeping a rule can verify, in the manner of IFEval (Zhou et al. 2023). A record says {"checks": [{"kind":
# "max_words", "value": 20}, ...]}; each kind has the type of its value and the rule, a function of (answer, value).
CHECKS = {
    "min_words": (int, lambda text, n: len(text.split()) >= n),
    "max_words": (int, lambda text, n: len(text.split()) <= n),
    "max_characters": (int, lambda text, n: len(text.strip()) <= n),
    "sentences": (int, lambda text, n: len(re.findall(r"[.!?]+(?=\s|$)", text)) == n),
    "paragraphs": (
        int,
        lambda text, n: len([p for p in re.split(r"\n\s*\n", text) if p.strip()]) == n,
    ),
    "bullets": (int, lambda text, n: len(re.findall(r"^ *[-*•] ", text, re.M)) == n),
    "placeholders": (int, lambda text, n: len(re.findall(r"\[[^\[\]]+\]", text)) >= n),
    "highlights": (int, lambda text, n: len(re.findall(r"\*[^*\n]+\*", text)) >= n),
    "keywords": (list, lambda text, words: all(has_word(text, word) for word in words)),
    "forbidden": (list, lambda text, words: not any(has_word(text, word) for word in words)),
    "starts_with": (str, lambda text, start: text.strip().startswith(start)),
    "ends_with": (str, lambda text, end: text.strip().endswith(end)),
    "lowercase": (bool, lambda text, yes: (text == text.lower()) == yes),
    "uppercase": (bool, lambda text, yes: (text == text.upper()) == yes),
    "commas": (bool, lambda text, yes: ("," in text) == yes),
    "quoted": (
        bool,
        lambda text, yes: (re.fullmatch(r'".*"', text.strip(), re.S) is not None) == yes,
    ),
    "title": (bool, lambda text, yes: (re.search("<<[^<>\\n]+>>", text) is not None) == yes),
    "json": (bool, lambda text, yes: is_json(text) == yes),
}


def has_word(text, word):
    return re.search(rf"(?<!\w){re.escape(str(word))}(?!\w)", text, re.I) is not None


def is_json(text):
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


class Marks(NamedTuple):
    """What one model made of the questions."""

    texts: list  # its answers
    right: list  # of True, False, or None where nothing was expected
    scores: dict  # {what: (how many, out of how many)}
    perplexity: float  # of the expected answers, per token; nan without any


def wilson(k, n, z=1.96):
    """The 95 % interval of a proportion k of n (Wilson 1927), which unlike the normal one holds near 0 and 1 and for few."""
    p, d = k / n, 1 + z * z / n
    middle, half = (
        (p + z * z / (2 * n)) / d,
        z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / d,
    )
    return max(0.0, middle - half), min(1.0, middle + half)


def write_marks(out, names, marks, questions, command):
    """The marks of one or two models (the examined, what it was before) -> OUT/report.md, report.html, answers.jsonl, and for the
    first a row of metrics.jsonl."""

    def share(k, n):
        low, high = wilson(k, n)
        return f"{k / n:.1%} ({low:.1%} to {high:.1%})"

    table = [
        [what, f"{n:,}", *(share(*m.scores[what]) for m in marks)]
        for what, (_, n) in marks[0].scores.items()
    ]
    table.append(
        [
            "perplexity of the expected answers",
            f"{sum(q.expected is not None for q in questions):,}",
            *(f"{m.perplexity:.3f}" for m in marks),
        ]
    )
    shown = [
        [
            q.messages[-1]["content"],
            q.expected or "",
            *(report.MARK[m.right[i]] + m.texts[i] for m in marks),
        ]
        for i, q in enumerate(questions)
    ]
    report.write_report(
        out,
        [
            f"# {names[0]}: {len(questions):,} questions",
            f"    {command}",
            "## Scores, with 95 % intervals",
            report.Table(["", "questions", *names], table),
            "## Answers",
            report.Table(["asked", "expected", *names], shown),
        ],
    )
    lines = [
        {
            "messages": q.messages,
            "expected": q.expected,
            "family": q.family,
            "answers": {name: m.texts[i] for name, m in zip(names, marks)},
            "right": {name: m.right[i] for name, m in zip(names, marks)},
        }
        for i, q in enumerate(questions)
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_atomic(out / "answers.jsonl", lambda path: path.write_text(text, encoding="utf-8"))
    last = (Metrics.read(out / "metrics.jsonl") if (out / "metrics.jsonl").is_file() else [])[
        -1:
    ] or [{"step": 0, "seconds": 0.0}]
    values = {what: k / n for what, (k, n) in marks[0].scores.items()}
    values |= {} if math.isnan(marks[0].perplexity) else {"perplexity": marks[0].perplexity}
    with open(out / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(
            json.dumps({"step": last[0]["step"], "seconds": last[0]["seconds"], "eval": values})
            + "\n"
        )
    for row in table:
        print(f"{row[0]:36s}{row[1]:>7s}  " + "  ".join(f"{cell:28s}" for cell in row[2:]))
    print(f"wrote    {out}/report.md, report.html, answers.jsonl, metrics.jsonl")
