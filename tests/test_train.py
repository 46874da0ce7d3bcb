"""train.py as a user runs it: exact resume, stop signals, refusals."""

import contextlib
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, within
from safetensors.torch import load_file

import common
import train
from common import Metrics
from data import Batches, Split, make_shards
from model import Transformer
from runtime import Runtime, latest_checkpoint, read_tensors, write_tensors
from tokenizer import Tokenizer
from training import loop, optim
from training.corpora import documents

TEXT = "".join(
    f"{who}:\nLine {i}, spoken by {who.lower()}.\n\n"
    for i, who in enumerate(["ROMEO", "JULIET", "NURSE"] * 60)
)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


TINY = (
    "--layers 2 --dim 16 --heads 2 --context 16 --batch 4 --eval-every 7 --save-every 5 --sample 5 "
    "--dropout 0.1 --dtype float32".split()
)


def command(text, out, flags):
    """The arguments of a tiny run; a resumed one inherits them."""
    tiny = [] if "--resume" in flags else ["--data", text, *TINY]
    return list(map(str, ("train.py", "--out", out, "--device", "cpu", *tiny, *flags)))


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
    stdout = io.StringIO()
    stderr = io.StringIO()
    code = 0
    argv = sys.argv
    sys.argv = command(text, out, flags)
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            common.cli(train.main)
        except SystemExit as exit:
            code = exit.code
    sys.argv = argv
    return code, stdout.getvalue(), stderr.getvalue()


def done(text, out, *flags):
    """In this process, to its end -> stdout."""
    code, stdout, stderr = run(text, out, *flags)
    assert code == 0, stderr
    return stdout


def saved_step(out):
    checkpoint = latest_checkpoint(out)
    return int(checkpoint.name.removeprefix("step-")) if checkpoint else -1


def refused(text, out, *flags):
    """The one line with which a run is refused."""
    code, _, stderr = run(text, out, *flags)
    assert code == 2
    assert "Traceback" not in stderr
    (line,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    return line


def wait_for_step(process, out, step):
    while saved_step(out) < step:
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)


def metrics(out):
    return Metrics.read(out / "metrics.jsonl")


def validations(out):
    return [row for row in metrics(out) if "val_loss" in row]


def same_folder(a, b):
    state = latest_checkpoint(a).relative_to(a)
    for file in ("model.safetensors", state / "optimizer.safetensors"):
        left = load_file(a / file)
        right = load_file(b / file)
        assert left.keys() == right.keys()
        for name in left:
            assert torch.equal(left[name], right[name]), name
    return True


def without_clock(row):
    return {k: v for k, v in row.items() if k not in ("seconds", "tokens_per_s")}


def test_killed_and_resumed_equals_never_stopped_to_the_bit(text, tmp_path):
    """2N steps == N steps, kill -9 somewhere after a checkpoint, --resume to 2N; dropout on."""
    whole = tmp_path / "whole"
    cut = tmp_path / "cut"
    done(text, whole, "--steps", 40, "--average", 0.9)
    process = start(text, cut, "--steps", 40, "--average", 0.9)
    wait_for_step(process, cut, 10)
    process.kill()
    process.communicate()
    assert 10 <= saved_step(cut) < 40
    done(text, cut, "--resume")
    assert same_folder(whole, cut)
    assert list(map(without_clock, metrics(whole))) == list(map(without_clock, metrics(cut)))


def test_evaluating_never_changes_training(text, tmp_path):
    done(text, tmp_path / "a", "--steps", 10)
    done(text, tmp_path / "b", "--steps", 10, "--eval-every", 1, "--save-every", 3)
    assert same_folder(tmp_path / "a", tmp_path / "b")


def test_sigterm_saves_exits_and_resumes_exactly(text, tmp_path):
    whole = tmp_path / "whole"
    cut = tmp_path / "cut"
    done(text, whole, "--steps", 60)
    process = start(text, cut, "--steps", 60)
    wait_for_step(process, cut, 0)
    process.send_signal(signal.SIGTERM)
    stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "SIGTERM: saved step" in stdout
    assert f"--resume --out {cut}" in stdout
    done(text, cut, "--resume")
    assert same_folder(whole, cut)


