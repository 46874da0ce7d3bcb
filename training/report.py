"""What demo.sh made: every stage's command, time, figures and curve, and the same questions after each stage, on one page.

    python -m training.report runs/demo        # reads runs/demo, runs/demo-sft, ... -> runs/demo-report/report.md, report.html

Only what lies in the folders is read, so a part of the road makes a report too. `write_report` also makes finetune.py's pages.
"""

import base64
import html
import json
import math
import re
import shlex
from collections import namedtuple
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from common import Metrics, UserError, cli, json_records, parse_flags, read_json, write_atomic
from training import toybox

MODELS = {
    "base": "only read",
    "sft": "fine-tuned",
    "lora": "LoRA",
    "dpo": "DPO",
    "int8": "int8",
    "int4": "int4",
}
SHOWN = (
    "reverse",
    "sort",
    "add",
    "fact",
    "speaker",
    "refuse",
    toybox.WITHHELD,
)  # of these the test's first question is shown
TRAINING = ("pretrain", "sft", "lora", "dpo")
ROWS = 40  # of a table in report.md; report.html has them all
MARK = {True: "✓ ", False: "✗ ", None: ""}  # in front of an answer; the page colours it


@dataclass
class Args:
    run: str = "runs/demo"  # what the names of the run's folders begin with


Stage = namedtuple(
    "Stage", "number seconds where why command name"
)  # a line that demo.sh left in RUN-report/stages/NAME
Answer = namedtuple(
    "Answer", "question expected family text right"
)  # one that `finetune.py eval` left in RUN-report/MODEL
Table = namedtuple("Table", "header rows")  # of texts


def read_answers(folder):
    return [
        Answer(
            row["messages"][-1]["content"],
            row["expected"],
            row["family"],
            *row["answers"].values(),
            *row["right"].values(),
        )
        for row in json_records(folder / "answers.jsonl")
    ]


def out_of(stage):
    words = shlex.split(stage.command)
    return Path(words[words.index("--out") + 1] if "--out" in words else "")


def clock(seconds):
    return str(timedelta(seconds=seconds)).removeprefix("0:").removeprefix("0")


def percent(values):
    """The share of those that are true, of those that are anything."""
    values = [value for value in values if value is not None]
    return f"{sum(values) / len(values):.1%}".replace(".0%", "%") if values else "–"


# ------------------------------------------------------------------------- what a stage left behind
def learned(folder):
    """Facts of a training run, from its weights and metrics."""
    for path in folder.glob("*model.safetensors"):
        with open(path, "rb") as file:  # the header alone
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        yield f"{sum(math.prod(tensor['shape']) for name, tensor in header.items() if name != '__metadata__'):,} parameters"
    rows = Metrics.read(folder / "metrics.jsonl")
    for name, what in {
        "loss": "loss",
        "val_loss": "held-out loss",
        "perplexity": "perplexity",
        "tokens_per_s": "",
        "val_rewards/accuracies": "preferred answer wins",
        "val_rewards/margins": "margin",
    }.items():
        if values := [row[name] for row in rows if row.get(name) is not None]:
            yield (
                f"{what} {values[0]:.3f} → {values[-1]:.3f}"
                if what
                else f"{sorted(values)[len(values) // 2]:,} tokens/s"
            )


def generated(path):
    """Facts of a file of answers, whose seconds count from the start of a command that may have been started again."""
    rows = list(json_records(path))
    total = sum(
        row["seconds"]
        for row, after in zip(rows, [*rows[1:], {"seconds": -1}])
        if after["seconds"] < row["seconds"]
    )
    tokens = sum(answer["tokens"] for row in rows for answer in row.get("answers", ()))
    return [
        f"{len(rows):,} answers, {tokens:,} tokens in {total:.1f} s: {tokens / max(total, 1e-3):,.0f} tokens/s"
    ]


