"""native.py, forward.cpp: one call says what model.py's forward says, whatever shares the batch,
in every weight format."""

import copy
import os
import platform
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import lora
import quant
from common import UserError
from engine import native
from engine.runner import StepBatch
from engine.sampler import Sampling
from generate import Engine
from model import Config, Transformer
from quant import GroupLinear

V = 50  # not a multiple of any vector's lanes


def tiny(kind="qwen3", C=32, H=4, K=2, D=16, M=48, layers=2, **options):
    torch.manual_seed(1)
    model = Transformer(
        Config(kind, V, C, M, layers, H, K, D, 96, qkv_bias=kind in ("qwen2", "gpt2"), **options)
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=0.3).add_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return model.eval()


def cpp(model, kind=None, dtype=torch.float32, blocks=40):
    made = native.Native(model, kind)
    made.allocate(blocks, dtype)
    return made


@torch.inference_mode()
def both(model, kind=None, dtype=torch.float32, twin=None):
    """-> logits of C++ over a prompt, then a token at a time, beside another sequence; and the
    model's (or twin's) own."""
    torch.manual_seed(2)
    run, a, b, got = (
        cpp(model, kind, dtype),
        torch.randint(V, (70,)).tolist(),
        torch.randint(V, (37,)).tolist(),
        [],
    )
    batch = StepBatch()
    batch.add([3, 9, 1], a[:41], 0, range(41))
    batch.add([7, 2, 30], b, 0, [])
    got.append(run(batch))
    for i in range(41, 70):
        batch = StepBatch()
        batch.add([7, 2, 30], b[-1:], 36, [])
        batch.add([3, 9, 1, 11, 5], [a[i]], i, [0])
        got.append(run(batch))
    return torch.cat(got), (twin or model)(torch.tensor([a]))[0]


@pytest.fixture(params=["avx512-vnni", "avx2", "plain"])
def each_level(request, monkeypatch):
    """The same source for three kinds of machine, as far as this one can run them."""
    names = list(native.LEVELS)
    if names.index(request.param) < names.index(native.level()) or (
        request.param != "plain" and platform.machine() != "x86_64"
    ):
        pytest.skip(f"this machine is only {native.level()}")
    monkeypatch.setattr(native, "level", lambda: request.param)
    native.library.cache_clear()
    yield request.param
    native.library.cache_clear()


@pytest.mark.parametrize(
    "options",
    [
        dict(kind="llama"),
        dict(kind="qwen2"),
        dict(kind="qwen3", H=6, K=2),
        dict(kind="mistral", sliding_window=20, sliding_layers=(0,)),
        dict(kind="gpt2", K=4, M=64, rope={}, out_bias=True, mlp_bias=True),
        dict(kind="llama", H=2, K=2, D=48, C=16, tie_word_embeddings=True),
        dict(kind="llama", H=5, K=1, D=128, M=16),
    ],
)
def test_every_shape_equals_the_model(options):
    got, expected = both(tiny(**options))
    assert torch.allclose(got, expected, atol=2e-5 * expected.abs().max(), rtol=0)


def test_every_kind_of_machine_gives_the_models_numbers(each_level):
    got, expected = both(tiny())
    assert torch.allclose(got, expected, atol=2e-5 * expected.abs().max(), rtol=0)


def quantized(model, make):
    """The model with each linear layer replaced, and the one in floats that those layers stand
    for."""
    small, twin = copy.deepcopy(model), copy.deepcopy(model)
    for name, m in list(model.named_modules()):
        if isinstance(m, torch.nn.Linear):
            layer = make(m)
            small.set_submodule(name, layer)
            twin.get_submodule(name).weight = torch.nn.Parameter(layer.dequantize(), False)
    return small, twin


def shuffled(m, bits, group, sym):
    """As GPTQ with act-order leaves it: columns in another order."""
    order = torch.randperm(m.weight.size(1))
    codes, scales, zeros = quant.round_to_nearest(m.weight[:, order], bits, group, sym)
    return GroupLinear(codes, scales, zeros, bits, group, order, m.bias)


@pytest.mark.parametrize(
    "make",
    [
        lambda m: GroupLinear.from_linear(m, 8, -1),
        lambda m: GroupLinear.from_linear(m, 4, 16),
        lambda m: GroupLinear.from_linear(m, 4, 16, sym=False),
        lambda m: GroupLinear.from_linear(m, 4, -1),
        lambda m: shuffled(m, 4, 32, False),
        lambda m: shuffled(m, 8, 16, True),
        lambda m: GroupLinear.from_linear(m, 3, 32),
    ],
    ids=["int8", "int4", "asymmetric", "rows", "act-order", "8 bits", "3 bits"],
)
def test_packed_layers_compute_what_they_stand_for(each_level, make):
    """Rounding activations to 8 bits a group costs about a percent; a wrong order, zero or scale
    would cost everything."""
    model = tiny(C=48, M=80, layers=1)
    small, twin = quantized(model, make)
    got, expected = both(small, twin=twin)
    assert (got - expected).norm() < 0.03 * expected.norm()


