"""What every training script does around its own loop: flags, resume, evaluation, checkpoints, logs."""

import contextlib
import dataclasses
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import common
from common import UserError
from data import Batches, Split
from model import Transformer
from runtime import (
    Runtime,
    all_rng_states,
    compile_or_say_why,
    latest_checkpoint,
    lost_rank_explained,
    peak_flops,
    read_tensors,
    save_checkpoint,
    set_all_rng_states,
)
from tokenizer import Tokenizer
from training.memory import choose_micro_batch
from training.optim import Guard, LossScale, MuonAdamW, schedule
from training.ranks import gather, grad_norm, local, wrap


@dataclass
class LoopArgs:
    """The flags that every training script shares; each has its own Args on top, with other defaults where they suit it."""

    out: str = "runs/shakespeare-char"  # the model folder to write
    resume: bool = False  # go on with the run in --out, bit-exactly
    overwrite: bool = False  # throw away the run in --out
    # optimization
    context: int = 64  # tokens a row, and the most the model can look back
    steps: int = 550  # optimizer steps
    batch: int = 32  # rows per optimizer step, over all ranks and passes
    micro_batch: int = (
        0  # rows per forward pass and rank; 0 is as many as the memory estimate allows
    )
    optimizer: str = "muon"  # muon (hidden matrices; AdamW for the rest), adamw, adamw8bit (its moments in 8 bits)
    muon_lr: float = 0.02  # learning rate of the hidden matrices under Muon
    lr: float = 0.008  # learning rate of everything under AdamW
    momentum: float = 0.9  # Muon's; longer runs like 0.95
    weight_decay: float = 0.0  # pull of the matrices towards zero, relative to the learning rate
    warmup: int = 0  # steps of linear warm-up
    schedule: str = "wsd"  # wsd (stable, then linear to zero) or cosine
    cooldown: float = 0.6  # share of the steps in which wsd falls to zero
    grad_clip: float = 0.0  # clip the gradient's norm to this; 0 is off
    spike: float = 20.0  # skip a step whose gradient is so many times its running mean; 0 is off
    seed: int = 1  # of the weights, the order of the data and dropout
    # memory and machines
    recompute: bool = False  # activation checkpointing: a third more time, a fraction of the memory
    shard: bool = (
        False  # FSDP2 instead of DDP under torchrun: weights and optimizer state spread over ranks
    )
    fit: bool = False  # print the memory estimate by part and stop
    device: str = "auto"  # auto, cpu, cuda, cuda:N, mps
    dtype: str = "auto"  # auto, float32, bfloat16, float16
    compile: str = "auto"  # torch.compile: auto, on, off
    # housekeeping
    log_every: int = 10  # steps between rows of metrics.jsonl
    eval_every: int = 200  # steps between evaluations on the whole validation split
    save_every: int = (
        500  # steps between checkpoints; one is always written at the end and on Ctrl-C
    )
    keep: int = 1  # how many checkpoints to keep under state/
    sample_every: int = 0  # steps between samples appended to OUT/samples.txt; 0 is only at the end
    sample: int = 400  # tokens a sample has
    track: str = ""  # also send metrics to tensorboard or wandb
    background: bool = False  # go on after the terminal closes; output in OUT/log.txt, `train.py watch OUT` shows it


# what may differ between a run and its resumption without making it another run
HOUSEKEEPING = {
    "resume",
    "overwrite",
    "out",
    "log_every",
    "eval_every",
    "save_every",
    "keep",
    "sample_every",
    "sample",
    "track",
    "background",
    "fit",
    "shard",
    "micro_batch",
    "recompute",
    "device",
    "compile",
}


AT_LEAST_ONE = {"context", "batch", "log_every", "eval_every", "save_every", "keep", "heads"}


CHOICES = {
    "optimizer": ("muon", "adamw", "adamw8bit"),
    "schedule": ("wsd", "cosine"),
    "track": ("", "tensorboard", "wandb"),
    "arch": ("qwen3", "llama", "gpt2"),
}


RUN_FILES = (
    "args.json",
    "metrics.jsonl",
    "samples.txt",
    "loss.png",
    "config.json",
    "model.safetensors",
    "adapter_config.json",
    "adapter_model.safetensors",
    "report.md",
    "report.html",
    "answers.jsonl",
)


