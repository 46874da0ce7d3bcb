"""Preference tuning: a model folder and pairs of answers, one preferred, become a model folder
that prefers it too.

    python dpo.py MODEL --data prefs.jsonl --out runs/dpo     # DPO; or --loss ipo, simpo, orpo
    python dpo.py MODEL --data toybox --lora 16               # the reference is the frozen base

Top to bottom: the loss, records of any layout into pairs of ids, rows that share a prompt,
log-probs and the reference's, training.
"""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import common  # isort: skip

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import chat
import finetune
import lora
from common import UserError
from data import PackedRows, moved
from formats.peft import base_sha256
from model import Transformer
from runtime import resolve
from training import toybox
from training.loop import (
    LoopArgs,
    backward,
    launch,
    log_step,
    passes,
    refuse_idle,
    start_run,
    steps,
    update,
    write_model,
)

PREFERENCE_LOSSES = ("sigmoid", "ipo", "simpo", "orpo")
REFERENCE_FREE = ("simpo", "orpo")


@dataclass
class PolicyArgs(LoopArgs):
    """What dpo.py and grpo.py have in common."""

    model: str = "runs/sft"  # the model folder to train; as it is now it is also the reference
    ignore_keys: str = ""  # KEY,KEY: keys of records and messages to leave out
    lora: int = 0  # train an adapter of this rank, not all weights
    alpha: float = 0.0  # its scale [twice the rank]
    targets: str = "all"  # its layers: all, attn, mlp or names
    optimizer: str = "adamw"  # adamw, or muon (hidden matrices; AdamW for the rest)
    grad_clip: float = 1.0  # clip the gradient's norm to this; 0 is off


@dataclass
class Args(PolicyArgs):
    data: str = "toybox"  # toybox, or a file of preferences
    val: str = ""  # held-out preferences [a share of the data's prompts, chosen by their hash]
    val_share: float = 0.1  # that share
    pairs: int = 4000  # how many pairs toybox makes
    out: str = "runs/dpo"  # the model folder to write, or with --lora the adapter's
    loss: str = "sigmoid"  # sigmoid (DPO), ipo, simpo or orpo
    beta: float = 0.1  # price of leaving the reference; orpo: odds ratio's weight; simpo likes 2
    label_smoothing: float = 0.0  # share of the preferences believed to be the wrong way round
    gamma: float = 0.5  # simpo: the margin it asks for, a half of --beta or so
    sft_weight: float = 0.0  # adds so many times the chosen answer's loss per token
    context: int = 1024  # tokens of a prompt and an answer; a longer prompt loses its beginning
    steps: int = 200  # optimizer steps
    batch: int = 32  # pairs per step
    micro_batch: int = 0  # pairs per pass and rank; 0: up to 8 on a CPU, else what memory allows
    lr: float = 3e-5  # learning rate of everything under AdamW; --lora likes ten times as much
    warmup: int = 10  # steps of linear warm-up
    eval_every: int = 50  # steps between evaluations on the held-out pairs


# ---------------------------------------------------------------------------------------- the loss
def preference_loss(
    policy_chosen,
    policy_rejected,
    ref_chosen,
    ref_rejected,
    beta=0.1,
    label_smoothing=0.0,
    loss_type="sigmoid",
    *,
    lengths=(1, 1),
    gamma=0.5,
):
    """Summed log-probs of answers (B,), under the policy and the reference -> (losses (B,),
    chosen_rewards (B,), rejected_rewards (B,)); rewards carry no gradient.

    With c, r = log(p / p_ref) of the chosen and the rejected answer:

    sigmoid  -log sigmoid(h), h = beta (c - r)                     DPO, Rafailov et al. 2023, eq. 7
             -(1 - e) log sigmoid(h) - e log sigmoid(-h)           with label_smoothing e: cDPO,
                                                                   Mitchell 2023, eq. 3
    ipo      (c - r - 1 / (2 beta))^2                              Azar et al. 2023, eq. 17;
                                                                   per token, as its authors advise
    simpo    -log sigmoid(beta (c' - r') - gamma)                  Meng et al. 2024, eq. 6;
                                                                   c', r' = log p per token
    orpo     -c' - beta log sigmoid(log odds(c') - log odds(r'))   Hong et al. 2024, eq. 6 and 7:
                                                                   it includes the SFT loss

    lengths: tokens of the (chosen, rejected) answers, (B,) each, for "per token"; 1 takes the
    log-probs as they are."""
    check_loss(loss_type, beta, label_smoothing)
    if loss_type in REFERENCE_FREE:  # all others measure the policy against the reference
        chosen = policy_chosen / lengths[0]
        rejected = policy_rejected / lengths[1]
    else:
        chosen = policy_chosen - ref_chosen
        rejected = policy_rejected - ref_rejected
    if loss_type == "ipo":
        losses = (chosen / lengths[0] - rejected / lengths[1] - 1 / (2 * beta)) ** 2
    elif loss_type == "orpo":
        losses = -chosen - beta * F.logsigmoid(log_odds(chosen) - log_odds(rejected))
    else:
        h = beta * (chosen - rejected)
        if loss_type == "simpo":
            h = h - gamma
        losses = -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)
    return losses, beta * chosen.detach(), beta * rejected.detach()


