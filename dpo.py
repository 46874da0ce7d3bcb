"""Preference tuning: a model folder and pairs of answers, one preferred, become a model folder that prefers it too.

    python dpo.py MODEL --data prefs.jsonl --out runs/dpo     # DPO; --loss ipo, simpo, orpo, or kto for single, rated answers
    python dpo.py MODEL --data toybox --out runs/dpo --resume # go on exactly where it stopped
    python dpo.py eval runs/dpo --data prefs.jsonl            # how often the preferred answer wins against the reference

Top to bottom: the loss, records of any layout into pairs of ids, the reference's log-probabilities, training, eval.
"""
import hashlib
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

import chat
import common
import toybox
from common import UserError
from model import Transformer
from runtime import latest_checkpoint, read_tensors, resolve, write_tensors
from tokenizer import Tokenizer
from train import LoopArgs, finish, forward_backward, log_step, lost_rank_explained, read_args, start_run, steps, update


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
        for n, record in enumerate(common.read_records(path), 1):
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
