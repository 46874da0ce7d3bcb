"""bench.py compare: rows find each other by what they are called, figures by their names."""

import asyncio
import json
import shlex
import sys
import weakref

import pytest
import torch
from conftest import ROOT

import bench
import kernels
from common import UserError
from model import Config
from peers.side_by_side import REQUESTS, Timing, measure, rows_of


def compare(tmp_path, capsys, a, b):
    for name, rows in (("a", a), ("b", b)):
        (tmp_path / name).write_text(
            json.dumps({"machine": {"cpu": "an abacus", "gpu": "", "cores": 2}, "rows": rows})
        )
    compared = bench.bench_compare(tmp_path / "a", tmp_path / "b")
    return bench.show_figures(compared), capsys.readouterr().out


def test_rows_are_matched_by_their_texts_and_not_by_their_place(tmp_path, capsys):
    a = [
        {"program": "int8", "rows": 1, "speed": 10.0},
        {"program": "int4", "rows": 1, "speed": 20.0},
    ]
    found, said = compare(tmp_path, capsys, a, [{**a[1], "speed": 19.5}, {**a[0], "speed": 12.0}])
    assert {row["row"]: row["ratio"] for row in found} == {"int8": 1.2, "int4": 0.975}
    assert [line.endswith("<") for line in said.splitlines() if "speed" in line] == [
        True,
        False,
    ]  # 20 % is marked, 2.5 is not


def test_rows_of_the_same_name_are_matched_in_their_order_and_a_lonely_one_is_named(
    tmp_path, capsys
):
    a = [
        {"format": "int8", "rows": 1, "speed": 1.5},
        {"format": "int8", "rows": 8, "speed": 3.5},
        {"format": "gone", "speed": 1.0},
    ]
    found, said = compare(tmp_path, capsys, a, [{**a[0], "speed": 3.0}, {**a[1], "speed": 7.0}])
    ratios = [(row["row"], row["figure"], row["ratio"]) for row in found if "ratio" in row]
    assert ratios == [("int8", "speed", 2), ("int8 (2)", "speed", 2)]
    assert "only in A" in said and "an abacus" in said


def test_a_parameter_of_a_measurement_is_a_flag():
    flags = bench.parse_command("decode M --formats int8 int4 --rounds 2".split())
    assert (flags["model"], flags["formats"], flags["rounds"]) == ("M", ["int8", "int4"], 2)
    assert flags["gguf"] == () and flags["json"] is None
    assert bench.parse_command("sass --rows 16 8".split())["rows"] == [16, 8]
    assert bench.parse_command("serve M --seqs 0".split())["seqs"] == 0
    with pytest.raises(UserError, match="invalid choice: 'decod'"):
        bench.parse_command(["decod"])
    with pytest.raises(UserError, match="unknown argument --rows"):
        bench.parse_command(["kernels", "--rows", "2"])


