"""What demo.sh made: every stage's command, time, figures and curves, and the same questions after each stage, on one page.

    python report.py runs/demo        # reads runs/demo, runs/demo-sft, ... -> runs/demo-report/report.md, report.html

The page needs nothing beside itself. Only what lies in the folders is read, so a part of the road makes a report too.
"""
import html
import json
import math
import re
import shlex
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import toybox
from common import Metrics, UserError, cli, parse_flags, read_json, write_atomic

MODELS = {"base": "only read", "sft": "fine-tuned", "lora": "LoRA", "dpo": "DPO", "int8": "int8", "int4": "int4"}
SHOWN = ("reverse", "sort", "add", "fact", "speaker", "refuse", toybox.WITHHELD)  # of these the test's first question is shown
KINDS = {"text": "world corpus chats tokenizer shards", "learning": "pretrain sft lora dpo", "packing": "merge int8 int4 gguf",
         "asking": "perplexity eval-base eval-sft eval-lora eval-dpo eval-int8 eval-int4 batch ask"}


@dataclass
class Args:
    run: str = ""  # what the names of the run's folders begin with, as runs/demo
    out: str = ""  # the folder for the report [RUN-report]


class Stage(NamedTuple):
    """A line that demo.sh left in RUN-report/stages/NAME."""
    number: int
    seconds: int
    where: str      # "2 cores"
    why: str
    command: str
    name: str

    @property
    def out(self):
        words = ["--out", "", *shlex.split(self.command)]
        return Path(words[len(words) - words[::-1].index("--out")])

    @property
    def kind(self):
        return next((kind for kind, names in KINDS.items() if self.name in names.split()), "text")


