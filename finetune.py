"""Supervised fine-tuning: a base model and conversations in, a model that answers out.

    python finetune.py MODEL --data chat.jsonl --out runs/chat       # any of chat.py's layouts
    python finetune.py MODEL --data data/toybox more.jsonl:0.5 --text data/wikitext-2    # a mixture
    python finetune.py --resume --out runs/chat                      # go on where it stopped
    python finetune.py eval MODEL --data data/toybox --before BASE   # its exam -> report.md

Two ideas: conversations are packed into rows, none of which sees another's tokens; and only what
the assistant says is in the loss. Top to bottom: conversations to packed rows, the model they
train, the loop, the exam.
"""

import re
import sys
from bisect import bisect_left, insort
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

# first, since it sets how torch's threads wait
from common import UserError, cli, parse_flags, sha256  # isort: skip

import numpy as np
import torch
from torch import nn

import chat
from data import PackedRows, Split, hold_out, open_shards
from model import Transformer
from runtime import resolve
from tokenizer import Tokenizer
from training.corpora import read_text
from training.exam import has_val, mark_answers, read_questions, source_records, write_marks
from training.loop import (
    LoopArgs,
    backward,
    check_args,
    describe,
    launch,
    log_step,
    passes,
    refuse_idle,
    start_run,
    steps,
    update,
)


@dataclass
class Args(LoopArgs):
    model: str | None = None  # the model folder to start from
    data: tuple = ()  # FILE, FOLDER (its train.jsonl and val.jsonl) or toybox; FILE:2 counts twice
    val: tuple = ()  # what to validate on [val.jsonl of a FOLDER, else a share of --data]
    val_share: float = 0.05  # that share
    ignore_keys: str = ""  # KEY,KEY: keys of records and messages to leave out
    text: str = ""  # text mixed in against forgetting: a file, a named corpus or shards
    text_share: float = 0.1  # share of the rows that are of --text
    examples: int = 40_000  # conversations that `--data toybox` makes
    epochs: float = 3.0  # passes over the data, where --steps is 0
    out: str = "runs/chat"  # the model folder to write
    context: int = 256  # tokens a row; a longer conversation is cut
    steps: int = 0  # optimizer steps; 0 is what --epochs makes
    batch: int = 16  # rows per optimizer step, over all ranks and passes
    muon_lr: float = 0.01  # learning rate of the hidden matrices under Muon
    lr: float = 0.002  # learning rate of everything under AdamW
    sample: int = 400  # tokens that an answer may have at the end; 0 tries none out
    cooldown: float = 0.8  # share of the steps in which wsd falls to zero


# --------------------------------------------------------------------- conversations to packed rows
def encode_conversations(tok, name, records, context, counts):
    """(record, messages, tools)s -> [(ids, mask)] arrays of at most context + 1 tokens.

    What is cut or left out is counted in `counts` by reason. UserError if none is left."""
    pairs = chat.examples(tok, name, records, counts, context + 1)
    return [(np.array(ids, tok.dtype), np.array(mask, bool)) for ids, mask in pairs]


def best_fit(sizes, context):
    """Pieces of these sizes into rows of `context` tokens -> the indices of each row's pieces.

    Piece after piece goes into the fullest row that has room for it (best fit). They come in random
    order, so a row mixes short and long ones. Sorted, the longest first, they would need 0.5 to
    1.5 % fewer rows, each of pieces alike in length. tests/test_finetune.py has the same as a plain
    double loop."""
    rows = []
    # Sorted (room left, minus the index of its last piece, row): of rows with as much room the one
    # that was filled last is the first, and rows themselves are never compared.
    unfilled = []
    smallest = min(sizes, default=0)
    for i, size in enumerate(sizes):
        at = bisect_left(unfilled, (size,))  # the first row with room enough
        if at < len(unfilled):
            room, _, row = unfilled.pop(at)
        else:
            room, row = context, []
            rows.append(row)
        row.append(i)
        if room - size >= smallest:  # else the row is full: nothing fits any more
            insort(unfilled, (room - size, -i, row))
    return rows