def check_loss(loss_type, beta, label_smoothing):
    if loss_type not in PREFERENCE_LOSSES:
        raise UserError(f"unknown loss {loss_type!r}: use {', '.join(PREFERENCE_LOSSES)}")
    if not beta > 0 or not label_smoothing < 0.5:
        raise UserError(
            f"--beta {beta} must be above 0, --label-smoothing {label_smoothing} below 0.5"
        )
    if label_smoothing and loss_type not in ("sigmoid", "simpo"):
        raise UserError(f"label smoothing is defined for sigmoid and simpo, not for {loss_type}")


def log_odds(log_p):
    """log(p / (1 - p))"""
    return log_p - torch.log(-torch.expm1(log_p.clamp(max=-1e-7)))


# ----------------------------------------------------------------------- records into pairs of ids
class Preference(NamedTuple):
    prompt: list  # messages
    chosen: dict  # a message of the assistant's
    rejected: dict
    tools: list | None = None


class PairIds(NamedTuple):
    """The same as ids. The answers go on where the prompt ends, and end in the end token."""

    prompt: list
    chosen: list
    rejected: list


PREFERENCE_LAYOUTS = (
    "{prompt, chosen, rejected} as strings or messages; {chosen, rejected} as whole conversations; "
    "Alpaca {instruction, input, chosen, rejected}; ShareGPT {conversations, chosen, rejected}; "
    "beside any system, history, tools"
)


def as_preference(record):
    """One record of a dataset, in any of PREFERENCE_LAYOUTS -> Preference.

    The `output` of an Alpaca record, from which both answers were made, is not used."""
    fields = chat.known_keys("the record", record, record)  # of any keys: as_talk refuses unknown
    if not {"chosen", "rejected"} <= fields.keys():
        keys = chat.quoted(fields)
        raise UserError(f"its keys are {keys}; known layouts: {PREFERENCE_LAYOUTS}")
    sides = fields.pop("chosen"), fields.pop("rejected")
    fields.pop("output", None)
    (_, chosen, tools), (_, rejected, _) = (as_talk(fields, side) for side in sides)
    if chosen[:-1] != rejected[:-1]:
        raise UserError("chosen and rejected differ before their last message")
    for talk in (chosen, rejected):
        if len(talk) < 2 or talk[-1]["role"] != "assistant":
            raise UserError("there must be a prompt, and after it an answer of the assistant's")
        if "weight" in talk[-1]:  # as_messages keeps none but 0
            raise UserError("an answer of weight 0 teaches nothing")
    return Preference(chosen[:-1], chosen[-1], rejected[-1], tools)


def as_talk(fields, answer):
    """A record without its answers, and one of them -> (what else it says, messages of prompt and
    answer, tools)."""
    answer = chat.as_turns("assistant", answer)
    for key in chat.TALKS:  # {conversations: [...]} and a message that goes on
        if key in fields:
            if len(answer) > 1:
                raise UserError(f"beside whole conversations {key!r} is an unknown key")
            talk = chat.as_turns("user", fields[key]) + answer
            return chat.as_messages({**fields, key: talk})
    if len(answer) < 2 and fields.keys() & set(chat.QUESTIONS):
        fields = {key: fields[key] for key in fields if key != "answer"}  # an exam's
        return chat.as_messages({**fields, "completion": answer})  # {prompt: ...} and a message
    return chat.as_messages({**fields, "messages": answer})  # the answer is a whole conversation