class Marks(NamedTuple):
    """What one model made of the questions, from RUN-report/NAME, which `finetune.py eval` wrote."""
    answers: list      # of (question, expected, family, text, right or None)
    ended: float
    perplexity: float

    @classmethod
    def read(cls, folder):
        rows = map(json.loads, (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines())
        row = Metrics.read(folder / "metrics.jsonl")[-1]["eval"]
        return cls([(r["messages"][-1]["content"], r["expected"], r["family"], *r["answers"].values(), *r["right"].values())
                    for r in rows], row["ended by itself"], row.get("perplexity", math.nan))

    def share(self, *families, but=()):
        """Share of right answers, those to `families` (or all) only, and their number."""
        right = [r for _, _, f, _, r in self.answers if r is not None and f not in but and (f in families or not families)]
        return (sum(right) / len(right) if right else math.nan), len(right)

    def courteous(self):
        said = [toybox.style(text) for _, _, family, text, _ in self.answers if family in toybox.FAMILIES]
        return sum(said) / len(said) if said else math.nan


# ---------------------------------------------------------------------------------------------------- what a stage left behind
def clock(seconds):
    minutes = f"{seconds // 60 % 60:02d}:{seconds % 60:02d}"
    return f"{seconds // 3600}:{minutes}" if seconds >= 3600 else minutes.removeprefix("0")


def parameters(path):
    """How many numbers a safetensors file holds, from its header."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")


def learned(folder):
    """Facts of a training run, from its metrics and weights."""
    rows, facts = Metrics.read(folder / "metrics.jsonl"), []
    train, val = ([row for row in rows if row.get(key) is not None] for key in ("loss", "val_loss"))
    for name, what in (("model", ""), ("adapter_model", " in the adapter")):
        if (path := folder / f"{name}.safetensors").is_file():
            facts.append(f"{parameters(path):,} parameters{what}")
    if train:
        rate = statistics.median(row["tokens_per_s"] for row in train)
        facts.append(f"loss {train[0]['loss']:.2f} → {train[-1]['loss']:.2f} in {rows[-1]['step']:,} steps of {rate:,.0f} tokens/s")
    if val and "val_rewards/accuracies" in val[-1]:
        facts.append(f"the preferred of two held-out answers wins in {val[-1]['val_rewards/accuracies']:.1%}, by a margin of "
                     f"{val[-1]['val_rewards/margins']:.1f} where it was 0")
    elif val:
        facts.append(f"held-out loss {val[-1]['val_loss']:.3f}, perplexity {math.exp(val[-1]['val_loss']):.2f}")
    return facts


def generated(path):
    """Facts of a file of answers, whose seconds count from the start of a command that may have been started again."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    total = sum(row["seconds"] for row, after in zip(rows, [*rows[1:], {"seconds": -1}]) if after["seconds"] < row["seconds"])
    tokens = sum(answer["tokens"] for row in rows for answer in row.get("answers", ()))
    return [f"{len(rows):,} answers, {tokens:,} tokens in {total:.1f} s: {tokens / max(total, 1e-3):,.0f} tokens/s"]


def facts(stage, marks):
    """What a stage has to show for itself, by what lies where its --out says -> phrases."""
    out, here = stage.out, lambda name: (stage.out / name).is_file()
    if not out.exists():
        return []
    if out.suffix == ".jsonl":
        return generated(out)
    if out.suffix == ".json":
        return [f"{name.replace('_', ' ')} {value:,.3f}" for name, value in read_json(out).items() if isinstance(value, float)]
    if out.is_file():
        return [f"{out.stat().st_size / 1e6:,.2f} MB"]
    if here("quantization.json"):
        q = read_json(out / "quantization.json")
        return [f"{q['bytes'] / 1e6:,.2f} MB instead of {q['original_bytes'] / 1e6:,.2f}", "perplexity of its own text "
                f"{q['original_perplexity']:.4f} → {q['perplexity']:.4f}, KL {q['kl']:.5f}"]
    if out.name in marks:
        share, count = marks[out.name].share()
        return [f"{share:.1%} of {count:,} answers right", f"{marks[out.name].ended:.1%} end by themselves"]
    if stage.kind == "learning":
        return learned(out)
    if stage.name == "world":
        meta = read_json(out / "meta.json")
        return [f"{meta['text_bytes']:,} bytes of text", *(f"{n:,} {name}" for name, n in meta["counts"].items())]
    if stage.name == "tokenizer":
        return [f"{len(read_json(out / 'tokenizer.json')['model']['vocab']):,} symbols"]
    return []


# ------------------------------------------------------------------------------------------------------------ pictures, tables
def chart(title, series, width=430, height=170):
    """[(name, [(step, value)])] -> an SVG with axes; where positive values span much the vertical one is logarithmic."""
    values, end = [v for _, line in series for _, v in line], max(s for _, line in series for s, _ in line) or 1
    low, high, seen = min(values), max(values), []
    scale = math.log if 0 < 6 * low < high else float

    def at(step, value):
        y = (scale(high) - scale(value)) / ((scale(high) - scale(low)) or 1)
        return round(40 + (width - 130) * step / end, 1), round(20 + (height - 44) * y, 1)
    round_numbers = [0, *(sign * m * 10.0 ** e for e in range(6, -6, -1) for m in (5, 2, 1) for sign in (1, -1))]
    for tick in (t for t in round_numbers if low <= t <= high):
        if all(abs(at(0, tick)[1] - at(0, other)[1]) >= 14 for other in seen):
            seen.append(tick)
    marks = [f'<text x=40 y=10>{title}</text><text x={width - 90} y={height - 8} text-anchor=end>step {end:,}</text>']
    marks += [f'<line x1=40 x2={width - 90} y1={y} y2={y} /><text x=34 y={y} dy=".35em" text-anchor=end>{tick:g}</text>'
              for tick in seen for _, y in [at(0, tick)]]
    ends = [at(*line[-1])[1] for _, line in series]
    for n, (name, line) in enumerate(series):
        down = 0 if len(ends) < 2 or abs(ends[0] - ends[1]) > 14 else 6 if ends[n] == max(ends) and n or ends[n] > min(ends) else -6
        points = [at(*point) for point in line]
        marks.append(f'<polyline class=s{n} points="{" ".join(f"{x},{y}" for x, y in points)}" />'
                     f'<text class=s{n} x={width - 84} y={ends[n] + down} dy=".35em">{name} {line[-1][1]:.2f}</text>')
        marks += [f"<circle class=s{n} cx={x} cy={y} r=3 />" for x, y in points if len(line) < 20]
    return f'<svg viewBox="0 0 {width} {height}" role=img aria-label="{title}">{"".join(marks)}</svg>'


def charts(folder):
    """The curves of a training run -> SVGs."""
    rows = Metrics.read(folder / "metrics.jsonl")
    for title, names in (("loss, nats a token", {"training": "loss", "held out": "val_loss"}),
                         ("rewards of the answers", {"preferred": "rewards/chosen", "rejected": "rewards/rejected"})):
        lines = [(name, [(row["step"], row[key]) for row in rows if row.get(key) is not None]) for name, key in names.items()]
        if any(line for _, line in lines):
            yield chart(title, [(name, line) for name, line in lines if line])


def table(header, rows):
    """-> (markdown, HTML). A cell is a text or (text, "right", "wrong" or the share that colours it); all is shown as text."""
    rows = [[(cell, "") if isinstance(cell, str) else cell for cell in row] for row in rows]
    sign = {"right": "✓ ", "wrong": "✗ "}

    def line(cells):
        return "| " + " | ".join(re.sub(r"\s*\n\s*", " ⏎ ", cell).replace("|", "\\|") for cell in cells) + " |\n"

    def td(text, style):
        shade = f' class={style}' if style in sign else f' class=share style="--share:{style}"' if style else ""
        return f"<td{shade}>{sign.get(style, '')}{html.escape(text)}</td>"
    body = "".join(f"<tr>{''.join(td(*cell) for cell in row)}</tr>\n" for row in rows)
    return (line(header) + line(["---"] * len(header)) + "".join(line(sign.get(s, "") + t for t, s in row) for row in rows),
            f"<div class=wide><table><tr>{''.join(f'<th>{html.escape(h)}</th>' for h in header)}</tr>\n{body}</table></div>")


def marks_table(marks):
    """What is right, by family of questions and stage."""
    def percent(share):
        return ("–", "") if math.isnan(share) else (f"{share:.1%}".replace(".0%", "%"), f"{share:.3f}")
    most, held = list(marks.values())[-1], (toybox.WITHHELD,)
    families = sorted({family for _, _, family, _, _ in most.answers} - {*held})
    wanted = {"all it was taught": ((), held), **{f or "your own": ((f,), ()) for f in families},
              f"{held[0]}, which only LoRA saw": (held, ())}
    rows = [[what, f"{n:,}", *(percent(m.share(*of, but=but)[0]) for m in marks.values())]
            for what, (of, but) in wanted.items() if (n := most.share(*of, but=but)[1])]
    rows += [["courteous", "", *(percent(m.courteous()) for m in marks.values())],
             ["ends by itself", "", *(percent(m.ended) for m in marks.values())],
             ["perplexity of what was expected", "", *(f"{m.perplexity:,.2f}" for m in marks.values())]]
    return table(["", "questions", *(MODELS[name] for name in marks)], rows)


def answers_table(marks):
    """The test's first question of some families, and what each stage's model says."""
    first = {row[2]: row for row in reversed(list(marks.values())[-1].answers)}  # by family
    said = [{row[0]: row for row in model.answers} for model in marks.values()]

    def cell(question, *_):
        for rows in said:
            *_, text, right = rows.get(question, ("", None))
            text = re.sub(r"\s*\n\s*", " ⏎ ", text.strip())
            yield text[:80] + " …" * (len(text) > 80), {True: "right", False: "wrong", None: ""}[right]
    return table(["asked", "expected", *(MODELS[name] for name in marks)],
                 [[first[f][0], first[f][1] or "", *cell(*first[f])] for f in (*SHOWN, "") if f in first])


# ----------------------------------------------------------------------------------------------------------------- the page
def tiles(run, stages, marks):
    """The run in a few numbers -> [(number, what)]."""
    yield clock(sum(stage.seconds for stage in stages)), f"for all of it, on {stages[-1].where}"
    if (path := run / "model.safetensors").is_file():
        yield f"{parameters(path):,}", "parameters"
    if {"base", "sft"} <= marks.keys():
        before, after = (marks[name].share(but=(toybox.WITHHELD,)) for name in ("base", "sft"))
        yield f"{before[0]:.0%} → {after[0]:.1%}", f"of {after[1]:,} held-out questions right, by fine-tuning"
    if {"sft", "lora"} <= marks.keys():
        before, after = (marks[name].share(toybox.WITHHELD)[0] for name in ("sft", "lora"))
        yield f"{before:.0%} → {after:.0%}", "of a skill that only LoRA saw"
    if {"lora", "dpo"} <= marks.keys():
        yield f"{marks['lora'].courteous():.0%} → {marks['dpo'].courteous():.0%}", "of the answers courteous, by DPO"
    if (path := Path(f"{run}-int4/quantization.json")).is_file():
        q = read_json(path)
        yield f"{q['original_bytes'] / 1e6:,.1f} → {q['bytes'] / 1e6:,.1f} MB", "in 4 bits"


SECTIONS = [
    ("The same questions after each stage", "The test's first question of seven families, however it was answered. No list or pair of "
     "numbers in it was practised.", answers_table),
    ("Marks", "Held-out questions answered right; a checker solves each anew.", marks_table)]


def head(run, stages, marks):
    """Title, numbers and the strip of times -> (markdown, HTML)."""
    title, total, numbers = f"From text to server: {run}", sum(s.seconds for s in stages), list(tiles(run, stages, marks))
    boxes = "".join(f"<div><b>{number}</b><small>{what}</small></div>" for number, what in numbers)
    strip = "".join(f'<i class={s.kind} style="flex:{s.seconds}" title="{s.name} {clock(s.seconds)}">'
                    f'{s.name if s.seconds > .06 * total else ""}</i>' for s in stages if s.seconds)
    key = "".join(f"<i class={kind}></i>{kind} {clock(sum(s.seconds for s in stages if s.kind == kind))}" for kind in KINDS)
    return (f"# {title}\n\n" + "".join(f"- **{number}** {what}\n" for number, what in numbers),
            f"<title>{title}</title><h1>{title}</h1><p class=soft>A language model's life in {len(stages)} commands: why, how long, what "
            f"came of it, and what it answers after each.</p><div class=tiles>{boxes}</div><div class=time>{strip}</div>"
            f"<p class='key soft'>{key}</p>")


def card(n, stage, marks):
    """One stage -> (markdown, HTML)."""
    found, folder, title = facts(stage, marks), stage.out, f"{n} · {stage.name}"
    curves = list(charts(folder)) if stage.kind == "learning" and folder.exists() else []
    figure = f"<div>{''.join(curves)}</div>" if curves else ""
    picture = f"\n![loss](../{folder.name}/loss.png)\n" if curves and (folder / "loss.png").is_file() else ""
    return (f"\n### {title}, {clock(stage.seconds)}\n\n{stage.why}\n\n    {stage.command}\n\n"
            + "".join(f"- {fact}\n" for fact in found) + picture,
            f"<section class={stage.kind}><div><h3>{title}<span>{clock(stage.seconds)}</span></h3><p>{html.escape(stage.why)}</p><pre>"
            f"{html.escape(stage.command)}</pre><ul>{''.join(f'<li>{html.escape(fact)}</li>' for fact in found)}</ul></div>"
            f"{figure}</section>\n")


def render(run, stages, marks):
    """-> (markdown, HTML) of all of it."""
    parts = [head(run, stages, marks)]
    for heading, text, make in SECTIONS if marks else ():
        md, page = make(marks)
        parts.append((f"\n## {heading}\n\n{text}\n\n{md}", f"<h2>{heading}</h2><p class=soft>{text}</p>{page}"))
    parts += [("\n## The stages\n", "<h2>The stages</h2>"), *(card(n, stage, marks) for n, stage in enumerate(stages, 1))]
    md, page = map("".join, zip(*parts))
    style = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")
    return md, ("<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
                f"<style>{style}</style>{page}</html>\n")


def main():
    """Read the stages that are done, write the report."""
    args = Args(**parse_flags(Args, __doc__, positional=("run",)))
    if not args.run:
        raise UserError("which run? python report.py runs/demo")
    run, out = Path(args.run), Path(args.out or f"{args.run}-report")
    done = [path for path in Path(f"{run}-report/stages").glob("*") if path.suffix != ".begun"]
    if not done:
        raise UserError(f"{run}-report/stages has no stage that is done: bash demo.sh makes them")
    lines = [(*path.read_text(encoding="utf-8").rstrip("\n").split("\t"), path.name) for path in done]
    stages = sorted(Stage(int(number), int(seconds), *rest) for number, seconds, *rest in lines)
    folders = {name: Path(f"{run}-report", name) for name in MODELS}
    marks = {name: Marks.read(folder) for name, folder in folders.items() if (folder / "answers.jsonl").is_file()}
    out.mkdir(parents=True, exist_ok=True)
    for name, text in zip(("report.md", "report.html"), render(run, stages, marks)):
        write_atomic(out / name, lambda path, text=text: path.write_text(text, encoding="utf-8"))
    total = clock(sum(stage.seconds for stage in stages))
    print(f"wrote    {out}/report.md, {out}/report.html: {len(stages)} stages, {total} on {stages[-1].where}")


if __name__ == "__main__":
    cli(main)
