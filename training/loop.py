"""What every training shares, in the order a run lives: flags, start, steps, evaluation, launch.

A stage (train.py, finetune.py, lora.py, dpo.py, grpo.py) shows its own loop: for each batch of
`steps` it adds up gradients over `passes` with `backward`, then calls `update` and `log_step`.
Around that loop it may bring three functions of its own, which are called from here: the loss, what
an evaluation logs, and what a checkpoint writes (see Run)."""

import contextlib
import dataclasses
import functools
import math
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import common
from common import UserError, first_words
from data import Batches, Split, moved
from model import Transformer, give_up_flex
from runtime import (
    Runtime,
    compile_or_say_why,
    fork_rng,
    latest_checkpoint,
    lost_rank_explained,
    peak_flops,
    read_tensors,
    rng_states,
    save_checkpoint,
    set_rng_states,
)
from tokenizer import Tokenizer
from training.memory import choose_micro_batch
from training.optim import Guard, LossScale, MuonAdamW, schedule
from training.ranks import gather, grad_norm, local, wrap


# ------------------------------------------------------------------------------- flags and resuming
@dataclass
class LoopArgs:
    """The flags that every training shares; each stage's Args adds its own and changes defaults."""

    out: str = "runs/shakespeare-char"  # the model folder to write
    resume: bool = False  # go on with the run in --out, bit-exactly
    overwrite: bool = False  # throw away the run in --out
    # optimization
    context: int = 64  # tokens a row, and the most the model can look back
    steps: int = 550  # optimizer steps
    batch: int = 32  # rows per optimizer step, over all ranks and passes
    micro_batch: int = 0  # rows per pass and rank; 0 is as many as the memory estimate allows
    optimizer: str = "muon"  # muon (hidden matrices; AdamW the rest), adamw, adamw8bit
    muon_lr: float = 0.02  # learning rate of the hidden matrices under Muon
    lr: float = 0.008  # learning rate of everything under AdamW
    embed_lr: float = 0.0  # learning rate of embedding, norms and biases; 0 is --lr
    momentum: float = 0.9  # Muon's; longer runs like 0.95
    average: float = 0.0  # evaluate and save the mean of the last weights: 0.99 is of about 100
    weight_decay: float = 0.0  # pull of the matrices towards zero, relative to the learning rate
    warmup: int = 0  # steps of linear warm-up
    schedule: str = "wsd"  # wsd (stable, then linear to zero) or cosine
    cooldown: float = 0.6  # share of the steps in which wsd falls to zero
    grad_clip: float = 0.0  # clip the gradient's norm to this; 0 is off
    spike: float = 20.0  # skip a step whose gradient is so many times its running mean; 0 is off
    seed: int = 1  # of the weights, the order of the data and dropout
    # memory and machines
    recompute: bool = False  # activation checkpointing: a third more time, far less memory
    shard: bool = False  # FSDP2 instead of DDP: weights and optimizer state spread over ranks
    fit: bool = False  # print the memory estimate by part and stop
    device: str = "auto"  # auto, cpu, cuda, cuda:N, mps
    dtype: str = "auto"  # auto, float32, bfloat16, float16
    compile: str = "auto"  # torch.compile: auto, on, off
    # housekeeping
    log_every: int = 10  # steps between rows of metrics.jsonl
    eval_every: int = 200  # steps between evaluations on the whole validation split
    save_every: int = 500  # steps between checkpoints; one is also written at the end and on Ctrl-C
    keep: int = 1  # how many checkpoints to keep under state/
    typed = ()  # names of the flags that the command line has, not of presets; it is none itself


# Flags that may differ between a run and its resumption without making it another run.
HOUSEKEEPING = set(
    "resume overwrite out log_every eval_every save_every keep sample on_error reward_seconds "
    "fit shard micro_batch recompute device compile".split()
)
AT_LEAST_ONE = (
    "context batch log_every eval_every save_every keep heads max_tokens examples".split()
)
BELOW_ONE = "momentum dropout average val_share text_share".split()
FLAG_CHOICES = {
    "optimizer": "muon adamw adamw8bit".split(),
    "schedule": "wsd cosine".split(),
    "arch": "qwen3 llama gpt2".split(),
    "on_error": "stop skip".split(),
}


