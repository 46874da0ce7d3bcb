"""bench.py compare: rows find each other by what they are called, figures by their names."""

import json
import sys

import pytest

import bench
from common import UserError


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
    with pytest.raises(UserError, match="invalid choice: 'decod'"):
        bench.parse_command(["decod"])
    with pytest.raises(UserError, match="unknown argument --rows"):
        bench.parse_command(["kernels", "--rows", "2"])


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
    assert (
        machine["cores"] >= 1
        and machine["cpu"]
        and machine["torch"].startswith("2.")
        and machine["platform"]
    )


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


def test_pretraining_is_measured_beside_nanogpts_own_source(tmp_path, capsys):
    (tmp_path / "model.py").write_text(NANOGPT)
    sizes = dict(rows=1, passes=2, steps=1, layers=1, dim=128, context=16, ways=("eager",))
    found = list(bench.bench_pretrain("gpt2", nanogpt=str(tmp_path), **sizes))
    steps = [(row["name"], row["passes"]) for row in found if "name" in row]
    assert steps == [(f"{who}, eager", n) for who in ("ours", "nanoGPT") for n in (1, 2)]
    assert all(row["tokens_per_s"] > 0 for row in found if "name" in row)
    kinds = {row["kind"] for row in found if "kind" in row}
    assert {"matrix products", "attention", "optimizer's lists"} <= kinds
    with pytest.raises(UserError, match="no model.py there"):
        list(bench.bench_pretrain("gpt2", nanogpt=str(tmp_path / "nowhere"), **sizes))
    with pytest.raises(UserError, match="the one that goes with --nanogpt"):
        list(bench.bench_pretrain("qwen3", nanogpt=str(tmp_path), **sizes))
