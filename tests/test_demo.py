"""demo.sh and report.py: every command's flags exist, what is done stays done, a killed stage
goes on, the page is safe."""

import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from common import UserError
from training import report, toybox

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
    """Each is run in this process with one flag more that does not exist: that, and nothing
    before it, has to be refused."""
    lines = commands(*flags, **env)
    assert (
        len(lines) >= 20
        and lines[-1].startswith("python serve.py")
        and lines[-2].startswith("python -m training.report")
    )
    monkeypatch.chdir(tmp_path)
    for line in lines:
        words = shlex.split(line.replace("torchrun --nproc-per-node 8 ", "python "))
        module = words[2] if words[1] == "-m" else words[1].removesuffix(".py")
        monkeypatch.setattr(sys, "argv", [*words[2 if words[1] == "-m" else 1 :], "--no-such-flag"])
        with pytest.raises((UserError, SystemExit)) as refused:
            importlib.import_module(module).main()
        told = f"{refused.value} {capsys.readouterr().err}"  # plain argparse prints it and exits
        assert re.search("(unknown argument|unrecognized arguments:) --no-such-flag", told), (
            f"{line}: {told}"
        )
    assert list(tmp_path.iterdir()) == []


def test_the_sizes_share_their_stages_but_no_folder():
    full, fast, large = (commands(*flags) for flags in ((), ("--fast",), ("--preset", "125m")))
    assert [line.split()[1] for line in full] == [line.split()[1] for line in fast]
    assert not any("runs/demo" in line for line in fast + large) and not any(
        "runs/fast" in line for line in full + large
    )
    assert {line.split()[1] for line in full} == {line.split()[1] for line in large}
    torchrun = "torchrun --nproc-per-node 8 "
    spread = commands("--preset", "125m", GPUS="8")
    assert sum(line.startswith(torchrun) for line in spread) == 4
    pretraining = next(line for line in large if "--preset 125m" in line)
    told = demo("--preset", "125m", "--dry-run").stdout
    assert torchrun + pretraining.removeprefix("python ") in told


def test_a_stage_can_be_the_last_and_the_server_left_out():
    assert commands("--no-serve") == commands(SERVE="0") == commands()[:-1]
    assert commands("--to", "sft") == [*commands()[:5], "python -m training.report runs/demo"]


@pytest.mark.parametrize(
    "flags, told",
    [
        (("--to", "sfd"), "no stage sfd; there are: world"),
        (("--preset", "1b"), "no size 1b"),
        (("--quick",), "unknown argument --quick"),
        (("--from",), "--from needs"),
    ],
)
def test_a_wrong_flag_is_one_line(flags, told):
    done = demo(*flags)
    assert (
        done.returncode != 0
        and told in done.stderr
        and done.stderr.count("\n") == 1
        and not done.stdout
    )


# --------------------------------------------------------------------- done, cut short, out of date
STUB = """#!/bin/sh
echo "$@" >> log
[ "$1" = "$FAIL" ] && exit 7
while [ $# -gt 0 ]; do
    if [ "$1" = --out ]; then
        case $2 in *.*) echo x > "$2" ;; *) mkdir -p "$2/state/step-1" ;; esac
    fi
    shift
done
exit 0
"""


@pytest.fixture
def stubbed(tmp_path):
    """demo.sh in a folder where `python` only writes down what it was asked, and makes the
    folder it should -> run(flags)."""
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


def test_what_is_done_is_skipped_and_a_second_run_serves_at_once(stubbed, tmp_path):
    code, log = stubbed()
    assert code == 0 and log == [
        line.removeprefix("python ").replace("'", "") for line in commands()[:-1]
    ]
    (tmp_path / "runs" / "demo-report" / "report.html").touch()
    assert stubbed() == (0, [])
    assert stubbed(SERVE="1") == (0, ["serve.py runs/demo-dpo --port 8000"])


def test_a_stage_that_failed_is_resumed_and_the_rest_follows(stubbed, tmp_path):
    code, log = stubbed(FAIL="dpo.py")
    assert code == 7 and log[-1].startswith("dpo.py")
    (tmp_path / "runs" / "demo-dpo" / "state" / "step-5").mkdir(parents=True)  # it had saved
    code, log = stubbed()
    assert code == 0 and log[0].startswith("dpo.py") and log[0].endswith("--resume")
    assert log[1].startswith("finetune.py eval runs/demo-dpo") and "--overwrite" not in log[1]
    assert stubbed()[1] == ["-m training.report runs/demo"]  # the stub has not made it


