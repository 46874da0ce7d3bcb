"""runtime.py: choices with their reasons, random number state, tensor files, checkpoints."""

import os

import pytest
import torch

import common
import runtime
from common import UserError


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
        raise RuntimeError("no C++ compiler\nlong story")

    assert runtime.compile_or_say_why(len, chosen, broken) is len
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith("continuing without: no C++ compiler long story")


def test_what_is_drawn_in_a_fork_changes_nothing_after_it():
    before = torch.get_rng_state()
    with pytest.raises(ValueError), runtime.fork_rng():
        torch.rand(3)
        raise ValueError
    assert torch.equal(before, torch.get_rng_state())


def test_random_numbers_of_an_older_checkpoint_come_back_and_a_new_rank_starts_from_the_seed():
    states = runtime.rng_states(rank=0) | {"0.python": torch.tensor([3])}
    expected = torch.rand(3)
    runtime.set_rng_states(states, rank=0, seed=5)
    assert torch.equal(torch.rand(3), expected)
    runtime.set_rng_states(states, rank=1, seed=5)
    drawn = torch.rand(3)
    torch.manual_seed(6)
    assert torch.equal(torch.rand(3), drawn)


def save(out, step, value, fail=False):
    def save_model(folder):
        runtime.write_tensors(folder / "model.safetensors", {"w": torch.full((4,), value)})
        if fail:
            raise OSError(28, "No space left on device")
        common.write_json(folder / "config.json", {"value": value})

    runtime.save_checkpoint(
        out, step, save_model, {"m": torch.zeros(2)}, runtime.rng_states(0), {"note": value}, keep=2
    )


def test_checkpoints_replace_each_other_and_the_last_k_stay(tmp_path):
    """What somebody else put beside them stays, and is no checkpoint."""
    (tmp_path / "state/step-backup").mkdir(parents=True)
    (tmp_path / "notes.tmp").touch()
    (tmp_path / "config.json.0123456789abcdef.tmp").touch()  # of a crash
    for step in (1, 2, 3):
        save(tmp_path, step, float(step))
    assert [p.name for p in sorted((tmp_path / "state").iterdir())] == [
        "step-00000002",
        "step-00000003",
        "step-backup",
    ]
    assert [p.name for p in tmp_path.glob("*.tmp")] == ["notes.tmp"]
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


def test_a_truly_full_disk_is_one_line(tmp_path, full_disk, capsys):
    """safetensors reports a full disk as an error of its own, which becomes an OSError."""
    tensors = {"w": torch.zeros(10_000)}
    with full_disk(1000), pytest.raises(SystemExit) as exit:
        common.cli(lambda: runtime.write_tensors(tmp_path / "w.safetensors", tensors))
    assert exit.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    assert os.listdir(tmp_path) == []