def read_args(
    cls, description, presets=None, positional=(), argv=None
) -> tuple[LoopArgs, Path | None]:
    """Flags -> (cls, path of the checkpoint to resume or None). A resumed run inherits every flag that is not typed; a script's
    own flags (its data, its model) and what the order of rows hangs on may not differ at all."""
    typed = common.parse_flags(cls, description, argv, positional)
    args = common.from_preset(cls, presets, typed) if presets else cls(**typed)
    checkpoint = latest_checkpoint(args.out)
    if not args.resume:
        if checkpoint and not args.overwrite:
            raise UserError(
                f"{args.out} already holds a run ({checkpoint.name}): continue it with --resume, throw it away "
                "with --overwrite, or choose another --out"
            )
        return check_args(args), None
    if checkpoint is None:
        raise UserError(
            f"--resume: no checkpoint in {args.out}/state; drop --resume to start a run there"
        )
    state = common.read_json(checkpoint / "state.json")
    flags, shared = ({f.name for f in dataclasses.fields(c)} for c in (cls, LoopArgs))
    kept = (flags - shared | {"context", "batch", "seed", "optimizer"}) - HOUSEKEEPING - {"dropout"}
    for name, new in typed.items():
        if name in HOUSEKEEPING or (old := state["args"].get(name, new)) == new:
            continue
        if name in kept:
            raise UserError(
                f"--resume: --{name.replace('_', '-')} was {old!r} in {args.out}, now {new!r}; a resumed run keeps "
                "it (from these weights a new run can start)"
            )
        print(f"resume   {name} changed from {old} to {new}: no longer the same run bit for bit")
    args = cls(
        **{k: v for k, v in state["args"].items() if k in flags} | typed
    )  # an older version may have had more flags
    if args.steps < (done := state["step"]):
        raise UserError(
            f"--resume: {args.out} is at step {done:,} already, --steps {args.steps:,} is less"
        )
    return check_args(args), checkpoint


def check_args(args):
    """UserError names the flag whose value cannot be -> args."""
    for name, value in vars(args).items():
        if isinstance(value, (int, float)) and not value >= (
            name in AT_LEAST_ONE
        ):  # so written it refuses nan as well
            must = "be at least 1" if name in AT_LEAST_ONE else "not be negative"
            raise UserError(f"--{name.replace('_', '-')} {value} must {must}")
        if value not in CHOICES.get(name, [value]):
            raise UserError(f"--{name} {value}: use {' or '.join(filter(None, CHOICES[name]))}")
        if (
            name in ("momentum", "dropout")
            and value >= 1
            or name == "cooldown"
            and not 0 < value <= 1
        ):
            raise UserError(
                f"--{name} {value} must be "
                + ("above 0 and at most 1" if name == "cooldown" else "below 1")
            )
    return args


def forward_backward(run, batch, count):
    """Gradients of the mean loss over `count` targets (of all ranks), in passes of `run.rows` rows -> this rank's summed loss.

    Losses are sums, divided once by the global count: then neither passes nor ranks nor ragged rows change the gradient."""
    run.optimizer.zero_grad()
    total = torch.zeros((), device=run.runtime.device)
    for part in passes(run, batch):
        with run.runtime.autocast():
            loss = run.loss(run.step_model, part, run.args)
        backward(run, loss, count)
        total += loss.detach()
    return total


def next_token_loss(model, batch, args):
    """Summed cross-entropy of a Batch; with --doc-mask packed documents are kept apart. DPO has another loss in its place."""
    apart = dict(docs=batch.docs, positions=batch.positions) if args.doc_mask else {}
    return model(batch.x, targets=batch.y, **apart)


def passes(run, batch):
    """The batch of a step in parts of `run.rows` rows, each on the device; ranks exchange gradients in the last one alone."""
    model, ranks, sharded = run.step_model, run.runtime.world > 1, run.args.shard
    for i in range(0, len(batch.x), run.rows):
        part = batch._make(t[i : i + run.rows] for t in batch).to(run.runtime.device)
        last = i + run.rows >= len(batch.x)
        if ranks and sharded:
            model.set_requires_gradient_sync(last)
        with model.no_sync() if ranks and not (last or sharded) else contextlib.nullcontext():
            yield part


def backward(run, loss, count):
    """Add to the gradients those of a pass: its summed loss, divided by the step's `count` of targets over all ranks.

    DDP and FSDP average over ranks; the count is of all ranks already, so that average is undone."""
    (loss * (run.scaler.scale * run.runtime.world / max(count, 1))).backward()


