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
import quant

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


def apart(x):
    """The same values, but not one behind the other in memory: kernels take those, too."""
    return torch.stack((x, x), -1)[..., 0]


def same(ours, twin, dtype=torch.float32, limit=1e-5 if CUDA else 2e-6):
    """Relative error of the whole tensor; NaN fails. (A GPU's exp and / are approximate.)"""
    error = (ours.double() - twin.double()).norm() / twin.double().norm().clamp(min=1e-12)
    assert ours.dtype == twin.dtype and ours.shape == twin.shape
    assert error < LIMITS.get(dtype, limit), error.item()


def tiles(format, N, C, group, zeros=False):
    """-> (Tiles of random codes, the weights that they stand for (N, C) float64)."""
    codes = torch.randint(0, 256 if format == "int8" else 16, (N, C), dtype=torch.uint8)
    groups = -(-C // group)
    scales = random(N, groups).abs() / 8
    points = torch.randint(0, 16, (N, groups), dtype=torch.uint8).to(DEVICE) if zeros else None
    codes = codes.to(DEVICE)
    column = torch.arange(C, device=DEVICE) // group
    middle = {"int8": 128, "int4": 8, "nf4": 0}[format]
    values = K.nf4_table(codes.device)[codes.int()] if format == "nf4" else codes
    weight = values.double() - (points.double()[:, column] if zeros else middle)
    return K.tile(format, codes, scales, group, points), weight * scales.double()[:, column]


def linear_equals(M, w, weight, dtype, bias=True):
    x = random(M, w.K, dtype=dtype)
    b = random(w.N) if bias else None
    expected = x.double() @ weight.T
    same(K.linear(x, w, b), (expected + b if bias else expected).to(dtype), dtype)
    assert not w.done.any()  # for the next launch


@pytest.fixture
def each_configuration(monkeypatch):
    """All configurations are launched, and must agree."""

    def each(key, configs, launch, device):
        results = []
        for config in configs:
            try:
                results.append(launch(config))
            except K.triton.OutOfResources:  # tuning leaves such a one out
                print(f"{key}: no room for {config}")
        for result in results:
            same(result, results[0], result.dtype, limit=2e-5)
        return results[0]

    monkeypatch.setattr(K, "tuned", each)


# ------------------------------------------------------------------------------------ linear layers
FORMATS = {
    "int8": ("int8", 10_000),
    "int4": ("int4", 128),
    "int4, zero points": ("int4", 128, True),
    "int4 in groups of 64": ("int4", 64, True),
    "int4 in groups of 32": ("int4", 32),
    "int4 in groups of 96": ("int4", 96, True),
    "int4 in rows": ("int4", 10_000, True),
    "nf4": ("nf4", 64),
    "nf4 in blocks of 128": ("nf4", 128),
}
HALVES = [torch.bfloat16, torch.float16]


@kernel
@pytest.mark.parametrize("name", FORMATS)
def test_a_quantized_product_equals_its_twin(name):
    """Odd rows of weights, columns that fill no tile, columns in parts of several programs."""
    format, *how = FORMATS[name]
    for i, (M, N, C) in enumerate([(1, 33, 640), (3, 130, 128), (16, 7, 320), (64, 20, 192)]):
        linear_equals(M, *tiles(format, N, C, *how), HALVES[i % 2], bias=i > 0)


@kernel
@pytest.mark.skipif(not CUDA, reason="what only a GPU runs: the inline assembly")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", FORMATS)
def test_unpacking_in_assembly_equals_the_twin_for_all_rows(name, dtype, each_configuration):
    format, *how = FORMATS[name]
    for M in (1, 2, 16, 17, 64):
        linear_equals(M, *tiles(format, 777, 2048, *how), dtype)


@pytest.mark.parametrize("name", FORMATS)
def test_dequantized_tiles_equal_the_weights(name):
    """On the CPU this is the twin, in the interpreter the kernel."""
    format, *how = FORMATS[name]
    for N, C in ((5, 320), (70, 128)):
        w, weight = tiles(format, N, C, *how)
        same(K.dequantize(w, torch.float32), weight.float())
        same(K.dequantize_twin(w, torch.float32), weight.float())


def test_many_rows_and_float32_take_dequantized_weights():
    w, weight = tiles("int4", 6, 100, 32)
    for x in (random(K.FUSED_ROWS + 1, 100, dtype=torch.bfloat16), random(2, 100)):
        same(K.linear(x, w), (x.double() @ weight.T).to(x.dtype), x.dtype)


@kernel
def test_rows_that_fill_whole_tiles_are_read_where_they_are(monkeypatch):
    w, weight = tiles("int8", 6, 256, 256)
    monkeypatch.setattr(F, "pad", None)  # which copies even where it adds nothing
    linear_equals(2, w, weight, torch.bfloat16)


def test_groups_that_parts_of_tiles_would_cross_have_no_tiles():
    codes = torch.zeros(4, 60, dtype=torch.uint8)
    assert K.tile("int4", codes, torch.ones(4, 3), 20) is None
    assert K.tile("int8", codes, torch.ones(4, 3), 20) is None


@pytest.mark.parametrize("name", ["int4", "nf4"])
def test_a_tiled_layer_has_the_product_and_the_gradient_of_the_layer(name):
    linear = torch.nn.Linear(192, 24)
    layer = quant.pack_linear(linear, name, 64, sym=False).to(DEVICE)
    tiled = quant.TiledLinear(layer, layer.tiles())
    assert quant.tiled(layer) is layer or CUDA
    x = random(3, 192).requires_grad_()
    results = []
    for one in (tiled, layer):
        y = one(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), x), one.dequantize()))
    for ours, twin in zip(*results):
        same(ours, twin)


