"""train.py as a user runs it: exact resume, stop signals, refusals."""

import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

import common
import train
from common import Metrics
from data import Batches, Split
from model import Transformer
from runtime import Runtime, latest_checkpoint
from training import loop, optim

TEXT = "".join(
    f"{who}:\nLine {i}, spoken by {who.lower()}.\n\n"
    for i, who in enumerate(["ROMEO", "JULIET", "NURSE"] * 60)
)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def command(text, out, flags):
    """The arguments of a tiny run; a resumed one inherits them."""
    tiny = (
        []
        if "--resume" in flags
        else [
            "--data",
            text,
            "--layers",
            2,
            "--dim",
            16,
            "--heads",
            2,
            "--context",
            16,
            "--batch",
            4,
            "--eval-every",
            7,
            "--save-every",
            5,
            "--sample",
            5,
            "--dropout",
            0.1,
        ]
    )
    return [str(x) for x in ("train.py", "--out", out, "--device", "cpu", *tiny, *flags)]


def start(text, out, *flags):
    """In a process of its own, to be killed."""
    return subprocess.Popen(
        [sys.executable, *command(text, out, flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=ROOT,
    )


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
    for file in (
        "model.safetensors",
        latest_checkpoint(a).relative_to(a) / "optimizer.safetensors",
    ):
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
    assert (
        process.returncode == 128 + signal.SIGTERM
        and "SIGTERM: saved step" in stdout
        and "--resume" in stdout
    )
    assert run(text, tmp_path / "cut", "--resume")[0] == 0
    assert same_folder(tmp_path / "whole", tmp_path / "cut")


def test_the_run_folder_holds_all_that_is_promised(text, tmp_path):
    code, stdout, _ = run(text, tmp_path / "run", "--steps", 12)
    assert code == 0
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "generation_config.json",
        "metrics.jsonl",
        "loss.png",
        "state",
    } <= names
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    rows = Metrics.read(tmp_path / "run" / "metrics.jsonl")
    assert [r["step"] for r in rows if "val_loss" in r] == [7, 12]
    assert (
        abs(rows[0]["loss"] - 3.7) < 0.2 and rows[-1]["val_loss"] < rows[0]["loss"]
    )  # 41 kinds of characters: ln 41 = 3.71
    assert "validation loss" in stdout
    model = Transformer.from_pretrained(tmp_path / "run")
    assert model.config.model_type == "qwen3" and model.config.num_hidden_layers == 2


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_other_architectures_train(text, tmp_path, arch):
    code, _, stderr = run(
        text, tmp_path / "run", "--steps", 12, "--arch", arch, "--optimizer", "adamw"
    )
    assert code == 0, stderr
    rows = [r for r in Metrics.read(tmp_path / "run" / "metrics.jsonl") if "val_loss" in r]
    assert rows[-1]["val_loss"] < rows[0]["val_loss"]


def test_init_from_starts_a_new_run_from_weights_only(text, tmp_path):
    assert run(text, tmp_path / "a", "--steps", 10)[0] == 0
    assert run(text, tmp_path / "b", "--steps", 0, "--init-from", tmp_path / "a")[0] == 0
    left, right = (load_file(tmp_path / d / "model.safetensors") for d in "ab")
    assert all(torch.equal(left[k], right[k]) for k in left)
    assert json.loads((latest_checkpoint(tmp_path / "b") / "state.json").read_text())["step"] == 0
    assert "layers 2 there, 3 here" in refused(
        text, tmp_path / "c", "--init-from", tmp_path / "a", "--layers", 3
    )
    code = subprocess.run(
        [
            sys.executable,
            str(ROOT / "train.py"),
            "--data",
            str(text),
            "--init-from",
            str(tmp_path / "a"),
            "--out",
            str(tmp_path / "d"),
            "--steps",
            "1",
            "--batch",
            "2",
            "--context",
            "16",
        ],
        capture_output=True,
    ).returncode
    assert (
        code == 0 and Transformer.from_pretrained(tmp_path / "d").config.num_hidden_layers == 2
    )  # its shape needs no flags


def test_a_resumed_run_keeps_the_rows_of_a_pass_and_does_not_need_its_tokenizer_file(
    text, tmp_path
):
    out = tmp_path / "run"
    assert run(text, out, "--steps", 3, "--batch", 8, "--micro-batch", 2)[0] == 0
    saved = json.loads((out / "state" / "step-00000003" / "state.json").read_text())
    (out / "args.json").unlink()
    code, stdout, _ = run(text, out, "--steps", 4, "--resume")
    assert saved["rows"] == 2 and code == 0 and "2 rows a pass" in stdout


def test_resuming_another_model_or_text_is_refused_with_both_values(text, tmp_path):
    out = tmp_path / "run"
    assert run(text, out, "--steps", 6)[0] == 0
    assert "--layers was 2" in refused(text, out, "--resume", "--layers", 3)
    assert "--tokenizer was 'char'" in refused(text, out, "--resume", "--tokenizer", tmp_path)
    before = (out / "model.safetensors").read_bytes()
    text.write_text(TEXT.replace("Line", "neiL"))  # the same characters, another text
    assert "the data's sha256 was" in refused(text, out, "--resume")
    text.write_text(TEXT.replace("L", "?"))  # characters that the run's own tokenizer does not know
    assert "'?'" in refused(text, out, "--resume")
    assert (out / "model.safetensors").read_bytes() == before


def test_a_finished_or_running_folder_is_not_overwritten_by_accident(text, tmp_path):
    out = tmp_path / "run"
    held = common.lock_folder(out)
    assert "another process is training there now" in refused(text, out)
    held.close()
    assert run(text, out, "--steps", 3)[0] == 0
    assert "already holds a run (step-00000003)" in refused(text, out, "--steps", 3)
    assert run(text, out, "--steps", 4, "--overwrite")[0] == 0
    assert "no checkpoint" in refused(text, tmp_path / "nothing", "--resume")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--context", 1024], "needs at least 1,025: use --context"),
        (["--dim", 15], "--dim 15 / --heads 2"),
        (["--laeyrs", 3], "unknown argument --laeyrs: did you mean --layers?"),
        (["--preset", "900b"], "unknown preset '900b'"),
        (["--batch", 6, "--micro-batch", 4], "--micro-batch 4 does not divide the 6 rows"),
        (["--steps", -1], "--steps"),
        (
            ["--layers", 999999999],
            "num_hidden_layers is 999999999, expected an integer from 1 to 1,024",
        ),
        (["--schedule", "cosin"], "--schedule cosin: use wsd or cosine"),
        (["--lr", "nan"], "--lr nan must not be negative"),
        (["--grad-clip", -1], "--grad-clip -1.0"),
        (["--track", "paper"], "use tensorboard or wandb"),
        (["--data", "/no/such/file"], "no such file"),
    ],
)
def test_bad_flags_are_one_line(text, tmp_path, flags, words):
    assert words in refused(text, tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()


def test_a_folder_without_write_permission_is_one_line(text, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")  # root may write anywhere, so the parent is a file instead
    assert "file" in refused(text, blocked / "run", "--steps", 1)


# ------------------------------------------------------------- the parts of a step, in this process
def make_run(text, out, *flags):
    """A prepared run of the tiny model, as main() makes it."""
    argv, sys.argv = sys.argv, command(text, out, flags)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return train.prepare_training(
                *train.read_args(train.Args, train.__doc__, train.PRESETS)
            )
    finally:
        sys.argv = argv


def forward_backward(run, batch, count):
    """The middle of train.train's loop: gradients of the mean loss over `count` targets -> the summed loss."""
    run.optimizer.zero_grad()
    total = 0.0
    for part in loop.passes(run, batch):
        with run.runtime.autocast():
            loss = run.loss(run.step_model, part, run.args)
        loop.backward(run, loss, count)
        total += loss.detach()
    return total


def gradients(run):
    return {n: p.grad.clone() for n, p in run.model.named_parameters()}


def test_passes_do_not_change_the_gradient_on_ragged_rows(text, tmp_path):
    """1 pass of 4 rows == 4 passes of 1 row, though every row has another number of targets."""
    run = make_run(text, tmp_path / "run", "--dropout", 0)
    batch = run.batches.next()
    y = batch.y.clone()
    for row, keep in enumerate((16, 1, 0, 7)):
        y[row, keep:] = -100
    batch = batch._replace(y=y)
    results = []
    for rows in (4, 1):
        run.rows = rows
        total = forward_backward(run, batch, 24)
        results.append((total.item(), gradients(run)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    for name, grad in results[0][1].items():
        assert torch.allclose(grad, results[1][1][name], atol=1e-6), name


def test_packed_documents_under_the_mask_lose_what_they_lose_one_by_one(text, tmp_path):
    """The loss of packed rows with --doc-mask == the sum over their documents' pieces, each alone in its own row."""
    run = make_run(text, tmp_path / "run", "--dropout", 0, "--doc-mask")
    with torch.no_grad():  # away from zero-initialised outputs, or attention would not matter
        for p in run.model.parameters():
            p.normal_(std=0.3)
    rng = np.random.default_rng(0)
    starts = np.concatenate([[0], np.cumsum(rng.integers(2, 25, 60))])
    split = Split([rng.integers(0, 40, starts[-1] + 9)], [starts])
    batch = Batches(split, 8, 16, seed=0, prefetch=0).next()
    run.rows = 4
    packed = forward_backward(run, batch, batch.y.numel()).item()
    pieces, alone = 0, 0.0
    for x, y, docs in zip(batch.x, batch.y, batch.docs):
        for doc in docs.unique():
            with torch.no_grad():
                alone += run.model(x[docs == doc][None], y[docs == doc][None]).item()
            pieces += 1
    assert pieces > 12 and packed == pytest.approx(alone, rel=1e-6)
    run.args.doc_mask = False
    assert abs(forward_backward(run, batch, batch.y.numel()).item() - alone) > 1e-2


def test_a_step_that_overflows_in_fp16_is_skipped_and_the_scale_recovers(text, tmp_path):
    run = make_run(text, tmp_path / "run", "--dtype", "float16", "--dropout", 0)
    run.scaler.scale, run.scaler.patience = 2.0**30, 3  # gradients times this are far beyond 65504
    before = {n: p.clone() for n, p in run.model.named_parameters()}
    scales = []
    for step in range(30):
        batch = run.batches.next()
        forward_backward(run, batch, batch.y.numel())
        loop.update(run, 0)
        run.guard.in_a_row = 0
        scales.append(run.scaler.scale)
        if run.guard.skipped == 1 and step == 0:
            assert all(torch.equal(p, before[n]) for n, p in run.model.named_parameters())
    assert scales[0] == 2.0**29 and min(scales) < 2.0**29
    assert scales[-1] > min(scales) or run.guard.skipped < 30  # it came to rest, then grew again
    assert any(b > a for a, b in zip(scales, scales[1:]))
    assert all(torch.isfinite(p).all() for p in run.model.parameters())
    assert any(not torch.equal(p, before[n]) for n, p in run.model.named_parameters())


def test_fp16_gradients_equal_float32_ones_after_unscaling(text, tmp_path):
    runs = [
        make_run(text, tmp_path / kind, "--dtype", kind, "--dropout", 0)
        for kind in ("float32", "float16")
    ]
    for run in runs:
        batch = run.batches.next()
        forward_backward(run, batch, batch.y.numel())
    full, half = (gradients(run) for run in runs)
    for name in full:
        if full[name].abs().max() > 0:
            assert (half[name] / runs[1].scaler.scale - full[name]).norm() < 0.02 * full[
                name
            ].norm(), name


def test_non_finite_and_spiking_gradients_are_skipped_and_counted():
    guard = optim.Guard(factor=5.0)
    assert all(guard.accepts(1.0) for _ in range(60))
    assert (
        not guard.accepts(float("nan"))
        and not guard.accepts(float("inf"))
        and not guard.accepts(9.0)
    )
    assert guard.skipped == 3 and guard.in_a_row == 3
    assert guard.accepts(1.1) and guard.in_a_row == 0
    assert (
        sum(not guard.accepts(9.0) for _ in range(50)) < 10
    )  # a lasting change is accepted before the run is stopped


def test_several_unusable_steps_in_a_row_stop_the_run_with_a_line(text, tmp_path):
    run = make_run(text, tmp_path / "run")
    with (
        pytest.raises(
            common.UserError,
            match="10 steps in a row had unusable gradients.*start again with --lr",
        ),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        for step in range(20):
            batch = run.batches.next()
            forward_backward(run, batch, batch.y.numel())
            run.model.norm.weight.grad[0] = float("nan")
            loop.update(run, step)
    assert all(torch.isfinite(p).all() for p in run.model.parameters())


def test_out_of_memory_halves_the_pass_before_the_run_starts(text, tmp_path, capsys):
    run = make_run(text, tmp_path / "run")
    model = run.step_model
    sizes = []

    def small_memory(ids, targets):
        sizes.append(len(ids))
        torch.rand(1)
        if len(ids) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return model(ids, targets)

    run.step_model = small_memory
    before = torch.get_rng_state()
    loop.halve_until_a_pass_fits(run)
    assert sizes == [4, 2, 1]
    assert run.rows == 1
    assert "2 rows a pass did not fit, going on with 1" in capsys.readouterr().out
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters())


def test_one_row_that_does_not_fit_is_an_error(text, tmp_path):
    run = make_run(text, tmp_path / "run", "--micro-batch", 1)

    def no_memory(ids, targets):
        raise torch.OutOfMemoryError("CUDA out of memory")

    run.step_model = no_memory
    with pytest.raises(common.UserError, match="out of memory with 1 rows of 16 tokens a pass"):
        loop.halve_until_a_pass_fits(run)


@pytest.mark.slow
def test_kill_9_at_any_moment_loses_nothing(text, tmp_path):
    """Ten kills at random moments of one run that saves at every other step; each resume goes on, the end is bit-exact."""
    assert run(text, tmp_path / "whole", "--steps", 60, "--save-every", 2)[0] == 0
    out, rng, saved = tmp_path / "cut", random.Random(0), -1
    for _ in range(10):
        process = start(
            text,
            out,
            *(["--resume"] if saved >= 0 else ["--steps", 60, "--save-every", 2, "--overwrite"]),
        )
        while saved_step(out) <= saved and process.poll() is None:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.05)  # anywhere in the next steps and saves
        process.kill()
        process.communicate()
        saved = saved_step(out)
        Transformer.from_pretrained(out)  # the folder is readable at every moment
    code, _, stderr = run(text, out, "--resume")
    assert code == 0, stderr
    assert same_folder(tmp_path / "whole", out)


def test_fit_prints_the_estimate_by_part_and_writes_nothing(text, tmp_path):
    code, stdout, _ = run(
        text, tmp_path / "run", "--fit", "--layers", 12, "--dim", 768, "--heads", 12
    )
    assert code == 0 and all(
        part in stdout for part in ("weights", "gradients", "optimizer", "activations", "logits")
    )
    assert not (tmp_path / "run").exists()


def test_a_model_that_cannot_fit_is_refused_before_it_starts(text, tmp_path, monkeypatch):
    monkeypatch.setattr("training.memory.free_memory", lambda device: 10_000)
    assert "GiB even for one row" in refused(text, tmp_path / "run")


def test_watch_draws_the_run(text, tmp_path, capsys):
    assert run(text, tmp_path / "run", "--steps", 12)[0] == 0
    train.watch([str(tmp_path / "run"), "--once"])
    drawn = capsys.readouterr().out
    assert "V" in drawn and "step 12 of 12" in drawn and "tokens/s" in drawn


def test_eval_equals_scoring_each_token_with_its_own_window(text, tmp_path):
    assert run(text, tmp_path / "run", "--steps", 3)[0] == 0
    model = Transformer.from_pretrained(tmp_path / "run")
    ids = torch.randint(0, 40, (70,), generator=torch.Generator().manual_seed(0)).tolist()

    runtime = Runtime(torch.device("cpu"), torch.float32, False)

    def reference(
        stride,
    ):  # every pair with the first window that holds it; windows of 16 pairs begin every `stride`
        total = 0.0
        for pair in range(len(ids) - 1):
            window = max(0, -(-(pair + 1 - 16) // stride))
            with torch.no_grad():
                logits = model(torch.tensor([ids[window * stride : pair + 1]]))[0, -1]
            total -= logits.log_softmax(-1)[ids[pair + 1]].item()
        return total

    for stride in (1, 5, 16):
        nats, count = train.evaluate(
            model, Split([np.array(ids)]), 3, train.Args(context=16), runtime, stride
        )
        assert count == 69 and nats == pytest.approx(reference(stride), rel=1e-5)


def test_eval_reports_words_and_bytes(text, tmp_path, capsys):
    assert run(text, tmp_path / "run", "--steps", 3)[0] == 0
    short = tmp_path / "short.txt"
    short.write_text("ROMEO:\nLine 1, spoken by romeo.\n")
    train.eval_text([str(tmp_path / "run"), "--data", str(short), "--device", "cpu"])
    printed = capsys.readouterr().out
    result = json.loads(printed[printed.index("{") :])
    assert result["tokens"] == 31 and result["bytes"] == 32 and result["words"] == 6 + 2
    assert result["bits_per_byte"] == pytest.approx(result["loss"] * 31 / 32 / 0.6931, rel=1e-3)


def test_overwriting_removes_a_run_and_nothing_else(text, tmp_path):
    out = tmp_path / "run"
    assert run(text, out, "--steps", 3)[0] == 0
    (out / "thesis.txt").write_text("mine")
    assert "--track" in refused(text, out, "--steps", 4, "--overwrite", "--track", "paper")
    assert saved_step(out) == 3  # a refused run takes nothing away
    assert run(text, out, "--steps", 4, "--overwrite")[0] == 0
    assert saved_step(out) == 4 and (out / "thesis.txt").read_text() == "mine"


def test_a_crash_between_saving_and_publishing_is_mended_by_resuming(text, tmp_path):
    out = tmp_path / "run"
    assert run(text, out, "--steps", 3)[0] == 0
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (out / name).unlink()
    assert run(text, out, "--resume")[0] == 0
    Transformer.from_pretrained(out)
    assert (out / "tokenizer.json").exists()
    assert (
        run(text, out, "--resume")[0] == 0
    )  # and when all is there already, nothing is left lying about
    assert not list(out.glob("*.tmp"))


def test_resuming_with_fewer_steps_or_another_optimizer_is_refused(text, tmp_path):
    out = tmp_path / "run"
    assert run(text, out, "--steps", 6)[0] == 0
    assert "is at step 6 already, --steps 4 is less" in refused(text, out, "--resume", "--steps", 4)
    assert "--optimizer was 'muon'" in refused(text, out, "--resume", "--optimizer", "adamw")
