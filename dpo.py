"""Preference tuning: a model folder and pairs of answers, one preferred, become a model folder that prefers it too.

    python dpo.py MODEL --data prefs.jsonl --out runs/dpo     # DPO; --loss ipo, simpo, orpo, or kto for single, rated answers
    python dpo.py MODEL --data toybox --out runs/dpo --resume # go on exactly where it stopped
    python dpo.py eval runs/dpo --data prefs.jsonl            # how often the preferred answer wins against the reference

Top to bottom: the loss, records of any layout into pairs of ids, the reference's log-probabilities, training, eval.
"""
import json
import math
import re
import sys
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
import lora
import toybox
from common import UserError
from model import Transformer
from runtime import read_tensors, resolve, write_tensors
from tokenizer import Tokenizer
from train import (
    LoopArgs,
    finish,
    forward_backward,
    log_step,
    lost_rank_explained,
    read_args,
    start_in_background,
    start_run,
    steps,
    update,
    write_model,
)


@dataclass
class Args(LoopArgs):
    model: str = "runs/sft"           # the model folder to tune; as it is now it is also the reference
    data: str = "toybox"              # toybox, or a .json or .jsonl of preferences
    val: str = ""                     # held-out preferences; else a share of the data's prompts, chosen by their hash, is held out
    val_share: float = 0.1            # that share
    pairs: int = 4000                 # how many pairs toybox makes
    out: str = "runs/dpo"             # the model folder to write
    loss: str = "sigmoid"             # sigmoid (DPO), ipo, simpo, orpo, or kto (single answers, rated good or bad)
    beta: float = 0.1                 # how dearly moving away from the reference is paid for; orpo: weight of the odds ratio
    label_smoothing: float = 0.0      # share of the preferences believed to be the wrong way round
    gamma: float = 0.5                # simpo: the margin it asks for
    desirable: float = 1.0            # kto: weight of the good answers
    undesirable: float = 1.0          # kto: weight of the bad ones
    sft_weight: float = 0.0           # adds so many times the chosen answer's loss per token: against collapse
    lora: int = 0                     # train an adapter of this rank instead of all weights; the reference is the model without it
    alpha: float = 0.0                # scale of the adapter [twice its rank]
    targets: str = "all"              # its layers: all, attn, mlp or names
    cache: str = ""                   # folder for the reference's log-probs, computed once [the one that --out is in]
    context: int = 1024               # tokens of a prompt and an answer together; a longer prompt loses its beginning
    steps: int = 200
    batch: int = 32                   # pairs per step
    optimizer: str = "adamw"
    lr: float = 3e-5
    warmup: int = 10
    schedule: str = "wsd"
    grad_clip: float = 1.0
    eval_every: int = 50
    save_every: int = 100


LOSSES = ("sigmoid", "ipo", "simpo", "orpo", "kto")
REFERENCE_FREE = ("simpo", "orpo")
LAYOUTS = ("{prompt, chosen, rejected}, strings or messages; {chosen, rejected} as whole conversations or as HH-RLHF's text; "
           "Alpaca {instruction, input, chosen, rejected}; ShareGPT {conversations, chosen, rejected}; for kto "
           "{prompt, completion, label}")


