"""From logits to tokens: what a request may ask for (Sampling) and the vectorised Sampler that does it for a whole batch.

    tokens, failed = draw(logits, rows)          # logits (R, V), one Row each

Randomness is counter-based: one uniform number per (seed, position), so a token depends on its own request and on nothing
else in the batch, and survives preemption and speculation.
"""

import hashlib
import math
from collections import Counter, defaultdict
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from common import UserError

CANDIDATES = 1024  # top-p looks at so many tokens before it sorts the whole vocabulary


@dataclass
class Sampling:
    """How one request is sampled. Filters apply in the order of the fields, as in transformers."""

    max_tokens: int = 256  # at most so many new tokens
    min_tokens: int = 0  # end-of-text and stop ids cannot come before so many
    repetition_penalty: float = (
        1.0  # on every token of prompt and output (CTRL, Keskar et al. 2019)
    )
    presence_penalty: float = 0.0  # subtracted from every token of the output (OpenAI)
    frequency_penalty: float = 0.0  # subtracted once per occurrence in the output (OpenAI)
    logit_bias: dict | None = None  # {token id: added to its logit}
    bad_words: tuple = ()  # strings or lists of token ids that must not appear
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # the k likeliest; 0 is all
    top_p: float = 1.0  # the likeliest that together have this probability (Holtzman et al. 2020)
    min_p: float = 0.0  # those at least this fraction of the likeliest (Nguyen et al. 2024)
    typical_p: float = 1.0  # locally typical sampling (Meister et al. 2022)
    seed: int | None = None  # same seed, same text; None draws one
    logprobs: int | None = None  # None: none; 0: of the chosen token; n: of the n likeliest as well
    stop: tuple = ()  # strings that end the text; they are not part of it
    stop_ids: tuple = ()  # token ids that end the text
    ignore_eos: bool = False  # go on past end-of-text
    n: int = 1  # so many answers
    best_of: int | None = None  # draw so many, return the n of the best mean log-probability
    constraint: object = (
        None  # grammar.Constraint: what each token may be. Every answer gets a copy
    )

    def check(self, vocab_size):
        """UserError for what no model could do."""

        def need(ok, name, what):
            if not ok:
                raise UserError(f"{name} is {getattr(self, name)!r}, but must be {what}")

        ranges = {
            "max_tokens": (1, 1 << 30),
            "min_tokens": (0, self.max_tokens),
            "repetition_penalty": (1e-3, 1e3),
            "presence_penalty": (-100.0, 100.0),
            "frequency_penalty": (-100.0, 100.0),
            "temperature": (0.0, 1e6),
            "top_k": (0, 1 << 30),
            "min_p": (0.0, 1.0),
            "logprobs": (0, min(100, vocab_size)),
            "n": (1, 128),
            "best_of": (self.n, 128),
        }
        for name, (low, high) in ranges.items():  # integers where the bounds are
            value, kinds = getattr(self, name), int if isinstance(high, int) else (int, float)
            if not (
                isinstance(value, kinds)
                and value is not True
                and value is not False
                and low <= value <= high
            ) and (value is not None or name not in ("logprobs", "best_of")):
                need(
                    False,
                    name,
                    f"{'an integer' if kinds is int else 'a number'} from {low:g} to {high:g}",
                )
        for name in ("top_p", "typical_p"):
            need(
                isinstance(getattr(self, name), (int, float)) and 0 < getattr(self, name) <= 1,
                name,
                "in (0, 1]",
            )
        need(self.seed is None or isinstance(self.seed, int), "seed", "an integer")
        need(all(isinstance(s, str) and s for s in self.stop), "stop", "non-empty strings")
        need(
            all(
                isinstance(i, int)
                and 0 <= i < vocab_size
                and isinstance(b, (int, float))
                and math.isfinite(b)
                for i, b in (self.logit_bias or {}).items()
            ),
            "logit_bias",
            f"{{id from 0 to {vocab_size - 1}: finite number}}",
        )
        need(
            all(isinstance(i, int) and 0 <= i < vocab_size for i in self.stop_ids),
            "stop_ids",
            f"ids from 0 to {vocab_size - 1}",
        )

    @property
    def counts_tokens(self):
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        )

    @property
    def narrows(self):
        return self.temperature > 0 and (
            self.top_k > 0 or self.top_p < 1 or self.min_p > 0 or self.typical_p < 1
        )


@dataclass
class Row:
    """One row of logits and all that decides which token it becomes."""

    sampling: Sampling
    uniform: float  # in [0, 1)
    output: list | tuple = ()  # token ids made so far
    prompt: list | tuple = ()
    ends: frozenset = frozenset()  # ids that are barred until min_tokens are made
    bad_words: tuple = ()  # of tuples of ids
    constraint: object = None
    room: int = 1 << 30  # tokens that may still be made
    edits: bool = False  # whether anything but the filters below changes its logits


def uniform(seed, position):
    """The random number in [0, 1) of one position of one answer, (seed, position) hashed to 24 bits (what float32 holds)."""
    digest = hashlib.blake2b(b"%d:%d" % (seed, position), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 40) / (1 << 24)


