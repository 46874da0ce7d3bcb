"""Reinforcement learning from checkable rewards: a model folder and questions whose answers a rule
can judge become a model folder that answers them better.

    python grpo.py MODEL --data toybox --out runs/grpo               # its checkers are the reward
    python grpo.py MODEL --data q.jsonl --reward checks short:0.1    # IFEval-style; brief as well
    python grpo.py MODEL --data q.jsonl --reward mine.py:judge       # def judge(question, answer)

Top to bottom: the objective and its variants, answers with their rewards and advantages, the loss
of a pass, the loop. The engine writes with the very weights that are trained.
"""

import copy
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import common  # isort: skip
from common import UserError  # isort: skip

import torch

import finetune
import lora
from dpo import (
    PolicyArgs,
    full_rows_loss,
    make_policy,
    open_start_model,
    padded_columns,
    prompt_row,
    target_nats,
    trimmed,
)
from formats.peft import base_sha256
from generate import Engine, Sampling
from model import Transformer
from training.loop import backward, launch, log_step, passes, refuse_idle, start_run, steps, update
from training.rewards import judge, load_questions, read_reward


@dataclass
class Args(PolicyArgs):
    data: tuple = ("toybox",)  # questions: FILE, FOLDER (its train.jsonl) or toybox
    val: tuple = ()  # held-out questions [val.jsonl of a FOLDER, else a twentieth of --data]
    examples: int = 20_000  # questions of each source at most
    families: tuple = ()  # train on these alone, and against forgetting on a tenth of the others
    reward: tuple = ("toybox",)  # toybox, checks, style, short, FILE.py:FUNCTION; any with :WEIGHT
    on_error: str = "stop"  # where a reward fails: stop (what was learned is saved); skip its group
    reward_seconds: float = 5.0  # a reward function that takes longer has failed
    out: str = "runs/grpo"  # the model folder to write, or with --lora the adapter's
    loss: str = "grpo"  # grpo, dr_grpo or dapo
    group: int = 8  # answers to each question
    batch: int = 32  # questions per step
    epochs: int = 1  # updates with the same answers; only from the second on does --clip matter
    max_tokens: int = 64  # of an answer; a longer one is cut
    clip: float = 0.2  # how far a token's probability may fall in a step and still be pushed
    clip_high: float = 0.0  # and how far it may rise; 0 is what the loss has
    beta: float = 0.0  # price of moving away from the reference
    context: int = 1024  # tokens of a prompt and an answer; longer prompts are left out
    steps: int = 100  # optimizer steps, each with answers of its own
    micro_batch: int = 0  # questions per pass and rank; 0: up to 8 on a CPU, else by memory
    lr: float = 1e-5  # learning rate of everything under AdamW; small models and adapters like more
    schedule: str = "cosine"  # wsd (stable, then linear to zero) or cosine
    log_every: int = 1  # steps between rows of metrics.jsonl
    eval_every: int = 25  # steps between evaluations on the held-out questions
    save_every: int = 50  # steps between checkpoints


# ------------------------------------------------------------------------------------ the objective
class Variant(NamedTuple):
    divide: bool  # advantages by the deviation of the group's rewards
    clip_high: float  # how far a ratio may rise
    # (tokens of an answer, --max-tokens) -> (the weight of each of its tokens, what it adds to the
    # count that divides the step's loss)
    weigh: Callable


VARIANTS = {
    "grpo": Variant(True, 0.2, lambda length, most: (1 / length, 1)),
    "dr_grpo": Variant(False, 0.2, lambda length, most: (1.0, most)),
    "dapo": Variant(True, 0.28, lambda length, most: (1.0, length)),
}


def advantages_of(rewards, loss_type="grpo"):
    """Rewards (..., G) of the answers to a question -> how much better each is than its group.

    grpo, dapo   (r - mean(r)) / (std(r) + 1e-4)
    dr_grpo      r - mean(r)                 a small deviation would favour questions that are
                                             nearly always, or nearly never, answered well"""
    advantages = rewards - rewards.mean(-1, keepdim=True)
    if VARIANTS[loss_type].divide:
        advantages = advantages / (rewards.std(-1, keepdim=True) + 1e-4)
    return advantages