@torch.no_grad()
def evaluate(model, split, rows, args, runtime, stride=None, loss=next_token_loss):
    """Summed loss (nats) and number of scored tokens over a whole split; ranks share the rows. Draws no random numbers."""
    model.eval()
    total, count = 0.0, 0
    for batch in split.validation(rows, args.context, stride, runtime.rank, runtime.world):
        count += (batch.y != -100).sum().item()
        with runtime.autocast():
            total += loss(model, batch.to(runtime.device), args).item()
    model.train()
    return runtime.sum(total), runtime.sum(count)


def validate(run):
    """What is logged at an evaluation -> {name: value}; the first is printed."""
    nats, scored = evaluate(run.step_model, run.val, run.rows, run.args, run.runtime, loss=run.loss)
    if not scored:
        return {}
    size = getattr(run.val, "counts", {}).get("bytes")  # of a text in memory nobody counted them
    return dict(
        val_loss=nats / scored,
        perplexity=math.exp(min(700.0, nats / scored)),
        epoch=run.batches.epoch,
        **({"bits_per_byte": nats / math.log(2) / size} if size else {}),
    )


def write_model(run, folder, weights):
    """The files of a model folder, config.json last: with it the folder is complete. LoRA writes an adapter in their place."""
    run.tok.save(folder)
    run.model.save_pretrained(folder, weights)


@dataclass
class Run:
    """What the loop works with."""

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
    start: int  # the step it begins or goes on at
    metrics: common.Metrics | None  # rank 0 only
    lock: object  # held while the run lives: no second process writes to --out
    loss: Callable = next_token_loss  # (model, batch, args) -> summed loss; a script may bring its own, as of the next two
    validate: Callable = validate  # (run) -> {name: value} to log
    write: Callable = write_model  # (run, folder, weights) writes the model's files
    clock: tuple = (0.0, 0)  # when and at which step the clock of tokens/s started
    bar: tqdm | None = None


def start_run(args, checkpoint, runtime, tok, model, data, val, loss=next_token_loss, **own):
    """A model and its data -> Run, as the checkpoint left it; None after `--fit`. The part of `prepare` all scripts share.
    own: validate, write."""
    out, state = Path(args.out), common.read_json(checkpoint / "state.json") if checkpoint else {}
    for what, now in (("tokenizer", tok.sha256), ("data", data.sha256)):
        if state and (then := state[f"{what}_sha256"]) != now:
            raise UserError(
                f"--resume: the {what}'s sha256 was {then[:12]}, now {now[:12]}; restore the {what}, or start a new "
                f"run from the weights in {out}"
            )
    rows = choose_micro_batch(model, args, runtime, state.get("rows", 0))
    if args.fit:
        return None
    lock = common.lock_folder(out) if runtime.rank == 0 else None
    wrapped = wrap(model, args, runtime).train()
    optimizer = MuonAdamW(
        model,
        args.muon_lr,
        args.lr,
        args.weight_decay,
        args.momentum,
        muon=args.optimizer == "muon",
        eight_bit=args.optimizer == "adamw8bit",
    )
    batches = Batches(
        data,
        args.batch // runtime.world,
        args.context,
        args.seed,
        runtime.rank,
        runtime.world,
        device=runtime.device,
    )
    guard, scaler = Guard(args.spike), LossScale(runtime.dtype)

    def trial(compiled):
        with runtime.autocast():
            loss(
                compiled, next(val.validation(rows, args.context)).to(runtime.device), args
            ).backward()
        optimizer.zero_grad()

    step_model = compile_or_say_why(wrapped, runtime, trial)
    if state:
        optimizer.load_tensors(read_tensors(checkpoint / "optimizer.safetensors"))
        batches.load_state(state["batches"])
        guard = Guard(**{**state["guard"], "factor": args.spike})
        if (
            scaler.on and state["loss_scale"][0] != 1.0
        ):  # 1 is that of a run that was not in fp16 so far
            scaler.scale, scaler.good = state["loss_scale"]
        set_all_rng_states(
            read_tensors(checkpoint / "rng.safetensors"), runtime.rank, args.seed + state["step"]
        )
    elif runtime.rank:
        torch.manual_seed(args.seed + runtime.rank)  # dropout differs between ranks
    metrics = None
    if runtime.rank == 0:
        if (
            args.overwrite and not checkpoint
        ):  # away with what a run wrote, and with nothing else that may lie there
            if (out / "state").exists():
                shutil.rmtree(out / "state")
            for name in RUN_FILES:
                (out / name).unlink(missing_ok=True)
        common.write_json(out / "args.json", dataclasses.asdict(args))
        metrics = common.Metrics(out, state.get("step"), args.track, vars(args))
    return Run(
        args,
        runtime,
        tok,
        model,
        step_model,
        optimizer,
        batches,
        val,
        rows,
        guard,
        scaler,
        state.get("step", 0),
        metrics,
        lock,
        loss,
        **own,
    )


