"""train.py on two ranks (gloo, CPU): losses and folder as of one process; resumes; a rank dies."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from test_train import TEXT

from common import Metrics
from runtime import latest_checkpoint


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT * 3)
    return path


def start(ranks, text, out, *flags):
    own = ["--device", "cpu", "--dtype", "float32", "--log-every", 1, "--save-every", 10]
    flags = ["--out", out, *own, *flags]
    if "--resume" not in flags:
        tiny = "--layers 2 --dim 32 --heads 2 --context 32 --batch 8 --eval-every 10 --sample 5"
        flags += ["--data", text, *tiny.split(), "--steps", 20]
    launch = []
    if ranks > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
    command = (sys.executable, *launch, ROOT / "train.py", *flags)
    return subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def run(*arguments):
    process = start(*arguments)
    stdout, stderr = process.communicate(timeout=100)
    assert process.returncode == 0, stderr
    return stdout


@pytest.fixture(scope="module")
def alone(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "run"
    run(1, text, out)
    return out


def losses(out):
    return [r["loss"] for r in Metrics.read(out / "metrics.jsonl") if "loss" in r]


def assert_same(out, alone):
    assert len(losses(out)) == 20
    assert max(abs(a - b) for a, b in zip(losses(out), losses(alone))) < 1e-5
    left, right = load_file(out / "model.safetensors"), load_file(alone / "model.safetensors")
    assert left.keys() == right.keys()
    # Muon turns rounding in a gradient's small singular values into small differences of the
    # weights
    assert all(torch.allclose(left[k], right[k], atol=1e-3) for k in left)
    assert {p.name for p in out.iterdir()} == {p.name for p in alone.iterdir()}


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "how",
    [
        "",
        "--shard",
        pytest.param("--micro-batch 2", marks=slow),
        pytest.param("--shard --micro-batch 2 --recompute", marks=slow),
    ],
)
def test_two_ranks_train_as_one(how, text, alone, tmp_path):
    told = run(2, text, tmp_path / "run", *how.split())
    assert told.count("wrote    ") == 1  # one rank tells the story
    assert_same(tmp_path / "run", alone)


@pytest.mark.parametrize(
    "first, second, how",
    [
        (2, 1, ["--shard"]),
        pytest.param(1, 2, ["--shard"], marks=slow),
        pytest.param(2, 1, [], marks=slow),
    ],
)
def test_what_some_ranks_saved_others_resume(first, second, how, text, alone, tmp_path):
    process = start(first, text, tmp_path / "run", *(how if first > 1 else []))
    while latest_checkpoint(tmp_path / "run") is None:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    run(second, text, tmp_path / "run", "--resume", *(how if second > 1 else []))
    assert_same(tmp_path / "run", alone)


def test_a_dead_rank_ends_the_others_with_a_line(text, tmp_path):
    process = start(2, text, tmp_path / "run", "--steps", 100000)
    while latest_checkpoint(tmp_path / "run") is None:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "lost another rank" in stderr and "--resume" in stderr, stderr
    saved = latest_checkpoint(tmp_path / "run")
    assert (
        saved and (tmp_path / "run" / "config.json").exists()
    )  # loadable, and at most 10 steps behind