@pytest.mark.parametrize(
    "command,why",
    [
        ("sass --rows x", "--rows: x must be a whole number from 1"),
        ("decode M --rounds 0", "--rounds: 0 must be a whole number from 1"),
        ("pretrain --ways compile", "--ways compile: use eager, compiled or"),
        ("grpo M --steps 1", "use 2 or more"),
        ("throughput M --low 9 --high 3", "--low 9 is more than --high 3"),
        ("serve http://localhost:8000 --seqs 2", "--seqs is a setting of the server"),
        ("compare a b --json nowhere/c", "there is no folder nowhere"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is(monkeypatch, command, why):
    monkeypatch.setattr(sys, "argv", ["bench.py", *command.split()])
    with pytest.raises(UserError, match=why):
        bench.main()


def test_a_server_without_a_port_is_asked_at_port_80(monkeypatch):
    async def connect(loop, protocol, host, port):
        raise OSError(f"{host} {port}")

    monkeypatch.setattr(asyncio.BaseEventLoop, "create_connection", connect)
    with pytest.raises(OSError, match="localhost 80"):
        asyncio.run(bench.send_load("http://localhost", [{}], 1))


def test_groups_of_kernels_are_chosen_by_name():
    flags = bench.parse_command(["kernels", "--only", "linear"])
    assert flags["only"] == "linear"
    with pytest.raises(UserError, match="--only matmul: a part of one of these: linear, 1 row;"):
        next(bench.bench_kernels("matmul"))


def test_the_longest_loop_of_machine_code_is_found():
    code = """
Function:_product
--:-:-:Y:1	S2R R1, SR_TID.X;
LBB2:
--:-:-:Y:1	MOV R1, R2;
LBB0:
01:-:-:Y:4	FADD R1, R1, R2;
--:-:-:Y:5	@!P0 BRA LBB0;
--:-:-:Y:5	@P1 BRA LBB1;
--:-:-:Y:5	@P2 BRA LBB2;
LBB1:
--:-:-:Y:5	EXIT;

"""
    loop = bench.longest_loop(code)
    assert len(loop) == 5 and "MOV" in loop[0] and "LBB2" in loop[-1]


@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_the_kernels_between_products_compile_for_a_gpu(dtype):
    """Over caches of another type, too."""
    if kernels.triton is None or kernels.INTERPRET:
        pytest.skip("needs Triton as a compiler")
    how = dict(num_warps=4, num_stages=3)

    def compiled(kernel, names, numbers, **constants):
        pointers = dict.fromkeys(names.split(), dtype)
        if "slots" in pointers:
            pointers["slots"] = "i64"
        if "scales" in pointers:
            pointers |= dict(cache="i8", scales="fp32")
        return bench.machine_code(kernel, pointers, numbers, constants | how)

    eps = dict(eps="fp32")
    assert compiled(kernels._add_norm, "x y gain out", eps | dict(C="i32"), BLOCK=4096)
    assert compiled(kernels._swiglu, "h out", dict(M="i32"), BLOCK=1024)
    plain = "qkv slots q cache"
    numbers = eps | dict.fromkeys(("v_offset", "H", "KH", "D"), "i32")
    blocks = dict(BLOCK_H=8, BLOCK_D=128)
    for names in (plain, f"{plain} cos sin", f"{plain} gain cos sin scales"):
        assert compiled(kernels._store_heads, names, numbers, **blocks)
    config = kernels.attention_configs(4, 4)[0]
    for cached in ("fp16", "i16"):
        assert bench.attention_machine_code(cached, config, dtype)


@pytest.mark.slow
def test_loops_take_few_instructions_a_weight_or_a_cached_value():
    try:
        rows = list(bench.bench_sass([1]))
    except UserError as error:
        pytest.skip(str(error))
    over = [row for row in rows if row["per_value"] > row["goal"] or row["spilled"]]
    assert len(rows) == 16 and not over


def test_a_file_of_something_else_is_refused(tmp_path, capsys):
    (tmp_path / "a").write_text('{"rows": []}')
    with pytest.raises(UserError, match="--json"):
        list(bench.bench_compare(tmp_path / "a", tmp_path / "a"))


def test_the_json_says_what_it_was_measured_on(tmp_path, monkeypatch):
    rows = [{"format": "int8", "speed": 1.0}]
    monkeypatch.setitem(bench.MEASUREMENTS, "kernels", lambda: rows)
    monkeypatch.setattr(sys, "argv", ["bench.py", "kernels", "--json", str(tmp_path / "x.json")])
    bench.main()
    written = json.loads((tmp_path / "x.json").read_text())
    machine = written["machine"]
    assert written["rows"] == rows
    assert machine["cores"] >= 1 and machine["torch"].startswith("2.")
    assert machine["cpu"] and machine["platform"]


# -------------------------------------------------------------------------------- beside the peers
def speaking(program, code, **options):
    """A Timing of a program that is a line of Python; FILE is where its figures go."""
    return Timing(program, f"-c {shlex.quote(code)}", REQUESTS, **options)


def test_a_program_that_fails_says_why_and_the_next_one_is_timed(tmp_path):
    written = "import sys; open(sys.argv[-1], 'w').write('{\"rows\": %s}')"
    rows = '[{"program": "greedy", "tokens_per_s": %d}]'
    marked = tmp_path / "compiled"
    todo = [
        speaking("gpt-fast", "x", folder=""),
        speaking("nanoGPT", "x", folder=str(tmp_path)),
        speaking("broken", "raise SystemExit('no such card')"),
        speaking("ours", written % rows % 300, compile=f"-m zipfile -c {marked} {__file__}"),
        speaking("transformers", written % rows % 200),
    ]
    table, failed = measure(todo, 80, 1)
    assert list(rows_of(table)) == [
        {
            "work": "256 requests, greedy: tok/s",
            "ours": 300,
            "peer": "transformers",
            "theirs": 200,
            "ours_over_theirs": 1.5,
        }
    ]
    why = {program: reason for program, _, reason in failed}
    assert "not at hand" in why["gpt-fast"] and str(tmp_path) in why["nanoGPT"]
    assert "no such card" in why["broken"] and marked.exists()


def test_every_program_that_is_timed_beside_the_peers_can_be_started():
    flags = bench.parse_command(["gpu", "--dry", "--nanogpt", "a b"])
    assert flags.pop("command") == "gpu" and flags.pop("json") is None
    rows = list(bench.bench_gpu(**flags))
    assert len(rows) == 13 and any("'a b'" in row["command"] for row in rows)
    for row in rows:
        for command in filter(None, (row["command"], row["compiled_by"])):
            script, *words = shlex.split(command)
            if script == "bench.py":
                assert bench.parse_command(words)["command"] in bench.MEASUREMENTS
            elif script == "-m":
                assert (ROOT / f"{words[0].replace('.', '/')}.py").is_file()


def test_kernels_are_timed_on_a_gpu_only():
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="CUDA device, and here is none"):
            list(bench.bench_kernels())
        with pytest.raises(UserError, match="--dry"):
            list(bench.bench_gpu())


NANOGPT = """
from dataclasses import dataclass
import torch
from torch.nn import functional as F

@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        assert (config.n_layer, config.n_head, config.bias) == (1, 2, False)
        self.wte = torch.nn.Embedding(config.vocab_size, config.n_embd)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas)

    def forward(self, idx, targets=None):
        logits = self.wte(idx) @ self.wte.weight.T
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))
"""


def test_no_model_is_in_memory_while_the_next_is_measured(monkeypatch):
    alive = weakref.WeakSet()
    make = bench.our_program

    def watched(*how):
        assert not alive
        model, optimizer = make(*how)
        alive.add(model)
        return model, optimizer

    monkeypatch.setattr(bench, "our_program", watched)
    monkeypatch.setitem(bench.SHAPES, "qwen3", Config("qwen3", 512, 64, 64, 1, 2, 2, 32, 16))
    rows = list(bench.bench_pretrain(rows=1, passes=1, steps=1, ways=("eager", "recomputing")))
    assert sum("peak_mib" in row for row in rows) == 2


def test_pretraining_is_measured_beside_nanogpts_own_source(tmp_path, monkeypatch):
    (tmp_path / "model.py").write_text(NANOGPT)
    monkeypatch.setitem(bench.SHAPES, "gpt2", Config("gpt2", 512, 128, 512, 1, 2, 2, 64, 16))
    sizes = dict(rows=1, passes=2, steps=1, ways=("eager",))
    found = list(bench.bench_pretrain("gpt2", nanogpt=str(tmp_path), **sizes))
    steps = [(row["name"], row["passes"]) for row in found if "name" in row]
    assert steps == [(f"{who}, eager", n) for who in ("ours", "nanoGPT") for n in (1, 2)]
    assert all(row["tokens_per_s"] > 0 for row in found if "name" in row)
    shares = {row["operation"]: row["share"] for row in found if "operation" in row}
    assert "aten::mm" in shares and all(0 < share < 1 for share in shares.values())
    with pytest.raises(UserError, match="no model.py there"):
        list(bench.bench_pretrain("gpt2", nanogpt=str(tmp_path / "nowhere"), **sizes))
    with pytest.raises(UserError, match="the one that goes with --nanogpt"):
        list(bench.bench_pretrain("qwen3", nanogpt=str(tmp_path), **sizes))
