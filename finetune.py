"""Supervised fine-tuning: a base model and conversations in, a model that answers out; and its examination.

    python finetune.py MODEL --data chat.jsonl --out runs/chat             # JSONL or JSON in any of chat.py's layouts
    python finetune.py MODEL --data data/toybox more.jsonl:0.5 --text data/wikitext-2 --out runs/chat    # a mixture
    python finetune.py --resume --out runs/chat                            # go on exactly where it stopped; torchrun as for train
    python finetune.py eval MODEL --data data/toybox --before BASE         # answers, exact match, perplexity -> report.md, .html

Top to bottom: sources into packed rows, the model they train, the run; then questions, answers, marks, report.
"""

import math
import os
import re
import sys
from bisect import bisect_left, insort
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

import chat
from common import UserError, cli, parse_flags, sha256
from data import Plan, Split, held_out, open_shards
from model import KVCache, Transformer
from runtime import resolve
from tokenizer import Tokenizer
from training import toybox
from training.corpora import read_text
from training.exam import CHECKS, Marks, Question, write_marks
from training.loop import LoopArgs, describe, evaluate, launch, read_args, start_run, train


@dataclass
class Args(LoopArgs):
    model: str | None = None  # the model folder to start from
    data: tuple = ()  # FILE, FOLDER (its train.jsonl and val.jsonl) or toybox; FILE:2 is taken twice an epoch
    val: tuple = ()  # what to validate on [val.jsonl of a FOLDER, else a share of --data]
    val_share: float = 0.05  # that share
    text: str = (
        ""  # pre-training text mixed in against forgetting: a file, a named corpus or shards
    )
    text_share: float = 0.1  # share of the rows that are of --text
    examples: int = 40_000  # conversations that `--data toybox` makes
    epochs: float = 3.0  # passes over the data, where --steps is 0
    out: str = "runs/chat"  # the model folder to write
    context: int = 256  # tokens a row; a longer conversation is cut
    steps: int = 0  # optimizer steps; 0 is what --epochs makes
    batch: int = 16  # rows per optimizer step, over all ranks and passes
    muon_lr: float = 0.01  # learning rate of the hidden matrices under Muon
    lr: float = 0.002  # learning rate of everything under AdamW
    cooldown: float = 0.8  # share of the steps in which wsd falls to zero


# ---------------------------------------------------------------------------------- sources to rows
def parse_source(spec):
    """'name' or 'name:weight' -> (name, weight)."""
    name, colon, weight = spec.rpartition(":")
    if not colon or Path(spec).exists():
        return spec, 1.0
    if not re.fullmatch(r"\d*\.?\d+", weight) or not 0 < float(weight) <= 1000:
        raise UserError(
            f"--data {spec}: after the colon stands how often an epoch takes it, a number above 0 and at most 1000"
        )
    return name, float(weight)


def records(name, split, count):
    """(record, messages, tools)s of a source: a file, FOLDER/SPLIT.jsonl, or `count` that toybox makes."""
    if name == "toybox":  # its families in equal shares
        rows = toybox.examples(
            split, count, families=[f for f in toybox.FAMILIES if f != toybox.WITHHELD]
        )
        return ((row, row["messages"], None) for row in rows)
    return chat.read_records(Path(name) / f"{split}.jsonl" if Path(name).is_dir() else name)


def encode(tok, name, rows, context, counts):
    """(record, messages, tools)s -> [(ids, mask)] arrays of at most context + 1 tokens, each with something to learn.

    What is cut or left out is counted by reason: of a conversation that is too long the start is kept, answers as far as they
    fit, without the end that was not reached; one whose prompt alone is too long teaches nothing. UserError if none is left."""
    pairs, n = [], 0
    for n, (_, messages, tools) in enumerate(rows, 1):
        try:
            ids, mask = chat.example(tok, messages, tools)
            counts["cut to the context"] += len(ids) > context + 1
            if not any(mask[1 : context + 1]):
                raise UserError("the prompt alone fills the context")
            pairs.append(
                (np.array(ids[: context + 1], tok.dtype), np.array(mask[: context + 1], bool))
            )
        except UserError as reason:
            counts[f"left out: {reason}"] += 1
    if not pairs:
        why = "; ".join(f"{times:,} x {reason}" for reason, times in (+counts).most_common(3))
        raise UserError(
            f"{name}: nothing to train on in {n:,} conversations{': ' if why else ''}{why}"
        )
    return pairs


