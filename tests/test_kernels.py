"""Each Triton kernel against its torch twin: the real kernels on a GPU, else the same code in Triton's interpreter.

Triton reads TRITON_INTERPRET when it is first imported, so without a GPU one test here runs this file in a process of its own.
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

RUNS = torch.cuda.is_available() or K.INTERPRET
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (
    [torch.float32, torch.bfloat16, torch.float16]
    if torch.cuda.is_available()
    else [torch.float32, torch.bfloat16]
)
kernel = pytest.mark.skipif(
    not RUNS, reason="runs inside test_kernels_equal_their_twins_in_the_interpreter"
)


@pytest.mark.skipif(
    RUNS or not importlib.util.find_spec("triton"),
    reason="the kernels run right here, or Triton is missing",
)
def test_kernels_equal_their_twins_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stdout


@pytest.fixture(autouse=True)
def seeded(monkeypatch, tmp_path):
    """Fixed numbers, and no tuning: the first configuration serves (a test below runs all of them)."""
    torch.manual_seed(0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(K, "milliseconds", lambda launch, config: 1.0)
    K.tuning_table.cache_clear()


def random(*shape, dtype=torch.float32):
    return torch.randn(shape).to(DEVICE, dtype)


def same(
    ours, twin, dtype=torch.float32, limit=1e-5 if DEVICE == "cuda" else 2e-6
):  # a GPU's exp and / are approximate
    """Relative error of the whole tensor; NaN fails."""
    error = (ours.double() - twin.double()).norm() / twin.double().norm().clamp(min=1e-12)
    assert ours.dtype == twin.dtype and ours.shape == twin.shape
    assert error < {torch.float32: limit, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype], (
        error.item()
    )


def int8(N, C, format="int8"):
    return K.Packed(
        format,
        torch.randint(-127, 128, (N, C), dtype=torch.int8, device=DEVICE),
        random(N).abs(),
        N,
        C,
    )


def int4(N, C, group, symmetric):
    groups = -(-C // group)
    packed = torch.randint(0, 256, (N, -(-C // 2)), dtype=torch.uint8, device=DEVICE)
    zeros = None if symmetric else torch.randint(0, 16, (N, groups), device=DEVICE).float()
    return K.Packed("int4", packed, random(N, groups).abs() / 8, N, C, group, zeros)


# ------------------------------------------------------------------------------------ linear layers
@kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M,N,C", [(1, 7, 4097), (1, 64, 128), (3, 33, 100), (16, 40, 96)])
@pytest.mark.parametrize("format", ["int8", "int8x8"])
def test_int8_linear_equals_its_twin(format, M, N, C, dtype):
    args = random(M, C, dtype=dtype), int8(N, C, format), random(N)
    same(K.linear(*args), K.linear_twin(*args), dtype)


@kernel
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    "M,N,C,group",
    [(1, 5, 4097, 128), (1, 9, 100, 32), (2, 33, 100, 64), (17, 20, 256, 32), (2, 8, 60, 20)],
)
def test_int4_linear_equals_its_twin(M, N, C, group, symmetric):
    x, bias = random(M, C), random(N)
    for b in (None, bias):
        args = x, int4(N, C, group, symmetric), b
        same(
            K.linear(*args), K.linear_twin(*args), limit=2e-5
        )  # the offsets of the packed bytes cost four bits


@kernel
def test_int4_linear_in_16_bits_equals_its_twin():
    for dtype in DTYPES[1:]:
        for M in (1, 4):
            args = random(M, 256, dtype=dtype), int4(12, 256, 64, False), random(12, dtype=dtype)
            same(K.linear(*args), K.linear_twin(*args), dtype)


@kernel
def test_many_rows_take_dequantized_weights():
    rows = K.DEQUANTIZE_ABOVE + 1
    for args in (
        (random(rows, 100), int4(6, 100, 32, False)),
        (random(rows, 100), int8(6, 100), random(6)),
    ):
        same(K.linear(*args), K.linear_twin(*args))


@kernel
@pytest.mark.parametrize(
    "M,N,C,block", [(1, 6, 256, 64), (3, 10, 128, 64), (2, 6, 100, 64), (1, 5, 4098, 64)]
)
def test_nf4_forward_and_backward_equal_the_twin(M, N, C, block):
    x, bias, weigh = random(M, C).requires_grad_(), random(N), random(M, N)
    packed = torch.randint(0, 256, (N * C // 2,), dtype=torch.uint8, device=DEVICE)
    w = K.Packed("nf4", packed, random(-(-N * C // block)).abs(), N, C, block)
    layer = SimpleNamespace(
        product=lambda x: K.linear(x, w, bias), dequantize=lambda dtype: K.dequantize(w, dtype)
    )
    ours, twin = FrozenProduct.apply(x, layer), K.linear_twin(x, w, bias)
    same(ours, twin)
    same(*(torch.autograd.grad((y * weigh).sum(), x)[0] for y in (ours, twin)))
    same(K.dequantize(w, torch.float32), K.dequantize_twin(w, torch.float32))


@kernel
def test_a_group_of_odd_length_is_left_to_torch():
    assert K.linear(random(2, 30), int4(4, 30, 15, True)) is None


# ------------------------------------------------------------------------------- one pass over rows
@kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 4097), (3, 2, 64), (5, 100)])
def test_rms_norm_and_swiglu_equal_their_twins(shape, dtype):
    x, residual, weight = (
        random(*shape, dtype=dtype),
        random(*shape, dtype=dtype),
        random(shape[-1], dtype=dtype),
    )
    same(K.rms_norm(x, weight, 1e-5), K.rms_norm_twin(x, weight, 1e-5), dtype)
    for ours, twin in zip(
        K.rms_norm(x, weight, 1e-5, residual), K.rms_norm_twin(x, weight, 1e-5, residual)
    ):
        same(ours, twin, dtype)
    same(K.swiglu(x, residual), K.swiglu_twin(x, residual), dtype)
    both = torch.cat((x, residual), -1).chunk(2, -1)  # the halves of one product: strided rows
    same(K.swiglu(*both), K.swiglu_twin(x, residual), dtype)


@kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B,T,H,D", [(2, 5, 3, 16), (1, 1, 33, 40), (3, 2, 1, 128)])
def test_rope_equals_model_rotate(B, T, H, D, dtype):
    x, angle = random(B, T, H, D, dtype=dtype), random(B, T, D // 2)
    same(K.rope(x, angle.cos(), angle.sin()), K.rope_twin(x, angle.cos(), angle.sin()), dtype)
    cos, sin = angle[0].cos(), angle[0].sin()  # the same positions for every row of the batch
    same(K.rope(x, cos, sin), K.rope_twin(x, cos, sin), dtype)
    qkv = random(T, 2 * H, D, dtype=dtype)
    same(K.rope(qkv[:, :H], cos, sin), K.rope_twin(qkv[:, :H], cos, sin), dtype)


@kernel
@pytest.mark.parametrize("rows,V", [(1, 4097), (4, 100), (3, 5000)])
def test_cross_entropy_and_its_gradient_equal_torch(rows, V):
    logits = (random(rows, V) * 5).requires_grad_()
    targets = torch.randint(0, V, (rows,), device=DEVICE)
    targets[rows // 2] = -100 if rows > 1 else 7
    ours, twin = K.cross_entropy(logits, targets), K.cross_entropy_twin(logits, targets)
    same(ours, twin)
    weigh = random(rows)
    same(*(torch.autograd.grad((loss * weigh).sum(), logits)[0] for loss in (ours, twin)))
    assert (
        K.cross_entropy(logits, torch.full((rows,), V, device=DEVICE)).isnan().all()
    )  # not read: it is outside the row


# ---------------------------------------------------------------------------------- the paged cache
def pages(S, lengths, page, KH, D, dtype, cache_dtype=None):
    """A cache whose pages are dealt out in random order, filled through kv_store -> (caches and scales, block_tables)."""
    width = -(-max(lengths) // page) + 1
    tables = torch.randperm(S * width).view(S, width).int()
    caches = [
        torch.zeros(S * width, page, KH, D, dtype=cache_dtype or dtype, device=DEVICE)
        for _ in range(2)
    ]
    scales = (
        [torch.zeros(S * width, page, KH, device=DEVICE) for _ in range(2)]
        if cache_dtype
        else [None, None]
    )
    slots = torch.cat(
        [
            tables[s, torch.arange(n) // page].long() * page + torch.arange(n) % page
            for s, n in enumerate(lengths)
        ]
    )
    K.kv_store(
        random(len(slots), KH, D, dtype=dtype),
        random(len(slots), KH, D, dtype=dtype),
        *caches,
        slots.to(DEVICE),
        *scales,
    )
    return (
        caches,
        scales,
        F.pad(tables, (0, 3), value=-1).to(DEVICE)[:, :width],
    )  # as cut from a wider table


def attend(rows, lengths, H, KH, D, page=16, window=None, dtype=torch.float32, cache_dtype=None):
    caches, scales, tables = pages(len(lengths), lengths, page, KH, D, dtype, cache_dtype)
    starts = torch.tensor([0, *rows], device=DEVICE).cumsum(0).int()
    args = (
        random(sum(rows), H, D, dtype=dtype),
        *caches,
        tables,
        torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
        starts,
        D**-0.5,
        window,
        *scales,
    )
    same(K.paged_attention(*args), K.paged_attention_twin(*args), dtype)


@kernel
@pytest.mark.parametrize("cache_dtype", [None, torch.int8, torch.float8_e4m3fn])
def test_kv_store_equals_its_twin_and_skips_slot_minus_one(cache_dtype):
    qkv = random(5, 3, 3, 24)
    slots = torch.tensor([3, -1, 17, 0, 9], device=DEVICE)
    results = []
    for store in (K.kv_store, K.kv_store_twin):
        caches = [
            torch.zeros(5, 4, 3, 24, device=DEVICE).to(cache_dtype or torch.float32)
            for _ in range(2)
        ]
        scales = [torch.zeros(5, 4, 3, device=DEVICE) for _ in range(2)] if cache_dtype else []
        store(qkv[:, 0], qkv[:, 1], *caches, slots, *scales)
        results.append([t.float() for t in caches + scales])
    for ours, twin in zip(*results):
        assert (ours.flatten(0, 1)[slots[slots >= 0]] != 0).any()
        assert cache_dtype == torch.float8_e4m3fn or (ours - twin).abs().max() < 1e-6
        assert (
            (ours != twin).float().mean() < 0.02
        )  # the interpreter drops the carry when a float8 rounds up to a power of two


@kernel
def test_decode_attention_equals_its_twin():
    attend([1, 1, 1], [1, 37, 16], H=4, KH=2, D=32)
    attend(
        [1], [300], H=7, KH=1, D=40
    )  # grouped by 7, split over the context, D not a power of two
    attend([1, 1], [5, 260], H=2, KH=2, D=16, window=100)


@kernel
def test_prefill_attention_equals_its_twin():
    attend(
        [20, 1, 3], [20, 30, 10], H=4, KH=2, D=16
    )  # whole prompt, decode and a later chunk in one call
    attend([40], [90], H=2, KH=1, D=64, page=32, window=17)
    attend([0, 9], [8, 9], H=3, KH=3, D=16)  # a sequence without new tokens


@kernel
@pytest.mark.parametrize("cache_dtype", [torch.int8, torch.float8_e4m3fn])
def test_attention_over_a_quantized_cache_equals_its_twin(cache_dtype):
    attend([1, 6], [200, 12], H=4, KH=2, D=32, cache_dtype=cache_dtype)


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
    slots = tables[0, torch.arange(11) // 4].long() * 4 + torch.arange(11) % 4
    K.kv_store_twin(k, v, *caches, slots)
    ours = K.paged_attention_twin(
        q, *caches, tables, torch.tensor([11]), torch.tensor([0, 6]), 8**-0.5
    )
    mask = torch.arange(5, 11)[:, None] >= torch.arange(11)
    theirs = F.scaled_dot_product_attention(
        *(t.transpose(0, 1)[None] for t in (q, k, v)), attn_mask=mask, enable_gqa=True
    )
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
            same(K.linear(x, w), K.linear_twin(x, w), limit=2e-5)
        w = int8(9, 300, "int8x8")
        same(K.linear(x, w), K.linear_twin(x, w))
    attend([1, 1], [70, 9], H=4, KH=2, D=32)
    attend([70], [90], H=2, KH=1, D=16)


def test_the_fastest_configuration_is_kept_on_disk(monkeypatch, tmp_path):
    times = {1: 3.0, 2: 1.0, 3: 2.0}
    tried = []
    monkeypatch.setattr(K, "INTERPRET", False)
    monkeypatch.setattr(K, "triton", K.triton or SimpleNamespace(__version__="none"))
    monkeypatch.setattr(
        K, "milliseconds", lambda launch, config: tried.append(config) or times[config["BLOCK"]]
    )
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    configs = [dict(BLOCK=n) for n in times]
    for _ in range(2):
        K.tuning_table.cache_clear()  # as a new process would start
        assert (
            K.tuned("some kernel", configs, lambda config: config["BLOCK"], torch.device("cpu"))
            == 2
        )
    assert len(tried) == 3
    (file,) = (tmp_path / "llm-kernels").iterdir()
    assert json.loads(file.read_text()) == {"some kernel": {"BLOCK": 2}}
    file.write_text("{broken")
    K.tuning_table.cache_clear()
    assert (
        K.tuned("some kernel", configs, lambda config: config["BLOCK"], torch.device("cpu")) == 2
        and len(tried) == 6
    )


def test_a_card_without_room_for_any_configuration_says_so_and_the_twin_serves(monkeypatch, capsys):
    monkeypatch.setattr(K, "INTERPRET", False)
    monkeypatch.setattr(K, "triton", K.triton or SimpleNamespace(__version__="none"))
    monkeypatch.setattr(K, "milliseconds", lambda launch, config: float("inf"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert K.tuned("some kernel", [dict(BLOCK=1)], None, torch.device("cpu")) is None
    assert "some kernel: no configuration compiles" in capsys.readouterr().err
