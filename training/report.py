"""What demo.sh made, on one page: each stage with its figures, the same questions after each.

    python -m training.report runs/demo    # runs/demo, runs/demo-sft, ... -> runs/demo-report/

Only what lies in the folders is read, so a part of the road makes a report too. A page is a list of
blocks in Markdown; exams write theirs with `markdown_table` and `write_page` too.
"""

import re
import shlex
from collections import defaultdict
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from statistics import median_high
from typing import NamedTuple

from common import Metrics, UserError, cli, curve, json_records, parse_flags, read_json, write_text
from training import toybox

# Whose answers are compared: the end of their folder's name.
MODELS = ("base", "sft", "lora", "dpo", "grpo", "int8", "int4")
# The test's first question of each of these is shown; "" is the family of your own questions.
SHOWN = ("reverse", "sort", "add", "fact", "speaker", "refuse", toybox.WITHHELD, "")
VERDICT = {True: "✓ ", False: "✗ ", None: ""}  # in front of an answer
# Rows of the table of marks, beside the families.
TAUGHT, BY_LORA, COURTEOUS = "all that was taught", f"{toybox.WITHHELD}, by LoRA", "courteous"


@dataclass
class Args:
    run: str = "runs/demo"  # what the names of the run's folders begin with


class Stage(NamedTuple):
    """A line that demo.sh left in RUN-report/stages/NAME."""

    number: int
    seconds: int
    where: str  # the machine
    why: str
    command: str
    name: str
    out: Path  # what its --out says


class ExamAnswer(NamedTuple):
    """One that `finetune.py eval` left in RUN-report/MODEL."""

    question: str
    expected: str | None
    family: str
    text: str
    right: bool | None


def read_stages(folder):
    stages = []
    for path in folder.glob("*"):
        if path.suffix != ".begun":
            line = path.read_text(encoding="utf-8").rstrip("\n")
            number, seconds, where, why, command = line.split("\t")
            out = shlex.split(command.partition(" --out ")[2])[:1]
            n = int(number)
            stages.append(Stage(n, int(seconds), where, why, command, path.name, Path(*out)))
    if not stages:
        raise UserError(f"{folder} has no stage that is done: bash demo.sh makes them")
    return sorted(stages)


def read_answers(folder):
    """The answers of the model that an exam examined: the first, and --before's is the second."""
    answers = []
    for _, row in json_records(folder / "answers.jsonl"):
        text, *_ = row["answers"].values()
        right, *_ = row["right"].values()
        asked = row["messages"][-1]["content"]
        answers.append(ExamAnswer(asked, row["expected"], row["family"], text, right))
    return answers


def marks_of(answers):
    """One model's answers -> {row of the table of marks: [was it so?], where that is known}."""
    marks = defaultdict(list)
    for answer in answers:
        rows = [TAUGHT, answer.family or "your own"]
        if answer.family == toybox.WITHHELD:
            rows = [BY_LORA]
        for row in rows if answer.right is not None else ():
            marks[row].append(answer.right)
        if answer.family:
            marks[COURTEOUS].append(toybox.style(answer.text))
    return marks


# ------------------------------------------------------------------------- what a stage left behind
def clock(seconds):
    return str(timedelta(seconds=seconds)).removeprefix("0:").removeprefix("0")


def percent(values):
    """Their mean."""
    return f"{sum(values) / len(values):.1%}".replace(".0%", "%") if values else "–"


def training_figures(folder):
    """Figures of a training run, from its metrics."""
    rows = Metrics.read(folder / "metrics.jsonl")
    for name, what in {
        "loss": "loss",
        "val_loss": "held-out loss",
        "perplexity": "perplexity",
        "val_rewards/accuracies": "preferred answer wins",
        "val_rewards/margins": "margin",
        "val_reward": "held-out reward",
    }.items():
        values = [value for _, value in curve(rows, name)]
        if values:
            yield f"{what} {values[0]:.3f} → {values[-1]:.3f}"
    speeds = [speed for _, speed in curve(rows, "tokens_per_s")]
    if speeds:
        yield f"{median_high(speeds):,} tokens/s"


def numbers_of(found):
    """A JSON object's numbers -> phrases."""
    found = found | found.get("counts", {})
    for name, value in found.items():
        if type(value) in (int, float) and name != "seed":
            digits = 0 if isinstance(value, int) else 4
            yield f"{name.replace('_', ' ')} {value:,.{digits}f}"