def describe(args, model, tok, tokens, val):
    c, per_step = model.config, args.batch * args.context
    print(
        f"model    {c.model_type} {c.num_hidden_layers} layers, {c.hidden_size} wide: {model.num_params():,} parameters, "
        f"{model.flops_per_token(args.context) / 1e6:.1f} MFLOP a token"
    )
    print(
        f"data     {len(tokens):,} training and {len(val):,} validation tokens of {tok.vocab_size:,} kinds; "
        f"{args.steps:,} steps of {per_step:,} = {args.steps * per_step / len(tokens):.1f} epochs; "
        f"a guess costs ln V = {math.log(tok.vocab_size):.3f}"
    )


def save(run, step):
    """A checkpoint and the model folder. Gathering what is sharded takes all ranks; rank 0 writes."""
    weights = {k: gather(local(v.detach()), v) for k, v in run.model.state_dict().items()}
    moments, rng = run.optimizer.tensors(), all_rng_states()
    if run.runtime.rank:
        return
    save_checkpoint(
        run.args.out,
        step,
        lambda folder: run.write(run, folder, weights),
        moments,
        rng,
        keep=run.args.keep,
        info={
            "args": dataclasses.asdict(run.args),
            "data_sha256": run.batches.split.sha256,
            "tokenizer_sha256": run.tok.sha256,
            "batches": run.batches.state(),
            "guard": dataclasses.asdict(run.guard),
            "rows": run.rows,
            "loss_scale": [run.scaler.scale, run.scaler.good],
        },
    )


def update(run, step):
    """The optimizer's part of a step: unscale, clip, skip what is not sane, move -> what is logged of it."""
    args, params = run.args, [p for p in run.model.parameters() if p.grad is not None]
    scale = run.scaler.scale
    norm = grad_norm(params).item() / scale
    factor = schedule(step, args.steps, args.warmup, args.schedule, args.cooldown)
    run.scaler.update(math.isfinite(norm))
    if not run.guard.accepts(norm):
        print(
            f"step {step:6,}  skipped: gradient norm {norm:.3g}, mean {run.guard.mean:.3g} ({run.guard.skipped} skipped so far)",
            file=sys.stderr,
        )
        if run.guard.in_a_row >= run.guard.limit:
            go_on = (
                f"--resume --out {args.out}" if latest_checkpoint(args.out) else "start again with"
            )
            raise UserError(
                f"stopped at step {step:,}: {run.guard.limit} steps in a row had unusable gradients; lower the rates: "
                f"{go_on} --lr {args.lr / 2:g} --muon-lr {args.muon_lr / 2:g}"
            )
        return dict(lr=factor, grad_norm=norm)
    shrink = min(1.0, args.grad_clip / (norm + 1e-6)) if args.grad_clip else 1.0
    if shrink != scale:
        torch._foreach_mul_([local(p.grad) for p in params], shrink / scale)
    run.optimizer.set_lr(factor)
    run.optimizer.step()
    return dict(lr=factor, grad_norm=norm)


