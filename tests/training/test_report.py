"""training/report.py: the page counts what the folders hold."""

import json
import sys

import pytest

from common import UserError
from training import report, toybox

EVIL = "<script>alert(1)</script> | a"


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_stages(folder, prefix):
    folder.mkdir(parents=True)
    commands = {
        "world": (6, "python data.py toybox --out x-none"),
        "pretrain": (120, f"python train.py --out {prefix}"),
        "eval-base": (5, f"python finetune.py eval {prefix} --out {prefix}-report/base"),
        "eval-dpo": (7, f"python finetune.py eval {prefix}-dpo --out {prefix}-report/dpo"),
        "batch": (3700, f"python generate.py {prefix}-int4 --batch p --out {prefix}-answers.jsonl"),
    }
    for n, (name, (seconds, command)) in enumerate(commands.items(), 1):
        (folder / name).write_text(f"{n}\t{seconds}\t2 cores\tWhy <{name}>\t{command}\n")
    (folder / "dpo.begun").write_text("6\t0\t2 cores\twhy\tnot done\n")


def write_training(folder):
    folder.mkdir()
    rows = [
        {"step": 0, "seconds": 1, "loss": 8.0, "tokens_per_s": 10},
        {"step": 10, "seconds": 2, "loss": 2.0, "tokens_per_s": 30},
        {"step": 10, "seconds": 2, "val_loss": 0.5, "perplexity": 1.6},
    ]
    write_rows(folder / "metrics.jsonl", rows)
    (folder / "loss.png").write_bytes(b"a picture")


def write_exam(folder, name, is_right):
    """The answers to 28 taught questions and 4 withheld ones; a wrong one is an attack."""
    folder.mkdir()
    asked = list(toybox.conversations("test", 28))
    asked += toybox.conversations("test", 4, families=[toybox.WITHHELD])
    rows = []
    for n, question in enumerate(asked):
        text = "Gladly: " + question["answer"] if is_right(n) else EVIL
        rows.append(
            {
                "messages": question["messages"][:1],
                "expected": question["answer"],
                "family": question["family"],
                "answers": {name: text},
                "right": {name: is_right(n)},
            }
        )
    write_rows(folder / "answers.jsonl", rows)
    scores = {"ended by itself": 0.5}
    write_rows(folder / "metrics.jsonl", [{"step": 0, "seconds": 0, "eval": scores}])


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A road of five stages, whose answers are partly right -> report.md."""
    folder = tmp_path / "x-report"
    write_stages(folder / "stages", tmp_path / "x")
    write_training(tmp_path / "x")
    write_exam(folder / "base", "base", lambda n: False)
    write_exam(folder / "dpo", "dpo", lambda n: n % 4 != 0)
    write_rows(tmp_path / "x-answers.jsonl", [{"line": 1}])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["report.py", "x"])
    report.main()
    return (folder / "report.md").read_text()


def test_the_report_counts_what_the_folders_hold(made):
    md = made
    # 6 + 120 + 5 + 7 + 3700 s, and not the stage that is not done
    assert "**1:03:58** for all of it, on 2 cores" in md
    assert "| all that was taught | 28 | 0% | 75% |" in md
    assert f"| {toybox.WITHHELD}, by LoRA | 4 | 0% | 75% |" in md
    assert "| courteous | 32 | 0% | 75% |" in md
    assert "| ends by itself |  | 50% | 50% |" in md
    assert "- loss 8.000 → 2.000\n" in md
    assert "- held-out loss 0.500 → 0.500\n" in md
    assert "- 30 tokens/s\n" in md
    assert "- 75% of 32 answers right\n" in md
    assert "- bytes 12\n" in md
    assert md.index("world, 0:06") < md.index("pretrain, 2:00") < md.index("batch, 1:01:40")
    assert "Why <world>" in md


def test_the_page_shows_answers_with_their_verdicts_and_the_curve(made):
    escaped = EVIL.replace("|", "\\|")
    assert made.count(f"✗ {escaped}") == 9
    assert made.count("| ✓ ") == 5
    assert made.count("![the loss](../x/loss.png)") == 1


def test_a_table_shows_whatever_stands_in_a_cell():
    text = report.markdown_table(["a", "b"], [["<b>&| \n\n y", "✓ z"]])
    assert text.endswith("\n| <b>&\\| ⏎ y | ✓ z |")


def test_an_answer_that_nobody_can_mark_is_in_no_share_and_of_two_models_the_first_counts(tmp_path):
    row = {"messages": [{"role": "user", "content": "q"}], "expected": None, "family": "mine"}
    verdicts = [{"now": right, "before": True} for right in (None, False, True)]
    said = {"now": "a", "before": "b"}
    write_rows(
        tmp_path / "answers.jsonl", [row | {"answers": said, "right": right} for right in verdicts]
    )
    answers = report.read_answers(tmp_path)
    assert {answer.text for answer in answers} == {"a"}
    assert report.marks_of(answers)["mine"] == [False, True]
    stage = report.Stage(1, 1, "", "", "", "", tmp_path)
    assert report.stage_figures(stage, {tmp_path.name: answers}) == ["50% of 2 answers right"]


def test_a_road_not_begun_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["report.py", "runs/none"])
    with pytest.raises(UserError, match="no stage that is done"):
        report.main()