def best_fit(sizes, context):
    """Pieces into rows of `context`: in their order, each into the fullest row with room for it -> [indices of a row's pieces].

    In random order, so that rows mix short and long: the longest first would fill 0.5 to 1.5 % fewer rows, of one length each."""
    rows, unfilled, least = (
        [],
        [],
        min(sizes, default=0),
    )  # unfilled: (room left, minus when it was last filled, row), sorted
    for i, size in enumerate(sizes):
        if (at := bisect_left(unfilled, (size,))) < len(unfilled):
            room, _, row = unfilled.pop(at)
        else:
            room, row = context, len(rows)
            rows.append([])
        rows[row].append(i)
        if room - size >= least:
            insort(unfilled, (room - size, -i, row))
    return rows


class Conversations:
    """Conversations packed into rows, whole; a split as data.Batches wants it. None sees another's tokens (docs), each counts
    its positions from 0, and only what the assistant has to say is a target. Text, if any, is in rows of its own."""

    def __init__(self, sources, text=None, text_share=0.0):
        """sources: [(weight, [(ids, mask)])]; text: a Split, of which `text_share` of all rows are."""
        pairs, ends = (
            [pair for _, own in sources for pair in own],
            np.cumsum([len(own) for _, own in sources]),
        )
        self.weights = [
            (weight, np.arange(end - len(own), end)) for (weight, own), end in zip(sources, ends)
        ]
        ids, said = (np.concatenate(part) for part in zip(*pairs))
        self.sizes = np.array(
            [len(ids) - 1 for ids, _ in pairs]
        )  # a conversation of n tokens has n - 1 pairs
        self.begin = np.cumsum(self.sizes + 1) - self.sizes - 1
        self.pairs, self.supervised, self.text, self.text_share = (
            pairs,
            int(said.sum()),
            text,
            text_share,
        )
        shards = text.tokens if text else []
        self.ids = Split(
            [ids, *shards], end_id=text and text.end_id
        )  # thought end to end, the text after the conversations
        self.said = Split(
            [said, *(np.broadcast_to(np.True_, len(shard)) for shard in shards)], end_id=True
        )
        self.sha256 = sha256(
            b"".join(part.tobytes() for part in (ids, said, self.sizes))
            + repr(([w for w, _ in sources], text and (text.sha256, text_share))).encode()
        )

    def __len__(self):
        return int(len(self.ids.tokens[0]))

    def plan(self, context, seed, epoch):
        """The rows of an epoch, by (seed, epoch): each source as often as its weight says, the fraction a draw -> data.Plan."""
        rng = np.random.default_rng([seed, epoch])
        chosen = [
            part
            for weight, own in self.weights
            for part in (
                np.tile(own, int(weight)),
                rng.permutation(own)[: round(weight % 1 * len(own))],
            )
        ]
        chosen = rng.permutation(np.concatenate(chosen))
        rows = [chosen[row] for row in best_fit(self.sizes[chosen].tolist(), context)]
        rows = [(self.begin[row], self.sizes[row]) for row in rows]
        if self.text:
            plan, offset = self.text.plan(context, seed, epoch), len(self)
            for r in range(round(len(rows) * self.text_share / (1 - self.text_share))):
                starts, sizes = plan.row(r % len(plan.order))
                rows.append((starts + offset, sizes))
        starts, sizes = (
            np.concatenate([np.zeros(0, np.int64), *part])
            for part in (zip(*rows) if rows else ((), ()))
        )
        return Plan(
            starts,
            sizes,
            np.cumsum([0, *(len(starts) for starts, _ in rows)]),
            rng.permutation(len(rows)),
        )

    def fill(self, rows, context):
        """[(starts, sizes) of the conversations of a row] -> data.Batch; what nobody has to say is target -100."""
        batch, said = (split.fill(rows, context) for split in (self.ids, self.said))
        return batch._replace(y=batch.y.masked_fill(said.y != 1, -100))

    def validation(self, rows, context, stride=None, rank=0, world=1):
        """Yield Batches that score every answer once. Rank r gets every world-th; all ranks get as many."""
        plan = self.plan(context, 0, 0)
        have, step = len(plan.order), rows * world
        for at in range(rank * rows, -(-have // step) * step, step):
            yield self.fill(
                [plan.row(r) if r < have else ((), ()) for r in range(at, at + rows)], context
            )


def load_text(args, tok):
    """--text as a Split: shards, or a text that becomes one document."""
    if not 0 < args.text_share < 1:
        raise UserError(f"--text-share {args.text_share} must be between 0 and 1")
    if (Path(args.text) / "meta.json").is_file():
        text = open_shards(args.text, Tokenizer.load(args.model).sha256)[
            "train"
        ]  # ours may have got chat tokens since
    else:
        ids = np.array(tok.encode(read_text(args.text)[0]), tok.dtype)
        text = Split([ids], sha256=sha256(ids.tobytes()))
    if not len(text.plan(args.context, 0, 0).order):
        raise UserError(
            f"--text {args.text}: {len(text):,} tokens do not fill one row of {args.context:,}; use a longer text"
        )
    return text


def load_data(args, tok):
    """--data, --val and --text -> (training, validation) Conversations; says what became of them."""

    def read(name, split, counts):
        return encode(
            tok,
            name,
            records(name, split, args.examples if split == "train" else 500),
            args.context,
            counts,
        )

    counts, train, val = (
        Counter(),
        [],
        [read(name, "val", Counter()) for name, _ in map(parse_source, args.val)],
    )
    for name, weight in map(parse_source, args.data):
        pairs = read(name, "train", counts)
        if not args.val and (name == "toybox" or (Path(name) / "val.jsonl").is_file()):
            val.append(read(name, "val", Counter()))
        elif not args.val:
            if not 0 < args.val_share < 1 or len(pairs) < 2:
                raise UserError(
                    f"{name}: a --val-share of {args.val_share} of {len(pairs):,} conversations cannot be held out: "
                    "give --val FILE"
                )
            val.append([pair for i, pair in enumerate(pairs) if held_out(args.val_share, i)])
            pairs = [pair for i, pair in enumerate(pairs) if not held_out(args.val_share, i)]
        train.append((weight, pairs))
    train = Conversations(train, load_text(args, tok) if args.text else None, args.text_share)
    val = Conversations([(1.0, pairs) for pairs in val])
    rows = len(train.plan(args.context, args.seed, 0).order)
    args.steps = args.steps or max(1, round(args.epochs * rows / args.batch))
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    ids, mask = (part[:400].tolist() for part in train.pairs[0])
    print(
        f"example  what is in the loss is {'green' if colour else 'in «»'}:\n{chat.paint(tok, ids, mask, colour)}"
    )
    print(
        f"chats    {len(train.pairs):,} to train on and {len(val.pairs):,} to validate on; {train.supervised / len(train):.1%} "
        f"of the tokens are in the loss; {rows:,} rows of {args.context:,} an epoch"
        + "".join(f"; {times:,} {reason}" for reason, times in (+counts).most_common(9))
    )
    return train, val


# -------------------------------------------------------------------------------- model and the run
@torch.no_grad()
def grow(model, size, new):
    """Rows for the ids `new` in the embedding and in a head of its own, up to a vocabulary of `size`.

    They start as the mean of the others: an average token, which changes what the model predicts least (Hewitt 2021)."""
    config = model.config
    old, config.vocab_size = config.vocab_size, max(config.vocab_size, size)
    for module in (model.embed_tokens, model.lm_head)[: 1 if config.tie_word_embeddings else 2]:
        mean = module.weight[: min(new)].mean(0)
        weight = torch.cat(
            [module.weight, mean.expand(config.vocab_size - old, -1)]
        )  # (V, C) -> (V + new, C)
        weight[new] = mean
        module.weight = nn.Parameter(weight)
    model.embed_tokens.num_embeddings = model.lm_head.out_features = config.vocab_size
    model.tie()


def open_model(folder, device, dtype=None):
    """A model folder -> (tokenizer, model) that can hold a conversation: a base model is given ChatML, its tokens if they are
    missing, and its end of a turn as an end of generation."""
    tok, model = Tokenizer.load(folder), Transformer.from_pretrained(folder, device, dtype)
    if not tok.chat_template:
        if missing := [name for name in chat.IM if name not in tok.special]:
            tok = tok.with_special(missing)
            grow(model, tok.vocab_size, [tok.special[name] for name in missing])
            print(
                f"chat     {folder} has no {' and '.join(missing)}: added; the embedding has {model.config.vocab_size:,} rows "
                "now, the new ones are the mean of the others"
            )
        tok.chat_template = chat.CHATML_TEMPLATE
    stop, ends = chat.stop_id(tok), model.config.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if stop not in ends:
        model.config.eos_token_id = [stop, *ends] if ends else stop
    return tok, model


def packed_loss(model, batch, args):
    """Summed cross-entropy of what the assistant says; a conversation attends to itself alone, from position 0."""
    return model(batch.x, targets=batch.y, docs=batch.docs, positions=batch.positions)


def prepare_finetuning(args, checkpoint):
    """Everything from the flags and the checkpoint -> Run, or None after `--fit`."""
    if not args.model or not args.data:
        raise UserError(
            "give a model folder and conversations: python finetune.py MODEL --data chat.jsonl --out D"
        )
    runtime = resolve(args.device, args.dtype, args.compile)
    tok, model = open_model(checkpoint or args.model, runtime.device, torch.float32)
    if args.context > (most := model.config.max_position_embeddings):
        print(f"context  {most:,} tokens a row, not {args.context:,}: the model has no more")
        args.context = most
    data, val = load_data(args, tok)
    describe(args, model, tok, data, val)
    return start_run(args, checkpoint, runtime, tok, model, data, val, loss=packed_loss)


def try_out(run, count=20):
    """Does it stop? Answers to held-out prompts, three of them shown beside what was expected."""
    if (
        not run.metrics or run.args.shard or not run.args.sample
    ):  # of one rank, which has the whole model
        return
    asked = []
    for ids, mask in run.val.pairs[:count]:
        end = len(mask) - int(np.argmax(mask[::-1]))  # of the last answer
        start = end - int(np.argmin(mask[:end][::-1]))
        asked.append((ids[:start].tolist(), ids[start:end].tolist()))
    given = greedy_answers(run.model, run.tok, [prompt for prompt, _ in asked], run.args.sample)
    for (prompt, expected), (text, _) in islice(zip(asked, given), 3):
        print(
            "\n"
            + chat.printable(
                f"{run.tok.decode(prompt)}{text}\n[expected: {run.tok.decode(expected, skip_special=True)}]"
            )
        )
    print(
        f"\n{sum(ended for _, ended in given)} of {len(given)} answers to held-out prompts ended by themselves"
    )


def main():
    if sys.argv[1:2] == ["eval"]:
        return eval_command(sys.argv[2:])
    launch(*read_args(Args, __doc__, positional=("model",)), prepare_finetuning, train_and_try)


def train_and_try(run):
    train(run)
    try_out(run)


# ---------------------------------------------------------------------------- questions and answers
@torch.inference_mode()
def greedy_answers(model, tok, prompts, max_tokens=256, rows=64):
    """The likeliest continuation of each prompt, a list of token ids -> [(text, whether it ended by itself)] in their order.

    Prompts of one length share a batch, so that nothing is padded; a row leaves its batch when it ends."""
    config, device, was_training = model.config, model.embed_tokens.weight.device, model.training
    model.eval()
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    new, ended, by_length = [[] for _ in prompts], [False] * len(prompts), defaultdict(list)
    for i, prompt in enumerate(prompts):
        by_length[len(prompt)].append(i)
    for length, same in by_length.items():
        room = min(length + max_tokens - 1, config.max_position_embeddings)
        for at in range(0, len(same), rows):
            live = same[at : at + rows]
            ids = torch.tensor([prompts[i] for i in live], device=device)  # (B, T), then (B, 1)
            caches = [
                KVCache(config, len(live), device, model.embed_tokens.weight.dtype, room)
                for _ in model.layers
            ]
            while live and caches[0].length + ids.size(1) <= room:
                hidden = model.hidden(ids, caches=caches)[:, -1]  # (B, C)
                picked = model.lm_head(hidden)[:, : tok.vocab_size].argmax(-1).tolist()
                stay = [j for j, token in enumerate(picked) if token not in ends]
                for i, token in zip(live, picked):
                    ended[i] = token in ends
                    new[i] += [] if ended[i] else [token]
                if len(stay) < len(live):
                    live = [live[j] for j in stay]
                    for cache in caches:
                        cache.keys = cache.keys[stay]  # (B, K, room, D)
                        cache.values = cache.values[stay]
                ids = torch.tensor([[picked[j]] for j in stay], device=device)
    model.train(was_training)
    return [(tok.decode(ids, skip_special=True), end) for ids, end in zip(new, ended)]


def read_questions(args):
    """--data -> [Question]: what is asked is all before the last answer; a record may end with the user and have only checks."""
    questions = []
    for name in args.data:
        for n, (record, talk, _) in enumerate(
            islice(records(name, "test", args.examples), args.examples), 1
        ):
            checks = [
                (c.get("kind"), c.get("value")) if isinstance(c, dict) else (c, None)
                for c in record.get("checks") or []
            ]
            for kind, value in checks:
                if kind not in CHECKS or type(value) is not CHECKS[kind][0]:
                    known = ", ".join(f"{name} ({of.__name__})" for name, (of, _) in CHECKS.items())
                    raise UserError(
                        f"{name}: record {n} has a check {kind!r} with {value!r}; known kinds and values: {known}"
                    )
            said = talk[-1]["content"] if talk and talk[-1]["role"] == "assistant" else None
            questions.append(
                Question(
                    talk if said is None else talk[:-1], said, str(record.get("family", "")), checks
                )
            )
    if not questions:
        raise UserError(f"{' '.join(args.data)}: no questions")
    return questions


def is_right(question, text):
    """By the family's checker if toybox asked, else by equality but for outer space."""
    if question.family in toybox.FAMILIES:
        return toybox.check(question.family, question.messages, text)
    return text.strip() == question.expected.strip()


def examine(folder, questions, args, runtime):
    """A model answers -> Marks."""
    tok, model = open_model(folder, runtime.device, runtime.dtype)
    given = greedy_answers(
        model,
        tok,
        [chat.render(tok, q.messages, True)[0] for q in questions],
        args.max_tokens,
        args.rows,
    )
    texts, results = [text for text, _ in given], defaultdict(list)
    right = [None if q.expected is None else is_right(q, text) for q, text in zip(questions, texts)]
    for q, (text, ended), good in zip(questions, given, right):
        results["ended by itself"].append(ended)
        if good is not None:
            results["exact match"].append(good)
        if good is not None and q.family:
            results[f"exact match: {q.family}"].append(good)
        kept = [(kind, CHECKS[kind][1](text, value)) for kind, value in q.checks]
        for kind, yes in kept:
            results[f"check: {kind}"].append(yes)
        if kept:
            results["check: all of an answer's"].append(all(yes for _, yes in kept))
    scores = {
        what: (sum(results[what]), len(results[what]))
        for what in sorted(results, key=lambda what: (":" in what, what))
    }
    known = [
        (None, [*q.messages, {"role": "assistant", "content": q.expected}], None)
        for q in questions
        if q.expected
    ]
    perplexity = math.nan
    if known:
        split = Conversations(
            [
                (
                    1.0,
                    encode(
                        tok,
                        "the expected answers",
                        known,
                        model.config.max_position_embeddings,
                        Counter(),
                    ),
                )
            ]
        )
        nats, count = evaluate(
            model,
            split,
            8,
            SimpleNamespace(context=int(split.sizes.max())),
            runtime,
            loss=packed_loss,
        )
        perplexity = math.exp(min(700.0, nats / count))
    return Marks(texts, right, scores, perplexity)


# ------------------------------------------------------------------------------------------- report


@dataclass
class EvalArgs:
    model: str = ""  # the model folder to examine
    data: tuple = (
        "toybox",
    )  # questions: FILE, FOLDER (its test.jsonl) or toybox; the last turn is the expected answer
    before: str = ""  # another model to set beside it, the base say
    out: str = ""  # where the report goes [the model's folder]
    examples: int = 1400  # questions of each source at most
    max_tokens: int = 128  # tokens an answer may have
    rows: int = 64  # answers generated at once
    device: str = "auto"  # auto, cpu, cuda, cuda:N, mps
    dtype: str = "auto"  # auto, float32, bfloat16, float16


def eval_command(argv):
    """Let a model answer held-out questions and mark it."""
    args = EvalArgs(**parse_flags(EvalArgs, eval_command.__doc__, argv, positional=("model",)))
    if not args.model or min(args.examples, args.max_tokens, args.rows) < 1:
        raise UserError(
            "give a model folder, and --examples, --max-tokens and --rows of at least 1: finetune.py eval MODEL"
        )
    questions, runtime = read_questions(args), resolve(args.device, args.dtype, "off")
    folders = [args.model, *([args.before] if args.before else [])]
    marks = [examine(folder, questions, args, runtime) for folder in folders]
    out = Path(args.out or args.model)
    out.mkdir(parents=True, exist_ok=True)
    write_marks(out, folders, marks, questions, " ".join(["python finetune.py eval", *argv]))


if __name__ == "__main__":
    cli(main)