def test_the_run_folder_holds_all_that_is_promised(text, tmp_path):
    out = tmp_path / "run"
    stdout = done(text, out, "--steps", 12)
    promised = "config.json model.safetensors tokenizer.json generation_config.json metrics.jsonl"
    for name in [*promised.split(), "loss.png", "state"]:
        assert (out / name).exists(), name
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [row["step"] for row in validations(out)] == [7, 12]
    first, *_, last = metrics(out)
    assert abs(first["loss"] - 3.7) < 0.2  # 41 kinds of characters: ln 41 = 3.71
    assert last["val_loss"] < first["loss"]
    assert "validation loss" in stdout
    config = Transformer.from_pretrained(out).config
    assert (config.model_type, config.num_hidden_layers) == ("qwen3", 2)


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_other_architectures_train(text, tmp_path, arch):
    done(text, tmp_path / "run", "--steps", 12, "--arch", arch, "--optimizer", "adamw")
    first, last = validations(tmp_path / "run")
    assert last["val_loss"] < first["val_loss"]


def test_init_from_starts_a_new_run_from_weights_only(text, tmp_path):
    a = tmp_path / "a"
    b = tmp_path / "b"
    done(text, a, "--steps", 10)
    done(text, b, "--steps", 0, "--init-from", a)
    left = load_file(a / "model.safetensors")
    right = load_file(b / "model.safetensors")
    assert all(torch.equal(left[k], right[k]) for k in left)
    assert saved_step(b) == 0


def test_a_billion_rows_are_refused_at_once(text, tmp_path):
    with within(seconds=5):
        told = refused(text, tmp_path, "--batch", 999_999_999)
    assert "use a smaller --batch" in told