class Conversations:
    """Conversations packed into rows, whole; a split as data.Batches wants it.

    None sees another's tokens: `fill` numbers the conversations of a row in Batch.docs, by which
    the model's attention masks. Each counts its positions from 0, and only what the assistant says
    is a target. Text, if any, is in rows of its own, and all of it is a target."""

    def __init__(self, sources, text=None, text_share=0.0):
        """sources: [(weight, [(ids, mask)])]; text: a Split that makes `text_share` of all rows."""
        self.pairs = []
        self.sources = []  # (weight, indices of the source's conversations)
        for weight, pairs in sources:
            first = len(self.pairs)
            self.pairs += pairs
            self.sources.append((weight, range(first, len(self.pairs))))
        ids, said = (np.concatenate(arrays) for arrays in zip(*self.pairs))
        lengths = np.array([len(ids) for ids, _ in self.pairs])
        self.begin = np.cumsum(lengths) - lengths
        self.sizes = lengths - 1  # a conversation of n tokens takes n - 1 places: x predicts y
        self.tokens = len(ids)
        self.supervised = int(said.sum())
        self.text, self.text_share = text, text_share
        # One array of ids, the text after the conversations. An id that the assistant does not say
        # is stored as -1 - id: `fill` takes the mask from the sign.
        signed = np.where(said, ids, -1 - ids.astype(np.int64))
        shards, end_id = (text.tokens, text.end_id) if text else ([], None)
        self.signed = Split([signed, *shards], end_id=end_id)
        mixture = [weight for weight, _ in sources], text and (text.sha256, text_share)
        self.sha256 = sha256(signed.tobytes() + self.sizes.tobytes() + repr(mixture).encode())

    def __len__(self):
        """Tokens of the conversations."""
        return self.tokens

    def conversations_of_epoch(self, rng):
        """Each source as often as its weight says: 2.5 takes it twice whole and a random half."""
        chosen = []
        for weight, members in self.sources:
            times, fraction = int(weight), weight % 1
            chosen += [members] * times
            chosen.append(rng.permutation(members)[: round(fraction * len(members))])
        return rng.permutation(np.concatenate(chosen))

    def plan(self, context, seed, epoch):
        """Which conversations share which row; the same (seed, epoch) gives the same rows."""
        rng = np.random.default_rng([seed, epoch])
        chosen = self.conversations_of_epoch(rng)
        rows = []
        for members in best_fit(self.sizes[chosen].tolist(), context):
            conversations = chosen[members]
            rows.append((self.begin[conversations], self.sizes[conversations]))
        if self.text and self.text_share:
            text = self.text.plan(context, seed, epoch)
            count = round(len(rows) * self.text_share / (1 - self.text_share))
            for r in range(max(1, count)):
                starts, sizes = text.row(r % len(text.order))  # from its start again if it is short
                rows.append((starts + len(self), sizes))  # it lies after the conversations
        return PackedRows(rows, rng.permutation(len(rows)))

    def fill(self, rows, context):
        """[(starts, sizes) of a row's pieces] -> data.Batch; what nobody says is target -100."""
        batch = self.signed.fill(rows, context)
        x = torch.where(batch.x < 0, -1 - batch.x, batch.x)  # (rows, context)
        return batch._replace(x=x, y=batch.y.masked_fill(batch.y < 0, -100))

    def validation(self, rows, context, stride=None, rank=0, world=1):
        """Yield Batches that score every answer once: every world-th to a rank, to all as many.

        Nothing is cut, so the stride that data.Split has for its windows has no use here."""
        planned = self.plan(context, 0, 0).rows
        step = rows * world
        planned += [((), ())] * (-len(planned) % step)  # rows without a piece
        for start in range(rank * rows, len(planned), step):
            yield self.fill(planned[start : start + rows], context)