def test_an_input_that_is_exact_in_8_bits_is_multiplied_exactly(each_level):
    """No rounding is left then: the product is the float64 one of the weights that the codes
    stand for."""
    head = torch.nn.Linear(64, V, bias=True)
    for layer in (
        GroupLinear.from_linear(head, 8, -1),
        GroupLinear.from_linear(head, 4, 32, sym=False),
        shuffled(head, 4, 32, False),
    ):
        model = tiny(C=64, layers=0)
        model.lm_head = layer
        with (
            torch.no_grad()
        ):  # an embedding of +-1 has norm sqrt(C), so the final norm leaves it as it is
            model.embed_tokens.weight.copy_(torch.randint(0, 2, (V, 64)) * 2 - 1.0)
            model.norm.weight.fill_(1)
        batch = StepBatch()
        batch.add([0, 1, 2], list(range(40)), 0, range(40))
        got = cpp(model)(batch)
        expected = (
            model.embed_tokens.weight[:40].double() @ layer.dequantize().double().T
            + head.bias.double()
        )
        assert torch.allclose(got.double(), expected, atol=1e-5)


@pytest.mark.parametrize("kind", [None, "16", "int8", "int4"])
def test_no_logit_depends_on_the_rest_of_the_batch(kind):
    """Bit for bit: a prompt in one piece, in chunks, a token at a time, alone and among eleven
    others."""
    model, ids = (
        tiny("mistral", sliding_window=20, sliding_layers=(0,)),
        torch.randint(V, (60,)).tolist(),
    )
    others = [torch.randint(V, (n,)).tolist() for n in (1, 2, 3, 4, 5, 8, 13, 1, 1, 1, 1)]

    def run(cuts, company=()):
        made, got = cpp(model, kind, torch.float16 if kind else torch.float32, 60), []
        for begin, end in zip((0, *cuts), (*cuts, 60)):
            batch = StepBatch()
            for i, other in enumerate(company):
                batch.add([10 + i], other, 0, [0])
            batch.add([3, 9, 1, 4], ids[begin:end], begin, range(end - begin))
            got.append(made(batch)[len(company) :])
        return torch.cat(got)

    whole = run([])
    assert (
        torch.equal(whole, run([16, 17, 40]))
        and torch.equal(whole, run(range(1, 60)))
        and torch.equal(whole, run([33], others))
    )


def test_adapters_of_every_kind_share_a_batch(tmp_path):
    """LoRA and rsLoRA of different ranks on different layers, beside none: each as if alone."""
    base, prompt = tiny(), list(range(30))
    base.save_pretrained(tmp_path / "base")
    names = {}
    for i, (r, targets, kind) in enumerate(
        ((2, "all", {}), (5, "attn", dict(rslora=True)), (3, "mlp,lm_head", {}))
    ):
        model = Transformer.from_pretrained(tmp_path / "base")
        lora.apply(model, r, 8, targets, **kind)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith(".B"):
                    p.normal_(std=0.3)
        names[f"a{i}"] = tmp_path / f"a{i}"
        lora.save_adapter(model, names[f"a{i}"])
    for kind in (None, "int8"):
        engine = Engine(tmp_path / "base", "cpu", "float32", kind, adapters=names)
        assert engine.runner.native
        batch, blocks = StepBatch(), iter(range(100))
        for row in (-1, 0, 1, 2):
            batch.add([next(blocks), next(blocks)], prompt, 0, [29], row)
        with torch.inference_mode():
            engine.runner.allocate(40)
            got = engine.runner(batch)
            for row, name in zip(got, (None, *names)):
                model = Transformer.from_pretrained(tmp_path / "base")
                if name:
                    lora.load_adapter(model, names[name])
                expected = model(torch.tensor([prompt]))[0, -1]
                assert (row - expected).norm() < (0.05 if quant else 1e-5) * expected.norm()
        assert len({tuple(row.topk(3).indices.tolist()) for row in got}) > 1


def test_a_float16_cache_stays_close():
    got, expected = both(tiny(), dtype=torch.float16)
    assert 0 < (got - expected).norm() < 2e-3 * expected.norm()


def test_what_it_does_not_do_is_said_and_done_by_torch(tmp_path, capsys, monkeypatch):
    for problem, model, options in (
        ("heads of 8", tiny(D=8), {}),
        ("a width of 40", tiny(C=40), {}),
        ("blocks of 8", tiny(), dict(block_size=8)),
        ("int8", tiny(), dict(kv_dtype="int8")),
    ):
        model.save_pretrained(tmp_path / problem)
        engine = Engine(tmp_path / problem, "cpu", **options)
        said = capsys.readouterr().out
        assert "forward  torch: forward.cpp does not do" in said and problem in said
        assert (
            len(engine.generate([1, 2, 3], Sampling(max_tokens=4, ignore_eos=True))[0].token_ids)
            == 4
        )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "false")
    native.library.cache_clear()
    tiny().save_pretrained(tmp_path / "fine")
    assert not Engine(tmp_path / "fine", "cpu").runner.native
    assert "false could not compile forward.cpp" in capsys.readouterr().out
    native.library.cache_clear()


