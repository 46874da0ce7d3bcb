"""Preference tuning: a model folder and pairs of answers, one preferred, become a model folder that prefers it too.

    python dpo.py MODEL --data prefs.jsonl --out runs/dpo     # DPO; --loss ipo, simpo, orpo, or kto for single, rated answers
    python dpo.py MODEL --data toybox --lora 16               # an adapter: the reference is the model without it
    python dpo.py eval runs/dpo --data prefs.jsonl            # how often the preferred answer wins, by how much

Top to bottom: the loss, records of any layout into pairs of ids, the reference's log-probs, the objective, training, eval.
"""

import json
import math
import re
import sys
import types
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import chat
import common
import finetune
import lora
import train
from common import UserError
from model import Transformer
from runtime import read_tensors, resolve, write_tensors
from training import loop, toybox

LOSSES, REFERENCE_FREE = ("sigmoid", "ipo", "simpo", "orpo", "kto"), ("simpo", "orpo")


@dataclass
class Args(train.LoopArgs):
    model: str = "runs/sft"  # the model folder to tune; as it is now it is also the reference
    data: str = "toybox"  # toybox, or a .json or .jsonl of preferences
    val: str = ""  # held-out preferences [a share of the data's prompts, chosen by their hash]
    val_share: float = 0.1  # that share
    pairs: int = 4000  # how many pairs toybox makes
    out: str = "runs/dpo"  # the model folder to write, or with --lora the adapter's
    loss: str = (
        "sigmoid"  # sigmoid (DPO), ipo, simpo, orpo, or kto (single answers, rated good or bad)
    )
    beta: float = (
        0.1  # how dearly moving away from the reference is paid for; orpo: weight of the odds ratio
    )
    label_smoothing: float = 0.0  # share of the preferences believed to be the wrong way round
    gamma: float = 0.5  # simpo: the margin it asks for
    desirable: float = 1.0  # kto: weight of the good answers
    undesirable: float = 1.0  # kto: weight of the bad ones
    sft_weight: float = (
        0.0  # adds so many times the chosen answer's loss per token: against collapse
    )
    lora: int = 0  # train an adapter of this rank, not all weights
    alpha: float = 0.0  # its scale [twice the rank]
    targets: str = "all"  # its layers: all, attn, mlp or names
    context: int = (
        1024  # tokens of a prompt and an answer together; a longer prompt loses its beginning
    )
    steps: int = 200  # optimizer steps
    batch: int = 32  # pairs per step
    micro_batch: int = (
        0  # pairs per forward pass and rank; 0 is 8 on a CPU, else as many as memory allows
    )
    optimizer: str = "adamw"  # adamw, or muon (hidden matrices; AdamW for the rest)
    lr: float = 3e-5  # learning rate of everything under AdamW; ten times that with --lora
    warmup: int = 10  # steps of linear warm-up
    grad_clip: float = 1.0  # clip the gradient's norm to this; 0 is off
    eval_every: int = 50  # steps between evaluations on the held-out pairs


