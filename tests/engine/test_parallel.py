"""A model divided among two ranks (gloo, CPU) answers as on one, refuses what cannot be divided,
and ends when a rank does."""

import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_scheduler import TEXT, CheckedEngine, make_model

from common import UserError
from engine.grammar import Constraint, Vocabulary, regex_grammar
from engine.sampler import Sampling
from generate import Engine
from model import Config, Transformer
from quant import quantize


# --------------------------------- what an engine is asked, in the tests' process and in the ranks'
def tiny_pool(engine):
    """Shared prefixes, chunked prefill, preemption, drafts, a constraint, and a request that is
    cancelled on its way."""
    rng = random.Random(1)
    start = [rng.randrange(4, len(TEXT)) for _ in range(9)]
    asked = [
        Sampling(max_tokens=14, temperature=0, ignore_eos=True, logprobs=2),
        Sampling(max_tokens=14, seed=3, n=2),
        Sampling(max_tokens=9, seed=4, top_p=0.9, repetition_penalty=1.3, ignore_eos=True),
        Sampling(
            max_tokens=8,
            constraint=Constraint(regex_grammar("(ab|cd)+e"), Vocabulary(engine.tok)),
            seed=5,
        ),
        Sampling(max_tokens=30, temperature=0, ignore_eos=True),
    ]
    for i, sampling in enumerate(asked):
        engine.submit(start + [4 + i] * 4, sampling, i)  # n answers share 3 of its 4 blocks
    got, steps = {}, 0
    while engine.has_work:
        steps += 1
        if steps == 12:
            engine.cancel(4)
        for d in engine.step():
            text, ids, _ = got.get(f"{d.request_id}.{d.index}", ("", [], None))
            got[f"{d.request_id}.{d.index}"] = [text + d.text, ids + d.token_ids, d.finish_reason]
    stats = engine.stats()
    assert stats["blocks_used"] == 0
    return got | {"counts": [stats["preemptions"], stats["cache_hit_tokens"]]}


def numbers(engine):
    """Log-probabilities out of the batch and of a prompt, and an embedding: bf16 kernels round
    parts and wholes differently."""
    ids = [4 + i % 20 for i in range(20)]
    first = engine.generate(
        [ids], Sampling(max_tokens=1, temperature=0, logprobs=4, ignore_eos=True)
    )[0].logprobs
    scored = sum(engine.read(ids, 3), [])
    return [x for t in first + scored[1:] for x in (t.logprob, *(v for _, v in t.top))] + sum(
        engine.read(ids), []
    )


def report(folder, what, **options):
    engine = CheckedEngine(
        folder,
        "cpu",
        "float32",
        block_size=4,
        max_seqs=3,
        step_tokens=7 if what == "tiny_pool" else 64,
        **options,
    )
    return engine, globals()[what](engine)


def rank_main(cases, out):
    """What each of the two ranks runs: all cases one after the other, each in a process group of
    its own."""
    results = {}
    for name, case in json.loads(Path(cases).read_text()).items():
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{out}.{name}",
            world_size=2,
            rank=int(os.environ["RANK"]),
            timeout=timedelta(seconds=120),  # a loaded machine starts the other rank late
        )
        torch.distributed.barrier()  # who is refused at once must not hang up on a handshake
        try:
            engine, results[name] = report(**case)
            engine.runner.everywhere("end")
        except UserError as error:
            results[name] = str(error)
            torch.distributed.destroy_process_group()
        except SystemExit:  # the first rank has ended this case
            pass
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    if os.environ["RANK"] == "0":
        Path(out).write_text(json.dumps(results))
    os._exit(0)


# ---------------------------------------------------------------------------------------- the tests
REFUSED = {
    "nf4": "self_attn.q_proj: NF4's blocks",
    "order": "self_attn.o_proj: GPTQ's act-order",
    "groups": "16 of 32 inputs for each of 2 ranks would cut a group of 24",
    "adapter": "merge them first",
    "heads": "2 ranks cannot share 3 heads, 1 key/value heads and 33 MLP channels evenly; "
    "--nproc-per-node can be 1",
}


def packed(folder, format, group=16, order=False, sym=True):
    model = Transformer.from_pretrained(make_model(folder, "llama", seed=5))
    quantize(model, format, group, sym)
    if order:
        model.quantization["desc_act"] = True
        for block in model.layers:
            block.self_attn.o_proj.order = torch.randperm(32)
    model.save_pretrained(folder)
    return folder


def environment(rank, port):
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONPATH": f"{ROOT}:{ROOT}/tests",
    }