def edit(logits, rows):
    """Penalties, biases, bad words, minimum length and constraints, in place on logits (R, V)."""
    scale_at, scale_by, add_at, add_by = (
        [],
        [],
        [],
        [],
    )  # flat positions in logits and what happens there
    V = logits.size(1)
    for r, row in enumerate(rows):
        if not row.edits:
            continue
        s, base, add = row.sampling, r * V, defaultdict(float)
        if s.repetition_penalty != 1:
            seen = {*row.prompt, *row.output}
            scale_at += [base + i for i in seen]
            scale_by += [s.repetition_penalty] * len(seen)
        if s.presence_penalty or s.frequency_penalty:
            for i, count in Counter(row.output).items():
                add[i] -= s.presence_penalty + count * s.frequency_penalty
        for i, bias in (s.logit_bias or {}).items():
            add[i] += bias
        for word in row.bad_words:
            history = (row.prompt + row.output)[-len(word) + 1 :] if len(word) > 1 else []
            if list(word[:-1]) == history:
                add[word[-1]] = -math.inf
        if len(row.output) < s.min_tokens:
            add.update(dict.fromkeys(row.ends, -math.inf))
        add_at += [base + i for i in add]
        add_by += add.values()
    flat = logits.view(-1)
    if scale_at:  # a penalty makes a likely token less likely, whatever the sign of its logit
        at = torch.tensor(scale_at, device=logits.device)
        by = torch.tensor(scale_by, device=logits.device, dtype=logits.dtype)
        now = flat[at]
        flat[at] = torch.where(now > 0, now / by, now * by)
    if add_at:
        flat[torch.tensor(add_at, device=logits.device)] += torch.tensor(
            add_by, device=logits.device, dtype=logits.dtype
        )
    for r, row in enumerate(rows):
        if row.constraint is not None:
            allowed = row.constraint.allowed(row.room).to(logits.device)[:V]
            barred = F.pad(~allowed, (0, V - len(allowed)), value=True)
            if row.constraint.complete and len(row.output) >= row.sampling.min_tokens:
                barred[list(row.ends)] = False
            logits[r].masked_fill_(barred, -torch.inf)


def kept(logits, rows):
    """Top-k, top-p, min-p and typical sampling over tempered logits (R, V) -> (R, V) bool: what may still be drawn.

    Each filter sees what the one before it left, renormalised. All but the last keep a beginning of the ranking, so a row whose
    last candidate is dropped needs no others: on the CPU, where sorting a vocabulary is slow, a few are tried first.
    """

    def column(name):
        return torch.tensor(
            [float(getattr(row.sampling, name)) for row in rows], device=logits.device
        )[:, None]

    R, V = logits.shape
    ks, top_p, min_p, typical = (
        [row.sampling.top_k or V for row in rows],
        column("top_p"),
        column("min_p"),
        column("typical_p"),
    )
    narrow = logits.device.type == "cpu" and all(row.sampling.typical_p == 1 for row in rows)
    for K in (min(max([k for k in ks if k < V] + [CANDIDATES]) + 1, V) if narrow else V, V):
        values, ids = logits.topk(K)  # (R, K), falling
        k = torch.tensor(ks, device=logits.device)[:, None]
        values = values.masked_fill(torch.arange(K, device=logits.device) >= k, -torch.inf)
        total = values.logsumexp(-1, keepdim=True)
        if K < V:  # a row without top-k has mass beyond the candidates
            total = torch.where(k < V, total, logits.logsumexp(-1, keepdim=True))
        p = (values - total).exp()
        before = p.cumsum(-1) - p  # the mass of everything likelier: the first is always kept
        keep = (p > 0) & ((before < top_p) | (top_p == 1)) & (p >= min_p * p[:, :1])
        if K == V or not keep[:, -1].any():
            break
    if not all(
        row.sampling.typical_p == 1 for row in rows
    ):  # nearest to the expected information content first
        p = p * keep
        p = p / p.sum(-1, keepdim=True)
        shift = torch.where(
            keep, (-p.log() + torch.xlogy(p, p).sum(-1, keepdim=True)).abs(), torch.inf
        )
        near, order = shift.sort(-1)
        last = (p.gather(-1, order).cumsum(-1) < typical).sum(-1, keepdim=True).clamp(max=K - 1)
        keep = keep & ((shift <= near.gather(-1, last)) | (typical == 1))
    return torch.zeros(R, V, dtype=torch.bool, device=logits.device).scatter_(1, ids, keep)


def draw(logits, rows):
    """One token for each row of logits (R, V) float32, which is overwritten -> ((R,) int64, (R,) bool: nothing was allowed)."""
    if any(row.edits for row in rows):
        edit(logits, rows)
    best, greedy = logits.max(-1)
    failed = best == -torch.inf
    hot = [r.sampling.temperature > 0 for r in rows]
    if not any(hot):
        return greedy, failed
    temperature = torch.tensor([r.sampling.temperature or 1.0 for r in rows], device=logits.device)[
        :, None
    ]
    tempered = (logits - best[:, None]) / temperature
    p = tempered.softmax(-1)
    narrowed = [i for i, r in enumerate(rows) if r.sampling.narrows]
    if narrowed:  # the candidates of a row stay in the vocabulary's order, so that its draw does not depend on other rows
        p[narrowed] *= kept(tempered[narrowed], [rows[i] for i in narrowed])
    # the inverse of the distribution function at u: the first token at which the summed probability exceeds u
    cdf = p.cumsum(-1)
    u = torch.tensor([r.uniform for r in rows], device=logits.device)[:, None]
    token = torch.searchsorted(
        cdf, torch.minimum(u * cdf[:, -1:], cdf[:, -1:] * (1 - 2**-23)), right=True
    )[:, 0]
    token = token.clamp(max=p.size(1) - 1)
    return (
        token if all(hot) else torch.where(torch.tensor(hot, device=logits.device), token, greedy)
    ), failed


def top_logprobs(logits, tokens, count):
    """Log-probabilities by the model itself, before any penalty or temperature: logits (R, V), tokens (R,) ->
    (R,) of the tokens, and values and ids (R, count) of the likeliest."""
    logprobs = logits.log_softmax(-1)
    values, ids = logprobs.topk(count)
    return logprobs.gather(-1, tokens[:, None])[:, 0], values, ids
