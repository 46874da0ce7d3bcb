"""demo.sh: every command's flags exist, what is done stays done, a killed stage goes on."""

import importlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common import UserError

ROOT = Path(__file__).resolve().parent.parent


def demo(*flags, **env):
    """The finished process of demo.sh; its python is ours."""
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **env}
    return subprocess.run(
        ["bash", ROOT / "demo.sh", *flags], capture_output=True, text=True, env=env, timeout=900
    )


def commands(*flags, **env):
    """The commands that it would run."""
    done = demo("--dry-run", *flags, **env)
    assert done.returncode == 0, done.stderr
    return [line[2:] for line in done.stdout.splitlines() if line.startswith("$ ")]


# ------------------------------------------------------------------------------------- the commands
@pytest.mark.parametrize(
    "flags, env",
    [
        ((), {}),
        (("--fast",), {}),
        (("--preset", "125m"), {}),
        (("--preset", "125m"), {"GPUS": "8", "INSTRUCT": "my chats.json", "PREFS": "p.jsonl"}),
    ],
)
def test_every_command_of_every_size_has_only_flags_that_exist(
    flags, env, monkeypatch, tmp_path, capsys
):
    """Each is run in this process with one flag more that does not exist: that, and nothing before
    it, has to be refused."""
    lines = commands(*flags, **env)
    assert len(lines) >= 20
    assert lines[-1].startswith("python serve.py")
    assert lines[-2].startswith("python -m training.report")
    monkeypatch.chdir(tmp_path)
    for line in lines:
        line = line.replace("torchrun --nproc-per-node 8 ", "python ").replace(" -m ", " ")
        _, program, *flags = shlex.split(line)
        monkeypatch.setattr(sys, "argv", [program, *flags, "--no-such-flag"])
        with pytest.raises((UserError, SystemExit)) as refused:
            importlib.import_module(program.removesuffix(".py")).main()
        told = f"{refused.value} {capsys.readouterr().err}"  # plain argparse prints it and exits
        assert re.search("(unknown argument|unrecognized arguments:) --no-such-flag", told), (
            f"{line}: {told}"
        )
    assert list(tmp_path.iterdir()) == []


def test_the_sizes_share_their_stages_but_no_folder():
    full, fast, large = (commands(*flags) for flags in ((), ("--fast",), ("--preset", "125m")))
    assert [line.split()[1] for line in full] == [line.split()[1] for line in fast]
    assert not any("runs/demo" in line for line in fast + large)
    assert not any("runs/fast" in line for line in full + large)
    assert {line.split()[1] for line in full} == {line.split()[1] for line in large}
    torchrun = "torchrun --nproc-per-node 8 "
    eight = commands("--preset", "125m", GPUS="8")
    assert sum(line.startswith(torchrun) for line in eight) == 5
    training = next(line for line in large if "--preset 125m" in line)
    told = demo("--preset", "125m", "--dry-run").stdout
    assert torchrun + training.removeprefix("python ") in told


def test_a_stage_can_be_the_last_and_the_server_left_out():
    assert commands("--no-serve") == commands(SERVE="0") == commands()[:-1]
    assert commands("--to", "sft") == [*commands()[:5], "python -m training.report runs/demo"]


@pytest.mark.parametrize(
    "flags, told",
    [
        (("--to", "sfd"), "no stage sfd; there are: world"),
        (("--from", "corpus"), "no stage corpus; there are: world tokenizer"),
        (("--to", "chats"), "no stage chats"),
        (("--preset", "1b"), "no size 1b"),
        (("--quick",), "unknown argument --quick"),
        (("--from",), "--from needs"),
    ],
)
def test_a_wrong_flag_is_one_line(flags, told):
    done = demo("--dry-run", *flags)
    assert done.returncode != 0
    assert told in done.stderr
    assert done.stderr.count("\n") == 1
    assert not done.stdout


