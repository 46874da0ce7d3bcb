"""Every speed figure of the README, from one command each.

    python bench.py train                        # seconds and validation loss of the CPU presets, beside nanoGPT's recipe
    python bench.py train --presets shakespeare-char-10m --target 1.4697        # on a GPU
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
    for command in (train,):
        command.add_argument("--json", help="also write the rows to this file")
    args = parser.parse_args()
    rows = args.run(args)
    if args.json:
        Path(args.json).write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1))


if __name__ == "__main__":
    cli(main)