# ------------------------------------------------------------------------------------------------------------------ the loss
def preference_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=0.1, label_smoothing=0.0, loss_type="sigmoid",
                    *, lengths=(1, 1), gamma=0.5, kl=0.0, weights=(1.0, 1.0)):
    """Summed log-probs of answers (B,), under the policy and the reference -> (losses (B,), chosen_rewards (B,),
    rejected_rewards (B,)); rewards carry no gradient. With h = beta * ((log p/p_ref)(chosen) - (log p/p_ref)(rejected)):

    sigmoid  -log sigmoid(h)                                       DPO, Rafailov et al. 2023, eq. 7; with label_smoothing e
             -(1 - e) log sigmoid(h) - e log sigmoid(-h)           cDPO, Mitchell 2023, eq. 3: a share e of the labels is wrong
    ipo      (h / beta - 1 / (2 beta))^2                           Azar et al. 2023, eq. 17, per token as its authors advise
    simpo    -log sigmoid(beta (mean c - mean r) - gamma)          Meng et al. 2024, eq. 6: log-probs per token, no reference
    orpo     -mean c - beta log sigmoid(log odds ratio)            Hong et al. 2024, eq. 6 and 7: with the SFT loss, no reference
    kto      w_c (1 - sigmoid(r_c - beta kl)) + w_r (1 - sigmoid(beta kl - r_r))   Ethayarajh et al. 2024, eq. 8, r the rewards

    lengths: tokens of the (chosen, rejected) answers, (B,) each; 1 takes the log-probs as they are (ipo, simpo, orpo).
    kl: KTO's reference point z0, no less than 0; weights: its (desirable, undesirable), (B,) or numbers: 0 where an answer of
    that kind is lacking."""
    if loss_type not in LOSSES:
        raise UserError(f"unknown loss {loss_type!r}: use {', '.join(LOSSES)}")
    if label_smoothing and loss_type not in ("sigmoid", "simpo"):
        raise UserError(f"label smoothing is defined for sigmoid and simpo, not for {loss_type}")
    chosen, rejected = policy_chosen - ref_chosen, policy_rejected - ref_rejected  # log-ratios (B,)
    if loss_type in ("simpo", "orpo"):  # the reward is the policy's own mean log-prob
        chosen, rejected = policy_chosen / lengths[0], policy_rejected / lengths[1]
    if loss_type in ("sigmoid", "simpo"):
        h = beta * (chosen - rejected) - (gamma if loss_type == "simpo" else 0.0)
        losses = -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)
    elif loss_type == "ipo":
        losses = (chosen / lengths[0] - rejected / lengths[1] - 1 / (2 * beta)) ** 2
    elif loss_type == "orpo":
        log_not = [torch.log(-torch.expm1(x.clamp(max=-1e-7))) for x in (chosen, rejected)]  # log(1 - p)
        losses = -chosen - beta * F.logsigmoid(chosen - rejected - (log_not[0] - log_not[1]))
    else:
        losses = weights[0] * (1 - F.sigmoid(beta * (chosen - kl))) + weights[1] * (1 - F.sigmoid(beta * (kl - rejected)))
    return losses, beta * chosen.detach(), beta * rejected.detach()


# ------------------------------------------------------------------------------------------------- records into pairs of ids
def as_preference(record):
    """One record of a dataset, in any of the LAYOUTS -> (prompt messages, [chosen, rejected] or [answer], label or None)."""
    if not isinstance(record, dict):
        raise UserError(f"it is a {type(record).__name__}, not an object")
    keys = [k for k in ("chosen", "rejected") if k in record] or [k for k in ("completion",) if "label" in record and k in record]
    if keys not in (["chosen", "rejected"], ["completion"]):
        raise UserError(f"its keys are {', '.join(str(k)[:40] for k in list(record)[:12]) or 'none'}; known layouts: {LAYOUTS}")
    head = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    if "instruction" in record:
        head = chat.as_messages({**record, "output": ""})[0][:-1]
    else:
        head += as_talk(record.get("prompt") or record.get("conversations") or [], "user")
    talks = [as_talk(record[k], "assistant") for k in keys]
    talks = [talk if len(talk) > 1 else head + talk for talk in talks]  # with more than an answer they are whole conversations
    if any(talk[:-1] != talks[0][:-1] for talk in talks):
        raise UserError("chosen and rejected differ before their last message")
    if len(talks[0]) < 2 or any(talk[-1].get("role") != "assistant" for talk in talks):
        raise UserError("there must be a prompt, and then an answer of the assistant's")
    label = record["label"] if keys == ["completion"] else None
    if label not in (None, True, False):
        raise UserError(f"label is {label!r}, expected true or false")
    return talks[0][:-1], [talk[-1]["content"] for talk in talks], label