# ------------------------------------------------------------------------------ flags to their data
def parse_source(spec):
    """'name' or 'name:weight' -> (name, weight)."""
    name, colon, weight = spec.rpartition(":")
    if not colon or Path(spec).exists():
        return spec, 1.0
    if not re.fullmatch(r"\d*\.?\d+", weight):
        raise UserError(
            f"--data {spec}: after the colon stands how often an epoch takes it, a number above 0"
        )
    return name, float(weight)


def load_text(args, tok):
    """--text as a Split: shards, or a text that becomes one document."""
    if (Path(args.text) / "meta.json").is_file():
        # The shards are of the tokenizer that --model has; ours may have got chat tokens since.
        text = open_shards(args.text, Tokenizer.load(args.model))["train"]
    else:
        ids = np.array(tok.encode(read_text(args.text)), tok.dtype)
        text = Split([ids], sha256=sha256(ids.tobytes()))
    if not len(text.plan(args.context, 0, 0).order):
        raise UserError(
            f"--text {args.text}: {len(text):,} tokens do not fill one row of {args.context:,}; "
            "use a longer text"
        )
    return text


def load_data(args, tok):
    """--data, --val, --text -> (training, validation) Conversations; --epochs set --steps."""
    counts = Counter()  # {what became of a conversation that was not taken whole: how many}

    def read(name, split, count):
        records = source_records(name, split, count, args.ignore_keys)
        return encode_conversations(tok, name, records, args.context, counts)

    names = [parse_source(spec)[0] for spec in args.data]
    refuse_idle(args, "toybox" in names, "--data toybox", "examples")
    refuse_idle(args, not args.val, "data without --val", "val_share")
    refuse_idle(args, args.text, "--text", "text_share")
    refuse_idle(args, "steps" not in args.typed, "a run without --steps", "epochs")
    sources, val = [], []
    val_names = list(args.val)
    for spec in args.data:
        name, weight = parse_source(spec)
        pairs = read(name, "train", args.examples)
        if not args.val and has_val(name):
            val_names.append(name)
        elif not args.val:
            if not args.val_share:
                raise UserError(f"{name}: nothing to validate on: give --val FILE or a --val-share")
            pairs, held = hold_out(args.val_share, pairs)
            val += held
        if not round(weight * len(pairs)):
            raise UserError(
                f"--data {spec}: an epoch would take none of the {len(pairs):,} conversations that "
                "there are to train on: give more, or --val FILE, or a larger weight behind a colon"
            )
        sources.append((weight, pairs))
    for name in val_names:
        val += read(name, "val", 500)  # so many of toybox, of a file all
    text = load_text(args, tok) if args.text else None
    train, val = Conversations(sources, text, args.text_share), Conversations([(1.0, val)])
    rows = len(train.plan(args.context, args.seed, 0).rows)
    args.steps = args.steps or max(1, round(args.epochs * rows / args.batch))
    ids, mask = (part[:400].tolist() for part in train.pairs[0])
    print(f"example  what is in the loss is in «»:\n{chat.paint(tok, ids, mask)}")
    print(
        f"chats    {len(train.pairs):,} to train on and {len(val.pairs):,} to validate on; "
        f"{train.supervised / len(train):.1%} of the tokens are in the loss; "
        f"{rows:,} rows of {args.context:,} an epoch"
        + "".join(f"; {times:,} {reason}" for reason, times in counts.most_common(9))
    )
    return train, val