def test_a_tiled_layer_keeps_the_order_of_its_columns():
    order = torch.randperm(64)
    codes = torch.randint(0, 16, (8, 64), dtype=torch.uint8)
    layer = quant.GroupLinear(codes, torch.rand(8, 2), torch.full((8, 2), 3), 4, 32, order)
    tiled = quant.TiledLinear(layer, layer.tiles())
    x = torch.randn(2, 64)
    same(tiled.dequantize(), layer.dequantize())
    same(tiled(x), layer(x))


# ----------------------------------------------------------- the assembly, emulated without a GPU
def prmt(a, b, selector):
    """Each digit of the selector chooses a byte of b:a; with its bit 3 only that byte's sign."""
    found = (a | b << 32).to_bytes(8, "little")
    digits = [selector >> 4 * i & 15 for i in range(4)]
    chosen = [found[d & 7] if d < 8 else 255 * (found[d & 7] >> 7) for d in digits]
    return int.from_bytes(bytes(chosen), "little")


def lop3(a, b, c, table):
    """The three operands' bits, together a number of 3 bits, choose one of the table's."""
    bits = [(a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1) for i in range(32)]
    return sum((table >> which & 1) << i for i, which in enumerate(bits))


def halves(register, dtype):
    """A register as two 16-bit numbers -> float32 (2,)"""
    data = register.to_bytes(4, "little")
    return torch.frombuffer(bytearray(data), dtype=dtype).float()


def fma(a, b, c, dtype):
    value = halves(a, dtype) * halves(b, dtype) + halves(c, dtype)
    return int.from_bytes(bytes(value.to(dtype).view(torch.uint8).tolist()), "little")