def policy_loss(log_p, old, advantages, clip=0.2, clip_high=0.2, ref=None, beta=0.0):
    """Log-probs of tokens (N,), now and when they were drawn -> (losses (N,), which are clipped,
    and the KL from the reference, (N,) each, without gradient).

    With r = p / p_old and A the answer's advantage, a token costs (PPO, Schulman et al. 2017)

        L = -min(r A, clip(r, 1 - clip, 1 + clip_high) A) + beta r (q - log q - 1),   q = p_ref / p

    The last is Schulman's estimate k3 of KL(p, p_ref), never negative; times r its gradient is the
    KL's own (DeepSeek-V3.2, 2025). The step's loss is

    grpo     1 / answers  sum of  1 / |o|  sum of L          Shao et al. 2024, eq. 3
    dr_grpo  1 / (answers max_tokens)  sum of L              Liu et al. 2025: a token of a long
                                                             answer counts as one of a short one
    dapo     1 / tokens  sum of L, clip_high 0.28            Yu et al. 2025, eq. 8: an unlikely
                                                             token may rise further

    and VARIANTS has each token's weight, and what an answer adds to the count in front. Counted are
    the answers of groups whose rewards differ. Others are dropped, as DAPO does; TRL counts them
    with A = 0, so that few useful groups make a small step.

    In the first update with new answers p_old is p: r is 1, and nothing is clipped."""
    ratio = torch.exp(log_p - old)
    bounded = ratio.clamp(1 - clip, 1 + clip_high)
    losses = -torch.minimum(ratio * advantages, bounded * advantages)
    clipped = (bounded * advantages < ratio * advantages).detach()
    kl = torch.zeros_like(log_p)
    if ref is not None:
        kl = ratio * (torch.expm1(ref - log_p) - (ref - log_p))
        losses = losses + beta * kl
    return losses, clipped, kl.detach()


# ------------------------------------------------------------------- answers, rewards, advantages
class Group(NamedTuple):
    """The answers to one question."""

    prompt: list  # ids
    answers: Sequence  # ids of each, the end token included
    log_probs: Sequence  # the engine's, of each id
    rewards: list


class AnswerBatch(NamedTuple):
    """Rows of a question and its group of answers, laid out as in dpo.PairBatch."""

    x: torch.Tensor  # (R, T) int64
    y: torch.Tensor  # (R, T) int64: the answers' tokens, else -100
    docs: torch.Tensor  # (R, T) int64: -1 prompt, then the answer's number, or dpo.PADDING
    positions: torch.Tensor  # (R, T) int64
    sampled: torch.Tensor  # (R, T) float32: the engine's log-prob of y
    advantage: torch.Tensor  # (R, T) float32: of the answer
    weight: torch.Tensor  # (R, T) float32: of the token in the loss


class Environment(NamedTuple):
    """What a run has beside the model."""

    engine: Engine
    rewards: list
    reference: Transformer | None  # for the KL, where all weights are trained


def ask(run, questions, numbers, n=1, **sampling):
    """The engine's answers to these questions -> lists of n Outputs, a list a question.

    A seed hangs on the step and the question alone: neither ranks nor resuming change it."""
    each = []
    for number in numbers:
        key = f"{run.args.seed} {run.step} {number}"
        seed = int(common.sha256(key.encode())[:12], 16)
        each.append(Sampling(n=n, max_tokens=run.args.max_tokens, seed=seed, **sampling))
    outputs = run.own.engine.generate([questions.prompts[number] for number in numbers], each)
    return [outputs[i : i + n] for i in range(0, len(outputs), n)]


def roll_out(run, numbers, totals):
    """Ask each question --group times and judge the answers -> the Groups whose rewards differ.

    A group with an answer that a reward failed on is left out as well."""
    questions = run.batches.split
    began = time.time()
    answered = ask(run, questions, numbers, run.args.group, temperature=1.0, logprobs=0)
    totals["generate_seconds"] += time.time() - began
    groups = []
    for number, outputs in zip(numbers, answered):
        question = questions.questions[number]
        rewards = [judge(run.own.rewards, question, out.text, run.args) for out in outputs]
        answers, log_probs = zip(*map(drawn_tokens, outputs))
        good = [reward for reward in rewards if not math.isnan(reward)]
        failed = len(rewards) - len(good)
        alike = not failed and min(good) == max(good)
        if not failed and not alike:
            groups.append(Group(questions.prompts[number], answers, log_probs, rewards))
            totals["spread"] += torch.tensor(rewards).std().item()
        totals.update(
            questions=1,
            answers=len(rewards),
            judged=len(good),
            reward=sum(good),
            alike=alike,
            failed=failed,
            cut=sum(output.end is None for output in outputs),
            answer_tokens=sum(map(len, answers)),
            entropy=-sum(map(sum, log_probs)),
        )
    return groups


def drawn_tokens(output):
    """-> (ids that were drawn, the end token too; the log-prob of each)"""
    drawn = [(token.id, token.logprob) for token in output.logprobs]
    if output.end:
        drawn.append(output.end)
    return tuple(zip(*drawn))


