"""train.py as a user runs it: exact resume, stop signals, refusals."""
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

import common
import train
from common import Metrics, latest_checkpoint
from model import Transformer

TEXT = "".join(f"{who}:\nLine {i}, spoken by {who.lower()}.\n\n" for i, who in enumerate(["ROMEO", "JULIET", "NURSE"] * 60))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def command(text, out, flags):
    """The arguments of a tiny run; a resumed one inherits them."""
    tiny = [] if "--resume" in flags else ["--data", text, "--layers", 2, "--dim", 16, "--heads", 2, "--context", 16, "--batch", 4,
                                           "--eval-every", 7, "--save-every", 5, "--sample", 5, "--dropout", 0.1]
    return [str(x) for x in ("train.py", "--out", out, "--device", "cpu", *tiny, *flags)]


def start(text, out, *flags):
    """In a process of its own, to be killed."""
    return subprocess.Popen([sys.executable, *command(text, out, flags)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=ROOT)


def run(text, out, *flags):
    """In this process -> (exit status, stdout, stderr)."""
    argv, stdout, stderr, code = sys.argv, io.StringIO(), io.StringIO(), 0
    sys.argv = command(text, out, flags)
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            common.cli(train.main)
        except SystemExit as exit:
            code = exit.code
    sys.argv = argv
    return code, stdout.getvalue(), stderr.getvalue()


def saved_step(out):
    checkpoint = latest_checkpoint(out)
    return int(checkpoint.name.removeprefix("step-")) if checkpoint else -1


def refused(text, out, *flags):
    code, _, stderr = run(text, out, *flags)
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in stderr, stderr
    return lines[0]


def same_folder(a, b):
    for file in ("model.safetensors", latest_checkpoint(a).relative_to(a) / "optimizer.safetensors"):
        left, right = load_file(a / file), load_file(b / file)
        assert left.keys() == right.keys()
        for name in left:
            assert torch.equal(left[name], right[name]), name
    return True


def without_clock(row):
    return {k: v for k, v in row.items() if k not in ("seconds", "tokens_per_s")}


def test_killed_and_resumed_equals_never_stopped_to_the_bit(text, tmp_path):
    """2N steps == N steps, kill -9 somewhere after a checkpoint, --resume to 2N; dropout on."""
    assert run(text, tmp_path / "whole", "--steps", 80)[0] == 0
    process = start(text, tmp_path / "cut", "--steps", 80)
    while saved_step(tmp_path / "cut") < 20:
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert 20 <= saved_step(tmp_path / "cut") < 80
    code, stdout, stderr = run(text, tmp_path / "cut", "--resume")
    assert code == 0, stderr
    assert same_folder(tmp_path / "whole", tmp_path / "cut")
    whole, cut = (Metrics.read(tmp_path / name / "metrics.jsonl") for name in ("whole", "cut"))
    assert [without_clock(r) for r in whole] == [without_clock(r) for r in cut]


def test_evaluating_never_changes_training(text, tmp_path):
    assert run(text, tmp_path / "a", "--steps", 10)[0] == 0
    assert run(text, tmp_path / "b", "--steps", 10, "--eval-every", 1, "--save-every", 3)[0] == 0
    assert same_folder(tmp_path / "a", tmp_path / "b")


def test_sigterm_saves_exits_and_resumes_exactly(text, tmp_path):
    assert run(text, tmp_path / "whole", "--steps", 60)[0] == 0
    process = start(text, tmp_path / "cut", "--steps", 60)
    while saved_step(tmp_path / "cut") < 0:
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "SIGTERM: saved step" in stdout and "--resume" in stdout
    assert run(text, tmp_path / "cut", "--resume")[0] == 0
    assert same_folder(tmp_path / "whole", tmp_path / "cut")


def test_the_run_folder_holds_all_that_is_promised(text, tmp_path):
    code, stdout, _ = run(text, tmp_path / "run", "--steps", 12)
    assert code == 0
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "metrics.jsonl", "loss.png",
            "state"} <= names
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    rows = Metrics.read(tmp_path / "run" / "metrics.jsonl")
    assert [r["step"] for r in rows if "val_loss" in r] == [0, 7, 12]
    assert abs(rows[0]["val_loss"] - 3.4) < 0.5 and rows[-1]["val_loss"] < rows[0]["val_loss"]
    assert "validation loss" in stdout
    model = Transformer.from_pretrained(tmp_path / "run")
    assert model.config.model_type == "qwen3" and model.config.num_hidden_layers == 2


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_other_architectures_train(text, tmp_path, arch):
    code, _, stderr = run(text, tmp_path / "run", "--steps", 12, "--arch", arch, "--optimizer", "adamw")
    assert code == 0, stderr
    rows = [r for r in Metrics.read(tmp_path / "run" / "metrics.jsonl") if "val_loss" in r]
    assert rows[-1]["val_loss"] < rows[0]["val_loss"]


def test_init_from_starts_a_new_run_from_weights_only(text, tmp_path):
    assert run(text, tmp_path / "a", "--steps", 10)[0] == 0
    assert run(text, tmp_path / "b", "--steps", 0, "--init-from", tmp_path / "a")[0] == 0
    left, right = (load_file(tmp_path / d / "model.safetensors") for d in "ab")
    assert all(torch.equal(left[k], right[k]) for k in left)
    assert json.loads((latest_checkpoint(tmp_path / "b") / "state.json").read_text())["step"] == 0
    assert "layers 2 there, 3 here" in refused(text, tmp_path / "c", "--init-from", tmp_path / "a", "--layers", 3)


def test_resuming_another_model_or_text_is_refused_with_both_values(text, tmp_path):
    out = tmp_path / "run"
    assert run(text, out, "--steps", 6)[0] == 0
    assert "--layers was 2" in refused(text, out, "--resume", "--layers", 3)
    assert "--tokenizer was 'char'" in refused(text, out, "--resume", "--tokenizer", tmp_path)
    before = (out / "model.safetensors").read_bytes()
    text.write_text(TEXT.replace("Line", "neiL"))  # the same characters, another text
    assert "the text's sha256 was" in refused(text, out, "--resume")
    text.write_text(TEXT.replace("L", "?"))  # other characters: another tokenizer
    assert "tokenizer" in refused(text, out, "--resume")
    assert (out / "model.safetensors").read_bytes() == before


def test_a_finished_or_running_folder_is_not_overwritten_by_accident(text, tmp_path):
    out = tmp_path / "run"
    assert run(text, out, "--steps", 3)[0] == 0
    assert "already holds a run (step-00000003)" in refused(text, out, "--steps", 3)
    assert run(text, out, "--steps", 4, "--overwrite")[0] == 0
    assert "no checkpoint" in refused(text, tmp_path / "nothing", "--resume")


@pytest.mark.parametrize("flags, words", [
    (["--context", 1024], "needs at least 1,025: use --context"),
    (["--dim", 15], "--dim 15 / --heads 2"),
    (["--laeyrs", 3], "unknown argument --laeyrs: did you mean --layers?"),
    (["--preset", "900b"], "unknown preset '900b'"),
    (["--batch", 6, "--micro-batch", 4], "--micro-batch 4 does not divide the 6 rows"),
    (["--steps", -1], "--steps"),
    (["--data", "/no/such/file"], "no such file"),
])
def test_bad_flags_are_one_line(text, tmp_path, flags, words):
    assert words in refused(text, tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()


def test_a_folder_without_write_permission_is_one_line(text, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")  # root may write anywhere, so the parent is a file instead
    assert "file" in refused(text, blocked / "run", "--steps", 1)