# --------------------------------------------------------------------- done, cut short, out of date
STUB = """#!/bin/sh
echo "$@" >> log
[ "$1" = "$FAIL" ] && exit 7
while [ $# -gt 0 ]; do
    [ "$1" = --out ] && case $2 in *.*) echo x > "$2" ;; *) mkdir -p "$2/state/step-1" ;; esac
    shift
done
exit 0
"""


@pytest.fixture
def stubbed(tmp_path):
    """demo.sh in a folder where `python` only writes down what it was asked, and makes the folder
    it should -> run(flags)."""
    shutil.copy(ROOT / "demo.sh", tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(STUB)
    (tmp_path / "bin" / "python").chmod(0o755)

    def run(*flags, **env):
        (tmp_path / "log").write_text("")
        env = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "SERVE": "0", **env}
        done = subprocess.run(
            ["bash", tmp_path / "demo.sh", *flags], capture_output=True, text=True, env=env
        )
        return done.returncode, (tmp_path / "log").read_text().splitlines()

    return run


def programs(log):
    return [line.split()[0] for line in log]


def test_what_is_done_is_skipped_and_a_second_run_serves_at_once(stubbed, tmp_path):
    code, log = stubbed()
    wanted = [line.removeprefix("python ").replace("'", "") for line in commands()[:-1]]
    assert code == 0
    assert log == wanted
    (tmp_path / "runs" / "demo-report" / "report.md").touch()
    assert stubbed() == (0, [])
    assert stubbed(SERVE="1") == (0, ["serve.py runs/demo-dpo --port 8000"])


def test_a_stage_that_failed_is_resumed_and_the_rest_follows(stubbed, tmp_path):
    code, log = stubbed(FAIL="dpo.py")
    assert code == 7
    assert log[-1].startswith("dpo.py")
    (tmp_path / "runs" / "demo-dpo" / "state" / "step-5").mkdir(parents=True)  # it had saved
    code, log = stubbed()
    assert code == 0
    assert log[0].startswith("dpo.py")
    assert log[0].endswith("--resume")
    assert log[1].startswith("finetune.py eval runs/demo-dpo")
    assert "--overwrite" not in log[1]
    assert stubbed()[1] == ["-m training.report runs/demo"]  # the stub has not made it


def test_what_is_older_than_what_it_was_made_from_is_made_anew_and_nothing_else(stubbed, tmp_path):
    stubbed()
    (tmp_path / "runs" / "demo-answers.jsonl").write_text("stale")
    shutil.rmtree(tmp_path / "runs" / "demo-merged")
    code, log = stubbed(FAIL="dpo.py")  # cut short when only a part of it is done
    assert code == 7
    assert programs(log) == ["lora.py", "finetune.py", "dpo.py"]
    assert "merge" in log[0]
    code, log = stubbed()
    assert code == 0
    assert " ".join(programs(log)) == (
        "dpo.py finetune.py grpo.py finetune.py quant.py quant.py -m finetune.py finetune.py "
        "generate.py generate.py -m"  # training.report
    )
    assert (tmp_path / "runs" / "demo-answers.jsonl").read_text() == "x\n"
    shutil.rmtree(tmp_path / "runs" / "demo-report" / "base")
    assert programs(stubbed()[1]) == ["finetune.py", "-m"]
    log = stubbed(LORA="--r 4")[1]  # other flags
    assert log[0].startswith("lora.py train")
    assert "--r 4" in log[0]
    assert log[0].endswith("--overwrite")
    assert any(line.startswith("dpo.py") and line.endswith("--overwrite") for line in log)
    assert not any(line.startswith(("train.py", "finetune.py runs")) for line in log)


def test_folders_and_files_may_have_a_space_in_their_name(stubbed, tmp_path):
    given = dict(RUNS="my runs/m", TOYBOX="a toy", PREFS="my pairs.jsonl", INSTRUCT="my chats.json")
    code, log = stubbed(**given)
    assert code == 0
    assert (tmp_path / "my runs" / "m-answers.jsonl").is_file()
    assert not (tmp_path / "my").exists()
    (tmp_path / "my runs" / "m-report" / "report.md").touch()
    assert stubbed(**given) == (0, [])
    shutil.rmtree(tmp_path / "my runs" / "m-grpo")
    assert programs(stubbed(**given)[1]) == ["grpo.py", "finetune.py", "-m"]


