"""common.py and runtime.py: flags, choices, files that survive a crash, random number state."""

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from conftest import ROOT

import common
import runtime
from common import UserError


@dataclasses.dataclass
class Flags:
    preset: str = "small"  # which preset
    layers: int = 4  # how many blocks, 100% of them
    rate: float = 0.1  # a number
    fast: bool = False  # a switch


def test_only_what_was_typed_is_returned():
    assert common.parse_flags(Flags, "doc", ["--layers", "6", "--fast"]) == {
        "layers": 6,
        "fast": True,
    }


def test_presets_sit_between_defaults_and_what_was_typed():
    presets = {"small": {"layers": 2, "rate": 0.5}}
    assert common.from_preset(Flags, presets, {"rate": 0.9}) == Flags("small", 2, 0.9, False)
    with pytest.raises(UserError, match="unknown preset 'huge': choose one of small"):
        common.from_preset(Flags, presets, {"preset": "huge"})


def test_help_shows_the_comment_and_the_default(capsys):
    with pytest.raises(SystemExit):
        common.parse_flags(Flags, "doc", ["--help"])
    assert "how many blocks, 100% of them [4]" in capsys.readouterr().out


def test_unknown_flags_are_refused_with_the_nearest():
    with pytest.raises(UserError, match="unknown argument --layer: did you mean --layers?"):
        common.parse_flags(Flags, "doc", ["--layer", "6"])
    with pytest.raises(UserError, match="--layers: invalid int value: 'six'"):
        common.parse_flags(Flags, "doc", ["--layers", "six"])


def test_choices_are_printed_with_their_reasons(capsys):
    chosen = runtime.resolve("cpu", "float32", "off")
    assert (chosen.device.type, chosen.dtype, chosen.compile) == ("cpu", torch.float32, False)
    assert capsys.readouterr().out.count("asked for") == 3


@pytest.mark.parametrize(
    "choice", [("cuda:99",), ("quantum",), ("cpu", "int3"), ("cpu", "auto", "maybe")]
)
def test_impossible_choices_are_refused(choice):
    if choice[0] == "cuda:99" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(UserError, match="--(device|dtype|compile)"):
        runtime.resolve(*choice)


def test_a_failing_compiler_is_named_and_eager_mode_stays(capsys):
    chosen = runtime.Runtime(torch.device("cpu"), torch.float32, compile=True)

    def broken(compiled):
        torch.rand(3)
        raise RuntimeError("no C++ compiler\nlong story")

    before = torch.get_rng_state()
    assert runtime.compile_or_say_why(len, chosen, broken) is len
    assert "continuing without: no C++ compiler" in capsys.readouterr().out
    assert torch.equal(before, torch.get_rng_state())


def test_random_numbers_come_back():
    torch.rand(1)
    state = runtime.rng_state()
    expected = torch.rand(3)
    torch.rand(3)
    runtime.set_rng_state(state)
    assert torch.equal(torch.rand(3), expected)


def test_random_numbers_of_an_older_checkpoint_come_back_and_a_new_rank_starts_from_the_seed():
    states = runtime.all_rng_states() | {"0.python": torch.tensor([3])}
    expected = torch.rand(3)
    runtime.set_all_rng_states(states, rank=0, seed=5)
    assert torch.equal(torch.rand(3), expected)
    runtime.set_all_rng_states(states, rank=1, seed=5)
    drawn = torch.rand(3)
    torch.manual_seed(6)
    assert torch.equal(torch.rand(3), drawn)


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "x.json"
    common.write_json(path, {"a": 1})

    def fail(temporary):
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        common.write_atomic(path, fail)
    assert common.read_json(path) == {"a": 1} and os.listdir(tmp_path) == ["x.json"]


def save(out, step, value, fail=False):
    def save_model(folder):
        runtime.write_tensors(folder / "model.safetensors", {"w": torch.full((4,), value)})
        if fail:
            raise OSError(28, "No space left on device")
        common.write_json(folder / "config.json", {"value": value})

    runtime.save_checkpoint(
        out,
        step,
        save_model,
        {"m": torch.zeros(2)},
        runtime.all_rng_states(),
        {"note": value},
        keep=2,
    )


def test_checkpoints_replace_each_other_and_the_last_k_stay(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, float(step))
    assert [p.name for p in sorted((tmp_path / "state").iterdir())] == [
        "step-00000002",
        "step-00000003",
    ]
    assert runtime.read_tensors(tmp_path / "model.safetensors")["w"][0] == 3
    assert common.read_json(tmp_path / "config.json") == {"value": 3.0}
    assert runtime.latest_checkpoint(tmp_path).name == "step-00000003"


def test_a_full_disk_while_saving_keeps_the_previous_checkpoint(tmp_path):
    save(tmp_path, 1, 1.0)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2, 2.0, fail=True)
    assert os.listdir(tmp_path / "state") == ["step-00000001"]
    assert runtime.read_tensors(tmp_path / "model.safetensors")["w"][0] == 1
    assert common.read_json(runtime.latest_checkpoint(tmp_path) / "state.json") == {
        "step": 1,
        "note": 1.0,
    }


def test_a_truly_full_disk_is_one_line(tmp_path):
    """safetensors' own error on /dev/full-like conditions becomes an OSError: RLIMIT_FSIZE plays the full disk."""
    code = textwrap.dedent(f"""
        import resource, signal, sys, torch; sys.path.insert(0, {str(ROOT)!r})
        import common, runtime
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        common.cli(lambda: runtime.write_tensors({str(tmp_path / "w.safetensors")!r}, {{"w": torch.zeros(10000)}}))
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (
        done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    ), done.stderr
    assert os.listdir(tmp_path) == []


def test_metrics_forget_what_the_crash_undid(tmp_path):
    metrics = common.Metrics(tmp_path)
    for step in range(5):
        metrics.log(step, loss=float(step))
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 5, "lo')  # the process died in the middle of a line
    common.Metrics(tmp_path, resume_step=2).log(2, loss=30.0)
    assert [r["loss"] for r in common.Metrics.read(tmp_path / "metrics.jsonl")] == [0.0, 1.0, 30.0]


def test_the_first_signal_is_noted_an_echo_ignored_a_later_one_obeyed():
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(9))
    with common.Interrupt() as interrupt:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # torchrun's, an instant after the user's
        assert interrupt.signal == signal.SIGTERM
        interrupt.at -= 4  # four seconds later
        with pytest.raises(SystemExit):
            signal.raise_signal(signal.SIGTERM)
    assert signal.signal(signal.SIGTERM, before) not in (before, interrupt.catch)


def test_a_saved_model_can_be_read_by_whom_the_umask_lets(tmp_path):
    from model import Config, Transformer

    before = os.umask(0o022)
    try:
        Transformer(Config("llama", 16, 16, 16, 1, 1, 1, 16, 8)).save_pretrained(tmp_path)
    finally:
        os.umask(before)
    assert {p.stat().st_mode & 0o777 for p in tmp_path.iterdir()} == {0o644}
