"""Rewards that a rule can check, for grpo.py, and the questions they are for. A rule is toybox's
checkers, a record's checks or a function of yours; terms are for what an answer looks like.

    --reward toybox    --reward checks short:0.1    --reward mine.py:judge:0.5

A function gets a training.exam.Question and the answer's text, and returns a number. It runs in
this process: what is in your file can do whatever you can."""

import contextlib
import math
import re
import runpy
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np
import torch

from chat import printable, render
from common import UserError, sha256, warn
from data import PackedRows, held_out, hold_out
from training import toybox
from training.exam import by_toybox, has_val, keeps, read_questions


class Reward(NamedTuple):
    name: str
    weight: float
    function: Callable  # (Question, answer) -> a number, or None where it has no rule


def by_checks(question, answer):
    """The share of the record's checks that are kept."""
    kept = [keeps(answer, kind, value) for kind, value in question.checks]
    return fmean(kept) if kept else None


RULES = {"toybox": by_toybox, "checks": by_checks}
TERMS = {  # what an answer looks like, whatever was asked
    "style": lambda question, answer: toybox.style(answer),
    "short": lambda question, answer: -len(answer) / 100,
}


def read_reward(spec):
    """'toybox', 'style:0.2' or 'file.py:function:0.5' -> Reward"""
    name, weight = re.fullmatch(r"(.*?)(?::([-+]?\d*\.?\d+))?", spec).groups()
    known = RULES | TERMS
    path, _, function = name.rpartition(":")
    if name in known:
        found = known[name]
    elif path.endswith(".py") and Path(path).is_file():
        found = runpy.run_path(path).get(function)
        if not callable(found):
            raise UserError(f"--reward {spec}: {path} has no function {function}")
    else:
        raise UserError(f"--reward {spec}: use {', '.join(known)} or an existing FILE.py:FUNCTION")
    return Reward(name, float(weight or 1), found)


class TooSlow(BaseException):
    """Not an Exception: a reward function that catches those must end all the same."""


@contextlib.contextmanager
def time_limit(seconds):
    """Context: raises TooSlow where Python code takes longer (on Windows nothing does)."""

    def stop(*_):
        raise TooSlow(f"it took longer than --reward-seconds {seconds:g}")

    if not hasattr(signal, "SIGALRM"):
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def judge(rewards, question, answer, args):
    """-> the weighted sum of the rewards; nan, and a line that says why, where one fails."""
    total = 0.0
    for reward in rewards:
        try:
            with time_limit(args.reward_seconds):
                value = reward.function(question, answer)
            if reward.name in RULES:
                value = value or 0  # None: another rule judges this question
            if value is None or not math.isfinite(value):
                raise ValueError(f"it returned {value}")
        except (Exception, TooSlow) as error:
            told = printable(f"{question.messages[-1]['content']!r}, answered {answer!r}"[:300])
            reason = f"{type(error).__name__}: {error}"
            print(f"reward   {reward.name} failed: {reason}; asked {told}", file=sys.stderr)
            if args.on_error == "stop":  # the loop saves after this step, and ends
                print("reward   stopping; --on-error skip would go on", file=sys.stderr)
                signal.raise_signal(signal.SIGTERM)
            return math.nan
        total += reward.weight * float(value)
    return total


def check_rules(questions, rewards):
    """UserError names the first question that no rule among the rewards can judge."""
    names = [reward.name for reward in rewards if reward.name not in TERMS]
    if not names or not set(names) <= RULES.keys():
        return  # nothing has to be judged, or a function judges anything
    for question in questions:
        if all(RULES[name](question, "") is None for name in names):
            asked = question.messages[-1]["content"][:80]
            raise UserError(f"--reward {' or '.join(names)} has no rule for the question {asked!r}")


# --------------------------------------------------------------------------------------- questions
class Asked(NamedTuple):
    x: torch.Tensor  # (R,) numbers of questions


class Questions:
    """A split for data.Batches: a row is a question's number."""

    def __init__(self, questions, prompts):
        self.questions = questions
        self.prompts = prompts  # their ids
        self.sha256 = sha256(repr((questions, prompts)).encode())

    def __len__(self):  # tokens, as of a Split
        return sum(map(len, self.prompts))

    def part(self, numbers):
        return Questions([self.questions[i] for i in numbers], [self.prompts[i] for i in numbers])

    def plan(self, context, seed, epoch):
        order = np.random.default_rng([seed, epoch]).permutation(len(self.prompts))
        return PackedRows([*range(len(order))], order)

    def fill(self, rows, context):
        return Asked(torch.tensor(rows))


def read_split(args, tok, rewards, split):
    """-> Questions, all of which the rewards can judge."""
    questions = read_questions(args, split)
    if args.families:
        unknown = set(args.families) - {question.family for question in questions}
        if unknown:
            raise UserError(f"--families {' '.join(unknown)}: no question is of this family")
        asked = args.families  # and of all others every tenth question
        questions = [q for i, q in enumerate(questions) if q.family in asked or held_out(0.1, i)]
    check_rules(questions, rewards)
    prompts = [render(tok, q.messages, True, q.tools)[0] for q in questions]
    fitting = [i for i, ids in enumerate(prompts) if len(ids) + args.max_tokens <= args.context]
    if len(fitting) < len(prompts):
        print(
            f"skipped  {len(prompts) - len(fitting):,} of {len(prompts):,} prompts: with answers "
            f"of {args.max_tokens} tokens they do not fit into --context {args.context:,}"
        )
    return Questions(questions, prompts).part(fitting)


def load_questions(args, tok, rewards):
    """-> Questions to train on, and to validate on"""
    names = args.val or list(filter(has_val, args.data))
    train = read_split(args, tok, rewards, "train")
    if not args.val and 0 < len(names) < len(args.data):
        warn(f"of --data only {' '.join(names)} is validated on; --val says otherwise")
    if names:
        everything = replace(args, data=names, examples=200, families=())
        val = read_split(everything, tok, rewards, "val")
    else:
        numbers, held = hold_out(0.05, range(len(train.prompts)))
        train, val = train.part(numbers), train.part(held)
    for name, found, least in (("training", train, args.batch), ("validation", val, 1)):
        if len(found.prompts) < least:
            raise UserError(
                f"{len(found.prompts)} questions for {name} of at least {least}: give more of "
                "them, or use a smaller --batch"
            )
    return train, val
