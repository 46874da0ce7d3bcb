"""common.py: errors and flags, files that survive a crash, metrics, signals."""

import dataclasses
import os
import signal
import sys

import pytest
from conftest import within

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


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "x.json"
    common.write_json(path, {"a": 1})

    def fail(temporary):
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        common.write_atomic(path, fail)
    assert common.read_json(path) == {"a": 1} and os.listdir(tmp_path) == ["x.json"]


def test_json_may_begin_with_a_bom_and_what_is_none_is_one_line(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert common.read_json(path) == {"a": 1}
    for data, words in ((b"[" * 100_000, "not valid JSON"), (b"\xff", "not UTF-8 text")):
        path.write_bytes(data)
        with pytest.raises(UserError, match=words):
            common.read_json(path)


def test_no_link_laid_beforehand_is_written_through(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("mine")
    path = tmp_path / "shared" / "x.json"
    path.parent.mkdir()
    for name in (f"x.json.{os.getpid()}.tmp", "x.json.tmp"):
        (path.parent / name).symlink_to(secret)
    path.symlink_to(secret)
    common.write_json(path, {"a": 1})
    assert secret.read_text() == "mine"
    assert common.read_json(path) == {"a": 1} and not path.is_symlink()


@pytest.mark.parametrize(
    "text", ["[]", '"a"', "null", "7", '{"a": ' + "9" * 5000 + "}", "[" * 10**5, '{"a": "\xff"}']
)
def test_json_that_is_no_object_is_one_line(text, tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="x.json: (not (valid JSON|UTF-8)|this is not a)"):
        common.read_json(path)


@pytest.mark.parametrize("value", ["{},", "[],", '{"a":[]},', '"",', "0,"])
def test_json_of_64_mb_is_refused_or_read_within_bounds(value, tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"x": [' + value * ((63 << 20) // len(value)) + "0]}")
    with within(), pytest.raises(UserError, match="values, more than the 3,145,728 allowed"):
        common.read_json(path)
    path.write_text(path.read_text() + " " * (2 << 20))
    with within(0.5), pytest.raises(UserError, match="65 MB, more than"):
        common.read_json(path)


def test_an_error_is_one_line_however_much_it_quotes():
    told = str(UserError("a\nb" * 10**5))
    assert len(told) < 1500 and "\n" not in told


def test_only_rank_0_writes_to_stdout(monkeypatch, capsys):
    for rank, told in (("0", "hello\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        common.cli(lambda: print("hello"))
        assert capsys.readouterr().out == told
    before = sys.stdout
    with pytest.raises(SystemExit):
        common.cli(lambda: runtime.resolve("quantum"))
    assert sys.stdout is before
    assert "error: --device quantum" in capsys.readouterr().err  # errors come from every rank


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


def test_a_rank_that_lost_another_says_so_before_torchrun_ends_it(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    ended = []
    before = signal.signal(signal.SIGTERM, lambda *_: ended.append("at once"))
    interrupted = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(RuntimeError), common.Interrupt():
            raise RuntimeError("Connection closed by peer")
        signal.raise_signal(signal.SIGTERM)  # torchrun's, while the error's line is made
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, interrupted)
    assert not ended


def test_a_saved_model_can_be_read_by_whom_the_umask_lets(tmp_path):
    from model import Config, Transformer

    before = os.umask(0o022)
    try:
        Transformer(Config("llama", 16, 16, 16, 1, 1, 1, 16, 8)).save_pretrained(tmp_path)
    finally:
        os.umask(before)
    assert {p.stat().st_mode & 0o777 for p in tmp_path.iterdir()} == {0o644}
