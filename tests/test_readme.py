"""README.md and docs/ do not lie: their commands run, defaults are the code's, what they name is
there.

The commands run as they are printed, in a folder of stand-ins: tiny texts and a hardly trained
model of 30,000 parameters under every name that the pages use. SHORT adds flags that make them
quick (the last of a flag counts). PARSED lists what is only parsed, as it needs a GPU, a peer or
an hour. A command of a program that is in neither fails: say here how to run it.
"""

import dataclasses
import importlib
import json
import random
import re
import shlex
import shutil
import string
import sys
from pathlib import Path
from unittest import mock

import pytest
from conftest import ROOT

PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
README = PAGES["README.md"]
EVERYTHING = "\n\n".join(PAGES.values())
PROGRAMS = ("python", "torchrun", "make", "curl", "docker", "bash", "pip", "git")
CALIBRATE = "--samples 2 --length 16 --held-out-rows 2 --device cpu"
SHORT = {  # the beginning of a command: flags added to it; the longest beginning counts
    "python train.py": "--steps 1 --layers 1 --dim 32 --heads 2 --batch 2 --sample 2 --overwrite"
    " --device cpu",
    "python train.py --preset 125m": "--fit --device cpu --batch 2 --layers 1 --overwrite",
    "python train.py eval": "--device cpu --context 64",
    "python tokenizer.py": "",
    "python tokenizer.py train": "--vocab-size 300 --processes 1 --out runs/made",
    "python chat.py": "",
    "python data.py": "",
    "python data.py mine": "--processes 1",
    "python data.py wikitext-103 --tokenizer": "--processes 1 --overwrite",
    "python data.py toybox": "--out data/made",
    "python finetune.py": "--steps 1 --context 64 --batch 2 --sample 0 --overwrite --device cpu",
    "python finetune.py eval": "--max-tokens 2 --examples 4 --device cpu",
    "python lora.py train": "--steps 1 --context 64 --batch 2 --sample 0 --overwrite --device cpu",
    "python lora.py merge": "--overwrite",
    "python dpo.py": "--steps 1 --context 64 --batch 2 --overwrite --device cpu",
    "python grpo.py": "--steps 1 --context 64 --max-tokens 8 --batch 2 --overwrite --device cpu",
    "python quant.py": f"{CALIBRATE} --group-size 32",
    "python -m formats.gguf": "",
    "python generate.py": "--max-tokens 4 --device cpu",
    "python serve.py": "--port 0 --device cpu",
    "python bench.py prefix": "--requests 2 --length 40",
}
PARSED = ("python bench.py", "torchrun")
BLANKS = {"N": "300", "MODEL": "runs/demo-dpo"}  # what a reader is to put in


# ------------------------------------------------------------------------------ what the pages say
def commands():
    """Every shell command in the pages' code blocks and in their inline code, once."""
    found = [command for page in PAGES.values() for command in commands_of(page)]
    return list(dict.fromkeys(found))


def commands_of(page):
    indented = re.findall(r"^(?:    .*\n)+", page, re.M)
    fenced = re.findall(r"^```(?:sh|bash)?\n(.*?)^```$", page, re.M | re.S)
    blocks = re.sub(r"\\\n\s*", "", "\n".join(indented + fenced))  # a backslash continues a line
    lines = [line.strip() for line in blocks.splitlines()]
    text = re.sub(r"^```.*?^```$", "", page, flags=re.M | re.S)
    inline = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]
    for line in lines + inline:
        match = re.fullmatch(rf"\$ (.*)|(?:[A-Z_]+=\S* )*((?:{'|'.join(PROGRAMS)}) .*)", line)
        if match:
            yield shlex.join(shlex.split(match[1] or match[2], comments=True))


def how(command):
    """The longest beginning in SHORT or PARSED, or None."""
    return max(
        (known for known in (*SHORT, *PARSED) if command.startswith(known)), key=len, default=None
    )


