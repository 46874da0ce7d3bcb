"""What demo.sh made, on one page: each stage with its figures, the same questions after each.

    python -m training.report runs/demo    # runs/demo, runs/demo-sft, ... -> runs/demo-report/

Only what lies in the folders is read, so a part of the road makes a report too. A page is a list of
blocks, texts in a little Markdown and Tables; `write_page` also makes the pages of exams.
"""

import base64
import html
import json
import math
import re
import shlex
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

from common import Metrics, UserError, cli, json_records, parse_flags, read_json, write_atomic
from training import toybox

MODELS = {  # whose answers are compared: the end of their folder's name, what they are called
    "base": "only read",
    "sft": "fine-tuned",
    "lora": "LoRA",
    "dpo": "DPO",
    "int8": "int8",
    "int4": "int4",
}
TRAINED = ("pretrain", "sft", "lora", "dpo")
# The test's first question of each of these is shown; "" is the family of your own questions.
SHOWN = ("reverse", "sort", "add", "fact", "speaker", "refuse", toybox.WITHHELD, "")
ROWS_IN_MD = 40  # of a table in report.md; report.html has them all
VERDICT = {True: "✓ ", False: "✗ ", None: ""}  # in front of an answer; the page colours it


@dataclass
class Args:
    run: str = "runs/demo"  # what the names of the run's folders begin with


class Table(NamedTuple):
    header: list  # of texts
    rows: list  # of lists of texts


class Stage(NamedTuple):
    """A line that demo.sh left in RUN-report/stages/NAME."""

    number: int
    seconds: int
    where: str  # the machine
    why: str
    command: str
    name: str

    @property
    def out(self):
        """What its --out says."""
        words = shlex.split(self.command)
        return Path(words[words.index("--out") + 1] if "--out" in words else "")


class ExamAnswer(NamedTuple):
    """One that `finetune.py eval` left in RUN-report/MODEL."""

    question: str
    expected: str | None
    family: str
    text: str
    right: bool | None

    @property
    def taught(self):
        """Is it right, of what fine-tuning taught? None for LoRA's family."""
        return None if self.family == toybox.WITHHELD else self.right

    @property
    def withheld(self):
        """Is it right, of what only LoRA taught? None for all other families."""
        return self.right if self.family == toybox.WITHHELD else None

    @property
    def shown(self):
        more = " …" if len(self.text) > 80 else ""
        return VERDICT[self.right] + self.text[:80] + more

    @property
    def courteous(self):
        return toybox.style(self.text) if self.family else None


def read_stages(folder):
    stages = []
    for path in folder.glob("*"):
        if path.suffix != ".begun":
            line = path.read_text(encoding="utf-8").rstrip("\n")
            number, seconds, where, why, command = line.split("\t")
            stages.append(Stage(int(number), int(seconds), where, why, command, path.name))
    if not stages:
        raise UserError(f"{folder} has no stage that is done: bash demo.sh makes them")
    return sorted(stages)


def read_answers(folder):
    """The answers of the one model that an exam's folder tells of."""
    answers = []
    for row in json_records(folder / "answers.jsonl"):
        (text,), (right,) = row["answers"].values(), row["right"].values()
        question = row["messages"][-1]["content"]
        answers.append(ExamAnswer(question, row["expected"], row["family"], text, right))
    return answers


# ------------------------------------------------------------------------- what a stage left behind
def clock(seconds):
    return str(timedelta(seconds=seconds)).removeprefix("0:").removeprefix("0")


def percent(values):
    """The share of those that are true, of those that are anything."""
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.1%}".replace(".0%", "%") if known else "–"


def training_figures(folder):
    """Figures of a training run, from its weights and metrics."""
    for path in folder.glob("*model.safetensors"):
        with open(path, "rb") as file:  # the header alone
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        yield f"{sum(math.prod(tensor['shape']) for tensor in header.values()):,} parameters"
    rows = Metrics.read(folder / "metrics.jsonl")
    for name, what in {
        "loss": "loss",
        "val_loss": "held-out loss",
        "perplexity": "perplexity",
        "val_rewards/accuracies": "preferred answer wins",
        "val_rewards/margins": "margin",
    }.items():
        values = [row[name] for row in rows if row.get(name) is not None]
        if values:
            yield f"{what} {values[0]:.3f} → {values[-1]:.3f}"
    speeds = sorted(row["tokens_per_s"] for row in rows if row.get("tokens_per_s") is not None)
    if speeds:
        yield f"{speeds[len(speeds) // 2]:,} tokens/s"