def as_talk(value, role):
    """A text, HH-RLHF's "\\n\\nHuman: ... \\n\\nAssistant: ...", a message or a list of messages -> list of messages."""
    if isinstance(value, str):
        said = re.split(r"\n\n(Human|Assistant):", value)
        if len(said) == 1 or said[0].strip():
            return [{"role": role, "content": value}]
        talk = [{"role": {"Human": "user"}.get(r, "assistant"), "content": t.strip()} for r, t in zip(said[1::2], said[2::2])]
        return talk[:-1] if not talk[-1]["content"] and len(talk) > 1 and role == "user" else talk
    names = {"human": "user", "gpt": "assistant"}
    return [{"role": names.get(m["from"], m["from"]), "content": m["value"]} if "from" in m else
            {"role": m["role"], "content": m["content"]} for m in ([value] if isinstance(value, dict) else value)]


def read_preferences(args, path, split):
    """Yields (prompt, answers, label) of toybox or of a JSON list or JSONL; UserError names the record that is not one."""
    if path == "toybox":
        yield from map(as_preference, toybox.preferences(split, args.pairs if split == "train" else 200, args.seed))
        return
    n = 0
    try:
        for n, record in enumerate(common.json_records(path), 1):
            yield as_preference(record)
    except (KeyError, TypeError, AttributeError, UserError) as error:
        raise UserError(f"{path}: record {n or 1} is no preference: {error}") from None


def encode(tok, prompt, answers, context):
    """Messages and answers -> (the prompt's ids, [each answer's ids, its end token last]). UserError: why it cannot be used.

    The prompt's ids are those a server would send, shared by the answers; a prompt too long is cut from the left."""
    head, ends = chat.render(tok, prompt, add_generation_prompt=True)[0], []
    for answer in answers:
        ids, mask = chat.render(tok, [*prompt, {"role": "assistant", "content": answer}])
        end = len(mask) - mask[::-1].index(1)
        if ids[:len(head)] != head or not all(mask[len(head):end]):
            raise UserError("the tokenizer joins the prompt's end and the answer's beginning into one token")
        ends.append(ids[len(head):end])
    if any(e == ends[0] for e in ends[1:]):
        raise UserError("chosen and rejected are the same")
    room = context - max(map(len, ends))
    if room < 1:
        raise UserError(f"an answer fills the context of {context:,} tokens, so no prompt fits before it")
    return head[-room:], ends