# ------------------------------------------------------------------------------------ the stand-ins
@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder in which the README's paths exist, small."""
    from training import toybox

    folder = tmp_path_factory.mktemp("readme")
    rng = random.Random(0)
    for name in ("data/wikitext-2", "data/wikitext-103", "runs", "mine", "more", "gpt2"):
        (folder / name).mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("LLM_DATA_DIR", raising=False)
        toybox.write_toybox("data/toybox", "", 30_000, 120, 40, 40)
        text = Path("data/toybox/text.txt").read_text()
        article = "".join(
            f" \n = Title {i} = \n \n {' '.join(rng.sample(text.split(), 60))} \n"
            for i in range(30)
        )
        for path in ("data/shakespeare.txt", "some.txt", "mine/a.txt", "FILE", "my.txt"):
            Path(path).write_text(text + string.printable)
        for path in [
            f"data/wikitext-{n}/{split}.txt"
            for n in (2, 103)
            for split in ("train", "valid", "test")
        ]:
            Path(path).write_text(article)
        Path("more/b.jsonl").write_text(
            "".join(json.dumps({"text": f"Line {i} of forty."}) + "\n" for i in range(40))
        )
        Path("chat.jsonl").write_text(Path("data/toybox/val.jsonl").read_text())
        Path("alpaca.json").write_text(
            json.dumps(
                [{"instruction": f"Say {i}", "input": "", "output": str(i)} for i in range(40)]
            )
        )
        Path("keys.txt").write_text("secret\n")
        for name, function in (("lenient", "contains"), ("mine", "judge")):
            Path(f"{name}.py").write_text(f"def {function}(question, answer): return len(answer)\n")
        Path("prompts.jsonl").write_text(json.dumps({"prompt": "Once"}) + "\n")
        run(
            "tokenizer.py",
            "train --data some.txt --vocab-size 400 --processes 1 --out runs/demo-tokenizer",
        )
        run("data.py", "wikitext-103 --tokenizer runs/demo-tokenizer --processes 1")
        run(
            "train.py",
            "--preset demo --layers 1 --dim 32 --mlp 64 --steps 1 --batch 2 --sample 0"
            " --device cpu",
        )
        quick = "--data data/toybox --steps 1 --context 64 --batch 2 --sample 0 --device cpu"
        run("finetune.py", f"runs/demo {quick} --out runs/demo-sft")
        run("lora.py", f"train runs/demo-sft {quick} --out runs/demo-lora")
        for name in ("runs/tokenizer", "runs/tokenizer-32k", "T"):
            shutil.copytree("runs/demo-tokenizer", name)
        shutil.copytree("runs/demo-lora", "runs/lora")
        copies = "demo-merged demo-dpo demo-int4 shakespeare-char 125m half half-grpo sft merged"
        for name in copies.split():  # any order of the commands is right
            shutil.copytree("runs/demo-sft", f"runs/{name}", ignore=shutil.ignore_patterns("state"))
        write_gpt2_tokenizer(Path("gpt2"))
    return folder


def write_gpt2_tokenizer(folder):
    """GPT-2's two files with a vocabulary of bytes and one merge."""
    from formats.vocab import BYTE_TO_CHAR

    vocab = [
        *BYTE_TO_CHAR.values(),
        BYTE_TO_CHAR[ord("t")] + BYTE_TO_CHAR[ord("h")],
        "<|endoftext|>",
    ]
    (folder / "encoder.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}))
    (folder / "vocab.bpe").write_text("#version: 0.2\nt h\n", encoding="utf-8")


def run(script, arguments):
    """A program in this process, as its command line would run it."""
    words = arguments if isinstance(arguments, list) else shlex.split(arguments)
    with mock.patch.object(sys, "argv", [script, *words]):
        importlib.import_module(script.removesuffix(".py")).main()


# ----------------------------------------------------------------------------------------- commands
@pytest.mark.parametrize("command", commands(), ids=lambda command: command[:90])
def test_command_of_the_readme_runs(command, workspace, monkeypatch, capsys):
    monkeypatch.chdir(workspace)
    monkeypatch.delenv("LLM_DATA_DIR", raising=False)
    words = [BLANKS.get(word, word) for word in shlex.split(command)]
    if words[0] == "make":
        assert all(
            re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)
            for target in words[1:]
            if "=" not in target
        )
    elif words[0] in (
        "bash",
        "pip",
        "docker",
    ):  # not run: the files are there, and a script mentions the flags
        files = [ROOT / word for word in words if Path(word).suffix in (".sh", ".txt", ".yaml")]
        assert all(file.is_file() for file in files) and (files or words[0] == "docker")
        assert words[0] != "bash" or all(
            flag in files[0].read_text() for flag in words[2:] if flag.startswith("-")
        )
        assert (
            words[0] != "docker"
            or (ROOT / ("compose.yaml" if "compose" in words else "Dockerfile")).is_file()
        )
    elif words[0] == "curl":
        ask(words)
    elif words[1:3] == ["-m", "pytest"]:
        assert all((ROOT / path).is_file() for path in words[3:] if path.startswith("tests/"))
    else:
        if words[0] == "torchrun" and "train.py" not in words:  # as the one rank would run it
            words = [
                "python",
                *words[next(i for i, word in enumerate(words) if word.endswith(".py")) :],
            ]
        beginning = how(shlex.join(words) if words[0] != shlex.split(command)[0] else command)
        assert beginning, f"tests/test_readme.py does not know how to run: {command}"
        if beginning in PARSED:
            parse(words, monkeypatch)
        else:
            if words[1] == "serve.py":
                monkeypatch.setattr("serve.Server.run", lambda self, sockets: sockets[0].close())
                monkeypatch.setattr("gc.freeze", lambda: None)  # for a process that only serves
                monkeypatch.setattr("serve.fork_front", lambda *_: None)
            program = words[2:] if words[1] == "-m" else words[1:]
            run(program[0], program[1:] + shlex.split(SHORT[beginning]))