# ---------------------------------------------------------------------------- model, loss, the loop
@torch.no_grad()
def grow(model, size, new):
    """Rows for the ids `new` in the embedding and in an untied head: `size` of them at least.

    They start as the mean of the others: an average token, which changes what the model predicts
    least (Hewitt 2021, "Initializing new word embeddings for pretrained language models")."""
    config = model.config
    old = config.vocab_size
    config.vocab_size = max(old, size)
    for module in (model.embed_tokens, model.lm_head):  # one matrix again, by tie, if they were
        mean = module.weight[: min(new)].mean(0)  # (V, C) -> (C,), of the ids that were trained
        more = mean.expand(config.vocab_size - old, -1)
        weight = torch.cat([module.weight, more])  # (V, C) -> (V + new, C)
        weight[new] = mean  # a padded embedding had rows for them, which nothing trained
        module.weight = nn.Parameter(weight)
    model.embed_tokens.num_embeddings = model.lm_head.out_features = config.vocab_size
    model.tie()


def open_model(folder, device, dtype=None):
    """A model folder -> (tokenizer, model) that can hold a conversation.

    A base model is given ChatML, its tokens if they are missing, and its end of a turn as an end of
    generation."""
    tok, model = Tokenizer.load(folder), Transformer.from_pretrained(folder, device, dtype)
    if not tok.chat_template:
        missing = [name for name in chat.IM if name not in tok.special]
        if missing:
            tok = tok.with_special(missing)
            grow(model, tok.vocab_size, [tok.special[name] for name in missing])
            print(
                f"chat     {folder} has no {' and '.join(missing)}: added; the embedding has "
                f"{model.config.vocab_size:,} rows now, the new ones are the mean of the others"
            )
        tok.chat_template = chat.CHATML_TEMPLATE
        # no token of its own in front of a conversation, in llama.cpp and here
        tok.config["add_bos_token"] = False
        tok.before = ()
    end_turns(tok, model.config)
    return tok, model


def tuned_tokenizer(folder):
    """The tokenizer of a model that knows how a conversation is written, and an answer ends."""
    tok = Tokenizer.load(folder)
    if not tok.chat_template:
        raise UserError(f"{folder} has no chat template: first run finetune.py on it")
    return tok


def end_turns(tok, config):
    """The token that ends a turn of a conversation ends what the model generates, too."""
    stop = chat.stop_id(tok)
    if stop is not None and stop not in config.end_ids:
        config.eos_token_id = [stop, *config.end_ids]


def limit_context(args, config):
    """Rows of more tokens than the model can look back at are shortened, which is said."""
    most = config.max_position_embeddings
    if args.context > most:
        print(f"context  {most:,} tokens a row, not {args.context:,}: the model has no more")
        args.context = most


def packed_loss(model, batch, args):
    """Summed cross-entropy, in nats, of what the assistant says (targets that are not -100).

    A conversation attends to itself alone (docs) and counts from position 0, so this is the loss
    that it would have in a row of its own."""
    return model(batch.x, targets=batch.y, docs=batch.docs, positions=batch.positions)


def prepare_finetuning(args, checkpoint):
    """Everything from the flags and the checkpoint's folder -> Run, or None after `--fit`."""
    if not args.model or not args.data:
        raise UserError(
            "give a model folder and conversations: "
            "python finetune.py MODEL --data chat.jsonl --out D"
        )
    runtime = resolve(args.device, args.dtype, args.compile)
    tok, model = open_model(checkpoint or args.model, runtime.device, torch.float32)
    limit_context(args, model.config)
    data, val = load_data(args, tok)
    describe(args, model, tok, data, val)
    # this loss is for evaluations; the loop calls it by name
    return start_run(args, checkpoint, runtime, tok, model, data, val, loss=packed_loss)


def finetune(run):
    """The loop of fine-tuning: next batch, loss, backward, optimizer, log."""
    for step, batch in steps(run):  # which also evaluates, saves and stops
        run.optimizer.zero_grad()
        count = run.runtime.sum((batch.y != -100).sum().item())  # what is said, over all ranks
        total = 0  # this rank's
        for part in passes(run, batch):  # as many rows at a time as fit into memory
            with run.runtime.autocast():
                loss = packed_loss(run.step_model, part, run.args)  # summed over what is said
            backward(run, loss, count)  # adds the gradients of loss / count
            total += loss.detach()
        values = update(run, step)  # the optimizer's step
        log_step(run, step, total, count, **values)
    try_out(run)