def steps(run):
    """Yield (step, batch) for each step that is to be done. In between: evaluations, checkpoints, samples; Ctrl-C or SIGTERM on
    any rank saves and ends the program. What every training script's loop runs over."""
    args, runtime, out = run.args, run.runtime, Path(run.args.out)
    hidden = runtime.rank > 0 or None  # the bar: on rank 0, and only in a terminal
    run.clock = time.time(), run.start
    with (
        common.Interrupt() as interrupt,
        tqdm(total=args.steps, initial=run.start, unit="step", disable=hidden) as run.bar,
    ):
        for step in range(run.start, args.steps + 1):
            last, fresh, begin = step == args.steps, step > run.start, time.time()
            if (step % args.eval_every == 0 or last) and (fresh or args.steps == 0):
                values = run.validate(run)
                told = ", ".join(
                    f"{k.removeprefix('val_')} {v:.4f}"
                    for k, v in values.items()
                    if isinstance(v, float)
                )
                run.bar.write(f"step {step:6,}  validation {told}", file=sys.stdout)
                if run.metrics:
                    run.metrics.log(step, **values)
            stop = runtime.sum(
                int(interrupt.signal is not None)
            )  # one rank's signal stops all at the same step
            if stop or last or (step % args.save_every == 0 and fresh):
                save(run, step)
            if stop or last:
                break
            if (
                args.sample_every
                and fresh
                and step % args.sample_every == 0
                and run.metrics
                and not args.shard
            ):
                with open(out / "samples.txt", "a", encoding="utf-8") as f:
                    f.write(f"----- step {step}\n{sample_text(run)}\n")
            run.clock = (
                run.clock[0] + time.time() - begin,
                run.clock[1],
            )  # none of that is training time
            yield step, run.batches.next()
            run.bar.update()
    run.batches.close()
    if interrupt.signal or stop:
        name = interrupt.signal.name if interrupt.signal else "another rank was stopped"
        print(
            f"{name}: saved step {step:,} in {out}; go on with: python {Path(sys.argv[0]).name} --resume --out {out}"
        )
        sys.exit(128 + (interrupt.signal or signal.SIGTERM))


def log_step(run, step, total, count, tokens=0, **more):
    """Every --log-every steps a row of metrics.jsonl and of the bar. total: this rank's summed loss; count: of all ranks;
    tokens: in a row, where rows are not full; more: what else to log."""
    if step % run.args.log_every:
        return
    loss, now = run.runtime.sum(total.item()) / max(count, 1), time.time()
    rate = (
        run.args.batch
        * (tokens or run.args.context)
        * (step + 1 - run.clock[1])
        / max(now - run.clock[0], 1e-9)
    )
    row = dict(loss=loss, tokens_per_s=round(rate), skipped=run.guard.skipped, **more)
    if peak := peak_flops(run.runtime.device):
        row["mfu"] = rate * run.model.flops_per_token(run.args.context) / (peak * run.runtime.world)
    if run.metrics:
        run.metrics.log(step, **row)
    run.bar.set_postfix(
        loss=f"{loss:.3f}", tok_s=f"{rate:,.0f}", **({"mfu": f"{row['mfu']:.1%}"} if peak else {})
    )
    run.clock = now, step + 1


def train(run):
    """The loop of pre-training, and of whatever else learns the next token."""
    for step, batch in steps(run):
        learn(run, step, batch)


def learn(run, step, batch):
    """One step: gradients of the mean loss over all targets of all ranks, the optimizer's move, a row of metrics."""
    count = run.runtime.sum((batch.y != -100).sum().item())
    total = forward_backward(run, batch, count)
    log_step(run, step, total, count, **update(run, step))


def sample_text(run):
    """A sample from the model as it is. Draws from a generator of its own; the model goes back to training."""
    first = run.tok.bos_id
    if first is None:  # as the validation begins
        first = next(run.val.validation(1, run.args.context)).x[0, 0].item()
    run.model.eval()
    new = list(run.model.generate([first], run.args.sample, temperature=0.8, seed=run.args.seed))
    run.model.train()
    return run.tok.decode(new)


def launch(args, checkpoint, prepare, loop):
    """What every training script does around its own prepare(args, checkpoint) -> Run or None (--fit) and loop(run)."""
    if args.background:
        return start_in_background(args)
    with lost_rank_explained(f"Go on from the last checkpoint: --resume --out {args.out}"):
        if (run := prepare(args, checkpoint)) is None:
            return
        loop(run)
        if run.metrics:
            common.plot_losses(
                args.out, f"{Path(args.out).name}: {run.model.num_params() / 1e6:.2f}M parameters"
            )
            print(
                f"wrote    {args.out}/ (model folder), {args.out}/loss.png, {args.out}/metrics.jsonl"
            )
        if torch.distributed.is_initialized():
            del run.step_model  # DDP must go before the process group it belongs to, and no rank's group before the others are done
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()


def start_in_background(args):
    """Start this command again in a session of its own, which outlives the terminal."""
    if "WORLD_SIZE" in os.environ:
        raise UserError(
            "--background is for one process; under torchrun start torchrun itself so: nohup torchrun ... &"
        )
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, sys.argv[0], *(a for a in sys.argv[1:] if a != "--background")]
    with open(out / "log.txt", "ab") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    print(
        f"started  process {process.pid}; output in {out}/log.txt; watch it: python train.py watch {out}; "
        f"stop it, saving: kill {process.pid}"
    )