def parse(words, monkeypatch):
    """Give a command's flags to its own parser, and go no further."""
    if words[0] == "torchrun":
        import train
        from training import loop

        at = words.index("train.py")
        loop.read_args(train.Args, "", train.PRESETS, argv=words[at + 1 :])
        return
    import bench

    bench.parse_command(words[2:])


def ask(words):
    """curl's request, to the server's application over the stand-in model."""
    from fastapi.testclient import TestClient

    import serve
    from generate import Engine

    url = next(word for word in words if "localhost" in word)
    body = json.loads(words[words.index("-d") + 1]) | {"max_tokens": 4}
    with TestClient(serve.create_app(Engine("runs/demo-dpo", device="cpu"))) as client:
        answer = client.post(url[url.index("/v1") :], json=body)
    assert answer.status_code == 200 and "data: [DONE]" in answer.text


def test_no_beginning_is_kept_that_the_readme_does_not_use():
    used = {how(command) for command in commands()}
    assert not {*SHORT, *PARSED} - used


def test_no_training_of_the_pages_meets_a_run_that_is_there():
    """`make demo` has made runs/demo...; a run that is there is not overwritten."""
    tuned = re.compile(r"python (finetune|lora|dpo|grpo)\.py (?!eval)\S+ .*--data")
    outs = [re.search(r"--out (\S+)|$", c)[1] for c in commands() if tuned.match(c)]
    assert len(outs) > 7 and len({*outs}) == len(outs) and None not in outs
    assert not [out for out in outs if out.startswith("runs/demo")]


@pytest.mark.parametrize("code", re.findall(r"^```python\n(.*?)^```$", EVERYTHING, re.M | re.S))
def test_python_of_the_readme_runs(code, workspace, monkeypatch):
    import torch

    import chat
    from model import Transformer
    from tokenizer import Tokenizer

    monkeypatch.chdir(workspace)
    folder = shutil.copytree("runs/demo", "again", dirs_exist_ok=True)
    names = dict(
        Transformer=Transformer,
        Tokenizer=Tokenizer,
        chat=chat,
        torch=torch,
        folder=folder,
        text="Once",
        messages=[{"role": "user", "content": "Hi"}],
    )
    exec(compile(re.sub(r"max_tokens=\d+", "max_tokens=2", code), "README.md", "exec"), names)


# ------------------------------------------------------------------------- what is said of the code
def test_defaults_of_the_readme_are_the_codes():
    table = re.search(r"^\| program \| its defaults.*?\n\n", README, re.M | re.S)[0]
    checked = 0
    for program, flags in re.findall(r"^\| `(\w+)\.py[^`]*` \| (.*?) \|$", table, re.M):
        module = importlib.import_module(program)
        fields = {f.name: f.default for f in dataclasses.fields(module.Args)}
        if "preset" in fields:
            fields |= module.PRESETS[fields["preset"]]
        for flag, value in re.findall(r"`--([\w-]+) ([^`]+)`", flags):
            default = fields[flag.replace("-", "_")]
            assert type(default)(value) == default, (
                f"{program}.py --{flag}: README {value}, code {default}"
            )
            checked += 1
    assert checked > 20
    rest = EVERYTHING.replace(table, "")
    elsewhere = re.search(r"\bby default\b|\bdefaults? (is|are|to|of)\b|\(default", rest)
    assert not elsewhere, f"{elsewhere[0]!r}: quote defaults in the table, which is checked"