def test_what_is_older_than_what_it_was_made_from_is_made_anew_and_nothing_else(stubbed, tmp_path):
    stubbed()
    (tmp_path / "runs" / "demo-answers.jsonl").write_text("stale")
    shutil.rmtree(tmp_path / "runs" / "demo-merged")
    code, log = stubbed(FAIL="dpo.py")  # cut short when only a part of it is done
    assert (
        code == 7
        and [line.split()[0] for line in log] == ["lora.py", "finetune.py", "dpo.py"]
        and "merge" in log[0]
    )
    code, log = stubbed()
    assert (
        code == 0
        and log[0].startswith("dpo.py")
        and [line.split()[0] for line in log[1:]]
        == [
            "finetune.py",
            "quant.py",
            "quant.py",
            "quant.py",
            "finetune.py",
            "finetune.py",
            "generate.py",
            "generate.py",
            "-m",
        ]
    )
    assert (tmp_path / "runs" / "demo-answers.jsonl").read_text() == "x\n"
    shutil.rmtree(tmp_path / "runs" / "demo-report" / "base")
    assert [line.split()[0] for line in stubbed()[1]] == ["finetune.py", "-m"]
    log = stubbed(LORA="--r 4")[1]  # other flags
    assert (
        log[0].startswith("lora.py train") and "--r 4" in log[0] and log[0].endswith("--overwrite")
    )
    assert any(line.startswith("dpo.py") and line.endswith("--overwrite") for line in log)
    assert not any(line.startswith(("train.py", "finetune.py runs")) for line in log)


def test_from_makes_a_stage_and_all_that_follow_anew(stubbed):
    whole = stubbed()[1]
    log = stubbed("--from", "dpo")[1]
    assert log[0].startswith("dpo.py") and log[0].endswith(" --overwrite")
    assert [line.removesuffix(" --overwrite") for line in log] == whole[
        -len(log) :
    ]  # the stub leaves its step-1 everywhere


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
    assert 40 <= int((begun.parent / "dpo").read_text().split("\t")[1]) <= 43 and not begun.exists()


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
    page, weights = (
        (tmp_path / "m-report" / "report.md").read_text(),
        (tmp_path / "m-sft" / "model.safetensors").read_bytes(),
    )
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
    assert (
        again.stdout.count("$ python") == 3 and "--resume" in again.stdout
    )  # sft, eval-sft, the report
    assert (tmp_path / "m-sft" / "model.safetensors").read_bytes() == weights
    assert figures((tmp_path / "m-report" / "report.md").read_text()) == figures(page)


def figures(page):
    """A report without what depends on the clock."""
    return [
        line for line in page.splitlines() if not re.search("^### | for all of it|tokens/s", line)
    ]