def read_args(cls, doc, presets=None, argv=None):
    """Flags -> (an instance of cls, the checkpoint's folder to resume or None)."""
    typed = common.parse_flags(cls, doc, argv, positional=("model",))
    args = common.from_preset(cls, presets, typed) if presets else cls(**typed)
    checkpoint = latest_checkpoint(args.out)
    if args.resume:
        if args.overwrite:
            raise UserError("--resume goes on with a run that --overwrite throws away: drop one")
        if checkpoint is None:
            raise UserError(f"--resume: no checkpoint in {args.out}/state")
        args = resumed_args(cls, typed, args.out, common.read_json(checkpoint / "state.json"))
    elif checkpoint and not (args.overwrite or args.fit):
        raise UserError(
            f"{args.out} already holds a run ({checkpoint.name}): --resume, --overwrite"
        )
    args.typed = typed
    check_args(args)
    refuse_idle(args, args.optimizer == "muon", "--optimizer muon", "muon_lr", "momentum")
    refuse_idle(args, args.schedule == "wsd", "--schedule wsd", "cooldown")
    return args, checkpoint if args.resume else None


def resumed_args(cls, typed, out, state):
    """The flags of a resumed run: those it had, and what was typed now.

    A stage's own flags (its data, its model) and what the order of rows hangs on may not change."""
    flags = cls.__dataclass_fields__.keys()
    own = flags - LoopArgs.__dataclass_fields__
    fixed = own - {"dropout"} | {"context", "batch", "seed", "optimizer", "average"}
    before = {k: v for k, v in state["args"].items() if k in flags}  # an old run may have had more
    for name, new in typed.items():
        old = before.get(name, new)
        if old == new or name in HOUSEKEEPING:
            continue
        if name in fixed:
            raise UserError(
                f"--resume: {common.flag(name)} was {old!r} in {out}, now {new!r}; "
                "a resumed run keeps it (from these weights a new run can start)"
            )
        print(f"resume   {name} changed from {old} to {new}: no longer the same run bit for bit")
    args = cls(**before | typed)
    if args.steps < state["step"]:
        raise UserError(
            f"--resume: {out} is at step {state['step']} already, --steps {args.steps} is less"
        )
    return args


def check_args(args):
    """UserError names the flag whose value cannot be."""
    for name, value in vars(args).items():
        typed = f"{common.flag(name)} {value}"
        if isinstance(value, (int, float)) and not 0 <= value < math.inf:  # true of NaN as well
            raise UserError(f"{typed} must be a number from 0")
        if name in AT_LEAST_ONE and value < 1:
            raise UserError(f"{typed} must be at least 1")
        if name in BELOW_ONE and value >= 1:
            raise UserError(f"{typed} must be below 1")
        if name in FLAG_CHOICES and value not in FLAG_CHOICES[name]:
            raise UserError(f"{typed}: use {' or '.join(FLAG_CHOICES[name])}")


def refuse_idle(args, used, where, *names):
    """UserError for flags that were typed although nothing uses them here."""
    given = common.flags_among(args.typed, names)
    if given and not used:
        raise UserError(f"{given} is for {where}: leave it out")


# -------------------------------------------------------------------------------------------- a run
def next_token_loss(model, batch, args):
    """Summed cross-entropy (nats) of a Batch; --doc-mask keeps documents of one row apart."""
    if args.doc_mask:
        return model(batch.x, targets=batch.y, docs=batch.docs, positions=batch.positions)
    return model(batch.x, targets=batch.y)


@torch.no_grad()
def evaluate(model, split, rows, args, runtime, stride=None, loss=next_token_loss):
    """Summed loss (nats) and number of scored tokens over a whole split; ranks share the rows.

    It draws no random numbers, so evaluating never changes a training."""
    model.eval()
    total = 0.0
    count = 0
    for batch in split.validation(rows, args.context, stride, runtime.rank, runtime.world):
        count += (batch.y != -100).sum().item()
        with runtime.autocast():
            total += loss(model, moved(batch, runtime.device), args).item()
    model.train()
    return runtime.sum(total), runtime.sum(count)


def perplexity(nats):
    return math.exp(min(nats, 700.0))  # e^710 is beyond float64; NaN stays


def validate(run):
    """What an evaluation logs -> {name: value}."""
    nats, scored = evaluate(run.step_model, run.val, run.rows, run.args, run.runtime, loss=run.loss)
    if not scored:
        return {}
    mean = nats / scored
    values = dict(val_loss=mean, perplexity=perplexity(mean), epoch=run.batches.epoch)
    if isinstance(run.val, Split) and "bytes" in run.val.counts:  # only shards have counted them
        values["bits_per_byte"] = nats / math.log(2) / run.val.counts["bytes"]
    return values