def emulate(assembly, outputs, word):
    """What the instructions make of a register -> [its output registers]"""
    registers = {f"${outputs}": word}

    def read(text):
        return registers[text] if text in registers else int(text, 0)

    code = assembly.strip().strip("{}")
    for line in code.split(";"):
        name, _, rest = line.strip().partition(" ")
        if not name or name == ".reg":
            continue
        target, *operands = [text.strip() for text in rest.split(",")]
        values = [read(text) for text in operands]
        if name == "mov.b32":
            registers[target] = values[0]
        elif name == "and.b32":
            registers[target] = values[0] & values[1]
        elif name == "shr.b32":
            registers[target] = values[0] >> values[1]
        elif name == "lop3.b32":
            registers[target] = lop3(*values)
        elif name == "prmt.b32":
            registers[target] = prmt(*values)
        else:
            dtype = {"fma.rn.bf16x2": torch.bfloat16, "fma.rn.f16x2": torch.float16}[name]
            registers[target] = fma(*values, dtype)
    return [registers[f"${i}"] for i in range(outputs)]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("format", ["int4", "int8", "nf4"])
def test_the_assembly_unpacks_every_byte_as_the_tiles_say(format, dtype):
    """Each byte value stands at each of the four places of a register of two words."""
    kind = {torch.bfloat16: "BF16", torch.float16: "FP16"}[dtype]
    assembly = getattr(K, f"{kind}_{format.upper()}")
    assembly = getattr(assembly, "value", assembly)  # a constexpr, where there is Triton
    offset = {"int4": 128 if dtype == torch.bfloat16 else 1024}.get(format, 0)
    size, outputs = (256, 2) if format == "int8" else (16, 4)
    for byte in range(256):
        codes = torch.randint(0, size, (1, 128), dtype=torch.uint8)
        w = K.tile(format, codes, torch.ones(1, 1), 128)
        at = byte % 16  # some pair of words
        w.words.view(torch.uint8)[0, 0, 4 * at : 4 * at + 4] = torch.arange(byte, byte + 4).byte()
        (pair,) = w.words[0, 0, 2 * at : 2 * at + 2].view(torch.int32).tolist()
        found = emulate(assembly, outputs, pair & 0xFFFFFFFF)
        parts = K.dequantize_twin(w, torch.float32).view(outputs, -1)[:, 2 * at : 2 * at + 2]
        if format == "int4":
            parts = parts + 8 + offset
        for register, values in zip(found, parts):
            assert torch.equal(halves(register, dtype), values.to(dtype).float()), byte


# ---------------------------------------------------------------------------------- the paged cache
def zeros(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype, device=DEVICE)