def batch_figures(path):
    """Figures of a file of answers. Its seconds count from the start of a command that may have
    been started again, so the times are summed over the starts."""
    tokens = total = last = 0
    count = 0
    for row in json_records(path):
        count += 1
        tokens += sum(answer["tokens"] for answer in row.get("answers", ()))
        if row["seconds"] < last:
            last = 0
        total += row["seconds"] - last
        last = row["seconds"]
    speed = tokens / max(total, 1e-3)
    return [f"{count:,} answers, {tokens:,} tokens in {total:.1f} s: {speed:,.0f} tokens/s"]


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
        right = percent(answer.right for answer in answers[out.name])
        return [f"{right} of {len(answers[out.name]):,} answers right"]
    if stage.name in TRAINED and (out / "metrics.jsonl").is_file():
        return training_figures(out)
    if out.suffix == ".jsonl" and out.is_file():
        return batch_figures(out)
    for path in (out / "meta.json", out / "quantization.json", out):
        if path.is_file() and path.suffix == ".json":
            return numbers_of(read_json(path))
    return numbers_of({"bytes": out.stat().st_size}) if out.is_file() else []


# ---------------------------------------------------------------------------- the parts of the page
def tiles(run, stages, answers):
    """The run in a few numbers -> lines of Markdown."""
    seconds = sum(stage.seconds for stage in stages)
    yield f"- **{clock(seconds)}** for all of it, on {stages[-1].where}"
    for before, after, mark, told in [
        ("base", "sft", lambda a: a.taught, "right of what fine-tuning taught"),
        ("sft", "lora", lambda a: a.withheld, "right of what only LoRA taught"),
        ("lora", "dpo", lambda a: a.courteous, "courteous, which DPO taught"),
    ]:
        if before in answers and after in answers:
            was, now = (percent(map(mark, answers[name])) for name in (before, after))
            yield f"- **{was} → {now}** {told}"
    path = Path(f"{run}-int4/quantization.json")
    if path.is_file():
        size = read_json(path)
        before, after = size["original_bytes"] / 1e6, size["bytes"] / 1e6
        yield f"- **{before:,.1f} → {after:,.1f} MB** in 4 bits"


def answers_table(answers):
    """The test's first question of some families, and what each model says."""
    models = list(answers.values())
    shown = [{a.question: a.shown for a in reversed(model)} for model in models]
    rows = []
    for family in SHOWN:
        first = next((a for a in models[-1] if a.family == family), None)
        if first:
            said = [model.get(first.question, "") for model in shown]
            rows.append([first.question, first.expected or "", *said])
    return Table(["asked", "expected", *(MODELS[name] for name in answers)], rows)


def marks_table(run, answers):
    """What is right, by family of questions and model; then manners, and perplexity."""

    def row(what, mark):
        marks = [[mark(a) for a in model] for model in answers.values()]
        count = sum(m is not None for m in marks[-1])
        return [what, f"{count:,}", *map(percent, marks)]

    def row_of(family):
        what = f"{family}, by LoRA" if family == toybox.WITHHELD else family or "your own"
        return row(what, lambda a: a.right if a.family == family else None)

    families = {answer.family for model in answers.values() for answer in model}
    last = sorted(families & {toybox.WITHHELD})
    rows = [row("all that was taught", lambda a: a.taught)]
    rows += map(row_of, sorted(families - {toybox.WITHHELD}) + last)
    rows.append(row("courteous", lambda a: a.courteous))
    paths = [Path(f"{run}-report", name, "metrics.jsonl") for name in answers]
    scores = [Metrics.read(path)[-1]["eval"] for path in paths]
    rows.append(["ends by itself", "", *(percent([row["ended by itself"]]) for row in scores)])
    perplexities = [f"{row.get('perplexity', math.nan):,.2f}" for row in scores]
    rows.append(["perplexity", "", *perplexities])
    return Table(["", "questions", *(MODELS[name] for name in answers)], rows)


