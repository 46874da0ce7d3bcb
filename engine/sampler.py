"""From logits to tokens: what a request may ask for (Sampling), and the draw for a whole batch.

    tokens, failed = draw_tokens(logits, rows, u)     # logits (R, V), one SamplingRow each, u (R,)

Randomness is counter-based: one uniform number per (seed, position). So a token depends on its own
request and on nothing else in the batch, and survives preemption and speculation. The plain twin
is Transformer.generate (one row, temperature and top-k); tests/test_generate.py compares the two.
"""

import functools
import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from common import UserError

CANDIDATES = 1024  # on a CPU, top-p looks at so many tokens before it sorts the whole vocabulary
UNLIMITED = 1 << 30
MOST_BIAS = 1e9  # more than any logit, and far below what float32 holds


@dataclass
class Sampling:
    """How one request is sampled. Filters apply in the order of the fields, as in transformers."""

    max_tokens: int = 256  # at most so many new tokens
    min_tokens: int = 0  # end-of-text and stop ids cannot come before so many
    # on every token of prompt and output (CTRL, Keskar et al. 2019)
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0  # subtracted from every token of the output (OpenAI)
    frequency_penalty: float = 0.0  # subtracted once per occurrence in the output (OpenAI)
    logit_bias: dict | None = None  # {token id: added to its logit}
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # the k likeliest; 0 is all
    top_p: float = 1.0  # the likeliest that together have this probability (Holtzman et al. 2020)
    min_p: float = 0.0  # those at least this fraction of the likeliest (Nguyen et al. 2024)
    seed: int | None = None  # same seed, same text; None draws one
    logprobs: int | None = None  # None: none; 0: of the chosen token; n: of the n likeliest too
    stop: tuple = ()  # strings that end the text; they are not part of it
    stop_ids: tuple = ()  # token ids that end the text
    ignore_eos: bool = False  # go on past end-of-text
    n: int = 1  # so many answers
    constraint: Any = None  # grammar.Constraint: what each token may be; every answer gets a copy

    def check(self, vocab_size):
        """UserError for what no model could do."""
        ranges = {  # integers where the bounds are
            "max_tokens": (1, UNLIMITED),
            "min_tokens": (0, self.max_tokens),
            "repetition_penalty": (1e-3, 1e3),
            "presence_penalty": (-100.0, 100.0),
            "frequency_penalty": (-100.0, 100.0),
            "temperature": (0.0, 1e6),
            "top_k": (0, UNLIMITED),
            "top_p": (1e-12, 1.0),
            "min_p": (0.0, 1.0),
            "seed": (-(1 << 63), 1 << 63),
            "logprobs": (0, min(100, vocab_size)),
            "n": (1, 128),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if value is None and getattr(Sampling, name) is None:
                continue  # not asked for
            kind = type(high)
            if type(value) not in (int, kind) or not low <= value <= high:
                raise UserError(f"{name} is {value!r}, not {kind.__name__} {low:g} to {high:g}")
        kinds: dict = {
            "stop": list | tuple,
            "stop_ids": list | tuple,
            "ignore_eos": bool,
            "logit_bias": dict | None,
        }
        for name, allowed in kinds.items():
            value = getattr(self, name)
            if not isinstance(value, allowed):
                raise UserError(f"{name} is {value!r}, a {type(value).__name__}")
        if not all(isinstance(text, str) and text for text in self.stop):
            raise UserError(f"stop is {self.stop!r}, but must be non-empty strings")
        for name in ("stop_ids", "logit_bias"):
            for i in getattr(self, name) or ():
                if type(i) is not int or not 0 <= i < vocab_size:
                    raise UserError(f"{name} has {i!r}, but ids go from 0 to {vocab_size - 1}")
        for bias in (self.logit_bias or {}).values():
            if type(bias) not in (int, float) or not -MOST_BIAS <= bias <= MOST_BIAS:
                raise UserError(f"logit_bias adds {bias!r}, no number of at most {MOST_BIAS:g}")

    @functools.cached_property
    def edits_logits(self):
        """Whether anything but temperature and the filters changes the logits."""
        penalties = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1
        others = self.min_tokens or self.logit_bias or self.constraint
        return bool(penalties or others)

    @functools.cached_property
    def filters(self):
        """Whether not every token may be drawn."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    @functools.cached_property
    def limits(self):
        """What decides the draw, beside the random number, as four float32."""
        limits = self.temperature, self.top_k or UNLIMITED, self.top_p, self.min_p
        return np.array(limits, np.float32).tobytes()

    @functools.cached_property
    def stop_beginnings(self):
        """What a text may end with while a stop string comes."""
        return tuple(stop[:n] for stop in self.stop for n in range(1, len(stop)))


@dataclass
class SamplingRow:
    """One row of logits and all that decides which token it becomes."""

    sampling: Sampling
    # The rest is read where sampling.edits_logits.
    output: list | tuple = ()  # token ids made so far
    prompt: list | tuple = ()
    ends: frozenset = frozenset()  # ids that are barred until min_tokens are made
    constraint: Any = None


def uniforms(seeds, positions):
    """One number in [0, 1) for each position of an answer -> (R,) float32.

    The pair is hashed (Steele et al. 2014, "Fast splittable pseudorandom number generators"); the
    first 24 bits are what float32 holds.
    """
    seeds = np.array([seed % 2**64 for seed in seeds], np.uint64)
    z = mixed_bits(seeds) + np.array(positions, np.uint64)
    u = (mixed_bits(z) >> np.uint64(40)) / np.float32(1 << 24)
    return torch.from_numpy(u.astype(np.float32))


def mixed_bits(z):
    """splitmix64's mixer: uint64 -> uint64, each bit of which depends on all of z."""
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


# --------------------------------------------------------------------------------- editing logits
def added_to_logits(row):
    """Penalties, biases, and -inf for what is barred -> {id: what is added to its logit}."""
    s = row.sampling
    add = defaultdict(float)
    if s.presence_penalty or s.frequency_penalty:
        for i, count in Counter(row.output).items():
            add[i] -= s.presence_penalty + count * s.frequency_penalty
    for i, bias in (s.logit_bias or {}).items():
        add[i] += bias
    if len(row.output) < s.min_tokens:
        add.update(dict.fromkeys(row.ends, -math.inf))
    return add


def edit_logits(logits, rows):
    """Penalties, biases, minimum length and constraints, in place on logits (R, V)."""
    R, V = logits.shape
    width = logits.stride(0)  # of a row in memory: the model may have ids beyond the tokenizer's V
    scale_at, scale_by, add_at, add_by = [], [], [], []  # flat positions, and what happens there
    for r, row in enumerate(rows):
        if not row.sampling.edits_logits:
            continue
        if row.sampling.repetition_penalty != 1:
            seen = {*row.prompt, *row.output}
            scale_at += [r * width + i for i in seen]
            scale_by += [row.sampling.repetition_penalty] * len(seen)
        add = added_to_logits(row)
        add_at += [r * width + i for i in add]
        add_by += add.values()
    flat = logits.as_strided(((R - 1) * width + V,), (1,))
    if scale_at:  # a penalty makes a likely token less likely, whatever the sign of its logit
        at = torch.tensor(scale_at, device=logits.device)
        by = logits.new_tensor(scale_by)
        now = flat[at]
        flat[at] = torch.where(now > 0, now / by, now * by)
    if add_at:
        at = torch.tensor(add_at, device=logits.device)
        flat[at] += logits.new_tensor(add_by)
    bound = [r for r, row in enumerate(rows) if row.sampling.constraint is not None]
    if bound:
        allowed = torch.stack([allowed_by_constraint(rows[r], V) for r in bound])
        logits[bound] = logits[bound].masked_fill(~allowed.to(logits.device), -torch.inf)


def allowed_by_constraint(row, V):
    """-> (V,) bool. A token that ends the turn is allowed where the text is complete."""
    bits = np.frombuffer(row.constraint.mask(), np.uint8)
    bits = np.unpackbits(bits, count=row.constraint.size, bitorder="little")
    allowed = F.pad(torch.from_numpy(bits).bool(), (0, V - len(bits)))
    enough = len(row.output) >= row.sampling.min_tokens
    allowed[list(row.ends)] = enough and row.constraint.complete
    return allowed


# --------------------------------------------------------------------------------------- the draw
def kept_tokens(logits, settings):
    """Top-k, top-p and min-p over tempered logits (R, V) -> (R, V) bool, what may be drawn.

    settings: (R, 5), as of `draw_settings`. Each filter sees what the one before it left,
    renormalised, and keeps a beginning of the ranking. So a row whose last candidate is dropped
    needs no others: on a CPU, where sorting a vocabulary is slow, a few are tried first
    (test_candidates_and_the_whole_vocabulary_agree).
    """
    V = logits.size(1)
    few = V
    if logits.device.type == "cpu":
        few = 1 + max([CANDIDATES, *(int(k) for k in settings[:, 1].tolist() if k < V)])
    if few < V:
        keep, ids = kept_of_largest(few, logits, settings)
    if few >= V or keep[:, -1].any():
        keep, ids = kept_of_largest(V, logits, settings)
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(1, ids, keep)


def kept_of_largest(count, logits, settings):
    """Which of the `count` largest logits of a row are kept -> (R, count) bool, their ids."""
    V = logits.size(1)
    _, k, top_p, min_p, _ = settings.T[..., None]  # (R, 1) each
    values, ids = logits.topk(count)  # (R, count), falling
    hidden = torch.arange(count, device=logits.device) >= k
    values = values.masked_fill(hidden, -torch.inf)
    total = values.logsumexp(-1, keepdim=True)
    if count < V:  # a row without top-k has mass beyond the candidates
        total = torch.where(k < V, total, logits.logsumexp(-1, keepdim=True))
    p = (values - total).exp()
    before = p.cumsum(-1) - p  # the mass of everything likelier: the first is always kept
    return ~hidden & ((before < top_p) | (top_p == 1)) & (p >= min_p * p[:, :1]), ids


def draw_tokens(logits, rows, u):
    """One token for each row of logits (R, V) float32, which is overwritten, at u (R,) in [0, 1).

    -> ((R,) int64, (R,) bool: nothing was allowed, or the model computed no number)
    """
    if any(row.sampling.edits_logits for row in rows):
        edit_logits(logits, rows)
    kind = draw_kind(rows)
    if kind == "greedy":
        return drawn_rows(kind, logits)
    settings = draw_settings(rows, u, len(rows)).to(logits.device)
    filtered = [r for r, row in enumerate(rows) if row.sampling.filters]
    if len(filtered) == len(rows):
        return drawn_rows(kind, logits, settings)
    return drawn_rows(kind, logits, settings, filtered)


def draw_kind(rows):
    """Which draw serves all of these rows."""
    if any(row.sampling.filters for row in rows):
        return "filtered"
    return "drawn" if any(row.sampling.temperature for row in rows) else "greedy"


def draw_settings(rows, u, size):
    """-> (size, 5) float32: Sampling.limits and u of each row, zeros where there is none."""
    settings = np.zeros((size, 5), np.float32)
    limits = b"".join([row.sampling.limits for row in rows])
    settings[: len(rows), :4] = np.frombuffer(limits, np.float32).reshape(-1, 4)
    settings[: len(rows), 4] = u
    return torch.from_numpy(settings)


def drawn_rows(kind, logits, settings=None, filtered=slice(None)):
    """The draw, as `draw_tokens`; filtered: the rows that have filters."""
    best, greedy = logits.max(-1)
    token = greedy
    if kind != "greedy":
        temperature = settings[:, 0]
        above_zero = temperature > 0
        tempered = (logits - best[:, None]) / torch.where(above_zero, temperature, 1.0)[:, None]
        p = tempered.softmax(-1)
        if kind == "filtered":
            # What is kept stays in the vocabulary's order, so a row's draw depends on no other row.
            p[filtered] *= kept_tokens(tempered[filtered], settings[filtered])
        drawn = token_at(p, settings[:, 4:])
        # CUDA's cumsum adds in trees: its curve may rise by an ulp at a token that is not allowed.
        allowed = p.gather(1, drawn) > 0
        token = torch.where(above_zero & allowed[:, 0], drawn[:, 0], greedy)
    return token, best - best != 0  # -inf, inf and NaN alike


def draw_by_settings(kind, logits, settings):
    """The draw as one chain of operations whose shapes depend on no value, so that a CUDA graph can
    hold it -> (2, R) int64: the tokens, and 1 where nothing was allowed."""
    return torch.stack(drawn_rows(kind, logits, settings))


def token_at(p, u):
    """The inverse of the distribution function at u: the first token at which the sum of the
    weights p (R, V) exceeds u (R, 1) of their total -> (R, 1). The last of p, if they are NaN."""
    cdf = p.cumsum(-1)
    below = u * cdf[:, -1:]  # less than the total: u has 24 bits, as float32 has
    return torch.searchsorted(cdf, below, right=True).clamp(max=p.size(1) - 1)
