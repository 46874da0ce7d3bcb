"""The house: what lies at the root, who may import whom, one name for one thing, short
functions."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

BOTTOM = ("common", "runtime", "kernels")
NOUNS = ("model", "tokenizer", "chat", "data", "quant")
WINGS = ("training", "engine", "formats", "server")
STAGES = ("generate", "train", "finetune", "lora", "dpo", "grpo", "serve", "bench")
# the only imports inside of functions that lead upwards: (file, function) -> what it opens
DOORS = {
    ("model.py", "Transformer.from_pretrained"): {"formats.hub"},
    ("model.py", "Transformer.save_pretrained"): {"formats.hub"},
    ("tokenizer.py", "Tokenizer.load"): {"formats.vocab"},
    ("tokenizer.py", "Tokenizer.save"): {"formats.vocab"},
    ("tokenizer.py", "Tokenizer.train"): {"training.bpe"},
    ("chat.py", "pieces_of"): {"formats.templates"},
}


def sources():
    """{path from the root: its syntax tree} of every Python file but the tests'."""
    folders = [ROOT, *(ROOT / wing for wing in (*WINGS, "peers"))]
    files = [path for folder in folders for path in sorted(folder.glob("*.py"))]
    return {str(p.relative_to(ROOT)): ast.parse(p.read_text(encoding="utf-8")) for p in files}


SOURCES = sources()
MODULES = {path.removesuffix(".py").replace("/", ".") for path in SOURCES}


def imports(tree):
    """[(our module that is imported, the function that does it, "" at the top of the file)]"""
    found = []

    def visit(node, inside):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend((name.name, inside) for name in child.names)
            elif isinstance(child, ast.ImportFrom):
                for name in child.names:
                    deeper = f"{child.module}.{name.name}"
                    found.append((deeper if deeper in MODULES else child.module, inside))
            elif isinstance(child, ast.If) and "__main__" in ast.unparse(child.test):
                visit(child, "main")
            elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                visit(child, f"{inside}.{child.name}".lstrip("."))
            else:
                visit(child, inside)

    visit(tree, "")
    return [(module, inside) for module, inside in found if module in MODULES]


def allowed(path, module):
    """Whether the file at `path` may import `module` wherever it likes."""
    name = path.removesuffix(".py").replace("/", ".")
    room, target = name.split(".")[0], module.split(".")[0]
    if room == "peers":
        return True
    if room == "kernels":
        return module == "common"
    if room in BOTTOM:
        return target in BOTTOM[:2]
    if room in NOUNS:
        return target in (*BOTTOM, *NOUNS)
    if room == "server" and target == "engine":  # the server is what stands around the engine
        return True
    if room in WINGS:
        return target in (*BOTTOM, *NOUNS, room)
    if target in STAGES:
        return STAGES.index(target) < STAGES.index(room)
    return target != "peers"


def opens(path, inside, module):
    """Whether a function may import what its file may not: a door, a noun's command, bench's
    peers."""
    function = inside.split(".")[-1]
    command = function == "main" or function.endswith("_command")
    target = module.split(".")[0]
    if module in DOORS.get((path, inside), ()):
        return True
    if path.removesuffix(".py") in NOUNS and command:
        return target in WINGS or (path, module) == ("quant.py", "generate")
    return path == "bench.py" and bool(inside) and target == "peers"


def test_the_root_is_the_spine():
    files = {path.name for path in ROOT.glob("*.py")}
    assert files == {f"{name}.py" for name in (*BOTTOM, *NOUNS, *STAGES)}


def test_imports_point_down():
    wrong = [
        f"{path}{f' ({inside})' if inside else ''} imports {module}"
        for path, tree in SOURCES.items()
        for module, inside in imports(tree)
        if not allowed(path, module) and not (inside and opens(path, inside, module))
    ]
    assert not wrong, "\n".join(wrong)


def test_every_door_is_in_use():
    used = {
        (path, inside): module for path, tree in SOURCES.items() for module, inside in imports(tree)
    }
    assert not [door for door in DOORS if door not in used]


def test_there_is_no_circle():
    """Of what a file imports when it is itself imported; a door opens later."""
    below = {
        path.removesuffix(".py").replace("/", "."): {m for m, inside in imports(tree) if not inside}
        for path, tree in SOURCES.items()
    }
    while below:
        leaves = [name for name, needs in below.items() if not needs & below.keys()]
        assert leaves, f"a circle among {', '.join(sorted(below))}"
        for name in leaves:
            del below[name]


@pytest.mark.parametrize("script", ["train.py", "tokenizer.py", "data.py"])
def test_a_small_command_loads_neither_engine_nor_gguf_nor_server_nor_a_compiler(script):
    code = (
        "import sys, runpy; sys.argv = [sys.argv[1], '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print('LOADED', *sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, script], capture_output=True, text=True, cwd=ROOT, check=True
    )
    loaded = done.stdout.rpartition("LOADED")[2].split()
    unwanted = ("engine", "server", "formats.gguf", "generate", "serve", "peers")
    assert "common" in loaded
    assert not [name for name in loaded if name.startswith(unwanted) and name in MODULES]
    assert "torch._dynamo" not in loaded  # as long again as torch itself


def top_level(tree):
    """The names that a file defines at its top."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                yield from (n.id for n in ast.walk(target) if isinstance(n, ast.Name))


@pytest.mark.parametrize("path", ["quant.py", *(f"{name}.py" for name in STAGES)])
def test_a_command_that_computes_imports_common_before_torch(path):
    """It sets what libgomp reads when torch is loaded."""
    first = {}
    for place, node in enumerate(SOURCES[path].body):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module]
        for name in names:
            first.setdefault("torch" if name in MODULES - {"common"} else name, place)
    assert first["common"] < first["torch"]


def test_every_top_level_name_means_one_thing():
    owners = {}
    for path, tree in SOURCES.items():
        for name in set(top_level(tree)) - {"main", "Args"}:
            owners.setdefault(name, []).append(path)
    assert not {name: paths for name, paths in owners.items() if len(paths) > 1}


def test_no_function_is_longer_than_a_screen():
    tests = [path for folder in ("tests", "deploy") for path in (ROOT / folder).rglob("*.py")]
    trees = SOURCES | {str(p.relative_to(ROOT)): ast.parse(p.read_text()) for p in tests}
    long = {
        f"{path}: {node.name}": node.end_lineno - node.lineno + 1
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.end_lineno - node.lineno >= 60
    }
    assert not long


@pytest.mark.parametrize("file", ["engine/forward.cpp", "ui.html"])
def test_lines_have_a_hundred_columns(file):
    """Of what ruff does not read."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    assert not [n for n, line in enumerate(lines, 1) if len(line) > 100]