# ----------------------------------------------------------------------------------------- the loss
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
    kl=0.0,
    weights=(1.0, 1.0),
):
    """Summed log-probs of answers (B,), under the policy and the reference -> (losses (B,), chosen_rewards (B,),
    rejected_rewards (B,)); rewards carry no gradient. With c, r = log(p / p_ref) of the chosen and the rejected answer:

    sigmoid  -log sigmoid(h), h = beta (c - r)                     DPO, Rafailov et al. 2023, eq. 7; with label_smoothing e
             -(1 - e) log sigmoid(h) - e log sigmoid(-h)           cDPO, Mitchell 2023, eq. 3: a share e of labels is wrong
    ipo      (c - r - 1 / (2 beta))^2                              Azar et al. 2023, eq. 17; per token, as its authors advise
    simpo    -log sigmoid(beta (c' - r') - gamma)                  Meng et al. 2024, eq. 6; c', r' = log p per token
    orpo     -c' - beta log sigmoid(log odds(c') - log odds(r'))   Hong et al. 2024, eq. 6 and 7: it includes the SFT loss
    kto      w_c (1 - sigmoid(beta (c - kl))) + w_r (1 - sigmoid(beta (kl - r)))       Ethayarajh et al. 2024, eq. 8

    lengths: tokens of the (chosen, rejected) answers, (B,) each, for "per token"; 1 takes the log-probs as they are.
    kl: KTO's reference point z0; weights: its (desirable, undesirable), (B,) or numbers, 0 where there is no such answer."""
    if loss_type not in LOSSES:
        raise UserError(f"unknown loss {loss_type!r}: use {', '.join(LOSSES)}")
    if label_smoothing and loss_type not in ("sigmoid", "simpo"):
        raise UserError(f"label smoothing is defined for sigmoid and simpo, not for {loss_type}")
    chosen, rejected = policy_chosen - ref_chosen, policy_rejected - ref_rejected
    if loss_type in REFERENCE_FREE:
        chosen, rejected = policy_chosen / lengths[0], policy_rejected / lengths[1]
    if loss_type in ("sigmoid", "simpo"):
        h = beta * (chosen - rejected) - (gamma if loss_type == "simpo" else 0.0)
        losses = -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)
    elif loss_type == "ipo":
        losses = (chosen / lengths[0] - rejected / lengths[1] - 1 / (2 * beta)) ** 2
    elif loss_type == "orpo":
        odds = [
            x - torch.log(-torch.expm1(x.clamp(max=-1e-7))) for x in (chosen, rejected)
        ]  # log of p / (1 - p)
        losses = -chosen - beta * F.logsigmoid(odds[0] - odds[1])
    else:
        losses = weights[0] * (1 - F.sigmoid(beta * (chosen - kl))) + weights[1] * (
            1 - F.sigmoid(beta * (kl - rejected))
        )
    return losses, beta * chosen.detach(), beta * rejected.detach()


# ------------------------------------------------------------------------ records into pairs of ids
LAYOUTS = (
    "{prompt, chosen, rejected} as strings or messages; {chosen, rejected} as whole conversations or HH-RLHF's text; Alpaca "
    "{instruction, input, chosen, rejected}; ShareGPT {conversations, chosen, rejected}; {prompt, completion, label}"
)


def as_preference(record):
    """One record of a dataset, in any of the LAYOUTS -> (prompt messages, [chosen, rejected] or [answer], label or None)."""
    if not isinstance(record, dict):
        raise UserError(f"it is a {type(record).__name__}, not an object")
    keys = next(
        (k for k in (("chosen", "rejected"), ("completion", "label")) if set(k) <= record.keys()),
        None,
    )
    if not keys:
        raise UserError(
            f"its keys are {', '.join(str(k)[:40] for k in list(record)[:12]) or 'none'}; known layouts: {LAYOUTS}"
        )
    if "instruction" in record:
        head = chat.as_messages({**record, "output": ""})[0][:-1]
    else:
        head = [{"role": "system", "content": record["system"]}] if record.get("system") else []
        head += as_talk(record.get("prompt") or record.get("conversations") or [], "user")
    talks = [as_talk(record[k], "assistant") for k in keys if k != "label"]
    talks = [
        talk if len(talk) > 1 else head + talk for talk in talks
    ]  # of more than an answer: a whole conversation
    if any(talk[:-1] != talks[0][:-1] for talk in talks):
        raise UserError("chosen and rejected differ before their last message")
    if len(talks[0]) < 2 or any(
        talk[-1]["role"] != "assistant" or not isinstance(talk[-1]["content"], str)
        for talk in talks
    ):
        raise UserError("there must be a prompt, and after it an answer of the assistant's")
    if (label := record["label"] if "label" in keys else None) not in (None, True, False):
        raise UserError(f"label is {label!r}, expected true or false")
    return talks[0][:-1], [talk[-1]["content"] for talk in talks], label


def as_talk(value, role):
    """A text, HH-RLHF's "\\n\\nHuman: ... \\n\\nAssistant: ...", a message or a list of messages -> list of messages."""
    if isinstance(value, str):
        start, *said = re.split(r"\n\n(Human|Assistant):", value)
        if not said or start.strip():
            return [{"role": role, "content": value}]
        talk = [
            {"role": "user" if who == "Human" else "assistant", "content": t.strip()}
            for who, t in zip(said[::2], said[1::2])
        ]
        return (
            talk if talk[-1]["content"] or role == "assistant" else talk[:-1]
        )  # a prompt may end in "Assistant:"
    talk = [value] if isinstance(value, dict) else value
    talk = chat.as_messages({"conversations": talk})[0] if talk and "from" in talk[0] else talk
    return [{"role": m["role"], "content": m["content"]} for m in talk]