def read_preferences(path, split="train", count=0, ignore=""):
    """The Preferences of a file, or `count` of toybox, one by one; UserError names the record that
    is none."""
    if path == "toybox":
        return map(as_preference, toybox.preferences(split, count))
    return chat.read_each(path, as_preference, ignore)


def pair_ids(tok, preference, context, counts):
    """Preference -> PairIds. Raises UserError that says why it cannot be used.

    The prompt's ids are those a server would send. Of a prompt that is too long the end is kept:
    the system prompt and a BOS token are lost first. `counts` counts those."""
    prompt, *answers, tools = preference
    head, _ = chat.render(tok, prompt, True, tools)
    begin = len(head)
    ends = []
    for answer in answers:
        talk = chat.read_chat(tok, [*prompt, answer], tools)
        ids, mask = chat.training_ids(tok, talk)
        if 1 not in mask[begin:]:
            raise UserError("the chat format has no answer in the loss")
        end = len(mask) - mask[::-1].index(1)
        if ids[:begin] != head or not all(mask[begin:end]):
            raise UserError(
                "the answer's tokens do not follow the prompt's: the tokenizer makes one of both, "
                "or the chat template writes something between them"
            )
        ends.append(ids[begin:end])
    chosen, rejected = ends
    if chosen == rejected:
        raise UserError("chosen and rejected are the same")
    room = context - max(len(chosen), len(rejected))
    if room < 1:
        raise UserError(f"an answer alone fills the context of {context:,} tokens")
    if begin > room:
        counts["cut: of a prompt longer than --context only the end is left"] += 1
    return PairIds(head[-room:], chosen, rejected)


def usable_pairs(tok, preferences, context, name):
    """Preferences -> list of PairIds; what is cut or cannot be used is counted by reason."""
    found = []
    counts = Counter()
    for preference in preferences:
        try:
            found.append(pair_ids(tok, preference, context, counts))
        except UserError as why:
            counts[f"skipped: {why}"] += 1
    for what, count in counts.most_common():
        print(f"pairs    {name}: {count:,} {what}")
    if len(found) < 2:
        raise UserError(
            f"{name}: {len(found)} usable pairs of at least 2; see --val and --val-share"
        )
    return found


def load_pairs(args, tok, model_sha):
    """-> (training Pairs, validation Pairs). A share is held out by prompt, so that no prompt is
    on both sides."""
    train = list(read_preferences(args.data, "train", args.pairs, args.ignore_keys))
    held_in = args.val or args.data
    if args.val or args.data == "toybox":
        val = read_preferences(held_in, "val", 200, args.ignore_keys)
    else:
        val = [p for p in train if chat.place_of(p.prompt) < args.val_share]
        train = [p for p in train if chat.place_of(p.prompt) >= args.val_share]
    found = usable_pairs(tok, train, args.context, f"{args.data}, to train on")
    held = usable_pairs(tok, val, args.context, f"{held_in}, held out")
    return Pairs(found, model_sha), Pairs(held, model_sha)


# ------------------------------------------------------------------------- rows that share a prompt
PADDING = 1 << 20  # the document that fills a row: no answer has this number


class PairBatch(NamedTuple):
    """Rows of one prompt and two answers, which both look back at it but not at each other: the
    prompt is computed once. The shorter rows come first.

    The prompt without its last token is document -1, which all may look at; an answer is a document
    that begins with that last token and predicts the answer's tokens, in the positions they would
    have alone. A batch of prompt [7 8] and answers [1 2] and [3]:

        x 7 8 1 8      y -100 1 2 3      docs -1 0 0 1      positions 0 1 2 1
    """

    x: torch.Tensor  # (R, T) int64
    y: torch.Tensor  # (R, T) int64: the answers' tokens, else -100
    docs: torch.Tensor  # (R, T) int64: -1 prompt, 0 chosen answer, 1 rejected, or PADDING
    positions: torch.Tensor  # (R, T) int64
    ref: torch.Tensor  # (R, T) float32: the reference's log-prob of y, else 0