def write_model(run, folder, weights):
    """The files of a model folder; config.json is the last: with it the folder is complete."""
    run.tok.save(folder)
    run.model.save_pretrained(folder, weights)


@dataclass
class Found:
    """What a step's gradient was like: it comes from the device while the next step begins."""

    step: int
    values: torch.Tensor  # (2,) its norm, and 1 where that is good
    arrived: torch.cuda.Event | None  # when `values` may be read; None is now


@dataclass
class Run:
    """A training under way. Three of its fields are functions that a stage may bring."""

    args: LoopArgs
    runtime: Runtime
    tok: Tokenizer
    model: Transformer  # the bare model: parameters, folder
    step_model: torch.nn.Module  # the same as the loop calls it: over ranks, compiled
    optimizer: MuonAdamW
    batches: Batches
    val: Split
    rows: int  # rows per pass
    guard: Guard
    scaler: LossScale
    lock: object  # held while the run lives, so that no second process writes to --out
    found: Found | None = None  # of the step before, until it is counted
    start: int = 0  # the step it begins or goes on at
    step: int = 0  # the one that is under way, or before which it evaluates
    metrics: common.Metrics | None = None  # rank 0 only
    loss: Callable = next_token_loss  # (model, batch, args) -> summed loss; start_run tries it too
    validate: Callable = validate  # (run) -> {name: value} to log
    write: Callable = write_model  # (run, folder, weights) writes the model's files
    own: Any = None  # what else a stage needs beside it
    timed_since: float = 0.0  # tokens/s are those since this time
    timed_from: int = 0  # and this step
    bar: tqdm | None = None


# ----------------------------------------------------------------------------------------- starting
def describe(args, model, tok, tokens, val):
    """Print the model's and the data's sizes; tokens and val are counted by len."""
    config = model.config
    seen = args.steps * args.batch * args.context
    print(
        f"model    {config.model_type} {config.num_hidden_layers} layers, {config.hidden_size} wide"
        f": {model.num_params():,} parameters, "
        f"{model.flops_per_token(args.context) / 1e6:.1f} MFLOP a token\n"
        f"data     {len(tokens):,} training and {len(val):,} validation tokens of "
        f"{tok.vocab_size:,} kinds; {args.steps:,} steps of {args.batch * args.context:,} = "
        f"{seen / len(tokens):.1f} epochs; a guess costs ln V = {math.log(tok.vocab_size):.3f}"
    )