def facts(stage, answers):
    """What a stage has to show for itself, by what lies where its --out says -> phrases."""
    out, found = out_of(stage), {}
    if out.name in answers:
        return [
            f"{percent(a.right for a in answers[out.name])} of {len(answers[out.name]):,} answers right"
        ]
    if stage.name in TRAINING and (out / "metrics.jsonl").is_file():
        return learned(out)
    if out.suffix == ".jsonl" and out.is_file():
        return generated(out)
    for path in (out, out / "quantization.json", out / "meta.json"):
        if path.is_file():
            found = read_json(path) if path.suffix == ".json" else {"bytes": path.stat().st_size}
    return [
        f"{name.replace('_', ' ')} {value:,.{0 if isinstance(value, int) else 4}f}"
        for name, value in (found | found.get("counts", {})).items()
        if type(value) in (int, float) and name != "seed"
    ]


def marks_table(run, answers):
    """What is right, by family of questions and model; then manners, and the perplexity of what was expected."""
    rows, families = (
        [],
        sorted(
            {a.family for a in [*answers.values()][-1]}, key=lambda f: (f == toybox.WITHHELD, f)
        ),
    )
    for what, wanted in [
        ("all that was taught", [f for f in families if f != toybox.WITHHELD]),
        *((f"{f}, by LoRA" if f == toybox.WITHHELD else f or "your own", [f]) for f in families),
    ]:
        asked = [[a.right for a in model if a.family in wanted] for model in answers.values()]
        rows.append([what, f"{len(asked[-1]):,}", *map(percent, asked)])
    rows.append(
        [
            "courteous",
            "",
            *(
                percent(toybox.style(a.text) for a in model if a.family)
                for model in answers.values()
            ),
        ]
    )
    evals = [
        Metrics.read(Path(f"{run}-report", name, "metrics.jsonl"))[-1]["eval"] for name in answers
    ]
    rows.append(["ends by itself", "", *(percent([row["ended by itself"]]) for row in evals)])
    rows.append(["perplexity", "", *(f"{row.get('perplexity', math.nan):,.2f}" for row in evals)])
    return Table(["", "questions", *(MODELS[name] for name in answers)], rows)


def answers_table(answers):
    """The test's first question of some families, and what each model says."""
    first = {a.family: a for a in reversed([*answers.values()][-1])}
    said = [
        {a.question: MARK[a.right] + a.text[:80] + " …" * (len(a.text) > 80) for a in model}
        for model in answers.values()
    ]
    return Table(
        ["asked", "expected", *(MODELS[name] for name in answers)],
        [
            [
                first[f].question,
                first[f].expected or "",
                *(model.get(first[f].question, "") for model in said),
            ]
            for f in (*SHOWN, "")
            if f in first
        ],
    )


def tiles(run, stages, answers):
    """The run in a few numbers -> lines of markdown."""
    yield f"- **{clock(sum(stage.seconds for stage in stages))}** for all of it, on {stages[-1].where}"
    for before, after, of, what in [
        (
            "base",
            "sft",
            lambda a: None if a.family == toybox.WITHHELD else a.right,
            "right of what fine-tuning taught",
        ),
        (
            "sft",
            "lora",
            lambda a: a.right if a.family == toybox.WITHHELD else None,
            "right of what only LoRA taught",
        ),
        (
            "lora",
            "dpo",
            lambda a: toybox.style(a.text) if a.family else None,
            "courteous, which DPO taught",
        ),
    ]:
        if {before, after} <= answers.keys():
            yield f"- **{percent(map(of, answers[before]))} → {percent(map(of, answers[after]))}** {what}"
    if (path := Path(f"{run}-int4/quantization.json")).is_file():
        size = read_json(path)
        yield f"- **{size['original_bytes'] / 1e6:,.1f} → {size['bytes'] / 1e6:,.1f} MB** in 4 bits"


def blocks_of(run, stages, answers):
    """All of the report -> blocks: texts in markdown, and Tables."""
    yield f"# From text to server: {run}"
    yield (
        f"A language model's life in {len(stages)} commands: why, how long, what came of each, and what the model answers "
        "after it."
    )
    yield "\n".join(tiles(run, stages, answers))
    if answers:
        yield "## The same questions after each stage"
        yield (
            "The test's first question of some families, however it was answered. No list or pair of numbers in it was "
            "practised."
        )
        yield answers_table(answers)
        yield from (
            "## Marks",
            "Held-out questions answered right; a checker solves each anew.",
            marks_table(run, answers),
        )
    yield "## The stages"
    for n, stage in enumerate(stages, 1):
        yield from (
            f"### {n} · {stage.name}, {clock(stage.seconds)}",
            stage.why,
            f"    {stage.command}",
        )
        if found := [f"- {fact}" for fact in facts(stage, answers)]:
            yield "\n".join(found)
        if stage.name in TRAINING and (out_of(stage) / "loss.png").is_file():
            yield f"![the loss](../{out_of(stage).name}/loss.png)"


