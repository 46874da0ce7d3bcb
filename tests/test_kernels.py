"""Each Triton kernel against its torch twin: on a GPU, else the same code in Triton's interpreter.

Triton reads TRITON_INTERPRET when it is first imported, so without a GPU one test here runs this
file in a process of its own.
"""

import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import kernels as K
from quant import FrozenProduct

CUDA = torch.cuda.is_available()
RUNS = CUDA or K.INTERPRET
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = [torch.float32, torch.bfloat16] + [torch.float16] * CUDA
LIMITS = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
kernel = pytest.mark.skipif(not RUNS, reason="runs inside the test of all in the interpreter")
here = RUNS or not importlib.util.find_spec("triton")


@pytest.mark.skipif(here, reason="the kernels run right here, or Triton is missing")
def test_kernels_equal_their_twins_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout


@pytest.fixture(autouse=True)
def seeded(monkeypatch, tmp_path):
    """Fixed numbers, and no tuning: the first configuration serves (a test below runs them all)."""
    torch.manual_seed(0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(K, "milliseconds", lambda launch, config: 1.0)
    K.tuning_table.cache_clear()


def random(*shape, dtype=torch.float32):
    return torch.randn(shape).to(DEVICE, dtype)


def same(ours, twin, dtype=torch.float32, limit=1e-5 if CUDA else 2e-6):
    """Relative error of the whole tensor; NaN fails. (A GPU's exp and / are approximate.)"""
    error = (ours.double() - twin.double()).norm() / twin.double().norm().clamp(min=1e-12)
    assert ours.dtype == twin.dtype and ours.shape == twin.shape
    assert error < LIMITS.get(dtype, limit), error.item()


def int8(N, C):
    weight = torch.randint(1, 256, (N, C), dtype=torch.uint8, device=DEVICE)
    return K.Packed("int8", weight, random(N).abs(), N, C)


def int4(N, C, group, symmetric):
    groups = -(-C // group)
    packed = torch.randint(0, 256, (N, -(-C // 2)), dtype=torch.uint8, device=DEVICE)
    zeros = None
    if not symmetric:
        zeros = torch.randint(0, 16, (N, groups), device=DEVICE).float()
    return K.Packed("int4", packed, random(N, groups).abs() / 8, N, C, group, zeros)


def nf4(N, C, block):
    packed = torch.randint(0, 256, (N * C // 2,), dtype=torch.uint8, device=DEVICE)
    return K.Packed("nf4", packed, random(-(-N * C // block)).abs(), N, C, block)


def dequantize_twin(w, dtype):
    if w.pack == 1:
        return ((w.weight.float() - 128) * w.scales.float().view(-1, 1)).to(dtype)
    rows = 1 if w.format == "nf4" else w.N  # NF4's groups run on across the ends of rows
    group = torch.arange(w.N * w.K // rows, device=w.weight.device) // w.group  # of each column
    scales = w.scales.view(rows, -1)[:, group].float()  # (rows, G) -> (rows, columns)
    low = w.weight & 15
    high = w.weight >> 4
    zeros = 0
    if w.format == "nf4":
        values = K.nf4_table(low.device)[torch.stack((high, low), -1).long()]
    else:
        values = torch.stack((low, high), -1)
        zeros = 8.0 if w.zeros is None else w.zeros[:, group].float()
    values = values.view(rows, -1)[:, : len(group)]  # (bytes, 2) -> (rows, columns), even first
    return ((values - zeros) * scales).view(w.N, w.K).to(dtype)


def linear_twin(x, w, bias=None):
    y = x.double() @ dequantize_twin(w, torch.float64).T
    return (y if bias is None else y + bias).to(x.dtype)


# ------------------------------------------------------------------------------------ linear layers
@kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M,N,C", [(1, 7, 4097), (1, 64, 128), (3, 33, 100), (16, 40, 96)])
def test_int8_linear_equals_its_twin(M, N, C, dtype):
    args = random(M, C, dtype=dtype), int8(N, C), random(N)
    same(K.linear(*args), linear_twin(*args), dtype)


@kernel
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    "M,N,C,group", [(1, 5, 4097, 128), (1, 9, 100, 32), (2, 33, 100, 64), (17, 20, 256, 32)]
)
def test_int4_linear_equals_its_twin(M, N, C, group, symmetric):
    x = random(M, C)
    w = int4(N, C, group, symmetric)
    for bias in (None, random(N)):  # the offsets of the packed bytes cost four bits
        same(K.linear(x, w, bias), linear_twin(x, w, bias), limit=2e-5)


@kernel
def test_int4_linear_in_16_bits_equals_its_twin():
    for dtype in DTYPES[1:]:
        for M in (1, 4):
            args = random(M, 256, dtype=dtype), int4(12, 256, 64, False), random(12, dtype=dtype)
            same(K.linear(*args), linear_twin(*args), dtype)


@kernel
def test_many_rows_take_dequantized_weights():
    x = random(K.DEQUANTIZE_ABOVE + 1, 100)
    for args in ((x, int4(6, 100, 32, False)), (x, int8(6, 100), random(6))):
        same(K.linear(*args), linear_twin(*args))


@kernel
@pytest.mark.parametrize("M,N,C", [(1, 6, 256), (3, 10, 128)])
def test_nf4_forward_and_backward_equal_the_twin(M, N, C):
    x = random(M, C).requires_grad_()
    w = nf4(N, C, 64)
    bias = random(N)
    layer = SimpleNamespace(
        product=lambda x: K.linear(x, w, bias), dequantize=lambda dtype: K.dequantize(w, dtype)
    )
    ours = FrozenProduct.apply(x, layer)
    twin = linear_twin(x, w, bias)
    same(ours, twin)
    weigh = random(M, N)
    gradients = [torch.autograd.grad((y * weigh).sum(), x)[0] for y in (ours, twin)]
    same(*gradients)


@kernel
@pytest.mark.parametrize("N,C", [(6, 256), (10, 128), (6, 100), (5, 4098)])
def test_dequantized_weights_equal_the_twin(N, C):
    """Also where NF4's blocks run on across the ends of rows."""
    for w in (int8(N, C), int4(N, C, 64, True), int4(N, C, 20, False), nf4(N, C, 64)):
        same(K.dequantize(w, torch.float32), dequantize_twin(w, torch.float32))


@kernel
def test_groups_that_tiles_would_cross_are_left_to_torch():
    for w in (int4(4, 30, 15, True), int4(8, 60, 20, False), nf4(6, 100, 64)):
        assert K.linear(random(2, w.K), w) is None


# ---------------------------------------------------------------------------------- the paged cache
def zeros(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype, device=DEVICE)


def pages(lengths, page, KH, D, dtype, cache_dtype=None):
    """A cache whose pages are dealt out in random order, filled through kv_store.

    -> (caches, scales, block_tables)"""
    S = len(lengths)
    width = -(-max(lengths) // page) + 1
    tables = torch.randperm(S * width).view(S, width).int()
    caches = [zeros(S * width, page, KH, D, dtype=cache_dtype or dtype) for _ in range(2)]
    scales = [None, None]
    if cache_dtype:
        scales = [zeros(S * width, page, KH) for _ in range(2)]
    slots = []
    for table, length in zip(tables.long(), lengths):
        at = torch.arange(length)
        slots.append(table[at // page] * page + at % page)
    slots = torch.cat(slots).to(DEVICE)
    k, v = (random(len(slots), KH, D, dtype=dtype) for _ in range(2))
    K.kv_store(k, v, *caches, slots, *scales)
    wider = F.pad(tables, (0, 3), value=-1).to(DEVICE)
    return caches, scales, wider[:, :width]


def attend(rows, lengths, H, KH, D, page=16, window=None, dtype=torch.float32, cache_dtype=None):
    caches, scales, tables = pages(lengths, page, KH, D, dtype, cache_dtype)
    starts = torch.tensor([0, *rows], device=DEVICE).cumsum(0).int()
    q = random(sum(rows), H, D, dtype=dtype)
    lengths = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    args = q, *caches, tables, lengths, starts, D**-0.5, window, *scales
    same(K.paged_attention(*args), K.paged_attention_twin(*args), dtype)


@kernel
@pytest.mark.parametrize("cache_dtype", [None, torch.int8])
def test_kv_store_equals_its_twin_and_skips_slot_minus_one(cache_dtype):
    qkv = random(5, 3, 3, 24)
    slots = torch.tensor([3, -1, 17, 0, 9], device=DEVICE)
    results = []
    for store in (K.store_rows, K.store_rows_twin):
        tensors = [zeros(5, 4, 3, 24, dtype=cache_dtype or torch.float32)]
        tensors.append(zeros(5, 4, 3) if cache_dtype else None)
        store(qkv[:, 1], *tensors, slots)
        results.append([t.float() for t in tensors if t is not None])
    for ours, twin in zip(*results):
        assert (ours.flatten(0, 1)[slots[slots >= 0]] != 0).any()
        assert (ours - twin).abs().max() < 1e-6


@kernel
def test_decode_attention_equals_its_twin():
    attend([1, 1, 1], [1, 37, 16], H=4, KH=2, D=32)
    attend([1], [300], H=7, KH=1, D=40)  # grouped by 7, split, D not a power of two
    attend([1, 1], [5, 260], H=2, KH=2, D=16, window=100)


@kernel
def test_prefill_attention_equals_its_twin():
    attend([20, 1, 3], [20, 30, 10], H=4, KH=2, D=16)  # a whole prompt, decode, a later chunk
    attend([40], [90], H=2, KH=1, D=64, page=32, window=17)
    attend([0, 9], [8, 9], H=3, KH=3, D=16)  # a sequence without new tokens


@kernel
def test_attention_over_an_int8_cache_equals_its_twin():
    attend([1, 6], [200, 12], H=4, KH=2, D=32, cache_dtype=torch.int8)


@kernel
def test_attention_in_16_bits_equals_its_twin():
    for dtype in DTYPES[1:]:
        attend([1, 1], [150, 9], H=4, KH=2, D=32, dtype=dtype)
        attend([30], [30], H=4, KH=2, D=32, dtype=dtype)


@kernel
def test_an_empty_context_gives_zeros():
    q = random(1, 2, 16)
    cache = random(2, 4, 2, 16)
    ints = [torch.tensor(v, dtype=torch.int32, device=DEVICE) for v in ([[0, 1]], [0], [0, 1])]
    assert not K.paged_attention(q, cache, cache, *ints, 1.0).any()


# --------------------------------------------------------------------- what holds without a GPU too
def test_paged_attention_twin_equals_torch_attention():
    q, k, v = torch.randn(6, 4, 8), torch.randn(11, 2, 8), torch.randn(11, 2, 8)
    caches = [torch.zeros(3, 4, 2, 8) for _ in range(2)]
    tables = torch.tensor([[2, 0, 1]], dtype=torch.int32)
    at = torch.arange(11)
    K.kv_store(k, v, *caches, tables[0, at // 4].long() * 4 + at % 4)
    starts = torch.tensor([0, 6])
    ours = K.paged_attention_twin(q, *caches, tables, torch.tensor([11]), starts, 8**-0.5)
    heads_first = [t.transpose(0, 1)[None] for t in (q, k, v)]  # (T, H, D) -> (1, H, T, D)
    mask = at[5:, None] >= at
    theirs = F.scaled_dot_product_attention(*heads_first, attn_mask=mask, enable_gqa=True)
    assert torch.allclose(ours, theirs[0].transpose(0, 1), atol=1e-6)


@kernel
def test_every_configuration_computes_the_same(monkeypatch):
    def each(key, configs, launch, device):
        results = []
        for config in configs:
            try:
                results.append(launch(config))
            except K.triton.OutOfResources:  # tuning leaves such a one out
                print(f"{key}: no room for {config}")
        for result in results:
            same(result, results[0], limit=2e-5)
        return results[0]

    monkeypatch.setattr(K, "tuned", each)
    for M in (1, 3):
        x = random(M, 300)
        for w in (int4(9, 300, 64, False), int8(9, 300)):
            same(K.linear(x, w), linear_twin(x, w), limit=2e-5)
    attend([1, 1], [70, 9], H=4, KH=2, D=32)
    attend([70], [90], H=2, KH=1, D=16)


@pytest.fixture
def gpu_tuning(monkeypatch):
    """`tuned` as on a GPU: with tables on disk, outside a graph's capture."""
    monkeypatch.setattr(K, "INTERPRET", False)
    triton = SimpleNamespace(__version__="none", TritonError=RuntimeError)
    monkeypatch.setattr(K, "triton", K.triton or triton)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


CONFIGS = [dict(BLOCK=1), dict(BLOCK=2), dict(BLOCK=3)]


@pytest.fixture
def tried(gpu_tuning, monkeypatch):
    """The configurations that were timed; the second is the fastest."""
    times = {1: 3.0, 2: 1.0, 3: 2.0}
    tried = []

    def milliseconds(launch, config):
        tried.append(config)
        return times[config["BLOCK"]]

    monkeypatch.setattr(K, "milliseconds", milliseconds)
    return tried


def use_in_a_new_process(launch=lambda config: config["BLOCK"], closed=False):
    K.tuning_table.cache_clear()
    device = torch.device("cpu")
    K.tuning_table(device).closed = closed
    return K.tuned("some kernel", CONFIGS, launch, device)


def test_the_fastest_configuration_is_kept_on_disk(tried, tmp_path):
    assert use_in_a_new_process() == 2 and use_in_a_new_process() == 2
    assert tried == CONFIGS
    (file,) = (tmp_path / "llm-kernels").iterdir()
    assert json.loads(file.read_text()) == {"some kernel": {"BLOCK": 2}}


@pytest.mark.parametrize(
    "text,why", [("{broken", "not valid JSON"), ('{"some kernel": {"TILE": 7}}', "another version")]
)
def test_a_file_of_choices_that_cannot_be_used_costs_a_line(tried, tmp_path, capsys, text, why):
    use_in_a_new_process()
    (file,) = (tmp_path / "llm-kernels").iterdir()
    file.write_text(text)
    assert use_in_a_new_process() == 2 and tried == CONFIGS * 2
    (line,) = capsys.readouterr().err.splitlines()
    assert why in line and str(file) in line


def test_a_closed_table_takes_the_first_configuration_that_runs(tried, capsys):
    def launch(config):
        if config["BLOCK"] < room:
            raise K.triton.TritonError
        return config["BLOCK"]

    room = 2
    assert use_in_a_new_process(launch, closed=True) == 2
    room = 9
    assert use_in_a_new_process(launch, closed=True) is None
    assert "no configuration compiles" in capsys.readouterr().err and not tried


def test_a_card_without_room_says_so_and_the_twin_serves(gpu_tuning, monkeypatch, capsys):
    monkeypatch.setattr(K, "milliseconds", lambda launch, config: float("inf"))
    assert K.tuned("some kernel", [dict(BLOCK=1)], None, torch.device("cpu")) is None
    assert "some kernel: no configuration compiles" in capsys.readouterr().err


def test_a_triton_that_does_not_work_says_so_and_the_twins_serve(monkeypatch, capsys):
    def store_rows(*inputs):
        raise RuntimeError("Failed to find C compiler.\nand more")

    monkeypatch.setattr(K, "store_rows", store_rows)
    assert not K.compiles.__wrapped__(torch.device(DEVICE))
    assert capsys.readouterr().err.count("\n") == 1