# --------------------------------------------------------------------------------------- the report
@pytest.fixture
def run(tmp_path):
    """A road of five stages, whose answers are partly right and partly an attack -> the prefix
    of its folders."""
    prefix, evil = tmp_path / "x", "<script>alert(1)</script> | a"
    stages = tmp_path / "x-report" / "stages"
    stages.mkdir(parents=True)
    lines = {
        "world": (6, "python data.py toybox --out x-none"),
        "pretrain": (120, f"python train.py --out {prefix}"),
        "eval-base": (5, f"python finetune.py eval {prefix} --out {prefix}-report/base"),
        "eval-dpo": (7, f"python finetune.py eval {prefix}-dpo --out {prefix}-report/dpo"),
        "batch": (3700, f"python generate.py {prefix}-int4 --batch p --out {prefix}-answers.jsonl"),
    }
    for n, (name, (seconds, command)) in enumerate(lines.items(), 1):
        (stages / name).write_text(f"{n}\t{seconds}\t2 cores\tWhy <{name}>\t{command}\n")
    (stages / "dpo.begun").write_text("6\t0\t2 cores\twhy\tnot done\n")
    prefix.mkdir()
    rows = [
        {"step": 0, "seconds": 1, "loss": 8.0, "tokens_per_s": 10},
        {"step": 10, "seconds": 2, "loss": 2.0, "tokens_per_s": 30},
        {"step": 10, "seconds": 2, "val_loss": 0.5, "perplexity": 1.6},
    ]
    save_file({"a": np.zeros((2, 3), np.float32)}, prefix / "model.safetensors")
    (prefix / "loss.png").write_bytes(b"a picture")
    (prefix / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = list(toybox.examples("test", 28)) + list(
        toybox.examples("test", 4, families=[toybox.WITHHELD])
    )
    for name, right in (("base", lambda n: False), ("dpo", lambda n: n % 4 != 0)):
        (tmp_path / "x-report" / name).mkdir()
        answers = [
            {
                "messages": r["messages"][:1],
                "expected": r["answer"],
                "family": r["family"],
                "answers": {name: "Gladly: " + r["answer"] if right(n) else evil},
                "right": {name: right(n)},
            }
            for n, r in enumerate(asked)
        ]
        (tmp_path / "x-report" / name / "answers.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in answers)
        )
        row = {"step": 0, "seconds": 0, "eval": {"ended by itself": 0.5, "perplexity": 3.25}}
        (tmp_path / "x-report" / name / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    answers = [
        {"line": n, "answers": [{"tokens": 5}], "seconds": s}
        for n, s in enumerate((1.0, 2.0, 0.5, 3.0))
    ]
    (tmp_path / "x-answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    return prefix


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def made(run, monkeypatch):
    monkeypatch.chdir(run.parent)
    monkeypatch.setattr(sys, "argv", ["report.py", "x"])
    report.main()
    return (run.parent / "x-report" / "report.md").read_text(), (
        run.parent / "x-report" / "report.html"
    ).read_text()


def test_the_report_counts_what_the_folders_hold(run, monkeypatch):
    md, page = made(run, monkeypatch)
    assert (
        "- **1:03:58** for all of it, on 2 cores" in md
    )  # 6 + 120 + 5 + 7 + 3700 s, and not the stage that is not done
    assert (
        "| all that was taught | 28 | 0% | 75% |" in md
        and f"| {toybox.WITHHELD}, by LoRA | 4 | 0% | 75% |" in md
    )
    assert (
        "| courteous |  | 0% | 75% |" in md
        and "| perplexity |  | 3.25 | 3.25 |" in md
        and "| 50% | 50% |" in md
    )
    assert (
        "- loss 8.000 → 2.000\n" in md
        and "- held-out loss 0.500 → 0.500\n" in md
        and "- 30 tokens/s\n" in md
    )
    assert "- 6 parameters\n" in md and "- 75% of 32 answers right\n" in md
    assert "- 4 answers, 20 tokens in 5.0 s: 4 tokens/s\n" in md  # started twice: 2.0 s and 3.0 s
    assert md.index("world, 0:06") < md.index("pretrain, 2:00") < md.index("batch, 1:01:40")
    assert all(
        text in Page(page).text for text in ("Why <world>", "75%", "1:03:58", "1 · world0:06")
    )


def test_the_page_needs_nothing_else_and_shows_answers_as_text(run, monkeypatch):
    md, page = made(run, monkeypatch)
    parsed = Page(page)
    assert (
        "<script>alert(1)</script> | a" in parsed.text and "<script>alert(1)</script> \\| a" in md
    )
    assert (
        not {tag for tag, _ in parsed.tags} & {"script", "link", "iframe"}
        and "http" not in page
        and "url(" not in page
    )
    assert [a["src"][:22] for tag, a in parsed.tags if tag == "img"] == ["data:image/png;base64,"]
    assert not any(
        name.startswith("on") or name == "href"
        for _, attributes in parsed.tags
        for name in attributes
    )
    cells = [a for tag, a in parsed.tags if tag == "td"]
    assert (
        sum(a.get("class") == "right" for a in cells) == 5
        and sum(a.get("class") == "wrong" for a in cells) == 9
    )
    assert {a["style"] for a in cells if a.get("class") == "share"} >= {
        "--share:0",
        "--share:75",
        "--share:50",
    }
    assert "prefers-color-scheme: dark" in page


def test_a_report_shows_whatever_stands_in_a_cell_as_text(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ROWS", 2)
    evil = "<b onclick=x>&| \n\n y"
    report.write_report(
        tmp_path, [f"# {evil}", f"    {evil}", report.Table(["a", "b"], [[evil, "✓ z"]] * 3)]
    )
    page, text = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    assert "<b" not in page.replace("<body", "") and page.count("&lt;b onclick=x&gt;&amp;|") == 6
    assert page.count("class=right") == 3
    assert text.count("| <b onclick=x>&\\| ⏎ y | ✓ z |\n") == 2 and "1 more in report.html" in text


def test_a_road_not_begun_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["report.py", "runs/none"])
    with pytest.raises(UserError, match="no stage that is done"):
        report.main()