def pages(lengths, page, KH, D, dtype, cache_dtype=None):
    """A cache whose pages are dealt out in random order, filled with random keys and values.

    -> (cache, scales, block_tables)"""
    S = len(lengths)
    width = -(-max(lengths) // page) + 1
    tables = torch.randperm(S * width).view(S, width).int()
    cache, scales = empty_cache(S * width, page, KH, D, dtype, cache_dtype)
    slots = []
    for table, length in zip(tables.long(), lengths):
        at = torch.arange(length)
        slots.append(table[at // page] * page + at % page)
    slots = torch.cat(slots).to(DEVICE)
    kv = random(len(slots), 2 * KH, D, dtype=dtype)
    K.store_heads_twin(kv, None, 0, None, slots, cache, scales)
    wider = F.pad(tables, (0, 3), value=-1).to(DEVICE)
    return cache, scales, wider[:, :width]


def empty_cache(blocks, page, KH, D, dtype, cache_dtype=None):
    """As the engine has one for a layer -> cache, scales"""
    scales = zeros(2, 3, blocks, page, KH)[:, 1] if cache_dtype == torch.int8 else None
    return zeros(2, 3, blocks, page, KH, D, dtype=cache_dtype or dtype)[:, 1], scales


def attend(rows, lengths, H, KH, D, page=16, window=None, dtype=torch.float32, cache_dtype=None):
    cache, scales, tables = pages(lengths, page, KH, D, dtype, cache_dtype)
    starts = torch.tensor([0, *rows], device=DEVICE).cumsum(0).int()
    q = apart(random(sum(rows), H, D, dtype=dtype))
    lengths = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    args = q, cache, tables, lengths, starts, D**-0.5, window, scales
    same(K.paged_attention(*args), K.paged_attention_twin(*args), dtype)


@kernel
@pytest.mark.parametrize("cache_dtype", [None, torch.int8])
@pytest.mark.parametrize("how", ["norm and rotation", "rotation", "neither"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_are_normed_turned_and_stored_as_the_twin_does(dtype, how, cache_dtype):
    """Groups of 4 query heads, head_dim 24; a token of slot -1 is turned but not stored."""
    T, H, KH, D = 5, 8, 2, 24
    qkv = random(T, H + 2 * KH, D, dtype=dtype)
    gain = random(H + KH, D, dtype=dtype) if "norm" in how else None
    rope = [random(T, 1, D, dtype=dtype) for _ in range(2)] if "rotation" in how else None
    slots = torch.tensor([3, -1, 17, 0, 9], device=DEVICE)
    before = qkv.clone()
    results, everywhere = [], []
    for store in (K.store_heads, K.store_heads_twin):
        cache, scales = empty_cache(5, 4, KH, D, dtype, cache_dtype)
        q = store(qkv, gain, 1e-5, rope, slots, cache, scales)
        results.append((q.float(), K.read_pages(cache, scales, torch.arange(5))))
        everywhere.append(cache._base)
    assert torch.equal(qkv, before)
    for ours, twin in zip(*results):
        same(ours, twin, dtype, limit=1e-3 if cache_dtype else 2e-6)
    filled = results[0][1].any(-1)  # (2, KH, 20)
    assert filled[..., slots[slots >= 0]].all()
    assert everywhere[0].any(-1).sum() == 2 * KH * 4  # not in another layer's cache either


@kernel
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_and_its_norm_equal_the_twins(dtype):
    norm = torch.nn.RMSNorm(90, 1e-5).to(DEVICE, dtype)
    torch.nn.init.normal_(norm.weight)
    y = apart(random(7, 90, dtype=dtype))
    results = []
    for add_norm, lie in ((K.add_norm, torch.clone), (K.add_norm, apart), (K.add_norm_twin, apart)):
        x = lie(torch.arange(7 * 90, device=DEVICE).view(7, 90).sin().to(dtype))
        results.append((add_norm(x, y, norm), x))
    for ours, of_apart, twin in zip(*results):
        same(ours, twin, dtype)
        same(of_apart, twin, dtype)


@kernel
@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_equals_its_twin(dtype):
    h = 30 * random(3, 2 * 1030, dtype=dtype)  # also where exp overflows
    same(K.swiglu(apart(h)), K.swiglu_twin(h), dtype)


@kernel
def test_what_needs_a_gradient_gets_one():
    h = random(3, 64, dtype=torch.bfloat16).requires_grad_()
    w, _ = tiles("int4", 8, 64, 32)
    assert K.swiglu(h).requires_grad and K.linear(h, w).requires_grad
    with torch.no_grad():
        assert not K.swiglu(h).requires_grad


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
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_over_an_int8_cache_equals_its_twin(dtype):
    attend([1, 6], [200, 12], H=4, KH=2, D=32, dtype=dtype, cache_dtype=torch.int8)
    attend([1, 70], [9, 80], H=3, KH=1, D=40, window=30, dtype=dtype, cache_dtype=torch.int8)


@kernel
def test_attention_over_a_cache_of_another_type_equals_its_twin():
    for cache_dtype in DTYPES[1:]:
        attend([1, 3], [50, 9], H=4, KH=2, D=32, cache_dtype=cache_dtype)
    attend([1, 3], [50, 9], H=4, KH=2, D=32, dtype=torch.bfloat16, cache_dtype=torch.float16)


@kernel
def test_attention_in_16_bits_equals_its_twin():
    for dtype in DTYPES[1:]:
        attend([1, 1], [150, 9], H=4, KH=2, D=32, dtype=dtype)
        attend([30], [30], H=4, KH=2, D=32, dtype=dtype)


@kernel
def test_an_empty_context_gives_zeros():
    q = random(1, 2, 16)
    cache = random(2, 2, 4, 2, 16)
    ints = [torch.tensor(v, dtype=torch.int32, device=DEVICE) for v in ([[0, 1]], [0], [0, 1])]
    assert not K.paged_attention(q, cache, *ints, 1.0).any()


# --------------------------------------------------------------------- what holds without a GPU too
def test_paged_attention_twin_equals_torch_attention():
    q, k, v = torch.randn(6, 4, 8), torch.randn(11, 2, 8), torch.randn(11, 2, 8)
    cache = torch.zeros(2, 3, 4, 2, 8)
    tables = torch.tensor([[2, 0, 1]], dtype=torch.int32)
    at = torch.arange(11)
    slots = tables[0, at // 4].long() * 4 + at % 4
    K.store_heads_twin(torch.cat((k, v), 1), None, 0, None, slots, cache)
    starts = torch.tensor([0, 6])
    ours = K.paged_attention_twin(q, cache, tables, torch.tensor([11]), starts, 8**-0.5)
    heads_first = [t.transpose(0, 1)[None] for t in (q, k, v)]  # (T, H, D) -> (1, H, T, D)
    mask = at[5:, None] >= at
    theirs = F.scaled_dot_product_attention(*heads_first, attn_mask=mask, enable_gqa=True)
    assert torch.allclose(ours, theirs[0].transpose(0, 1), atol=1e-6)


@kernel
def test_every_configuration_computes_the_same(each_configuration):
    for M in (1, 17):
        linear_equals(M, *tiles("int4", 9, 300, 64), torch.float16)
    attend([1, 1], [70, 9], H=4, KH=2, D=32)
    attend([70], [90], H=2, KH=1, D=16)


@pytest.fixture
def gpu_tuning(monkeypatch):
    """`tuned` as on a GPU: with tables on disk, outside a graph's capture."""
    monkeypatch.setattr(K, "INTERPRET", False)
    triton = SimpleNamespace(__version__="none")
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
            raise RuntimeError("out of registers")
        return config["BLOCK"]

    room = 2
    assert use_in_a_new_process(launch, closed=True) == 2
    room = 9
    assert use_in_a_new_process(launch, closed=True) is None
    assert "(RuntimeError: out of registers)" in capsys.readouterr().err and not tried


def test_where_no_configuration_runs_one_process_leaves_it_to_the_twin(tried, monkeypatch, capsys):
    """The next one tries again: a broken installation may have been mended."""

    def broken(launch, config):
        raise RuntimeError("out of registers")

    device = torch.device("cpu")
    with monkeypatch.context() as patch:
        patch.setattr(K, "milliseconds", broken)
        assert use_in_a_new_process() is None
    assert K.tuned("some kernel", CONFIGS, None, device) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert "some kernel: no configuration runs on this card (RuntimeError: out of reg" in line
    K.tuned("other kernel", CONFIGS, str, device)  # writes the file
    assert use_in_a_new_process() == 2


@pytest.mark.parametrize("closed", [False, True])
def test_memory_that_is_full_says_nothing_about_the_card(gpu_tuning, monkeypatch, closed):
    """The smallest configuration serves, or fails; the next call tries again."""

    def launch(config):
        if full and config["BLOCK"] < 3:
            raise torch.OutOfMemoryError
        return config["BLOCK"]

    monkeypatch.setattr(K, "milliseconds", lambda launch, config: launch(config))
    full = True
    assert use_in_a_new_process(launch, closed) == 3
    full = False
    assert K.tuned("some kernel", CONFIGS, launch, torch.device("cpu")) == 1


def test_a_triton_that_does_not_work_says_so_and_the_twins_serve(monkeypatch, capsys):
    class Broken:
        def __getitem__(self, grid):
            raise RuntimeError("Failed to find C compiler.\nand more")

    monkeypatch.setattr(K, "_swiglu", Broken())
    assert not K.compiles.__wrapped__(torch.device(DEVICE))
    assert capsys.readouterr().err.count("\n") == 1