# ----------------------------------------------------------------------------------------- the page
def as_markdown(block):
    """A block in markdown; newlines and bars stay inside their cell."""
    if isinstance(block, str):
        return block
    lines = [
        "| "
        + " | ".join(re.sub(r"\s*\n\s*", " ⏎ ", cell).replace("|", "\\|") for cell in cells)
        + " |"
        for cells in (block.header, ["---"] * len(block.header), *block.rows[:ROWS])
    ]
    more = len(block.rows) - ROWS
    return "\n".join(lines) + (f"\n\n{more:,} more in report.html" if more > 0 else "")


def as_html(block, folder):
    """A block in HTML, shown as the text it is: numbers in tiles, shares and answers coloured, pictures in the page itself."""
    if isinstance(block, Table):
        rows = [
            "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
            for cells in (block.header, *block.rows)
        ]
        page = "".join(f"<tr>{row}</tr>\n" for row in rows).replace("<td>✓", "<td class=right>✓")
        page = re.sub(r"<td>(([\d.]+)%)</td>", r'<td class=share style="--share:\2">\1</td>', page)
        return f"<div class=wide><table>{page.replace('<td>✗', '<td class=wrong>✗')}</table></div>"
    text = html.escape(block)
    if block.startswith("### "):
        return "</section><section><h3>{}<span>{}</span></h3>".format(*text[4:].split(", "))
    if block.startswith("#"):
        return "<h{0}>{1}</h{0}>".format(text.index(" "), text.lstrip("# "))
    if block.startswith("!["):
        picture = (folder / re.search(r"\((.*)\)", block)[1]).read_bytes()
        return (
            f'<img alt="the loss" src="data:image/png;base64,{base64.b64encode(picture).decode()}">'
        )
    if block.startswith("- **"):
        return (
            "<div class=tiles>"
            + re.sub(r"(?m)^- \*\*(.*?)\*\*(.*)$", r"<div><b>\1</b><small>\2</small></div>", text)
            + "</div>"
        )
    tag = "ul" if block.startswith("- ") else "pre" if block.startswith("    ") else "p"
    return f"<{tag}>" + re.sub("(?m)^- (.*)$", r"<li>\1</li>", text.strip()) + f"</{tag}>"


def write_report(out, blocks):
    """Blocks (markdown, first the title, and Tables) -> OUT/report.md, and OUT/report.html, a page that needs nothing else."""
    body = "".join(as_html(block, out) for block in blocks).replace("</section>", "", 1)
    style = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{html.escape(blocks[0].lstrip('# '))}</title><style>{style}</style>{body}</html>\n"
    )
    for name, text in (
        ("report.md", "\n\n".join(map(as_markdown, blocks)) + "\n"),
        ("report.html", page),
    ):
        write_atomic(out / name, lambda path: path.write_text(text, encoding="utf-8"))


def main():
    """Read the stages that are done, write the report."""
    run = Path(Args(**parse_flags(Args, __doc__, positional=("run",))).run)
    out = Path(f"{run}-report")
    lines = [
        (*path.read_text(encoding="utf-8").rstrip("\n").split("\t"), path.name)
        for path in (out / "stages").glob("*")
        if path.suffix != ".begun"
    ]
    if not lines:
        raise UserError(f"{out}/stages has no stage that is done: bash demo.sh makes them")
    stages = sorted(Stage(int(number), int(seconds), *rest) for number, seconds, *rest in lines)
    answers = {
        name: read_answers(out / name)
        for name in MODELS
        if (out / name / "answers.jsonl").is_file()
    }
    write_report(out, list(blocks_of(run, stages, answers)))
    print(f"wrote    {out}/report.md, {out}/report.html")


if __name__ == "__main__":
    cli(main)