def trimmed(batch):
    """A pass without the columns after its longest row; on a GPU its width stays a power of two, so
    that there are few shapes to compile for."""
    longest = int((batch.docs != PADDING).sum(1).max())
    width = power_of_two(longest) if batch.x.is_cuda else -(-longest // 8) * 8
    return batch._make(t[:, :width] for t in batch)


def power_of_two(size):
    """The next one that is not smaller, and at least 128: a block of FlexAttention."""
    return max(128, 1 << (size - 1).bit_length())


def prompt_row(prompt, answers):
    """Ids of a prompt and of any number of answers -> x, y, docs, positions, as in PairBatch."""
    *head, last = prompt  # the head is there once, its last token before each answer
    start = len(head)
    x = [*head]
    y = [-100] * start
    docs = [-1] * start
    positions = [*range(start)]
    for i, answer in enumerate(answers):
        x += [last, *answer[:-1]]
        y += answer
        docs += [i] * len(answer)
        positions += range(start, start + len(answer))
    return x, y, docs, positions


def padded_columns(rows):
    """Rows of x, y, docs, positions and of floats, each a list -> a tensor (R, T) of each, in which
    the shorter rows come first. T is a power of two: `trimmed` can only cut from it."""
    rows = sorted(rows, key=lambda row: len(row[0]))
    width = power_of_two(len(rows[-1][0]))
    fillers = 0, -100, PADDING, 0, 0.0, 0.0, 0.0  # zip takes as many as there are columns
    for column, filler in zip(zip(*rows), fillers):
        padded = torch.full((len(rows), width), filler)
        for i, values in enumerate(column):
            padded[i, : len(values)] = torch.tensor(values)
        yield padded


class Pairs:
    """A split for data.Batches: a row is a pair, the rows of a batch are sorted by length."""

    def __init__(self, pairs, model_sha=""):
        """pairs: list of PairIds; model_sha: the reference's, a part of the data's hash."""
        prompts = np.array([len(pair.prompt) for pair in pairs])
        answers = np.array([len(pair.chosen) + len(pair.rejected) for pair in pairs])
        self.pairs = pairs
        self.ends = prompts - 1 + answers  # (pairs,): the length of its row
        self.by_size = self.ends.argsort(kind="stable")
        self.first = np.append(0, answers.cumsum())  # where in `ref` a pair's answers begin
        self.ref = np.zeros(self.first[-1], np.float32)
        self.sha256 = common.sha256(repr((model_sha, pairs)).encode())

    def __len__(self):
        """Tokens of all rows."""
        return int(self.ends.sum())

    def plan(self, context, seed, epoch):
        order = np.random.default_rng([seed, epoch]).permutation(len(self.pairs))
        return PackedRows([*range(len(order))], order)

    def fill(self, rows, context):
        """Numbers of pairs -> PairBatch, whose rows are as long as they are, whatever `context`."""
        return PairBatch(*padded_columns(map(self.pair_row, rows)))

    def pair_row(self, r):
        """The pair of number r -> its row of x, y, docs, positions and ref, as in PairBatch."""
        prompt, *answers = self.pairs[r]
        ref = [0.0] * (len(prompt) - 1) + self.ref[self.first[r] : self.first[r + 1]].tolist()
        return *prompt_row(prompt, answers), ref

    def validation(self, rows, context, rank=0, world=1):
        """Yield PairBatches that have every pair once, alike in length. Rank r gets every world-th
        batch; all ranks get as many, of as many rows: one without targets only fills the batch."""
        step = rows * world
        filling = [self.by_size[-1]] * (-len(self.pairs) % step)
        numbers = [*self.by_size, *filling]
        for at in range(rank * rows, len(numbers), step):
            batch = self.fill(numbers[at : at + rows], context)
            batch.y[max(0, len(self.pairs) - at) :] = -100
            yield batch


# ------------------------------------------------------------------------- log-probs and reference
def target_nats(model, batch):
    """-> -log p of each target (R, T), 0 elsewhere."""
    return model(batch.x, batch.y, per_token=True, docs=batch.docs, positions=batch.positions)


def log_probs(model, batch):
    """PairBatch -> target_nats (R, T), and by answer (2, R): the policy's summed log-probs, the
    reference's, and counts of tokens."""
    nats = target_nats(model, batch)
    sides = torch.stack([batch.docs == 0, batch.docs == 1])  # (2, R, T)
    policy = -(nats * sides).sum(-1)
    ref = (batch.ref * sides).sum(-1)
    lengths = ((batch.y != -100) & sides).sum(-1).clamp(min=1)
    return nats, policy, ref, lengths


@torch.no_grad()
def fill_reference(pairs, model, runtime, rows):
    """Set pairs.ref to the model's log-probs, computed by all ranks together."""
    model.eval()
    found = torch.zeros(len(pairs.ref), device=runtime.device)
    begins = range(runtime.rank * rows, len(pairs.pairs), rows * runtime.world)
    for at in tqdm(begins, "reference", disable=runtime.rank > 0 or None):
        these = pairs.by_size[at : at + rows]
        batch = trimmed(moved(pairs.fill(these, 0), runtime.device))
        with runtime.autocast():
            nats = target_nats(model, batch)
        # `fill` sorts rows by length, and so did by_size: they are in the order of `these`
        for r, row, y in zip(these, nats, batch.y):
            found[pairs.first[r] : pairs.first[r + 1]] = -row[y != -100]
    if runtime.world > 1:
        torch.distributed.all_reduce(found)
    pairs.ref = found.cpu().numpy()


def pair_loss(model, batch, args):
    """PairBatch -> (its summed loss, {what is logged: its sum over the batch, float64})."""
    batch = trimmed(batch)
    nats, policy, ref, lengths = log_probs(model, batch)
    given = *policy, *ref, args.beta, args.label_smoothing, args.loss
    losses, chosen, rejected = preference_loss(*given, lengths=lengths, gamma=args.gamma)
    answered = batch.y != -100  # (R, T)
    real = answered.any(1)  # not a row that only fills the batch
    losses = (losses - args.sft_weight * policy[0] / lengths[0]) * real
    # KL(p_ref, p) by token, in Schulman's form (r - 1) - log r with r = p / p_ref: never negative,
    # 0 where p has not moved, and unbiased where the answers are the reference's own samples, as
    # DPO supposes (Rafailov et al. 2023, section 4)
    log_ratio = (-nats.detach() - batch.ref) * answered  # (R, T)
    by_row = {
        "loss": losses,
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": chosen > rejected,
        "logps/chosen": policy[0],
        "logps/rejected": policy[1],
        "pairs": real,
        "kl": (torch.expm1(log_ratio) - log_ratio).sum(1),
        "targets": answered.sum(1),
    }
    sums = {name: (row.detach() * real).double().sum() for name, row in by_row.items()}
    return losses.sum(), sums


def pair_means(totals, args, runtime):
    """The sums of many batches -> {name: mean over the pairs of all ranks, of the KL over
    tokens}."""
    total = {name: runtime.sum(value.item()) for name, value in totals.items()}
    kl = total.pop("kl") / total.pop("targets")
    pairs = total.pop("pairs")
    means = {name: value / pairs for name, value in total.items()}
    if args.loss not in REFERENCE_FREE:
        means["kl"] = kl
    return means


# ---------------------------------------------------------------------------------------- training
def prepare_preferences(args, checkpoint):
    """Flags and checkpoint -> Run. There is never a second model: the reference's log-probs are
    computed before the model changes."""
    check_loss(args.loss, args.beta, args.label_smoothing)
    from_file = args.data != "toybox"
    refuse_idle(args, args.loss == "simpo", "--loss simpo", "gamma")
    refuse_idle(args, not from_file, "--data toybox", "pairs")
    refuse_idle(args, from_file and not args.val, "a file of --data without --val", "val_share")
    runtime, tok, model = open_start_model(args)
    base_hash = base_sha256(model)
    data, val = load_pairs(args, tok, base_hash)
    if args.loss not in REFERENCE_FREE and not args.fit:
        for pairs in (data, val):
            fill_reference(pairs, model, runtime, args.micro_batch or 8)
    print(
        f"data     {len(data.pairs):,} pairs to train on, {len(val.pairs):,} held out; "
        f"{len(data):,} tokens, prompts once"
    )
    model, write = make_policy(args, checkpoint, model, base_hash, runtime)
    return start_run(
        args,
        checkpoint,
        runtime,
        tok,
        model,
        data,
        val,
        loss=full_rows_loss(int(data.ends.max())),
        validate=validate_preferences,
        write=write,
    )


def full_rows_loss(width):
    """-> a loss (model, batch, args) for start_run to try whether a GPU has room for rows of this
    width."""

    def loss(model, batch, args):
        x = batch.x.new_zeros(len(batch.x), power_of_two(width))
        return model(x, x, per_token=True, docs=x, positions=x).sum()

    return loss


def open_start_model(args):
    """-> (Runtime, tokenizer, the model of --model, which is the reference and is then trained);
    flags that hang on these are set."""
    refuse_idle(args, args.lora, "--lora", "alpha", "targets")
    if (Path(args.model) / "adapter_config.json").is_file():
        raise UserError(
            f"{args.model} is an adapter, and the reference has to be a whole model: merge it "
            f"first, with python lora.py merge BASE {args.model} --out D"
        )
    runtime = resolve(args.device, args.dtype, args.compile)
    # what --lora freezes need not be finer than the products are; what is trained is float32
    dtype = runtime.dtype if args.lora else torch.float32
    tok, model = finetune.open_model(args.model, runtime.device, dtype)
    finetune.limit_context(args, model.config)
    if not args.micro_batch and runtime.device.type == "cpu":
        # short passes of rows alike in length waste little on padding; a step is whole passes
        args.micro_batch = math.gcd(8, args.batch // runtime.world)
    return runtime, tok, model


def make_policy(args, checkpoint, model, base_hash, runtime):
    """What is trained, fresh or as the checkpoint has it: the model, or with --lora an adapter in
    it -> (model, the function that writes its files)."""
    write = lora.adapter_writer(base_hash) if args.lora else write_model
    if checkpoint and args.lora:
        lora.load_adapter(model, checkpoint, trainable=True)
    elif checkpoint:
        model = Transformer.from_pretrained(checkpoint, runtime.device, torch.float32)
    elif args.lora:
        torch.manual_seed(args.seed)
        lora.apply(model, args.lora, args.alpha or 2 * args.lora, args.targets)
    trained, total = lora.count_params(model)
    print(f"model    {trained:,} of {total:,} parameters are trained: {args.loss}")
    return model, write


@torch.no_grad()
def validate_preferences(run):
    """The loss over all held-out pairs and what goes with it -> {name: mean}."""
    runtime = run.runtime
    model = run.step_model.eval()
    totals = Counter()
    for batch in run.val.validation(run.rows, run.args.context, runtime.rank, runtime.world):
        with runtime.autocast():
            totals.update(pair_loss(model, moved(batch, runtime.device), run.args)[1])
    model.train()
    means = pair_means(totals, run.args, runtime)
    return {f"val_{name}": value for name, value in means.items()}


def check_start(run):
    """At step 0 the policy is the reference: whatever --beta and the length of answers, their KL
    is 0 up to rounding, and DPO's loss is ln 2. All else is a mistake."""
    values = validate_preferences(run)
    if "val_kl" in values:
        told = (
            f"loss {values['val_loss']:.6f} (DPO's is ln 2 = 0.693147), KL {values['val_kl']:.0e}"
        )
        if not values["val_kl"] <= (1e-9 if run.runtime.dtype == torch.float32 else 1e-2):
            raise UserError(f"step 0: {told}: the policy is not the reference; did dpo.py change?")
        print(f"start    {told}: the policy is the reference")
    if run.metrics:
        run.metrics.log(0, **values)


def train_preferences(run):
    """The loop. A row of the metrics has the loss of its step, and of all else the mean since the
    row before."""
    args = run.args
    if run.start == 0:
        check_start(run)
    totals = Counter()
    for step, batch in steps(run):
        tokens = (batch.docs != PADDING).sum().item() / len(batch.docs)  # of a row
        run.optimizer.zero_grad()
        total = 0
        for part in passes(run, batch):
            with run.runtime.autocast():
                loss, sums = pair_loss(run.step_model, part, args)
            backward(run, loss, args.batch)
            total += loss.detach()
            totals.update(sums)
        values = update(run, step)
        if step % args.log_every == 0:
            values |= pair_means(totals, args, run.runtime)
            del values["loss"]
            totals.clear()
        log_step(run, step, total, args.batch, tokens, **values)


def main():
    launch(Args, __doc__, prepare_preferences, train_preferences)


if __name__ == "__main__":
    common.cli(main)