def test_a_library_that_does_not_load_is_named_and_torch_does_it(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "library_path", lambda *_: tmp_path / "forward.so")
    (tmp_path / "forward.so").write_bytes(b"")
    native.library.cache_clear()
    with pytest.raises(native.Unavailable, match="forward.so does not load .*delete it"):
        native.library()
    native.library.cache_clear()


@pytest.mark.parametrize("shared", ["file", "folder"])
def test_a_library_that_others_could_have_put_there_is_not_loaded(shared, tmp_path, monkeypatch):
    path = tmp_path / "cache" / "forward.so"
    monkeypatch.setattr(native, "library_path", lambda *_: path)
    monkeypatch.setattr(native.ctypes, "CDLL", lambda path: pytest.fail("it was loaded"))
    path.parent.mkdir()
    path.touch()
    (path if shared == "file" else path.parent).chmod(0o777)
    native.library.cache_clear()
    with pytest.raises(native.Unavailable, match=r"others may write to it \(mode 777\)"):
        native.library()
    native.library.cache_clear()


def test_a_library_of_another_user_is_not_loaded(tmp_path, monkeypatch):
    (tmp_path / "forward.so").touch()
    native.check_owner(tmp_path / "forward.so")
    monkeypatch.setattr(native.os, "getuid", lambda: 12345)
    monkeypatch.setattr(native, "ROOT_ID", 54321)
    with pytest.raises(native.Unavailable, match="is another user's"):
        native.check_owner(tmp_path / "forward.so")


def test_a_library_is_the_users_alone_whatever_the_umask(tmp_path, monkeypatch):
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\nfor last; do :; done\necho > "$last"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    before = os.umask(0o002)
    try:
        native.compile_to(tmp_path / "cache" / "forward.so", "plain")
    finally:
        os.umask(before)
    native.check_owner(tmp_path / "cache" / "forward.so")


def test_what_a_compiler_calls_an_error_is_said(tmp_path, monkeypatch):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho In file included >&2\necho a.h: error: no >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(native.Unavailable, match="could not compile .*'a.h: error: no'"):
        native.compile_to(tmp_path / "forward.so", "plain")


def test_another_compiler_makes_another_library_but_an_image_has_one(tmp_path, monkeypatch):
    for folder, same in ((None, False), (tmp_path, True)):
        monkeypatch.delenv("CXX", raising=False)
        path = native.library_path("plain", folder)
        monkeypatch.setenv("CXX", "clang++")
        assert (native.library_path("plain", folder) == path) == same


def test_sums_that_could_overflow_are_left_to_torch():
    one = torch.ones(1, 1)
    wide = GroupLinear(torch.full((1, 66_312), 128, dtype=torch.uint8), one, 128 * one, 8, -1)
    model = tiny(layers=0)
    model.lm_head = wide
    with pytest.raises(native.Unavailable, match="66,312 inputs with one scale"):
        native.Native(model)
    assert wide.product(torch.ones(1, 66_312)).tolist() == [[0.0]]


def test_compiling_for_an_image_needs_a_folder(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("sys.argv", ["native.py"])
    with pytest.raises(UserError, match="--out"):
        native.main()
    monkeypatch.setattr(native, "LEVELS", {"plain": ""})
    monkeypatch.setattr("sys.argv", ["native.py", "--out", str(tmp_path)])
    native.main()
    assert [str(p) for p in tmp_path.iterdir()] == capsys.readouterr().out.split()


def test_teams_of_different_sizes_take_turns():
    """Threads that sat out a round do not run it later, and results do not depend on how many
    there are."""
    runs = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3, 2, 5):
            torch.set_num_threads(threads)
            runs.append(cpp(tiny(), "int8"))
    finally:
        torch.set_num_threads(before)
    got = []
    for i in range(400):
        batch = StepBatch()
        batch.add([0, 1], list(range(20)), 0, [19])
        got.append(runs[i * 7 % 4](batch))
    assert all(torch.equal(got[0], other) for other in got)


LOADING = """
import re
import sys
from pathlib import Path
from generate import Engine


def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024


Engine(sys.argv[1] + "/small", "cpu", "float32", "int8", kv_tokens=64)  # what the first one loads
Path("/proc/self/clear_refs").write_text("5")  # the peak falls to what is held now
before = peak()
engine = Engine(sys.argv[1] + "/large", "cpu", "float32", "int8", kv_tokens=64)
print("peak", peak() - before, engine.runner.forward.weight_bytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_model_that_is_packed_while_it_is_loaded_is_never_there_twice(tmp_path):
    for name, layers, width in (("small", 1, 64), ("large", 40, 256)):
        config = Config("llama", 2048, width, 4 * width, layers, width // 64, 1, 64, 64)
        Transformer(config).to(torch.bfloat16).save_pretrained(tmp_path / name)
    command = [sys.executable, "-c", LOADING, tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    peak, packed = map(int, done.stdout.split()[-2:])
    assert peak < 1.3 * packed + 2**24  # of a 1B shape: 1.1