def road_blocks(run, stages, answers):
    """All of the report -> blocks: texts in Markdown, and Tables."""
    yield f"# From text to server: {run}"
    yield (
        f"A language model's life in {len(stages)} commands: why, how long, what came of each, "
        "and what the model answers after it."
    )
    yield "\n".join(tiles(run, stages, answers))
    if answers:
        yield "## The same questions after each stage"
        yield (
            "The test's first question of some families, however it was answered. "
            "No list or pair of numbers in it was practised."
        )
        yield answers_table(answers)
        yield "## Marks"
        yield "Held-out questions answered right; a checker solves each anew."
        yield marks_table(run, answers)
    yield "## The stages"
    for n, stage in enumerate(stages, 1):
        yield f"### {n} · {stage.name}, {clock(stage.seconds)}"
        yield stage.why
        yield f"    {stage.command}"
        figures = [f"- {figure}" for figure in stage_figures(stage, answers)]
        if figures:
            yield "\n".join(figures)
        if stage.name in TRAINED and (stage.out / "loss.png").is_file():
            yield f"![the loss](../{stage.out.name}/loss.png)"


# -------------------------------------------------------------------------------- blocks to a page
def as_markdown(block):
    """A block in Markdown; newlines and bars stay inside their cell."""
    if isinstance(block, str):
        return block
    lines = []
    for cells in [block.header, ["---"] * len(block.header), *block.rows[:ROWS_IN_MD]]:
        cells = [re.sub(r"\s*\n\s*", " ⏎ ", cell).replace("|", "\\|") for cell in cells]
        lines.append(f"| {' | '.join(cells)} |")
    more = len(block.rows) - ROWS_IN_MD
    if more > 0:
        lines.append(f"\n{more:,} more in report.html")
    return "\n".join(lines)


def as_html(block, folder):
    """A block in HTML, shown as the text it is; pictures are in the page itself."""
    if isinstance(block, Table):
        rows = ["".join(map(table_cell, cells)) for cells in (block.header, *block.rows)]
        page = "".join(f"<tr>{row}</tr>\n" for row in rows)
        return f"<div class=wide><table>{page}</table></div>"
    text = html.escape(block)
    if block.startswith("### "):
        title, time = text.removeprefix("### ").split(", ")
        return f"</section><section><h3>{title}<span>{time}</span></h3>"
    if block.startswith("#"):
        marks, title = text.split(" ", 1)
        return f"<h{len(marks)}>{title}</h{len(marks)}>"
    if block.startswith("!["):
        picture = folder / re.search(r"\((.*)\)", block)[1]
        data = base64.b64encode(picture.read_bytes()).decode()
        return f'<img alt="the loss" src="data:image/png;base64,{data}">'
    if block.startswith("- **"):
        tile = r"<div><b>\1</b><small>\2</small></div>"
        tiles = re.sub(r"(?m)^- \*\*(.*?)\*\*(.*)$", tile, text)
        return f"<div class=tiles>{tiles}</div>"
    if block.startswith("- "):
        items = re.sub("(?m)^- (.*)$", r"<li>\1</li>", text)
        return f"<ul>{items}</ul>"
    tag = "pre" if block.startswith("    ") else "p"
    return f"<{tag}>{text.strip()}</{tag}>"


def table_cell(cell):
    """Answers are coloured by their verdict, shares by their size."""
    share = re.fullmatch(r"([\d.]+)%", cell)
    if share:
        attributes = f' class=share style="--share:{share[1]}"'
    elif cell.startswith("✓"):
        attributes = " class=right"
    else:
        attributes = " class=wrong" if cell.startswith("✗") else ""
    return f"<td{attributes}>{html.escape(cell)}</td>"


def write_page(out, blocks):
    """Blocks, first the title -> OUT/report.md, and report.html, which needs nothing else."""
    body = "".join(as_html(block, out) for block in blocks).replace("</section>", "", 1)
    look = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width'>"
        f"<title>{html.escape(blocks[0].lstrip('# '))}</title><style>{look}</style>{body}</html>\n"
    )
    text = "\n\n".join(map(as_markdown, blocks)) + "\n"
    write_atomic(out / "report.md", lambda path: path.write_text(text, encoding="utf-8"))
    write_atomic(out / "report.html", lambda path: path.write_text(page, encoding="utf-8"))


def main():
    run = Path(Args(**parse_flags(Args, __doc__, positional=("run",))).run)
    out = Path(f"{run}-report")
    stages = read_stages(out / "stages")
    examined = [name for name in MODELS if (out / name / "answers.jsonl").is_file()]
    answers = {name: read_answers(out / name) for name in examined}
    write_page(out, list(road_blocks(run, stages, answers)))
    print(f"wrote    {out}/report.md, {out}/report.html")


if __name__ == "__main__":
    cli(main)