def group_row(group, args):
    """-> (a Group's row of an AnswerBatch, what it adds to the count in front of the loss)"""
    blank = [0.0] * (len(group.prompt) - 1)
    sampled, advantage, weight = ([*blank] for _ in range(3))
    count = 0
    advantages = advantages_of(torch.tensor(group.rewards), args.loss).tolist()
    for ids, log_p, better in zip(group.answers, group.log_probs, advantages):
        each, part = VARIANTS[args.loss].weigh(len(ids), args.max_tokens)
        sampled += log_p
        advantage += [better] * len(ids)
        weight += [each] * len(ids)
        count += part
    return (*prompt_row(group.prompt, group.answers), sampled, advantage, weight), count


NOTHING = [0], [-100], [-1], [0], [0.0], [0.0], [0.0]  # a row that only fills a rank's passes


def batch_of(groups, args, runtime):
    """Groups of this rank -> (AnswerBatch, its count over all ranks); (None, 0) if none has any."""
    made = [group_row(group, args) for group in groups]
    rows = [row for row, _ in made]
    most = int(runtime.sum(len(rows), "MAX"))  # ranks must make as many passes
    if not most:
        return None, 0
    rows += [NOTHING] * (most - len(rows))
    batch = AnswerBatch(*padded_columns(rows))
    return batch, runtime.sum(sum(count for _, count in made))


# --------------------------------------------------------------------------------- loss of a pass
GAP_BOUND = 0.01  # nats between sampler and trainer above which a token is reweighted


def log_probs_of(model, batch):
    """-> (N,) of the batch's targets"""
    return -target_nats(model, batch)[batch.y != -100]


@torch.no_grad()
def reference_log_probs(run, batch):
    """With --lora the reference is the frozen base: the model without its adapter."""
    if run.args.lora:
        with lora.adapter_off(run.model):
            return log_probs_of(run.model, batch)
    return log_probs_of(run.own.reference, batch)


def answer_loss(run, batch, before, totals):
    """A pass over an AnswerBatch -> (its summed, weighted loss, the log-probs (N,) before the step:
    the policy's, and the reference's if --beta asks for them).

    before: None in the first of --epochs, then what this returned in it. Where sampler and trainer
    disagree by more than GAP_BOUND, a token counts p / p_sampled times, at most twice (truncated
    importance sampling, Yao et al. 2025)."""
    args = run.args
    batch = trimmed(batch)
    said = batch.y != -100
    log_p = log_probs_of(run.step_model, batch)
    if before is None:
        before = log_p.detach(), reference_log_probs(run, batch) if args.beta else None
    old, ref = before
    gap = old - batch.sampled[said]
    weight = batch.weight[said]
    weight = torch.where(gap.abs() > GAP_BOUND, weight * gap.exp().clamp(max=2), weight)
    high = args.clip_high or VARIANTS[args.loss].clip_high
    losses, clipped, kl = policy_loss(
        log_p, old, batch.advantage[said], args.clip, high, ref, args.beta
    )
    gaps = gap.abs().tolist()
    totals["gap_max"] = max([totals["gap_max"], *gaps])
    totals.update(
        gap_mean=sum(gaps), pushed=len(old), clipped=clipped.sum().item(), kl=kl.sum().item()
    )
    return (losses * weight).sum(), before


# ---------------------------------------------------------------------------------------- training
def check_grpo_args(args):
    if args.loss not in VARIANTS:
        raise UserError(f"unknown loss {args.loss!r}: use {', '.join(VARIANTS)}")
    if args.group < 2:
        raise UserError(f"--group {args.group}: an answer is judged against others; use at least 2")
    if not args.epochs or not args.reward_seconds:
        raise UserError("--epochs must be at least 1, --reward-seconds above 0")
    refuse_idle(args, args.epochs > 1, "--epochs of 2 and more", "clip", "clip_high")
    if args.shard:
        raise UserError("--shard: the engine needs the whole model on each rank; leave it out")
    finetune.tuned_tokenizer(args.model)  # refuses a model whose answers never end


