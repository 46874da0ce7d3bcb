"""Rewards that a rule can check, for grpo.py: by toybox's checkers, by a record's checks, by a
function of yours, and terms for what an answer looks like.

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
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from chat import printable
from common import UserError
from training import toybox
from training.exam import keeps


class Reward(NamedTuple):
    name: str
    weight: float
    function: Callable  # (Question, answer) -> a number, or None where it has no rule


def by_toybox(question, answer):
    if question.family not in toybox.FAMILIES:
        return None
    return toybox.check(question.family, question.messages, answer)


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
    name, weight = re.fullmatch(r"(.+?)(?::([-+]?\d*\.?\d+))?", spec).groups()
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
                value = float(reward.function(question, answer) or 0)
            if not math.isfinite(value):
                raise ValueError(f"it returned {value}")
        except (Exception, TooSlow) as error:
            told = printable(f"{question.messages[-1]['content']!r}, answered {answer!r}"[:300])
            reason = f"{type(error).__name__}: {error}"
            print(f"reward   {reward.name} failed: {reason}; asked {told}", file=sys.stderr)
            if args.on_error == "stop":  # the loop saves after this step, and ends
                print("reward   stopping; --on-error skip would go on", file=sys.stderr)
                signal.raise_signal(signal.SIGTERM)
            return math.nan
        total += reward.weight * value
    return total


def check_rules(questions, rewards):
    """UserError names the first question that no rule among the rewards can judge."""
    rules = [reward for reward in rewards if reward.name not in TERMS]
    if any(reward.name not in RULES for reward in rules):
        return  # a function judges anything
    for question in questions if rules else ():
        if all(rule.function(question, "") is None for rule in rules):
            asked = question.messages[-1]["content"][:80]
            names = " or ".join(rule.name for rule in rules)
            raise UserError(f"--reward {names} has no rule for the question {asked!r}")