def test_what_was_made_from_a_file_of_yours_is_made_anew_when_it_has_changed(stubbed, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.touch()
    stubbed(PREFS=str(pairs))
    later = time.time() + 60
    os.utime(pairs, (later, later))
    assert programs(stubbed(PREFS=str(pairs))[1])[:2] == ["dpo.py", "finetune.py"]


def test_from_makes_a_stage_and_all_that_follow_anew(stubbed):
    whole = stubbed()[1]
    log = stubbed("--from", "dpo")[1]
    assert log[0].startswith("dpo.py")
    assert log[0].endswith(" --overwrite")
    # the stub leaves its step-1 everywhere
    assert [line.removesuffix(" --overwrite") for line in log] == whole[-len(log) :]


def test_a_run_that_the_demo_did_not_make_is_never_thrown_away(stubbed, tmp_path):
    (tmp_path / "runs" / "demo" / "state" / "step-9").mkdir(parents=True)
    log = stubbed()[1]
    assert next(line for line in log if line.startswith("train.py --preset")).endswith("--resume")


def test_times_count_what_was_saved_before_a_stage_was_cut_short(stubbed, tmp_path):
    stubbed(FAIL="dpo.py")
    begun = tmp_path / "runs" / "demo-report" / "stages" / "dpo.begun"
    saved = tmp_path / "runs" / "demo-dpo" / "state" / "step-5"
    saved.mkdir(parents=True)
    os.utime(saved, (begun.stat().st_mtime + 40,) * 2)
    stubbed()
    assert 40 <= int((begun.parent / "dpo").read_text().split("\t")[1]) <= 43
    assert not begun.exists()


@pytest.mark.slow
def test_a_demo_killed_in_the_middle_ends_with_the_same_report(tmp_path):
    """SIGKILL to all of it while the fine-tuning is under way, then the same command again: the
    same weights and figures."""
    (tmp_path / "tinyshakespeare.txt").write_text(
        "ROMEO:\nWhat light through yonder window breaks?\n\n" * 2000
    )
    env = dict(RUNS=str(tmp_path / "m"), TOYBOX=str(tmp_path / "world"), LLM_DATA_DIR=str(tmp_path))
    env |= dict(
        PRETRAIN="--steps 5 --batch 2 --context 128",
        EVAL="--examples 28 --max-tokens 8",
        CUDA_VISIBLE_DEVICES="",
        SFT="--context 128 --batch 4 --steps 60 --eval-every 60 --save-every 10 --sample 0",
    )
    flags = ("--to", "eval-sft", "--no-serve")
    whole = demo(*flags, **env)
    assert whole.returncode == 0, whole.stderr
    page = (tmp_path / "m-report" / "report.md").read_text()
    weights = (tmp_path / "m-sft" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "m-sft")
    for name in ("sft", "eval-sft"):
        (tmp_path / "m-report" / "stages" / name).unlink()
    environ = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **env}
    process = subprocess.Popen(
        ["bash", ROOT / "demo.sh", *flags],
        env=environ,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not list(tmp_path.glob("m-sft/state/step-*")):
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "m-report" / "stages" / "sft").exists()
    again = demo(*flags, **env)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("$ python") == 3  # sft, eval-sft, the report
    assert "--resume" in again.stdout
    assert (tmp_path / "m-sft" / "model.safetensors").read_bytes() == weights
    assert figures((tmp_path / "m-report" / "report.md").read_text()) == figures(page)


def figures(page):
    """A report without what depends on the clock."""
    return [
        line for line in page.splitlines() if not re.search("^### | for all of it|tokens/s", line)
    ]