def stage_figures(stage, answers):
    """What a stage has to show for itself, by what lies where its --out says -> phrases."""
    out = stage.out
    if out.name in answers:
        right = [answer.right for answer in answers[out.name] if answer.right is not None]
        return [f"{percent(right)} of {len(right):,} answers right"]
    if (out / "metrics.jsonl").is_file():
        return training_figures(out)
    for path in (out / "meta.json", out / "quantization.json", out):
        if path.is_file() and path.suffix == ".json":
            return numbers_of(read_json(path))
    return numbers_of({"bytes": out.stat().st_size}) if out.is_file() else []


# ---------------------------------------------------------------------------- the parts of the page
def shown_answers(answers):
    """The test's first question of some families, and what each model says -> rows of a table."""
    *_, last = answers.values()
    for family in SHOWN:
        asked = next((a for a in last if a.family == family), None)
        if not asked:
            continue
        row = [asked.question, asked.expected or ""]
        for model in answers.values():
            said = next((a for a in model if a.question == asked.question), None)
            row.append(VERDICT[said.right] + shortened(said.text) if said else "")
        yield row


def shortened(text):
    return text if len(text) <= 80 else text[:80] + " …"


def marks_rows(run, marks):
    """What is right, by family of questions and model; then manners."""
    *_, last = marks.values()
    families = set().union(*marks.values()) - {TAUGHT, BY_LORA, COURTEOUS}
    for what in (TAUGHT, *sorted(families), BY_LORA, COURTEOUS):
        yield [what, f"{len(last[what]):,}", *(percent(model[what]) for model in marks.values())]
    scores = [
        Metrics.read(Path(f"{run}-report", name, "metrics.jsonl"))[-1]["eval"] for name in marks
    ]
    yield ["ends by itself", "", *(percent([row["ended by itself"]]) for row in scores)]


def road_blocks(run, stages, answers):
    """All of the report -> blocks of Markdown."""
    marks = {name: marks_of(model) for name, model in answers.items()}
    yield f"# From text to server: {run}"
    yield (
        f"A language model's life in {len(stages)} commands: why, how long, what came of each, "
        "and what the model answers after it."
    )
    seconds = sum(stage.seconds for stage in stages)
    yield f"**{clock(seconds)}** for all of it, on {stages[-1].where}"
    if answers:
        yield "## The same questions after each stage"
        yield (
            "The test's first question of some families, however it was answered. "
            "No list or pair of numbers in it was practised."
        )
        yield markdown_table(["asked", "expected", *answers], shown_answers(answers))
        yield "## Marks"
        yield "Held-out questions answered right; a checker solves each anew."
        yield markdown_table(["", "questions", *answers], marks_rows(run, marks))
    yield "## The stages"
    for n, stage in enumerate(stages, 1):
        yield f"### {n} · {stage.name}, {clock(stage.seconds)}"
        yield stage.why
        yield f"    {stage.command}"
        figures = [f"- {figure}" for figure in stage_figures(stage, answers)]
        if figures:
            yield "\n".join(figures)
        for goal in ("loss", "reward"):
            if (stage.out / f"{goal}.png").is_file():
                yield f"![the {goal}](../{stage.out.name}/{goal}.png)"


# ----------------------------------------------------------------------------------------- the page
def markdown_table(header, rows):
    """Texts -> a table; newlines and bars stay inside their cell."""
    lines = []
    for cells in (header, ["---"] * len(header), *rows):
        cells = [re.sub(r"\s*\n\s*", " ⏎ ", cell).replace("|", "\\|") for cell in cells]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write_page(out, blocks):
    write_text(out / "report.md", "\n\n".join(blocks) + "\n")


def main():
    run = Path(Args(**parse_flags(Args, __doc__, positional=("run",))).run)
    out = Path(f"{run}-report")
    stages = read_stages(out / "stages")
    answers = {}
    for name in MODELS:
        if (out / name / "answers.jsonl").is_file():
            answers[name] = read_answers(out / name)
    write_page(out, road_blocks(run, stages, answers))
    print(f"wrote    {out}/report.md")


if __name__ == "__main__":
    cli(main)