def read_preferences(path, split="train", count=0, seed=0):
    """Yields (prompt, answers, label) of a JSON list or JSONL, or `count` of toybox; UserError names the record that is none."""
    for n, record in enumerate(
        toybox.preferences(split, count, seed) if path == "toybox" else common.json_records(path), 1
    ):
        try:
            yield as_preference(record)
        except (KeyError, TypeError, AttributeError, UserError) as error:
            raise UserError(f"{path}: record {n} cannot be read as a preference: {error}") from None


def encode(tok, prompt, answers, context):
    """Messages and answers -> (the prompt's ids, [each answer's ids, its end token last]). UserError: why it cannot be used.

    The prompt's ids are those a server would send, shared by the answers; a prompt too long is cut from the left."""
    head, ends = chat.render(tok, prompt, add_generation_prompt=True)[0], []
    for answer in answers:
        ids, mask = chat.render(tok, [*prompt, {"role": "assistant", "content": answer}])
        end = len(mask) - mask[::-1].index(1)
        if ids[: len(head)] != head or not all(mask[len(head) : end]):
            raise UserError(
                "the tokenizer joins the prompt's end and the answer's beginning into one token"
            )
        ends.append(ids[len(head) : end])
    if len(ends) == 2 and ends[0] == ends[1]:
        raise UserError("chosen and rejected are the same")
    room = context - max(map(len, ends))
    if room < 1:
        raise UserError(f"an answer alone fills the context of {context:,} tokens")
    return head[-room:], ends


def usable(tok, records, context):
    """(prompt, answers, label) records -> list of (prompt ids, answers' ids, label, a number in [0, 1) by the prompt's hash)."""
    found, skipped = [], Counter()
    for prompt, answers, label in records:
        try:
            number = int(common.sha256(json.dumps(prompt).encode())[:8], 16) / 2**32
            found.append((*encode(tok, prompt, answers, context), label, number))
        except UserError as why:
            skipped[str(why)] += 1
    for why, count in skipped.most_common():
        print(f"skipped  {count:,}: {why}")
    return found


def load_pairs(args, tok, context, model_sha):
    """-> [training Pairs, validation Pairs]. A share is held out by prompt, so that no prompt is on both sides."""
    rows = usable(tok, read_preferences(args.data, "train", args.pairs, args.seed), context)
    if args.val or args.data == "toybox":
        val = usable(tok, read_preferences(args.val or args.data, "val", 200), context)
    else:
        rows, val = (
            [r for r in rows if r[3] >= args.val_share],
            [r for r in rows if r[3] < args.val_share],
        )
    for name, part in (("training", rows), ("validation", val)):
        if len(part) < 2:
            raise UserError(
                f"{args.data}: {len(part)} usable pairs for {name}: give more data, --val FILE, or another --val-share"
            )
    return [make_pairs(args, part, model_sha) for part in (rows, val)]


def make_pairs(args, found, model_sha):
    """What `usable` found -> Pairs. For KTO pairs come apart, and each answer gets its neighbour's beside it, for z0."""
    if args.loss != "kto":
        if any(label is not None for _, _, label, _ in found):
            raise UserError(
                f"{args.data} has single answers with a label, --loss {args.loss} needs pairs: use --loss kto"
            )
        return Pairs([(p, a) for p, a, *_ in found], [(1.0, 1.0)] * len(found), model_sha)
    single = [(p, a[0], label is not False) for p, a, label, _ in found]
    single += [(p, a[1], False) for p, a, label, _ in found if label is None]
    pairs = [(p, [a, other]) for (p, a, _), (_, other, _) in zip(single, single[-1:] + single[:-1])]
    return Pairs(
        pairs,
        [(args.desirable, 0.0) if good else (0.0, args.undesirable) for *_, good in single],
        model_sha,
    )