def start(rank, port, *command):
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=environment(rank, port),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("models")
    pool = dict(what="tiny_pool", kv_tokens=40)
    cases = {
        "llama": pool
        | dict(
            folder=make_model(tmp / "llama", "llama", seed=2, tie_word_embeddings=False),
            kv_tokens=48,
        ),
        "qwen3": pool | dict(folder=make_model(tmp / "qwen3"), draft_tokens=4),
        "gpt2": pool | dict(folder=make_model(tmp / "gpt2", "gpt2", seed=3), kv_tokens=56),
        "float": dict(what="numbers", folder=tmp / "llama"),
        "int8": dict(what="numbers", folder=packed(tmp / "int8", "int8")),
        "int4": dict(what="numbers", folder=packed(tmp / "int4", "int4", sym=False)),
        "nf4": dict(what="numbers", folder=packed(tmp / "nf4", "nf4")),
        "order": dict(what="numbers", folder=packed(tmp / "order", "int4", order=True)),
        "groups": dict(what="numbers", folder=packed(tmp / "groups", "int4", 24)),
        "adapter": dict(what="numbers", folder=tmp / "llama", adapters={"a": "nowhere"}),
        "heads": dict(what="numbers", folder=tmp / "heads"),
    }
    Transformer(Config("llama", len(TEXT), 16, 33, 1, 3, 1, 8, 64)).save_pretrained(tmp / "heads")
    return {name: dict(case, folder=str(case["folder"])) for name, case in cases.items()}


@pytest.fixture(scope="module")
def on_one(cases):
    return {name: report(**case)[1] for name, case in cases.items() if name not in REFUSED}


@pytest.fixture(scope="module")
def on_two(cases, tmp_path_factory):
    tmp = tmp_path_factory.mktemp("ranks")
    (tmp / "cases.json").write_text(json.dumps(cases))
    ranks = [start(rank, 0, __file__, tmp / "cases.json", tmp / "out.json") for rank in (0, 1)]
    told = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert (tmp / "out.json").exists(), told
    return json.loads((tmp / "out.json").read_text())


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_two_ranks_answer_as_one(name, on_one, on_two):
    """Through prefix hits, preemption, sampling, n answers, a constraint, drafts and a cancelled
    request."""
    assert on_two[name] == on_one[name]
    assert all(map(sum, zip(*(case["counts"] for case in on_one.values() if "counts" in case))))


@pytest.mark.parametrize("name", ["float", "int8", "int4"])
def test_two_ranks_compute_what_one_does(name, on_one, on_two):
    expected = torch.tensor(on_one[name])
    assert len(expected) > 90
    assert torch.allclose(
        torch.tensor(on_two[name]), expected, atol=1e-4 if name == "float" else 0.02
    )


@pytest.mark.parametrize("name", REFUSED)
def test_what_ranks_cannot_share_is_refused_in_a_line(name, on_two):
    assert REFUSED[name] in on_two[name] and "\n" not in on_two[name]


def test_after_an_error_in_one_rank_nothing_more_is_computed(cases, monkeypatch):
    """The others may be in the middle of the order that failed."""
    engine = report(**cases["float"])[0]
    told = []
    monkeypatch.setattr(engine.runner, "orders", True)
    monkeypatch.setattr(
        "torch.distributed.broadcast_object_list", lambda *order: told.append(order)
    )
    engine.runner.everywhere("close_tuning")
    for _ in range(2):
        with pytest.raises((AttributeError, UserError)) as caught:
            engine.runner.everywhere("no_such_order")
    assert len(told) == 2 and "out of step" in str(caught.value)


def batch(tmp_path):
    """A model, the flags of a batch that takes long, and its answers so far."""
    make_model(tmp_path / "model")
    (tmp_path / "in.jsonl").write_text(
        "".join(json.dumps({"prompt": [4 + i % 26] * 5}) + "\n" for i in range(3000))
    )
    out = tmp_path / "out.jsonl"

    def answers(at_least, process):
        deadline = time.time() + 200
        while not out.exists() or len(out.read_bytes().splitlines()) < at_least:
            assert process.poll() is None and time.time() < deadline, process.communicate()
            time.sleep(0.02)
        return [
            json.loads(line) for line in out.read_text().splitlines(True) if line.endswith("\n")
        ]

    return [
        ROOT / "generate.py",
        tmp_path / "model",
        "--batch",
        tmp_path / "in.jsonl",
        "--out",
        out,
        "--device",
        "cpu",
        "--temperature",
        0,
        "--max-tokens",
        20,
        "--max-seqs",
        8,
        "--dtype",
        "float32",
    ], answers


@pytest.mark.parametrize("killed", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_dead_rank_ends_the_other_with_a_line(killed, tmp_path):
    command, answers = batch(tmp_path)
    ranks = [start(rank, 20000 + os.getpid() % 20000, *command) for rank in (0, 1)]
    answers(3, ranks[0])
    ranks[killed].kill()
    _, told = ranks[1 - killed].communicate(timeout=60)
    ranks[killed].communicate()
    lines = [line for line in told.splitlines() if line.startswith("error:")]
    assert (
        ranks[1 - killed].returncode == 3 and len(lines) == 1 and "lost another rank" in lines[0]
    ), told
    assert "Traceback" not in told


def test_torchrun_answers_as_one_rank_until_ctrl_c_ends_all(tmp_path):
    command, answers = batch(tmp_path)
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        *map(str, command),
    ]
    process = subprocess.Popen(
        launch,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    got = answers(4, process)
    os.killpg(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode != 0 and "error:" not in told and "lost another rank" not in told, (
        told
    )
    alone = Engine(tmp_path / "model", "cpu", "float32")
    for row in got[:4]:
        output = alone.generate(
            [4 + (row["line"] - 1) % 26] * 5, Sampling(max_tokens=20, temperature=0)
        )[0]
        assert row["answers"][0]["text"] == output.text


if __name__ == "__main__":
    rank_main(*sys.argv[1:])