# ----------------------------------------------------------------------------- answers and the exam
def greedy_answers(model, tok, prompts, max_tokens, dtype="auto"):
    """The likeliest continuation of each prompt, a list of ids -> [(text, did it end itself)]."""
    from generate import Engine, Sampling  # here: training needs no engine

    was_training = model.training
    model.eval()  # an adapter in training drops out some of its input
    engine = Engine.of(model, tok, dtype=dtype)
    answers = [("", False)] * len(prompts)
    fitting = [i for i, prompt in enumerate(prompts) if len(prompt) < engine.max_model_len]
    if len(fitting) < len(prompts):
        print(
            f"answers  {len(fitting):,} of {len(prompts):,}: the other prompts leave no room for "
            f"one in the model's {engine.max_model_len:,} tokens"
        )
    sampling = Sampling(temperature=0, max_tokens=max_tokens)
    outputs = engine.generate([prompts[i] for i in fitting], sampling)
    for i, output in zip(fitting, outputs):
        answers[i] = output.text, output.finish_reason == "stop"
    model.train(was_training)
    return answers


def try_out(run):
    """Does it stop? Answers to held-out prompts, three of them shown beside what was expected."""
    if not run.metrics or run.args.shard or not run.args.sample:
        return  # only rank 0 has metrics, and of a sharded model it has no whole one
    pairs = run.val.pairs[:20]
    # A prompt ends where the assistant begins to speak.
    prompts = [ids[: mask.argmax()].tolist() for ids, mask in pairs]
    given = greedy_answers(run.model, run.tok, prompts, run.args.sample)
    for (ids, mask), (text, _) in zip(pairs[:3], given):
        expected = chat.paint(run.tok, ids.tolist(), mask)
        print(f"\n{expected}answered: {chat.printable(text)}")
    ended = sum(ended for _, ended in given)
    print(f"\n{ended} of {len(given)} answers to held-out prompts ended by themselves")


@dataclass
class ExamArgs:
    model: str = ""  # the model folder to examine
    data: tuple = ("toybox",)  # FILE, FOLDER (its test.jsonl) or toybox; the last turn is expected
    ignore_keys: str = ""  # KEY,KEY: keys of records and messages to leave out
    before: str = ""  # another model to set beside it, the base say
    out: str = ""  # where the report goes [the model's folder]
    examples: int = 1400  # questions of each source at most
    max_tokens: int = 128  # tokens an answer may have
    device: str = "auto"  # auto, cpu, cuda, cuda:N, mps
    dtype: str = "auto"  # auto, float32, bfloat16, float16


def exam_command(argv):
    """Let a model answer held-out questions and mark it."""
    args = ExamArgs(**parse_flags(ExamArgs, exam_command.__doc__, argv, positional=("model",)))
    check_args(args)
    questions, runtime = read_questions(args), resolve(args.device, args.dtype, "off")
    folders = [folder for folder in (args.model, args.before) if folder]
    marks = []
    for folder in folders:
        tok, model = open_model(folder, runtime.device, runtime.dtype)
        prompts = [chat.render(tok, q.messages, True, q.tools)[0] for q in questions]
        answers = greedy_answers(model, tok, prompts, args.max_tokens, args.dtype)
        marks.append(mark_answers(questions, answers))
    out = Path(args.out or args.model)
    out.mkdir(parents=True, exist_ok=True)
    write_marks(out, folders, marks, questions, " ".join(["python finetune.py eval", *argv]))


def main():
    if sys.argv[1:2] == ["eval"]:
        return exam_command(sys.argv[2:])
    launch(Args, __doc__, prepare_finetuning, finetune)


if __name__ == "__main__":
    cli(main)
