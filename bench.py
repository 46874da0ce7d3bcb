"""Every speed figure of the README, from one command each.

    python bench.py train                        # seconds and validation loss of the CPU presets, beside nanoGPT's recipe
    python bench.py train --presets shakespeare-char-10m --target 1.4697        # on a GPU
    python bench.py optimizers                   # Muon at 0.7 of the steps against AdamW with its best learning rate
"""
import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from common import Metrics, UserError, cli


def machine():
    """One line that says what the figures were measured on."""
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), "") if Path("/proc/cpuinfo").exists() else platform.processor()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{torch.get_num_threads()} threads of {cpu or platform.machine()}{gpu}, torch {torch.__version__}"


def bench_train(args):
    """Train each preset in a process of its own; the clock starts before Python does, as it does for a user."""
    print(machine())
    print(f"{'':24s} {'parameters':>10s} {'wall s':>8s} {'val loss':>9s} {'to ' + str(args.target):>10s}")
    if args.nanogpt_seconds:
        print(f"{'nanoGPT (given)':24s} {'804,096':>10s} {args.nanogpt_seconds:8.1f} {args.nanogpt_loss:9.4f}")
    rows = []
    for preset in args.presets:
        with tempfile.TemporaryDirectory() as out:
            begin = time.time()
            done = subprocess.run([sys.executable, Path(__file__).with_name("train.py"), "--preset", preset, "--out", f"{out}/run",
                                   "--sample", "1", "--data", args.data, *args.train_flags], capture_output=True, text=True)
            wall = time.time() - begin
            if done.returncode:
                raise UserError(f"train.py --preset {preset} failed: {done.stderr.strip().splitlines()[-1]}")
            losses = [r for r in Metrics.read(f"{out}/run/metrics.jsonl") if "val_loss" in r]
            size = next(line for line in done.stdout.splitlines() if line.startswith("model")).split(":")[1].split()[0]
        reached = next((r["seconds"] + wall - losses[-1]["seconds"] for r in losses if r["val_loss"] <= args.target), None)
        row = dict(preset=preset, parameters=int(size.replace(",", "")), wall=wall, reached=reached,
                   val_loss=losses[-1]["val_loss"])
        ratio = f"  {args.nanogpt_seconds / wall:.1f}x nanoGPT's speed" if args.nanogpt_seconds else ""
        print(f"{preset:24s} {size:>10s} {wall:8.1f} {row['val_loss']:9.4f} "
              f"{f'{reached:.1f} s' if reached else 'not reached':>10s}{ratio}", flush=True)
        rows.append(row)
    return rows


def bench_optimizers(args):
    """Does Muon with 0.7 of the steps reach what tuned AdamW reaches with all? Same model, text, batch, order, for each seed."""
    def final_loss(seed, steps, *flags):
        with tempfile.TemporaryDirectory() as out:
            shape = ["--dim", 96, "--mlp", 192, "--batch", 32, "--eval-every", 10 ** 6, "--save-every", 10 ** 6, "--sample", 1]
            command = [sys.executable, Path(__file__).with_name("train.py"), "--out", f"{out}/run", "--data", args.data, *shape,
                       "--seed", seed, "--steps", steps, *flags]
            done = subprocess.run([str(x) for x in command], capture_output=True, text=True)
            if done.returncode:
                raise UserError(f"train.py failed: {done.stderr.strip().splitlines()[-1]}")
            return next(r["val_loss"] for r in reversed(Metrics.read(f"{out}/run/metrics.jsonl")) if "val_loss" in r)

    print(machine())
    adamw = ["--optimizer", "adamw", "--warmup", args.steps // 20]
    tried = {}
    for schedule in ("wsd", "cosine"):  # AdamW gets the better schedule, and rates until the next one is worse
        for lr in (0.001, 0.002, 0.004, 0.008, 0.016):
            tried[schedule, lr] = final_loss(args.seeds[0], args.steps, *adamw, "--schedule", schedule, "--lr", lr)
            print(f"AdamW {schedule:6s} lr {lr:<6} seed {args.seeds[0]}: {tried[schedule, lr]:.4f}", flush=True)
            if lr > 0.001 and tried[schedule, lr] > tried[schedule, lr / 2]:
                break
    schedule, lr = min(tried, key=tried.get)
    rows = []
    for seed in args.seeds:
        first = final_loss(seed, args.steps, *adamw, "--schedule", schedule, "--lr", lr)
        second = final_loss(seed, round(args.steps * 0.7))
        rows.append(dict(seed=seed, adamw=first, muon=second))
        print(f"seed {seed}: AdamW ({schedule}, lr {lr}) {args.steps} steps {first:.4f}; Muon {round(args.steps * 0.7)} steps "
              f"{second:.4f}  {'reached' if second <= first else 'NOT reached'}", flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="time the training presets")
    train.add_argument("--presets", nargs="+", default=["shakespeare-char-fast", "shakespeare-char"])
    train.add_argument("--data", default="shakespeare")
    train.add_argument("--target", type=float, default=1.886, help="report the time to this validation loss [1.886]")
    train.add_argument("--nanogpt-seconds", type=float, help="wall time of nanoGPT's CPU recipe on this machine")
    train.add_argument("--nanogpt-loss", type=float, default=1.886, help="its loss over the whole validation split [1.886]")
    train.add_argument("--train-flags", nargs=argparse.REMAINDER, default=[], help="the rest goes to train.py")
    train.set_defaults(run=bench_train)
    optimizers = commands.add_parser("optimizers", help="sample efficiency of Muon against AdamW")
    optimizers.add_argument("--data", default="shakespeare")
    optimizers.add_argument("--steps", type=int, default=400, help="AdamW's steps [400]")
    optimizers.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    optimizers.set_defaults(run=bench_optimizers)
    for command in (train, optimizers):
        command.add_argument("--json", help="also write the rows to this file")
    args = parser.parse_args()
    rows = args.run(args)
    if args.json:
        Path(args.json).write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1))


if __name__ == "__main__":
    cli(main)