def test_init_from_needs_no_flags_of_shape_and_refuses_others(text, tmp_path):
    a = tmp_path / "a"
    done(text, a, "--steps", 1)
    for typed, told in (
        (["--layers", 3], "--layers 3: the model of --init-from has 2"),  # the preset's
        (["--kv-heads", 1], "--kv-heads 1: the model of --init-from has 2"),
        (["--tokenizer", "char"], "--tokenizer is for a model without --init-from: leave it out"),
        (["--context", 24], "--context 24: use the 16 of --init-from, or less"),
    ):
        assert told in refused(text, tmp_path / "b", "--init-from", a, *typed)
    flags = ["--data", text, "--init-from", a, "--steps", 1, "--batch", 2, "--context", 16]
    argv = list(map(str, ["train.py", "--out", tmp_path / "c", "--device", "cpu", *flags]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        train.main()
    assert Transformer.from_pretrained(tmp_path / "c").config.num_hidden_layers == 2


def test_a_resumed_run_keeps_the_rows_of_a_pass_and_does_not_need_its_tokenizer_file(
    text, tmp_path
):
    out = tmp_path / "run"
    done(text, out, "--steps", 3, "--batch", 8, "--micro-batch", 2)
    assert common.read_json(out / "state" / "step-00000003" / "state.json")["rows"] == 2
    (out / "args.json").unlink()
    (out / "tokenizer.json").unlink()
    assert "2 rows a pass" in done(text, out, "--steps", 4, "--resume")


def test_a_run_of_an_older_version_resumes(text, tmp_path):
    """It may have flags that are gone, and the states of more generators."""
    out = tmp_path / "run"
    done(text, out, "--steps", 3)
    state = latest_checkpoint(out)
    saved = common.read_json(state / "state.json")
    saved["args"]["background"] = False
    common.write_json(state / "state.json", saved)
    rng = read_tensors(state / "rng.safetensors") | {"0.python_gauss": torch.zeros(0)}
    write_tensors(state / "rng.safetensors", rng)
    done(text, out, "--resume", "--steps", 4)
    assert saved_step(out) == 4


def test_resuming_another_model_or_text_is_refused_with_both_values(text, tmp_path):
    out = tmp_path / "run"
    done(text, out, "--steps", 6)
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
    done(text, out, "--steps", 3)
    assert "already holds a run (step-00000003)" in refused(text, out, "--steps", 3)
    assert "memory" in done(text, out, "--fit")  # writes nothing
    done(text, out, "--steps", 4, "--overwrite")
    assert "drop one" in refused(text, out, "--resume", "--overwrite")
    assert "no checkpoint" in refused(text, tmp_path / "nothing", "--resume")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--context", 1024], "allow a --context of 630, not 1,024"),
        (["--dim", 15], "--dim 15 / --heads 2"),
        (["--laeyrs", 3], "unknown argument --laeyrs: did you mean --layers?"),
        (["--preset", "900b"], "unknown preset '900b'"),
        (["--batch", 6, "--micro-batch", 4], "--micro-batch 4 does not divide the 6 rows"),
        (["--steps", -1], "--steps"),
        (["--layers", 999999999], "num_hidden_layers is 999999999, expected int from 1 to 1,024"),
        (["--schedule", "cosin"], "--schedule cosin: use wsd or cosine"),
        (["--lr", "nan"], "--lr nan must be a number from 0"),
        (["--grad-clip", -1], "--grad-clip -1.0"),
        (["--optimizer", "adamw", "--muon-lr", 1], "--muon-lr is for --optimizer muon"),
        (["--schedule", "cosine", "--cooldown", 1], "--cooldown is for --schedule wsd"),
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
    argv = command(text, out, flags)[1:]
    with contextlib.redirect_stdout(io.StringIO()):
        args, checkpoint = loop.read_args(train.Args, train.__doc__, train.PRESETS, argv=argv)
        return train.prepare_training(args, checkpoint)


def forward_backward(run, batch, count):
    """The middle of train.train: gradients of the mean over `count` targets -> summed loss."""
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


def weights(run):
    return {n: p.clone() for n, p in run.model.named_parameters()}


def test_passes_do_not_change_the_gradient_on_ragged_rows(text, tmp_path):
    """1 pass of 4 rows == 4 passes of 1 row, though every row has another number of targets."""
    run = make_run(text, tmp_path / "run", "--dropout", 0)
    batch = run.batches.next()
    for row, keep in enumerate((16, 1, 0, 7)):
        batch.y[row, keep:] = -100
    run.rows = 4
    loss = forward_backward(run, batch, 24).item()
    expected = gradients(run)
    run.rows = 1
    assert forward_backward(run, batch, 24).item() == pytest.approx(loss, rel=1e-6)
    for name, grad in gradients(run).items():
        assert torch.allclose(grad, expected[name], atol=1e-6), name


def test_packed_documents_under_the_mask_lose_what_they_lose_one_by_one(text, tmp_path):
    """The loss of packed rows with --doc-mask == the sum over their pieces, each alone in a row."""
    run = make_run(text, tmp_path / "run", "--dropout", 0, "--doc-mask")
    with torch.no_grad():  # away from zero-initialised outputs, or attention would not matter
        for p in run.model.parameters():
            p.normal_(std=0.3)
    rng = np.random.default_rng(0)
    starts = np.append(0, np.cumsum(rng.integers(2, 25, 60)))
    split = Split([rng.integers(0, 40, starts[-1] + 9)], [starts])
    batch = Batches(split, 8, 16, seed=0, prefetch=0).next()
    run.rows = 4
    count = batch.y.numel()
    packed = forward_backward(run, batch, count).item()
    pieces = 0
    alone = 0.0
    for x, y, docs in zip(batch.x, batch.y, batch.docs):
        for doc in docs.unique():
            with torch.no_grad():
                alone += run.model(x[docs == doc][None], y[docs == doc][None]).item()
            pieces += 1
    assert pieces > 12
    assert packed == pytest.approx(alone, rel=1e-6)
    run.args.doc_mask = False
    assert abs(forward_backward(run, batch, count).item() - alone) > 1e-2


def test_a_step_that_overflows_in_fp16_is_skipped_and_the_scale_recovers(text, tmp_path):
    run = make_run(text, tmp_path / "run", "--dtype", "float16", "--dropout", 0)
    run.scaler.scale = 2.0**30  # gradients times this are far beyond 65504
    run.scaler.patience = 3
    before = weights(run)
    scales = []
    for step in range(30):
        batch = run.batches.next()
        forward_backward(run, batch, batch.y.numel())
        loop.update(run, 0)
        run.guard.in_a_row = 0
        scales.append(run.scaler.scale)
        if step == 0:
            assert run.guard.skipped == 1
            assert all(torch.equal(p, before[n]) for n, p in weights(run).items())
    assert scales[0] == 2.0**29
    assert run.guard.skipped < 30  # it came to rest
    assert any(b > a for a, b in zip(scales, scales[1:]))  # and grew again
    after = weights(run)
    assert all(torch.isfinite(p).all() for p in after.values())
    assert any(not torch.equal(after[n], before[n]) for n in after)


def test_fp16_gradients_equal_float32_ones_after_unscaling(text, tmp_path):
    found = []
    for kind in ("float32", "float16"):
        run = make_run(text, tmp_path / kind, "--dtype", kind, "--dropout", 0)
        batch = run.batches.next()
        forward_backward(run, batch, batch.y.numel())
        found.append(gradients(run))
    full, half = found
    for name, grad in full.items():
        off = half[name] / run.scaler.scale - grad
        assert off.norm() <= 0.02 * grad.norm(), name


def test_a_gradient_after_many_that_were_0_is_taken():
    guard = optim.Guard(factor=5.0)
    for _ in range(60):
        guard.count(0.0, True)
    assert guard.most >= 1.0


def test_non_finite_and_spiking_gradients_are_skipped_and_counted():
    guard = optim.Guard(factor=5.0)

    def accepts(norm):
        good = norm <= guard.most
        guard.count(norm, good)
        return good

    assert all(accepts(1.0) for _ in range(60))
    assert not accepts(float("nan"))
    assert not accepts(float("inf"))
    assert not accepts(9.0)
    assert (guard.skipped, guard.in_a_row) == (3, 3)
    assert accepts(1.1)
    assert guard.in_a_row == 0
    refusals = sum(not accepts(9.0) for _ in range(50))
    assert refusals < 10  # a lasting change is accepted before the run is stopped


def test_several_unusable_steps_in_a_row_stop_the_run_with_a_line(text, tmp_path):
    run = make_run(text, tmp_path / "run")
    words = "10 steps in a row had unusable gradients.*start again with --lr"
    with pytest.raises(common.UserError, match=words):
        for step in range(20):
            batch = run.batches.next()
            forward_backward(run, batch, batch.y.numel())
            run.model.norm.weight.grad[0] = float("nan")
            loop.update(run, step)
    assert all(torch.isfinite(p).all() for p in run.model.parameters())


def test_a_bad_gradient_is_counted_one_step_late_and_reaches_nothing(text, tmp_path, capsys):
    """NaN, inf and a spike; what is saved right after one holds none of it."""
    run = make_run(text, tmp_path / "run", "--dropout", 0)
    for step, bad in enumerate((float("nan"), float("inf"), 1e30)):
        run.guard.seen, run.guard.mean = 99, 1.0
        batch = run.batches.next()
        forward_backward(run, batch, batch.y.numel())
        run.model.norm.weight.grad[0] = bad
        loop.update(run, step)
        assert run.guard.skipped == step
        assert f"step      {step}" not in capsys.readouterr().err
        loop.save_run(run, step)
        assert run.guard.skipped == step + 1
        assert f"step      {step}  skipped: gradient norm" in capsys.readouterr().err
    saved = read_tensors(latest_checkpoint(run.args.out) / "optimizer.safetensors")
    assert all(t.isfinite().all() for t in saved.values())
    assert all(p.isfinite().all() for p in run.model.parameters())


def test_weights_that_are_not_finite_are_never_saved(text, tmp_path):
    run = make_run(text, tmp_path / "run")
    loop.save_run(run, 1)
    run.model.norm.weight.data[0] = float("nan")
    with pytest.raises(common.UserError, match="not saved, 1 tensors.*norm.weight.*--resume"):
        loop.save_run(run, 2)
    assert saved_step(run.args.out) == 1


def full_gpu(self, factor):
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")


def full_machine(self, factor):
    torch.empty(1 << 57)


@pytest.mark.parametrize("step", [full_gpu, full_machine])
def test_a_device_out_of_memory_in_the_optimizer_is_one_line(text, tmp_path, monkeypatch, step):
    monkeypatch.setattr(optim.MuonAdamW, "step", step)
    line = refused(text, tmp_path / "run", "--steps", 2)
    assert re.search("allocate (2 GiB|memory).*: use a smaller --micro-batch", line)


def small_memory(run, most):
    """Let the run's model run out of memory above so many rows -> the rows it was given."""
    model = run.step_model
    sizes = []

    def forward(ids, targets):
        sizes.append(len(ids))
        if len(ids) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return model(ids, targets)

    forward.eval = forward.train = lambda: None
    run.step_model = forward
    return sizes


def test_out_of_memory_halves_the_pass_before_the_run_starts(text, tmp_path, capsys):
    run = make_run(text, tmp_path / "run")
    sizes = small_memory(run, most=1)
    loop.halve_until_a_pass_fits(run)
    assert sizes == [4, 2, 1, 1]  # where one fits, an evaluation's forward is tried, too
    assert run.rows == 1
    assert "2 rows a pass did not fit, going on with 1" in capsys.readouterr().out
    assert all(p.grad is None for p in run.model.parameters())


def test_an_evaluation_that_fails_when_it_is_tried_leaves_dropout_on(text, tmp_path):
    run = make_run(text, tmp_path / "run")
    run.loss = lambda model, *given: loop.next_token_loss(model, *given) * (1 / model.training)
    with pytest.raises(ZeroDivisionError):
        loop.try_pass(run, run.step_model)
    assert run.model.training and all(p.grad is None for p in run.model.parameters())


def test_one_row_that_does_not_fit_is_an_error(text, tmp_path):
    run = make_run(text, tmp_path / "run", "--micro-batch", 1)
    small_memory(run, most=0)
    with pytest.raises(common.UserError, match="out of memory with 1 rows of 16 tokens a pass"):
        loop.halve_until_a_pass_fits(run)


@pytest.mark.slow
def test_kill_9_at_any_moment_loses_nothing(text, tmp_path):
    """Ten kills at random moments of a run that saves at every other step; the end is bit-exact."""
    whole = tmp_path / "whole"
    out = tmp_path / "cut"
    flags = ["--steps", 60, "--save-every", 2]
    done(text, whole, *flags)
    rng = random.Random(0)
    saved = -1
    for _ in range(10):
        flags = ["--resume"] if saved >= 0 else [*flags, "--overwrite"]
        process = start(text, out, *flags)
        published = out / "config.json"  # before the first there is no model folder yet
        while (saved_step(out) <= saved or not published.exists()) and process.poll() is None:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.05)  # anywhere in the next steps and saves
        process.kill()
        process.communicate()
        saved = saved_step(out)
        Transformer.from_pretrained(out)  # the folder is readable at every moment
    done(text, out, "--resume")
    assert same_folder(whole, out)


def test_fit_prints_the_estimate_by_part_and_writes_nothing(text, tmp_path):
    shape = ["--layers", 12, "--dim", 768, "--heads", 12]
    stdout = done(text, tmp_path / "run", "--fit", *shape)
    for part in ("weights", "gradients", "optimizer", "activations", "logits"):
        assert part in stdout
    assert not (tmp_path / "run").exists()


def test_a_model_that_cannot_fit_is_refused_before_it_starts(text, tmp_path, monkeypatch):
    monkeypatch.setattr("training.memory.free_memory", lambda device: 10_000)
    assert "GiB even for one row" in refused(text, tmp_path / "run")


def scored_by_hand(model, ids, stride, context=16):
    """Summed nats of every pair in the first window that holds it; windows begin every `stride`."""
    total = 0.0
    for pair in range(len(ids) - 1):
        window = max(0, -(-(pair + 1 - context) // stride))
        seen = torch.tensor([ids[window * stride : pair + 1]])
        with torch.no_grad():
            logits = model(seen)[0, -1]
        total -= logits.log_softmax(-1)[ids[pair + 1]].item()
    return total


@pytest.mark.parametrize("stride", [1, 5, 16])
def test_eval_equals_scoring_each_token_with_its_own_window(text, tmp_path, stride):
    done(text, tmp_path / "run", "--steps", 3)
    model = Transformer.from_pretrained(tmp_path / "run")
    ids = torch.randint(0, 40, (70,), generator=torch.Generator().manual_seed(0)).tolist()
    runtime = Runtime(torch.device("cpu"), torch.float32, False)
    args = train.Args(context=16)
    nats, count = train.evaluate(model, Split([np.array(ids)]), 3, args, runtime, stride)
    assert count == 69
    assert nats == pytest.approx(scored_by_hand(model, ids, stride), rel=1e-5)


def evaluated(folder, data, capsys):
    capsys.readouterr()
    train.eval_text([str(folder), "--data", str(data), "--device", "cpu"])
    printed = capsys.readouterr().out
    return json.loads(printed[printed.index("{") :])


def test_eval_reports_words_and_bytes(text, tmp_path, capsys):
    done(text, tmp_path / "run", "--steps", 3)
    short = tmp_path / "short.txt"
    short.write_text("ROMEO:\nLine 1, spoken by romeo.\n")
    result = evaluated(tmp_path / "run", short, capsys)
    assert (result["tokens"], result["bytes"], result["words"]) == (31, 32, 6 + 2)
    bits = result["loss"] * 31 / 32 / 0.6931
    assert result["bits_per_byte"] == pytest.approx(bits, rel=1e-3)


def test_a_text_has_as_many_words_as_its_shards(text, tmp_path, capsys):
    """A no-break space is part of a word."""
    text.write_text(TEXT.replace("Line ", "Line\xa0"))
    done(text, tmp_path / "run", "--steps", 1)
    tok = Tokenizer.load(tmp_path / "run")
    make_shards({"val": [text], "train": [text]}, tok, tmp_path / "shards", documents, {})
    results = [evaluated(tmp_path / "run", data, capsys) for data in (text, tmp_path / "shards")]
    assert results[0] == results[1]


def test_what_cannot_be_evaluated_is_one_line(text, tmp_path):
    folder = tmp_path / "run"
    done(text, folder, "--steps", 1)
    letters = tmp_path / "letters.jsonl"  # documents of one token
    letters.write_text('{"text": "R"}\n{"text": "O"}\n')
    files = {"val": [letters], "train": [letters]}
    shards = tmp_path / "shards"
    make_shards(files, Tokenizer.load(folder), shards, documents, {})
    weights = load_file(folder / "model.safetensors")
    for data, flags, told in (
        (text, ["--split", "test"], "--split test: .* has none"),
        (text, ["--context", "-5"], "--context -5: use 1 to 16, or 0 for all"),
        (text, ["--context", "17", "--doc-mask"], "--context 17: use 1 to 16"),
        (shards, [], "2 tokens leave nothing to predict"),
        (text, [], "a loss of nan in torch.float32: try another --dtype"),
    ):
        if "nan" in told:
            weights["model.norm.weight"][0] = float("nan")
            write_tensors(folder / "model.safetensors", weights)
        with pytest.raises(common.UserError, match=told):
            train.eval_text([str(folder), "--data", str(data), "--device", "cpu", *flags])


def test_overwriting_removes_a_run_and_nothing_else(text, tmp_path):
    out = tmp_path / "run"
    done(text, out, "--steps", 3)
    (out / "thesis.txt").write_text("mine")
    assert "--schedule" in refused(text, out, "--steps", 4, "--overwrite", "--schedule", "sine")
    assert saved_step(out) == 3  # a refused run takes nothing away
    done(text, out, "--steps", 4, "--overwrite")
    assert saved_step(out) == 4
    assert (out / "thesis.txt").read_text() == "mine"


def test_a_crash_between_saving_and_publishing_is_mended_by_resuming(text, tmp_path):
    out = tmp_path / "run"
    done(text, out, "--steps", 3)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (out / name).unlink()
    done(text, out, "--resume")
    Transformer.from_pretrained(out)
    assert (out / "tokenizer.json").exists()
    done(text, out, "--resume")  # when all is there already, nothing is left lying about
    assert not list(out.glob("*.tmp"))


def test_resuming_with_fewer_steps_or_another_optimizer_is_refused(text, tmp_path):
    out = tmp_path / "run"
    done(text, out, "--steps", 6)
    assert "is at step 6 already, --steps 4 is less" in refused(text, out, "--resume", "--steps", 4)
    assert "--optimizer was 'muon'" in refused(text, out, "--resume", "--optimizer", "adamw")
    assert "--average was 0.0" in refused(text, out, "--resume", "--average", 0.9)