def start_run(args, checkpoint, runtime, tok, model, data, val, **own):
    """A model and its data -> Run, as the checkpoint left it; None after `--fit`.

    own: loss, validate, write, where the stage brings its own."""
    out = Path(args.out)
    rank = runtime.rank
    world = runtime.world
    state = common.read_json(checkpoint / "state.json") if checkpoint else {}
    rows = choose_micro_batch(model, args, runtime, state.get("rows", 0))
    if args.fit:
        return None
    lock = common.lock_folder(out) if rank == 0 else None
    step_model = wrap(model, args, runtime).train()
    rates = args.muon_lr, args.lr, args.weight_decay, args.momentum
    run = Run(
        args,
        runtime,
        tok,
        model,
        step_model,
        MuonAdamW(model, *rates, kind=args.optimizer, embed_lr=args.embed_lr, average=args.average),
        Batches(data, args.batch // world, args.context, args.seed, rank, world, runtime.device),
        val,
        rows,
        Guard(args.spike),
        LossScale(runtime.dtype),
        lock,
        **own,
    )
    with fork_rng():  # as if nothing had been tried
        if runtime.device.type == "cuda":  # a CPU that is out of memory raises nothing
            halve_until_a_pass_fits(run)
        tried = functools.partial(try_pass, run)
        run.step_model = compile_or_say_why(step_model, runtime, tried)
    if state:
        restore_run(run, checkpoint, state)
    elif rank:
        torch.manual_seed(args.seed + rank)  # dropout differs between ranks
    if rank == 0:
        if args.overwrite and not checkpoint:
            remove_old_run(out)
        common.write_json(out / "args.json", dataclasses.asdict(args))
        run.metrics = common.Metrics(out, state.get("step", -1))
    return run


def try_pass(run, model):
    """A pass of full rows as the loop makes it, forward and backward, then the forward of an
    evaluation, so that none in the middle of a run can fail. No gradients remain."""
    plan = run.batches.plan(0)
    batch = run.batches.split.fill([plan.row(r) for r in range(run.rows)], run.args.context)
    batch = moved(batch, run.runtime.device)

    def loss():
        with run.runtime.autocast():
            return run.loss(model, batch, run.args)

    try:
        loss().backward()
        model.eval()
        with torch.no_grad():
            loss()
    finally:
        model.train()
        run.optimizer.zero_grad()


def halve_until_a_pass_fits(run):
    """Memory is only estimated: try a pass, and halve its rows until it does fit.

    With several ranks there is no second try, since a rank that failed alone would leave the others
    waiting for its gradients."""
    while True:
        try:
            with contextlib.suppress(torch.OutOfMemoryError):
                try_pass(run, run.step_model)
                break
        except RuntimeError as error:  # FlexAttention's backward is compiled on its first use
            if not run.model.config.flex:
                raise
            give_up_flex(run.model.config, first_words(error))
            continue
        # Out of memory. An except block would be too early: its exception keeps the activations.
        if run.runtime.world > 1 or run.rows == 1:
            raise UserError(
                f"out of memory with {run.rows} rows of {run.args.context:,} tokens a pass: use a "
                "smaller --micro-batch, --recompute or --shard"
            )
        fewer = next(r for r in range(run.rows // 2, 0, -1) if run.rows % r == 0)
        print(f"memory   {run.rows} rows a pass did not fit, going on with {fewer}")
        run.rows = fewer
        torch.cuda.empty_cache()


def restore_run(run, checkpoint, state):
    """Put the run where the checkpoint left it; UserError if it has another tokenizer or data."""
    for what, now in (("tokenizer", run.tok.sha256), ("data", run.batches.split.sha256)):
        before = state[f"{what}_sha256"]
        if before != now:
            raise UserError(
                f"--resume: the {what}'s sha256 was {before[:12]}, now {now[:12]}; restore the "
                f"{what}, or start a new run from the weights in {run.args.out}"
            )
    run.start = state["step"]
    moments = read_tensors(checkpoint / "optimizer.safetensors")
    # an adapter's A was called adapters.default.A once
    moments = {name.replace(".adapters.default", ""): t for name, t in moments.items()}
    run.optimizer.load_tensors(moments)
    run.batches.load_state(state["batches"])
    run.guard = Guard(**state["guard"] | {"factor": run.args.spike})
    scale, good = state["loss_scale"]
    if run.scaler.on and scale != 1.0:  # 1 is of a run that was not in fp16 so far
        run.scaler.scale = scale
        run.scaler.good = good
    rng = read_tensors(checkpoint / "rng.safetensors")
    set_rng_states(rng, run.runtime.rank, run.args.seed + run.start)


RUN_FILES = (
    "args.json metrics.jsonl samples.txt loss.png reward.png config.json model.safetensors "
    "adapter_config.json adapter_model.safetensors report.md answers.jsonl".split()
)


def remove_old_run(out):
    """Remove what a run wrote, and nothing else that may lie in its folder."""
    shutil.rmtree(out / "state", ignore_errors=True)
    for name in RUN_FILES:
        (out / name).unlink(missing_ok=True)


# --------------------------------------------------------------------------------- the loop's parts
def steps(run):
    """Yield (step, batch) for each step that is left: what every stage's loop runs over.

    Between steps it evaluates and saves; Ctrl-C or SIGTERM on any rank saves and ends."""
    args = run.args
    runtime = run.runtime
    hidden = runtime.rank > 0 or None  # None is a bar in a terminal, and none elsewhere
    run.timed_since, run.timed_from = time.time(), run.start
    bar = tqdm(total=args.steps, initial=run.start, unit="step", disable=hidden)
    with common.Interrupt() as interrupt, bar as run.bar:
        for step in range(run.start, args.steps + 1):
            run.step = step
            began = time.time()
            last = step == args.steps
            fresh = step > run.start or args.steps == 0  # a run of no steps is evaluated, too
            if fresh and (last or step % args.eval_every == 0):
                log_validation(run, step)
            # One rank's signal stops all ranks at the same step.
            stopped = runtime.sum(int(interrupt.signal is not None))
            if stopped or last or (fresh and step % args.save_every == 0):
                save_run(run, step)
            if stopped or last:
                break
            run.timed_since += time.time() - began  # none of this was training
            yield step, run.batches.next()
            run.bar.update()
    run.batches.close()
    if stopped or interrupt.signal:
        caught = interrupt.signal or signal.SIGTERM  # or another rank was stopped
        command = f"python {Path(sys.argv[0]).name} --resume --out {args.out}"
        print(f"{caught.name}: saved step {step:,} in {args.out}; go on with: {command}")
        sys.exit(128 + caught)  # as a program does that a signal has ended


def passes(run, batch):
    """The batch of a step in parts of `run.rows` rows, each on the device.

    Ranks exchange gradients in the last pass alone."""
    model = run.step_model
    several = run.runtime.world > 1
    for i in range(0, len(batch.x), run.rows):
        part = moved(batch._make(t[i : i + run.rows] for t in batch), run.runtime.device)
        last = i + run.rows >= len(batch.x)
        context = contextlib.nullcontext()
        if several and run.args.shard:
            model.set_requires_gradient_sync(last)
        elif several and not last:
            context = model.no_sync()
        with context:
            yield part


def backward(run, loss, count):
    """Add the gradients of a pass: of its summed loss / `count`, the step's targets over all ranks.

    So neither passes nor ranks nor ragged rows change the gradient. DDP and FSDP average over
    ranks; since `count` is of all ranks already, `world` undoes that average."""
    (loss * (run.scaler.scale * run.runtime.world / max(count, 1))).backward()


def update(run, step):
    """The optimizer's part of a step: unscale, clip, move -> what to log.

    A gradient that is not sane counts as 0, so that nothing it holds reaches a weight. That is
    decided on the device and not waited for: it is counted when the next step is here."""
    args = run.args
    scale = run.scaler.scale  # this step's: in fp16 the step before is counted by now
    count_found(run)
    params = [p for p in run.model.parameters() if p.grad is not None]
    grads = [local(p.grad) for p in params]
    norm = grad_norm(params) / scale
    good = norm <= run.guard.most  # false of NaN, too
    if args.grad_clip or scale != 1:
        clip = (args.grad_clip / (norm + 1e-6)).clamp(max=1) if args.grad_clip else 1.0
        torch._foreach_mul_(grads, clip / scale)
    if norm.is_cuda or not good:  # elsewhere asking costs nothing
        # as integers, since 0 * NaN is NaN
        torch._foreach_mul_([grad.view(torch.int32) for grad in grads], good.int())
    found = torch.stack((norm, good.float())).to("cpu", non_blocking=norm.is_cuda)
    arrived = torch.cuda.current_stream(norm.device).record_event() if norm.is_cuda else None
    run.found = Found(step, found, arrived)
    if run.scaler.on:  # the next step needs its scale
        count_found(run)
    factor = schedule(step, args.steps, args.warmup, args.schedule, args.cooldown)
    run.optimizer.step(factor)
    return dict(lr_factor=factor, grad_norm=norm)


def count_found(run):
    """Count what the step before found; UserError after too many bad gradients in a row."""
    found = run.found
    if found is None:
        return
    run.found = None
    if found.arrived:
        found.arrived.synchronize()
    norm, good = found.values.tolist()
    args = run.args
    guard = run.guard
    run.scaler.update(math.isfinite(norm))
    guard.count(norm, bool(good))
    if not good and run.metrics:
        skipped = f"gradient norm {norm:.3g}, mean {guard.mean:.3g}; {guard.skipped} skipped so far"
        print(f"step {found.step:6,}  skipped: {skipped}", file=sys.stderr)
    if guard.in_a_row >= guard.limit:
        raise UserError(
            f"stopped at step {found.step:,}: {guard.limit} steps in a row had unusable gradients; "
            + lower_rates(args)
        )


def lower_rates(args):
    """What to do after steps that were too large."""
    go_on = f"--resume --out {args.out}" if latest_checkpoint(args.out) else "start again with"
    names = ["lr", "embed_lr"] + ["muon_lr"] * (args.optimizer == "muon")
    rates = {common.flag(name): getattr(args, name) / 2 for name in names}
    flags = " ".join(f"{flag} {rate:g}" for flag, rate in rates.items() if rate)
    return f"lower the rates: {go_on} {flags}"


def log_step(run, step, total, count, tokens=0, **values):
    """Every --log-every steps: a row of metrics.jsonl and of the bar.

    total: this rank's summed loss, a tensor; count: of all ranks; tokens: in a row, where rows are
    not full; values: what else to log."""
    args = run.args
    if step % args.log_every:
        return
    count_found(run)
    loss = run.runtime.sum(total.item()) / max(count, 1)
    now = time.time()
    processed = args.batch * (tokens or args.context) * (step + 1 - run.timed_from)
    rate = processed / max(now - run.timed_since, 1e-9)
    row = dict(loss=loss, tokens_per_s=round(rate), skipped=run.guard.skipped, **values)
    if "grad_norm" in row:
        row["grad_norm"] = row["grad_norm"].item()
    peak = peak_flops(run.runtime.device)
    if peak:
        flops = rate * run.model.flops_per_token(args.context)
        row["mfu"] = flops / (peak * run.runtime.world)
    if run.metrics:
        run.metrics.log(step, **row)
    run.bar.set_postfix(loss=f"{loss:.3f}", tok_s=f"{rate:,.0f}")
    run.timed_since, run.timed_from = now, step + 1


# ---------------------------------------------------------------- evaluations, samples, checkpoints
def log_validation(run, step):
    """Evaluate, print what came out, and add it to metrics.jsonl."""
    with run.optimizer.averaged():
        values = run.validate(run)
    losses = [(name.removeprefix("val_"), v) for name, v in values.items() if isinstance(v, float)]
    told = ", ".join(f"{name} {value:.4f}" for name, value in losses)
    run.bar.write(f"step {step:6,}  validation {told}", file=sys.stdout)
    if run.metrics:
        run.metrics.log(step, **values)


def print_sample(run):
    """A text from the model as it is; on one rank, and only where that holds the whole model."""
    if run.runtime.rank or run.args.shard or not run.args.sample:
        return
    first = run.tok.bos_id
    if first is None:  # a tokenizer without one: as the validation text begins
        first = next(run.val.validation(1, run.args.context)).x[0, 0].item()
    run.model.eval()
    with run.optimizer.averaged():
        ids = list(run.model.generate([first], run.args.sample, seed=run.args.seed))
    print(run.tok.decode(ids) + "\n")


def save_run(run, step):
    """A checkpoint and the model folder. All ranks gather what is sharded; rank 0 writes.

    UserError where a number in it is not finite: what was saved before stays."""
    count_found(run)
    weights = {}
    mean = set(run.optimizer.names.values()) if run.args.average else ()
    with run.optimizer.averaged():
        for name, v in run.model.state_dict().items():
            whole = gather(local(v.detach()), v)
            weights[name] = whole.clone() if name in mean else whole  # it is only lent
    moments = run.optimizer.tensors()
    broken = [name for name, t in (weights | moments).items() if not t.isfinite().all()]
    if broken:
        raise UserError(
            f"step {step:,} is not saved, {len(broken)} tensors are not finite ({broken[0]}, ...); "
            + lower_rates(run.args)
        )
    rng = rng_states(run.runtime.rank)
    if run.runtime.rank:
        return
    info = {
        "args": dataclasses.asdict(run.args),
        "data_sha256": run.batches.split.sha256,
        "tokenizer_sha256": run.tok.sha256,
        "batches": run.batches.state(),
        "guard": dataclasses.asdict(run.guard),
        "rows": run.rows,
        "loss_scale": [run.scaler.scale, run.scaler.good],
    }
    write = functools.partial(run.write, run, weights=weights)
    save_checkpoint(run.args.out, step, write, moments, rng, info, run.args.keep)


# ---------------------------------------------------------------------------------------- launching
@contextlib.contextmanager
def out_of_memory_explained():
    """Context: that a device has no memory left, in the optimizer or wherever, is one line."""
    try:
        yield
    except RuntimeError as error:
        if not re.search("out of memory|can't allocate memory", str(error)):  # a GPU's, a CPU's
            raise
        raise UserError(
            f"{first_words(error)}: use a smaller --micro-batch, --recompute, "
            "--optimizer adamw8bit, or --shard over more ranks"
        ) from None


def launch(cls, doc, prepare, loop, presets=None, argv=None):
    """A whole training: flags, as read_args has them; prepare(args, checkpoint) -> a Run, or None
    after --fit; then loop(run)."""
    args, checkpoint = read_args(cls, doc, presets, argv)
    go_on = f"Go on from the last checkpoint: --resume --out {args.out}"
    with lost_rank_explained(go_on), out_of_memory_explained():
        run = prepare(args, checkpoint)
        if run is None:
            return
        loop(run)
        if run.metrics:
            size = run.model.num_params() / 1e6
            title = f"{common.model_name(args.out)}: {size:.2f}M parameters"
            made = common.plot_run(args.out, title)
            print(f"wrote    {args.out}/ (model folder), its {made} and metrics.jsonl")
        if torch.distributed.is_initialized():
            del run.step_model  # DDP must go before the process group it belongs to
            torch.distributed.barrier()  # no rank's group may go before the others are done
            torch.distributed.destroy_process_group()