class PairBatch(NamedTuple):
    """Rows of one prompt and two answers, which both look back at it but not at each other: the prompt is computed once.

    The prompt without its last token is document -1, which every other may look at; an answer is a document that begins with
    that last token and predicts its own tokens, in the positions it would have alone. After the second comes padding.
    For KTO the second answer is some other prompt's: only for z0."""
    x: torch.Tensor          # (R, T) int64
    y: torch.Tensor          # (R, T) int64: the answers' tokens, else -100
    docs: torch.Tensor       # (R, T) int32: -1 prompt, 0 first answer, 1 second, 2 padding
    positions: torch.Tensor  # (R, T) int64
    ref: torch.Tensor        # (R, T) float32: the reference's log-prob of y, 0 where none
    ends: torch.Tensor       # (R, 2) int64: where the answers end
    weight: torch.Tensor     # (R, 2) float32: of a good and a bad answer; 0, 0 for a row that only fills a batch
    kl: torch.Tensor         # (R,) float32: KTO's z0

    def to(self, device):
        return PairBatch(*(t.to(device, non_blocking=True) for t in self))

    def trimmed(self, answers=2):
        """Without the columns after the longest row's first or second answer. A GPU gets few different shapes to compile for."""
        longest, unit = int(self.ends[:, answers - 1].max()), 8
        width = -(-longest // unit) * unit if not self.x.is_cuda else max(128, 1 << (longest - 1).bit_length())
        return self._make(t[:, :width] if t.ndim == 2 and t.size(1) == self.x.size(1) else t for t in self)


class Order(NamedTuple):
    """The rows of an epoch."""
    order: np.ndarray

    def row(self, r):
        return self.order[r]


class Pairs:
    """Prompts with two answers as ids, for data.Batches: a row is a pair, rows of a batch are sorted by their length."""

    def __init__(self, pairs, weights, model_sha=""):
        """pairs: [(prompt ids, [first answer's ids, second's])]; weights: [(of the good, of the bad answer)]."""
        self.pairs, self.weights = pairs, np.array(weights, np.float32)
        sizes = np.array([[len(prompt), *map(len, answers)] for prompt, answers in pairs])
        self.ends = sizes[:, :1] - 1 + sizes[:, 1:].cumsum(1)  # (pairs, 2): where in its row an answer ends
        self.first = np.append(0, sizes[:, 1:].sum(1).cumsum())  # where in `ref` a pair's answers are
        self.ref = np.zeros(self.first[-1], np.float32)
        self.sha256 = common.sha256(repr((model_sha, pairs, weights)).encode())

    def __len__(self):
        return int(self.ends[:, 1].sum())

    def plan(self, context, seed, epoch):
        return Order(np.random.default_rng([seed, epoch]).permutation(len(self.pairs)))

    def fill(self, rows, context):
        """Numbers of pairs -> PairBatch."""
        rows = sorted(rows, key=lambda r: self.ends[r, 1])
        width = max(128, 1 << (int(self.ends[rows, 1].max()) - 1).bit_length())
        x, y, docs, positions = (np.full((len(rows), width), v, np.int64) for v in (0, -100, 2, 0))
        ref = np.zeros((len(rows), width), np.float32)
        for i, r in enumerate(rows):
            prompt, answers = self.pairs[r]
            at = len(prompt) - 1
            x[i, :at], docs[i, :at], positions[i, :at] = prompt[:-1], -1, np.arange(at)
            y[i, at:self.ends[r, 1]] = np.concatenate(answers)
            ref[i, at:self.ends[r, 1]] = self.ref[self.first[r]:self.first[r + 1]]
            for doc, answer in enumerate(answers):
                end = at + len(answer)
                x[i, at:end], docs[i, at:end] = [prompt[-1], *answer[:-1]], doc
                positions[i, at:end] = np.arange(len(prompt) - 1, len(prompt) - 1 + len(answer))
                at = end
        tensors = x, y, docs.astype(np.int32), positions, ref, self.ends[rows], self.weights[rows], np.zeros(len(rows), np.float32)
        return PairBatch(*map(torch.from_numpy, tensors))

    def validation(self, rows, context, stride=None, rank=0, world=1):
        """Yield PairBatches that have every pair once, alike in length; rank r gets every world-th batch, all get as many."""
        by_size = self.ends[:, 1].argsort(kind="stable")
        for at in range(rank * rows, -(-len(by_size) // (rows * world)) * rows * world, rows * world):
            these = by_size[at:at + rows]
            batch = self.fill([*these, *[by_size[-1]] * (rows - len(these))], context)
            batch.weight[len(these):] = 0
            yield batch


def load_pairs(args, tok, context, model_sha):
    """-> (training Pairs, validation Pairs), and what was skipped and why is printed."""
    splits = {"train": read_preferences(args, args.data, "train")}
    if args.val or args.data == "toybox":
        splits["val"] = read_preferences(args, args.val or args.data, "val")
    found, skipped = {"train": [], "val": []}, Counter()
    for split, records in splits.items():
        for prompt, answers, label in records:
            part = split
            if "val" not in splits:  # the same prompt never on both sides
                part = "val" if int(common.sha256(json.dumps(prompt).encode())[:8], 16) < args.val_share * 2 ** 32 else "train"
            try:
                found[part].append((*encode(tok, prompt, answers, context), label))
            except UserError as why:
                skipped[str(why)] += 1
    for why, count in skipped.most_common():
        print(f"skipped  {count:,}: {why}")
    for part, pairs in found.items():
        if len(pairs) < 2:
            raise UserError(f"{args.data}: {len(pairs)} usable pairs for {'training' if part == 'train' else 'validation'}: give more "
                            "data, or --val FILE, or another --val-share")
    return [make_pairs(args, found[part], model_sha) for part in ("train", "val")]


def make_pairs(args, found, model_sha):
    """[(prompt, answers, label or None)] -> Pairs. For KTO pairs come apart, and each answer gets a neighbour's beside it."""
    if args.loss != "kto":
        if any(label is not None for *_, label in found):
            raise UserError(f"{args.data} has single answers with a label, --loss {args.loss} needs pairs: use --loss kto")
        return Pairs([(p, a) for p, a, _ in found], [(1.0, 1.0)] * len(found), model_sha)
    single = [(p, a[0], True if label is None else label) for p, a, label in found]
    single += [(p, a[1], False) for p, a, label in found if label is None]
    pairs = [(p, [a, other]) for (p, a, _), (_, other, _) in zip(single, single[-1:] + single[:-1])]
    return Pairs(pairs, [(args.desirable, 0.0) if good else (0.0, args.undesirable) for *_, good in single], model_sha)


# ------------------------------------------------------------------------------------------------ log-probs and the objective
def log_probs(model, batch):
    """-> nats of each target (R, T); and summed by answer (2, R): the policy's, the reference's log-probs, counts of tokens."""
    nats = model(batch.x, batch.y, per_token=True, docs=batch.docs, positions=batch.positions)
    sides = torch.stack([batch.docs == 0, batch.docs == 1])  # (2, R, T)
    return nats, -(nats * sides).sum(-1), (batch.ref * sides).sum(-1), ((batch.y != -100) & sides).sum(-1)


@torch.no_grad()
def reference(pairs, model, tok, runtime, rows, folder):
    """Fill pairs.ref with the model's log-probs: read from FOLDER if they were computed before, else computed (ranks share the
    work) and kept there, under a hash of pairs, weights, tokenizer and dtype."""
    key = common.sha256(f"{pairs.sha256} {tok.sha256} {runtime.dtype}".encode())
    path = Path(folder) / f"reference-{key[:16]}.safetensors"
    if path.is_file() and len(stored := read_tensors(path)["log_probs"]) == len(pairs.ref):
        pairs.ref = stored.numpy()
        print(f"refer    {len(pairs.pairs):,} pairs' reference log-probs read from {path}")
        return
    found, by_size = torch.zeros(len(pairs.ref), device=runtime.device), pairs.ends[:, 1].argsort(kind="stable")
    for at in tqdm(range(runtime.rank * rows, len(by_size), rows * runtime.world), "reference", disable=runtime.rank > 0 or None):
        these = by_size[at:at + rows]
        batch = pairs.fill(these, 0).to(runtime.device).trimmed()
        with runtime.autocast():
            nats = log_probs(model, batch)[0]
        for r, row, y in zip(these, nats, batch.y):
            found[pairs.first[r]:pairs.first[r + 1]] = -row[y != -100]
    if runtime.world > 1:
        torch.distributed.all_reduce(found)
    pairs.ref = found.cpu().numpy()
    if runtime.rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, {"log_probs": found})
    print(f"refer    {len(pairs.pairs):,} pairs' reference log-probs computed, kept in {path}")


class Objective:
    """The summed loss of a PairBatch, as train.forward_backward calls it; in passing it adds up what is logged."""
    NAMES = ("loss", "pairs", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "logps/chosen", "logps/rejected", "kl",
             "good", "bad", "answered", "tokens")

    def __init__(self):
        self.sums = 0.0

    def __call__(self, model, batch, args):
        kto = args.loss == "kto"
        batch = batch.trimmed(1 if kto else 2)
        if kto:  # the second answer was for z0
            batch = batch._replace(y=batch.y.where(batch.docs == 0, -100))
        nats, policy, ref, lengths = log_probs(model, batch)
        if kto:
            policy, ref, lengths = policy[[0, 0]], ref[[0, 0]], lengths[[0, 0]]
        losses, chosen, rejected = preference_loss(*policy, *ref, args.beta, args.label_smoothing, args.loss, lengths=lengths,
                                                   gamma=args.gamma, kl=batch.kl, weights=batch.weight.unbind(1))
        good, bad = (batch.weight > 0).float().unbind(1)  # (R,)
        if args.sft_weight:
            losses = losses - args.sft_weight * good * policy[0] / lengths[0]
        real = torch.maximum(good, bad)
        right = ((chosen > 0) * good + (rejected < 0) * bad) if kto else (chosen > rejected) * good
        gap = ((batch.ref + nats.detach()) * real[:, None]).clamp(max=20)  # log(p_ref / p) by token
        tokens = (batch.y != -100) * real[:, None]
        self.sums += torch.stack([t.detach().double().sum() for t in (
            losses * real, real, chosen * good, rejected * bad, right, policy[0] * good, policy[1] * bad,
            torch.expm1(gap) - gap, good, bad, tokens, (batch.docs < 2) * real[:, None])])
        return (losses * real).sum()

    def means(self, args, runtime, prefix=""):
        """What was added up since the last call, over all ranks -> {name: mean}.

        kl is Schulman's estimator (r - 1) - log r with r = p_ref / p, by token of the data: 0 only where the policy is still the
        reference. (Of its own samples it would be the KL divergence; the data's make it a measure of how far it has moved.)"""
        total = dict(zip(self.NAMES, map(runtime.sum, self.sums.tolist())))
        self.sums = 0.0
        per = {"loss": "pairs", "rewards/accuracies": "pairs", "kl": "answered", "rewards/chosen": "good", "logps/chosen": "good",
               "rewards/rejected": "bad", "logps/rejected": "bad"}
        values = {prefix + name: total[name] / max(total[by], 1) for name, by in per.items()}
        values[prefix + "rewards/margins"] = values[prefix + "rewards/chosen"] - values[prefix + "rewards/rejected"]
        if args.loss in REFERENCE_FREE:
            del values[prefix + "kl"]
        return values, total


@torch.no_grad()
def mismatch_kl(run, batch):
    """KTO's z0 = max(0, mean log(p / p_ref)) of answers to other prompts, over the whole step of all ranks (eq. 7)."""
    total = 0.0
    for i in range(0, len(batch.x), run.rows):
        part = batch._make(t[i:i + run.rows] for t in batch).to(run.runtime.device).trimmed()
        with run.runtime.autocast():
            _, policy, ref, _ = log_probs(run.step_model, part)
        total += (policy[1] - ref[1]).sum().item()
    return batch._replace(kl=torch.full_like(batch.kl, max(0.0, run.runtime.sum(total) / run.args.batch)))


# ------------------------------------------------------------------------------------------------------------------ training
def check_flags(args):
    if args.loss not in LOSSES:
        raise UserError(f"--loss {args.loss}: use {', '.join(LOSSES)}")
    if not args.beta > 0 or not 0 <= args.label_smoothing < 0.5 or not 0 < args.val_share < 1 or not args.sft_weight >= 0:
        raise UserError(f"--beta {args.beta} must be above 0, --label-smoothing {args.label_smoothing} in [0, 0.5), --val-share "
                        f"{args.val_share} between 0 and 1, --sft-weight {args.sft_weight} not negative")
    if (Path(args.model) / "adapter_config.json").is_file():
        raise UserError(f"{args.model} is an adapter, and the reference must be a whole model: merge it first with python lora.py "
                        f"merge BASE {args.model} --out D")


def prepare(args, checkpoint):
    """Flags and checkpoint -> Run. There is never a second model: the reference's log-probs are computed before it is changed."""
    check_flags(args)
    runtime = resolve(args.device, args.dtype, args.compile)
    tok, model = Tokenizer.load(args.model), Transformer.from_pretrained(args.model, runtime.device, torch.float32)
    splits = load_pairs(args, tok, min(args.context, model.config.max_position_embeddings), lora.base_sha256(model))
    if not args.micro_batch and runtime.device.type == "cpu":  # short passes of pairs alike in length waste little on padding
        args.micro_batch = math.gcd(8, args.batch // runtime.world)
    if args.loss not in REFERENCE_FREE:
        for pairs in splits:
            reference(pairs, model, tok, runtime, args.micro_batch or 8, args.cache or Path(args.out).parent)
    if args.lora and checkpoint:
        lora.load_adapter(model, checkpoint, trainable=True)
    elif args.lora:
        torch.manual_seed(args.seed)
        lora.apply(model, args.lora, args.alpha or 2 * args.lora, args.targets)
    elif checkpoint:
        model = Transformer.from_pretrained(checkpoint, runtime.device, torch.float32)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"data     {len(splits[0].pairs):,} pairs to train on, {len(splits[1].pairs):,} held out, {len(splits[0]):,} tokens with "
          f"prompts shared; {args.steps:,} steps of {args.batch} = {args.steps * args.batch / len(splits[0].pairs):.1f} epochs\n"
          f"model    {model.num_params():,} parameters, {trained:,} trained ({trained / model.num_params():.1%}); "
          f"{args.loss}, beta {args.beta:g}")
    return start_run(args, checkpoint, runtime, tok, model, *splits, loss=Objective(), validate=validate,
                     write=write_adapter if args.lora else write_model)


def write_adapter(run, folder, weights):
    run.tok.save(folder)
    lora.save_adapter(run.model, folder)


@torch.no_grad()
def validate(run):
    """The loss and all that goes with it, over the held-out pairs -> {name: value}."""
    objective = Objective()
    run.step_model.eval()
    for batch in run.val.validation(run.rows, run.args.context, None, run.runtime.rank, run.runtime.world):
        batch = batch.to(run.runtime.device)
        if run.args.loss == "kto":
            batch = mismatch_kl(run, batch)
        with run.runtime.autocast():
            objective(run.step_model, batch, run.args)
    run.step_model.train()
    return objective.means(run.args, run.runtime, "val_")[0]


def check_start(run):
    """At step 0 the policy is the reference: DPO's loss is ln 2 and the margin 0, up to rounding. Anything else is a mistake."""
    values = validate(run)
    if run.args.loss == "sigmoid":
        off, margin = abs(values["val_loss"] - math.log(2)), abs(values["val_rewards/margins"])
        # rounding grows with the sums of log-probs it happens in
        allowed = 1e-6 if run.runtime.dtype == torch.float32 else 2e-2
        if not max(off, margin) <= allowed:
            raise UserError(f"step 0: loss {values['val_loss']:.7f}, not ln 2 = 0.6931472, margin {margin:.2g}: the policy is not the "
                            f"reference; delete the cached reference-*.safetensors in {run.args.cache or Path(run.args.out).parent}")
        print(f"start    loss {values['val_loss']:.7f} = ln 2 within {off:.0e}, margin {margin:.0e}: the policy is the reference")
    if run.metrics:
        run.metrics.log(0, **values)


def train(run):
    if not run.start:
        check_start(run)
    for step, batch in steps(run):
        if run.args.loss == "kto":
            batch = mismatch_kl(run, batch)
        total = forward_backward(run, batch, run.args.batch)
        norm, factor = update(run, step)
        if step % run.args.log_every == 0:
            means, sums = run.loss.means(run.args, run.runtime)
            del means["loss"]
            log_step(run, step, total, run.args.batch, norm, factor, tokens=sums["tokens"] * run.args.batch / sums["pairs"], **means)


def main():
    if sys.argv[1:2] == ["eval"]:
        return evaluate(sys.argv[2:])
    args, checkpoint = read_args(Args, __doc__, positional=("model",))
    if args.background:
        return start_in_background(args)
    with lost_rank_explained(args.out):
        run = prepare(args, checkpoint)
        if run is None:
            return
        train(run)
        finish(run)


if __name__ == "__main__":
    common.cli(main)