def prepare_grpo(args, checkpoint):
    """Flags and checkpoint -> Run"""
    check_grpo_args(args)
    rewards = [read_reward(spec) for spec in args.reward]
    runtime, tok, model = open_start_model(args)
    data, val = load_questions(args, tok, rewards)
    reference = None
    if args.beta and not args.lora:
        reference = copy.deepcopy(model).requires_grad_(False)
    print(
        f"data     {len(data.prompts):,} questions to train on, {len(val.prompts):,} held out; "
        f"{args.batch} x {args.group} answers a step"
    )
    model, write = make_policy(args, checkpoint, model, base_sha256(model), runtime)
    engine = None
    if not args.fit:
        at_once = min(args.batch * args.group, 256 if runtime.device.type == "cuda" else 128)
        room = at_once * args.context
        engine = Engine.of(model, tok, args.dtype, max_seqs=at_once, kv_tokens=room)
    return start_run(
        args,
        checkpoint,
        runtime,
        tok,
        model,
        data,
        val,
        loss=full_rows_loss(args.context + (args.group - 1) * args.max_tokens),
        validate=validate_answers,
        write=write,
        own=Environment(engine, rewards, reference),
    )


@torch.no_grad()
def validate_answers(run):
    """The mean reward of likeliest answers to held-out questions; samples.txt gets a few."""
    run.own.engine.refresh(run.model)  # with --average these are the mean weights
    numbers = range(run.runtime.rank, len(run.val.prompts), run.runtime.world)
    answers = [output.text for (output,) in ask(run, run.val, numbers, temperature=0.0)]
    questions = [run.val.questions[n] for n in numbers]
    rewards = [judge(run.own.rewards, *pair, run.args) for pair in zip(questions, answers)]
    good = [r for r in rewards if not math.isnan(r)]
    if run.metrics:
        with open(Path(run.args.out) / "samples.txt", "a", encoding="utf-8") as file:
            for question, answer, reward in zip(questions[:8], answers, rewards):
                text = question.messages[-1]["content"]
                print(f"{run.step}\t{reward:.3g}\t{text!r}\t{answer!r}", file=file)
    return {"val_reward": run.runtime.sum(sum(good)) / max(run.runtime.sum(len(good)), 1)}


MEANS = {  # what a row of the metrics has: {mean: of how many}
    "reward": "judged",
    "spread": "questions",  # deviation of the rewards in a group
    "alike": "questions",  # share of groups whose rewards are all alike, which are dropped
    "failed": "answers",  # share of answers that a reward function failed on
    "cut": "answers",  # share that never ended
    "answer_tokens": "answers",  # tokens of an answer
    "entropy": "answer_tokens",  # nats: -log p of what was drawn, whose mean is the entropy
    "gap_mean": "pushed",  # nats between the sampler's log-probs and the trainer's
    "clipped": "pushed",  # share of tokens
    "kl": "pushed",  # nats
}


def step_means(run, totals, seconds):
    """The step's sums -> what is logged, over all ranks."""
    total = {name: run.runtime.sum(totals[name]) for name in (*MEANS, *MEANS.values())}
    values = {name: total[name] / max(total[by], 1) for name, by in MEANS.items()}
    values["gap_max"] = run.runtime.sum(totals["gap_max"], "MAX")
    values["generate_share"] = totals["generate_seconds"] / seconds
    return values


PATIENCE = 5  # steps without a single group whose rewards differ, from the start


def train_policy(run):
    """The loop: the engine gets the weights and answers, the trainer updates --epochs times."""
    args = run.args
    learned = run.start > 0
    for step, drawn in steps(run):
        began = time.time()
        totals = Counter()
        run.own.engine.refresh(run.model)  # it packs the weights as they are now
        groups = roll_out(run, drawn.x.tolist(), totals)
        batch, count = batch_of(groups, args, run.runtime)
        learned = learned or count > 0
        total = torch.zeros(())
        values = {}
        before = {}  # {pass: log-probs before the step}
        for _ in range(args.epochs if count else 0):
            run.optimizer.zero_grad()
            total = 0
            for i, part in enumerate(passes(run, batch)):
                with run.runtime.autocast():
                    loss, before[i] = answer_loss(run, part, before.get(i), totals)
                backward(run, loss, count)
                total += loss.detach()
            values = update(run, step)
        values |= step_means(run, totals, time.time() - began)
        log_step(run, step, total, count, args.group * values["answer_tokens"], **values)
        if not learned and step + 1 == PATIENCE:
            raise UserError(
                f"{PATIENCE} steps, and no group of {args.group} answers has rewards that differ "
                f"({values['alike']:.0%} alike, of mean {values['reward']:.3g}; "
                f"{values['failed']:.0%} of the answers failed): nothing tells a better answer; "
                "mend --reward where it fails, or take easier or harder questions, a larger "
                "--group, another --reward or a model trained longer"
            )


def main():
    launch(Args, __doc__, prepare_grpo, train_policy)


if __name__ == "__main__":
    common.cli(main)