def test_every_program_is_in_the_map_of_files_and_every_file_of_it_exists():
    table = re.search(r"^\| file \|.*?\n\n", README, re.M | re.S)[0]
    named = {
        name
        for row in table.strip().splitlines()[2:]
        for name in re.findall(r"`([^`]+)`", row.split("|")[1])
    }
    assert not [name for name in named if not (ROOT / name.rstrip("/")).exists()]
    assert {
        path.name for kind in ("py", "cpp", "html", "sh") for path in ROOT.glob(f"*.{kind}")
    } <= named


@pytest.mark.parametrize("page", PAGES)
def test_every_link_and_picture_exists(page):
    folder = (ROOT / page).parent
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", PAGES[page])
    assert targets
    assert not [t for t in targets if not t.startswith("http") and not (folder / t).exists()]
    headings = re.findall(r"^#+ (.*)$", PAGES[page], re.M)
    anchors = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in headings}
    assert not set(re.findall(r"\]\(#([^)]+)\)", PAGES[page])) - anchors


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs")])
def test_what_a_page_explains_is_in_the_code(page):
    """Names in code marks that look like a function's or a class's are defined in a file that
    the page links to."""
    text = re.sub(r"^```.*?^```$|^(?:    .*\n)+", "", PAGES[page], flags=re.M | re.S)
    named = set(re.findall(r"`([A-Z]\w+\.\w+|[a-z]+_\w+|[A-Z][a-z]\w+)`", text)) - NOT_OURS
    folder = (ROOT / page).parent
    linked = {folder / t for t in re.findall(r"\]\((\.\./[^)#]+)\)", text)}
    files = [f for f in linked if f.suffix in (".py", ".cpp")]
    code = "\n".join(f.read_text(encoding="utf-8") for f in files)
    missing = [name for name in named if not is_defined(name, code)]
    assert not missing, f"{page} names {', '.join(missing)}, which its files do not define"


NOT_OURS = {
    "Dockerfile",
    "Makefile",
    "apply_chat_template",
    "max_tokens",
    "top_token_ids",
    "addr_",
    "addmm_",
    "val_rewards",
}


def is_defined(name, code):
    outer, _, inner = name.rpartition(".")
    defined = re.search(rf"^ *(?:async def|def|class) {inner}\b|^{inner}\b.* =", code, re.M)
    return bool(defined) and (not outer or bool(re.search(rf"^class {outer}\b", code, re.M)))


@pytest.mark.parametrize("page", PAGES)
def test_pages_are_short_and_narrow(page):
    lines = [line for line in PAGES[page].splitlines() if not line.startswith("|")]
    assert not [line for line in lines if len(line) > 100]
    assert len(PAGES[page].splitlines()) <= 250 and len(PAGES[page].split()) <= 2500


def test_the_request_fields_are_the_servers():
    from server import api

    def row(name):
        (names,) = re.findall(rf"^\| {name} \| (.*) \|$", EVERYTHING, re.M)
        return set(re.findall(r"`(\w+)`", names))

    fields = {*api.ChatRequest.model_fields, *api.CompletionRequest.model_fields}
    assert row("applied") | row("applied, as in vLLM") == fields
    assert row("ignored") == api.IGNORED
    assert row("only at its default") == {*api.DEFAULTS}


def test_sizes_of_the_presets_are_as_said():
    from types import SimpleNamespace

    import torch

    import train
    from model import Transformer

    tok = SimpleNamespace(vocab_size=32_768, bos_id=None, eos_id=None)
    with torch.device("meta"):
        model = Transformer(train.model_config(train.Args(**train.PRESETS["125m"]), tok))
    assert f"{model.num_params():,}" in EVERYTHING
    settings = train.Args(**train.PRESETS["125m"])
    tokens = settings.batch * settings.context
    said = " ".join(EVERYTHING.split())
    assert f"A step is {settings.batch} rows = {tokens:,} tokens" in said