class PairBatch(NamedTuple):
    """Rows of one prompt and two answers, which both look back at it but not at each other: the prompt is computed once.

    The prompt without its last token is document -1, which all may look at; an answer is a document that begins with that last
    token and predicts the answer's tokens, in the positions they would have alone. For KTO the second is another prompt's."""

    x: torch.Tensor  # (R, T) int64
    y: torch.Tensor  # (R, T) int64: the answers' tokens, else -100
    docs: torch.Tensor  # (R, T) int32: -1 prompt, 0 first answer, 1 second, 2 padding
    positions: torch.Tensor  # (R, T) int64
    ref: torch.Tensor  # (R, T) float32: the reference's log-prob of y, else 0
    ends: torch.Tensor  # (R, 2) int64: where the answers end
    weight: (
        torch.Tensor
    )  # (R, 2) float32: of a good and of a bad answer; both 0 in a row that only fills a batch
    kl: torch.Tensor  # (R,) float32: KTO's z0

    def to(self, device):
        return PairBatch(*(t.to(device, non_blocking=True) for t in self))

    def trimmed(self, answers=2):
        """Without the columns after the longest first or second answer; on a GPU to a power of two: few shapes to compile for."""
        longest = int(self.ends[:, answers - 1].max())
        width = 1 << max(7, (longest - 1).bit_length()) if self.x.is_cuda else -(-longest // 8) * 8
        return PairBatch(*(t[:, :width] if t.shape == self.x.shape else t for t in self))


class Pairs:
    """Prompts with two answers as ids, for data.Batches: a row is a pair, the rows of a batch are sorted by length."""

    def __init__(self, pairs, weights, model_sha=""):
        """pairs: [(prompt ids, [first answer's ids, second's])]; weights: [(of a good, of a bad answer)]."""
        sizes = np.array([[len(prompt), *map(len, answers)] for prompt, answers in pairs])
        self.pairs, self.weights = pairs, np.array(weights, np.float32)
        self.ends = (
            sizes[:, :1] - 1 + sizes[:, 1:].cumsum(1)
        )  # (pairs, 2): where in its row an answer ends
        self.by_size = self.ends[:, 1].argsort(kind="stable")
        self.first = np.append(
            0, sizes[:, 1:].sum(1).cumsum()
        )  # where in `ref` a pair's answers begin
        self.ref = np.zeros(self.first[-1], np.float32)
        self.sha256 = common.sha256(repr((model_sha, pairs, weights)).encode())

    def __len__(self):
        return int(self.ends[:, 1].sum())

    def plan(self, context, seed, epoch):
        order = np.random.default_rng([seed, epoch]).permutation(len(self.pairs))
        return types.SimpleNamespace(order=order, row=order.__getitem__)

    def fill(self, rows, context):
        """Numbers of pairs -> PairBatch."""
        rows = sorted(rows, key=lambda r: self.ends[r, 1])
        width = 1 << max(7, (int(self.ends[rows, 1].max()) - 1).bit_length())
        x, y, docs, positions = (np.full((len(rows), width), v, np.int64) for v in (0, -100, 2, 0))
        ref = np.zeros((len(rows), width), np.float32)
        for i, r in enumerate(rows):
            prompt, answers = self.pairs[r]
            start, at = len(prompt) - 1, len(prompt) - 1
            x[i, :at], docs[i, :at], positions[i, :at] = prompt[:-1], -1, np.arange(at)
            for doc, answer in enumerate(answers):
                now = slice(at, at := at + len(answer))
                x[i, now], y[i, now], docs[i, now] = [prompt[-1], *answer[:-1]], answer, doc
                positions[i, now] = np.arange(start, start + len(answer))
            ref[i, start:at] = self.ref[self.first[r] : self.first[r + 1]]
        tensors = (
            x,
            y,
            docs.astype(np.int32),
            positions,
            ref,
            self.ends[rows],
            self.weights[rows],
            np.zeros(len(rows), np.float32),
        )
        return PairBatch(*map(torch.from_numpy, tensors))

    def validation(self, rows, context, stride=None, rank=0, world=1):
        """Yield PairBatches that have every pair once, alike in length; rank r gets every world-th batch, all get as many."""
        for at in range(
            rank * rows, -(-len(self.pairs) // (rows * world)) * rows * world, rows * world
        ):
            these = self.by_size[at : at + rows]
            batch = self.fill([*these, *[self.by_size[-1]] * (rows - len(these))], context)
            batch.weight[len(these) :] = 0
            yield batch


# ---------------------------------------------------------------------- log-probs and the objective
def log_probs(model, batch):
    """-> nats of each target (R, T); and by answer (2, R): the policy's and the reference's summed log-probs, counts of tokens."""
    nats = model(batch.x, batch.y, per_token=True, docs=batch.docs, positions=batch.positions)
    sides = torch.stack([batch.docs == 0, batch.docs == 1])  # (2, R, T)
    return (
        nats,
        -(nats * sides).sum(-1),
        (batch.ref * sides).sum(-1),
        ((batch.y != -100) & sides).sum(-1),
    )


@torch.no_grad()
def reference(pairs, model, tok, runtime, rows, folder):
    """Fill pairs.ref with the model's log-probs: read from FOLDER if they were computed before, else computed (ranks share the
    work) and kept there, under a hash of pairs, weights, tokenizer and dtype."""
    key = common.sha256(
        f"{pairs.sha256} {tok.sha256} {model.embed_tokens.weight.dtype} {runtime.dtype}".encode()
    )
    path = Path(folder) / f"reference-{key[:16]}.safetensors"
    if path.is_file() and len(stored := read_tensors(path).get("log_probs", ())) == len(pairs.ref):
        pairs.ref = stored.numpy()
        return print(f"refer    log-probs of {len(pairs.pairs):,} pairs read from {path}")
    found, model = torch.zeros(len(pairs.ref), device=runtime.device), model.eval()
    begins = range(runtime.rank * rows, len(pairs.pairs), rows * runtime.world)
    for at in tqdm(begins, "reference", disable=runtime.rank > 0 or None):
        batch = pairs.fill(these := pairs.by_size[at : at + rows], 0).to(runtime.device).trimmed()
        with runtime.autocast():
            nats = log_probs(model, batch)[0]
        for r, row, y in zip(these, nats, batch.y):
            found[pairs.first[r] : pairs.first[r + 1]] = -row[y != -100]
    if runtime.world > 1:
        torch.distributed.all_reduce(found)
    pairs.ref = found.cpu().numpy()
    if runtime.rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, {"log_probs": found})
    print(f"refer    log-probs of {len(pairs.pairs):,} pairs computed, kept in {path}")


class Objective:
    """The summed loss of a PairBatch, as loop.forward_backward calls it; in passing it adds up what is logged."""

    MEANS = {
        "loss": "pairs",
        "rewards/accuracies": "pairs",
        "rewards/chosen": "good",
        "rewards/rejected": "bad",  # sum: its count
        "logps/chosen": "good",
        "logps/rejected": "bad",
        "kl": "targets",
        "tokens": "pairs",
    }
    sums: torch.Tensor = 0.0

    def __call__(self, model, batch, args):
        kto = args.loss == "kto"
        batch = batch.trimmed(1 if kto else 2)
        if kto:  # the second answer was for z0
            batch = batch._replace(y=batch.y.where(batch.docs == 0, -100))
        nats, *by_answer = log_probs(model, batch)
        policy, ref, lengths = (
            t[[0, 0]] if kto else t for t in by_answer
        )  # (2, R): the one answer stands for both, weighted
        losses, chosen, rejected = preference_loss(
            policy[0],
            policy[1],
            ref[0],
            ref[1],
            args.beta,
            args.label_smoothing,
            args.loss,
            lengths=lengths,
            gamma=args.gamma,
            kl=batch.kl,
            weights=batch.weight.unbind(1),
        )
        good, bad = (batch.weight > 0).float().unbind(1)  # (R,)
        real = torch.maximum(good, bad)
        losses = (losses - args.sft_weight * good * policy[0] / lengths[0]) * real
        right = (chosen > 0) * good + (rejected < 0) * bad if kto else (chosen > rejected) * good
        # KL(p_ref, p) by token, in Schulman's form (r - 1) - log r with r = p / p_ref: never negative, 0 where p has not moved, and
        # unbiased where the answers are the reference's own samples, as DPO supposes (Rafailov et al. 2023, section 4).
        answered = (batch.y != -100) * real[:, None]  # (R, T)
        gap = (-nats.detach() - batch.ref) * answered
        sums = {
            "loss": losses,
            "pairs": real,
            "good": good,
            "bad": bad,
            "kl": torch.expm1(gap) - gap,
            "targets": answered,
            "tokens": (batch.docs < (1 if kto else 2)) * real[:, None],
            "rewards/chosen": chosen * good,
            "rewards/rejected": rejected * bad,
            "rewards/accuracies": right,
            "logps/chosen": policy[0] * good,
            "logps/rejected": policy[1] * bad,
        }
        self.names, self.sums = (
            list(sums),
            self.sums + torch.stack([t.detach().double().sum() for t in sums.values()]),
        )
        return losses.sum()

    def means(self, args, runtime, prefix=""):
        """What was added up since the last call, over all ranks -> {name: mean}."""
        total, self.sums = dict(zip(self.names, map(runtime.sum, self.sums.tolist()))), 0.0
        values = {
            prefix + name: total[name] / max(total[count], 1)
            for name, count in self.MEANS.items()
            if not (name == "kl" and args.loss in REFERENCE_FREE)
        }
        values[prefix + "rewards/margins"] = (
            values[prefix + "rewards/chosen"] - values[prefix + "rewards/rejected"]
        )
        return values


@torch.no_grad()
def with_z0(run, batch):
    """The batch with KTO's z0 = max(0, mean log(p / p_ref)) of answers to other prompts, over the whole step of all ranks."""
    total = 0.0
    for i in range(0, len(batch.x), run.rows):
        part = batch._make(t[i : i + run.rows] for t in batch).to(run.runtime.device).trimmed()
        with run.runtime.autocast():
            _, policy, ref, _ = log_probs(run.step_model, part)
        total += ((policy[1] - ref[1]) * (part.weight > 0).any(1)).sum().item()
    count = run.runtime.sum((batch.weight > 0).any(1).sum().item())
    return batch._replace(kl=torch.full_like(batch.kl, max(0.0, run.runtime.sum(total) / count)))


# ----------------------------------------------------------------------------------------- training
def prepare(args, checkpoint):
    """Flags and checkpoint -> Run. There is never a second model: the reference's log-probs are computed before it changes."""
    if args.loss not in LOSSES:
        raise UserError(f"--loss {args.loss}: use {', '.join(LOSSES)}")
    if not args.beta > 0 or not args.label_smoothing < 0.5 or not 0 < args.val_share < 1:
        raise UserError(
            f"--beta {args.beta} must be above 0, --label-smoothing {args.label_smoothing} below 0.5, --val-share "
            f"{args.val_share} between 0 and 1"
        )
    if (Path(args.model) / "adapter_config.json").is_file():
        raise UserError(
            f"{args.model} is an adapter, and the reference has to be a whole model: merge it first, with "
            f"python lora.py merge BASE {args.model} --out D"
        )
    runtime = resolve(args.device, args.dtype, args.compile)
    kept = (
        runtime.dtype if args.lora else torch.float32
    )  # frozen weights need no more than products do
    tok, model = finetune.open_model(args.model, runtime.device, kept)
    data, val = load_pairs(
        args, tok, min(args.context, model.config.max_position_embeddings), lora.base_sha256(model)
    )
    if (
        not args.micro_batch and runtime.device.type == "cpu"
    ):  # short passes of pairs alike in length waste little on padding
        args.micro_batch = math.gcd(8, args.batch // runtime.world)
    for pairs in (data, val) if args.loss not in REFERENCE_FREE and not args.fit else ():
        reference(pairs, model, tok, runtime, args.micro_batch or 8, Path(args.out).parent)
    if args.lora and checkpoint:
        lora.load_adapter(model, checkpoint, trainable=True)
    elif args.lora:
        torch.manual_seed(args.seed)
        lora.apply(model, args.lora, args.alpha or 2 * args.lora, args.targets)
    elif checkpoint:
        model = Transformer.from_pretrained(checkpoint, runtime.device, torch.float32)
    print(
        f"data     {len(data.pairs):,} pairs to train on, {len(val.pairs):,} held out; {len(data):,} tokens, prompts once; "
        f"{args.steps:,} steps of {args.batch} = {args.steps * args.batch / len(data.pairs):.1f} epochs\n"
        f"model    {model.num_params():,} parameters, {lora.count_params(model)[0]:,} of them trained: {args.loss}, beta "
        f"{args.beta:g}"
    )
    return train.start_run(
        args,
        checkpoint,
        runtime,
        tok,
        model,
        data,
        val,
        loss=Objective(),
        validate=validate,
        write=(lambda run, folder, _: lora.save_adapter(run.model, folder))
        if args.lora
        else loop.write_model,
    )


def validate(run, prefix="val_"):
    """The loss and what goes with it over the held-out pairs -> {name: value}."""
    objective = Objective()

    def loss(model, batch, args):
        return objective(model, with_z0(run, batch) if args.loss == "kto" else batch, args)

    train.evaluate(run.step_model, run.val, run.rows, run.args, run.runtime, loss=loss)
    return objective.means(run.args, run.runtime, prefix)


def check_start(run):
    """At step 0 the policy is the reference, so DPO's loss is ln 2 and the margin 0, up to rounding; all else is a mistake."""
    values = validate(run)
    off, margin = abs(values["val_loss"] - math.log(2)), abs(values["val_rewards/margins"])
    if run.args.loss == "sigmoid" and not run.args.sft_weight:
        if not max(off, margin) <= (1e-6 if run.runtime.dtype == torch.float32 else 2e-2):
            raise UserError(
                f"step 0: loss {values['val_loss']:.7f}, not ln 2 = 0.6931472, margin {margin:.2g}: the policy is "
                f"not the reference; delete reference-*.safetensors in {Path(run.args.out).parent}"
            )
        print(
            f"start    loss {values['val_loss']:.7f} = ln 2 to {off:.0e}, margin {margin:.0e}: the policy is the reference"
        )
    if run.metrics:
        run.metrics.log(0, **values)


def main():
    if sys.argv[1:2] == ["eval"]:
        return evaluate(sys.argv[2:])
    train.launch(*train.read_args(Args, __doc__, positional=("model",)), prepare, learn)


def learn(run):
    """The loop."""
    args = run.args
    if not run.start:
        check_start(run)
    for step, batch in loop.steps(run):
        batch = with_z0(run, batch) if args.loss == "kto" else batch
        total = loop.forward_backward(run, batch, args.batch)
        values = loop.update(run, step)
        if (
            step % args.log_every == 0
        ):  # the row's loss is this step's, all else the mean since the last row
            values |= run.loss.means(args, run.runtime)
            del values["loss"]
        loop.log_step(run, step, total, args.batch, **values)


# --------------------------------------------------------------------------------------------- eval
@dataclass
class EvalArgs:
    model: str = "runs/dpo"  # what dpo.py wrote: a model folder, or an adapter
    reference: str = ""  # the model folder it started from [the one its run was given]
    data: str = "toybox"  # toybox, or a .json or .jsonl of pairs
    pairs: int = 500  # how many of toybox's test split
    beta: float = 0.1  # scale of the rewards
    context: int = 1024  # tokens of a prompt and an answer together
    max_tokens: int = 64  # of an answer that is generated
    device: str = "auto"  # auto, cpu, cuda, cuda:N, mps
    dtype: str = "auto"  # auto, float32, bfloat16, float16


def evaluate(argv):
    """How often the preferred answer has the higher reward, and by how much; on toybox also what the models themselves say."""
    args = EvalArgs(**common.parse_flags(EvalArgs, evaluate.__doc__, argv, positional=("model",)))
    own = Path(args.model) / "args.json"
    start = args.reference or (common.read_json(own).get("model", "") if own.is_file() else "")
    if not start:
        raise UserError(
            f"{args.model} does not say what it started from: name that model folder with --reference"
        )
    runtime, settings = (
        resolve(args.device, args.dtype, "off"),
        Args(beta=args.beta, data=args.data),
    )
    tok, model = finetune.open_model(start, runtime.device, runtime.dtype)
    records = read_preferences(args.data, "test", args.pairs)
    found = usable(tok, records, min(args.context, model.config.max_position_embeddings))
    pairs = make_pairs(settings, found, lora.base_sha256(model))
    reference(pairs, model, tok, runtime, 8, Path(args.model).parent)
    before = say(args, tok, model) if args.data == "toybox" else None
    if (Path(args.model) / "adapter_config.json").is_file():
        model = lora.load_adapter(model, args.model)
    else:
        model = finetune.open_model(args.model, runtime.device, runtime.dtype)[1]
    run = types.SimpleNamespace(args=settings, runtime=runtime, step_model=model, val=pairs, rows=8)
    result = {"pairs": len(pairs.pairs), **validate(run, "")}
    print(
        json.dumps(
            result | ({"before": before, "after": say(args, tok, model.eval())} if before else {}),
            indent=1,
        )
    )


def say(args, tok, model):
    """Greedy answers to toybox's questions -> the shares in the preferred style, right, and ended by themselves."""
    rows = list(toybox.preferences("test", args.pairs))
    prompts = [chat.render(tok, row["prompt"], add_generation_prompt=True)[0] for row in rows]
    said = finetune.greedy_answers(model, tok, prompts, args.max_tokens)
    marks = [
        (toybox.style(text), toybox.check(row["family"], row["prompt"], text), end)
        for row, (text, end) in zip(rows, said)
    ]
    return dict(
        zip(("style", "right", "ended"), (sum(column) / len(rows) for column in zip(*marks)))
    )


if __name__ == "__main__":
    common.cli(main)
