"""Grids, packed layers, GPTQ and the command: quant.py."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT, within

import quant
from common import UserError
from engine.forward import fused_layers
from model import Config, Transformer
from tokenizer import Tokenizer


def small_model(kind="llama", seed=0, width=64, inner=172):
    torch.manual_seed(seed)
    shape = dict(
        vocab_size=96,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=width // 4,
    )
    if kind == "gpt2":
        biases = dict(qkv_bias=True, out_bias=True, mlp_bias=True)
        shape |= dict(intermediate_size=256, num_key_value_heads=4, rope={}, **biases)
    model = Transformer(Config(model_type=kind, **shape))
    for p in model.parameters():
        around = 1 if p.ndim == 1 else 0  # norms start at 1
        p.data = torch.randn_like(p) * 0.1 + around
    return model.eval()


def ids(rows=4, length=48, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(96, (rows, length), generator=generator)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


# ------------------------------------------------------------------------------------------- grids
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("sym,bound", [(True, 1.0), (False, 0.51)])
def test_no_rounding_error_exceeds_half_a_step(bits, sym, bound):
    """Symmetric: nor a whole one where the top end is cut."""
    torch.manual_seed(0)
    weight = torch.randn(8, 100)
    codes, scales, zeros = quant.round_to_nearest(weight, bits, 32, sym)
    layer = quant.GroupLinear(codes, scales, zeros, bits, 32)
    steps = scales.repeat_interleave(32, 1)[:, :100]
    errors = (layer.dequantize() - weight).abs()
    assert (errors / steps).max() < bound
    assert codes.max() <= 2**bits - 1


@pytest.mark.parametrize("sym", [True, False])
def test_groups_of_zeros_stay_zero(sym):
    rounded = quant.round_to_nearest(torch.zeros(4, 64), 4, 32, sym)
    assert not quant.GroupLinear(*rounded, 4, 32).dequantize().any()


# ------------------------------------------------------------------------------------------ layers
LAYERS = {  # arguments of GroupLinear.from_linear
    "int8": (8, -1),
    "nf4": None,
    "int4": (4, 64),
    "int4 with zeros": (4, 32, False),
    "groups of 48": (4, 48),
    "int3 rows": (3, -1),
    "int6": (6, 128),
}


def packed_layer(name, linear):
    if name == "nf4":
        return quant.pack_linear(linear, "nf4", 64)
    return quant.GroupLinear.from_linear(linear, *LAYERS[name])


def twin_of(layer, x):
    return F.linear(x, layer.dequantize(), layer.bias)


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("outputs,inputs", [(64, 64), (172, 64), (64, 172), (48, 200)])
def test_products_are_near_their_dequantized_twin(outputs, inputs, rows):
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs)
    x = torch.randn(2, rows, inputs)
    for name in LAYERS:
        layer = packed_layer(name, linear)
        y = layer(x)
        assert y.shape == (2, rows, outputs)
        assert relative(y, twin_of(layer, x)) < 1e-5
        assert relative(layer.dequantize(), linear.weight) < 0.2


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("bias", [True, False])
def test_fused_layers_are_their_parts_stacked(name, bias):
    torch.manual_seed(0)
    layers = [packed_layer(name, nn.Linear(64, n, bias)) for n in (32, 16, 16)]
    x = torch.randn(3, 64)
    weights = [layer.dequantize() for layer in layers]
    outputs = [layer(x) for layer in layers]
    fused = quant.fuse(layers)
    assert torch.equal(fused.dequantize(), torch.cat(weights))
    assert torch.allclose(fused(x), torch.cat(outputs, -1), atol=1e-5)


def test_a_fused_layer_leaves_its_zero_points_out_only_if_all_are_in_the_middle():
    torch.manual_seed(0)
    symmetric = quant.GroupLinear.from_linear(nn.Linear(64, 8))
    skewed = quant.GroupLinear.from_linear(nn.Linear(64, 8), sym=False)
    assert symmetric.tiles().zeros is None
    assert quant.fuse([symmetric, symmetric]).tiles().zeros is None
    assert quant.fuse([symmetric, skewed]).tiles().zeros is not None


def test_what_cannot_be_one_layer_is_refused():
    linear = nn.Linear(64, 32)
    ordered = quant.GroupLinear.from_linear(linear)
    ordered.order = torch.randperm(64)
    for other in (
        quant.GroupLinear.from_linear(linear, 3),
        quant.GroupLinear.from_linear(linear, 4, 32),
        quant.GroupLinear.from_linear(linear, 8, -1),
        quant.GroupLinear.from_linear(nn.Linear(64, 32, bias=False)),
        ordered,
    ):
        with pytest.raises(UserError, match="cannot be one"):
            quant.fuse([quant.GroupLinear.from_linear(linear), other])


def test_nf4_layers_that_end_within_a_block_are_not_fused():
    layers = [quant.pack_linear(nn.Linear(36, n), "nf4", 64) for n in (36, 12, 12)]
    with pytest.raises(UserError, match="cannot be one"):
        quant.fuse(layers)
    assert fused_layers(layers, None) == layers


def test_gradient_through_nf4_is_that_of_its_dequantized_twin():
    torch.manual_seed(0)
    layer = quant.pack_linear(nn.Linear(64, 24), "nf4", 64)
    x = torch.randn(5, 64, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    y = layer(x)
    expected = twin_of(layer, twin)
    (y**2).sum().backward()
    (expected**2).sum().backward()
    assert torch.equal(y, expected)
    assert torch.allclose(x.grad, twin.grad)
    assert not any(p.requires_grad for p in layer.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_packed_layers_compile_without_a_break(format):
    torch.manual_seed(0)
    layer = quant.pack_linear(nn.Linear(128, 64), format, 64)
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(2, 128)
    with torch.inference_mode():
        assert torch.allclose(compiled(x), layer(x), atol=3e-2)


# -------------------------------------------------------------------------------------------- GPTQ
def plain_gptq(weight, H, bits, group, sym, damp):
    """Frantar et al. 2023, section 3: after each column its row and column leave the inverse."""
    weight = weight.clone()
    result = torch.zeros_like(weight)
    ridge = torch.full_like(H.diagonal(), damp * H.diagonal().mean())
    inverse = torch.linalg.inv(H + torch.diag(ridge))
    for j in range(weight.size(1)):
        if j % group == 0:
            scale, zero = quant.grid(weight[:, j : j + group], bits, sym)
        column = weight[:, j]
        codes = (column / scale + zero).round().clamp(0, 2**bits - 1)
        result[:, j] = (codes - zero) * scale
        row, pivot = inverse[j], inverse[j, j]
        error = (column - result[:, j]) / pivot
        weight[:, j:] -= torch.outer(error, row[j:])  # equation 2
        inverse = inverse - torch.outer(inverse[:, j], row) / pivot  # equation 3
    return result


@pytest.mark.parametrize(
    "group,sym,act_order",
    [(-1, True, False), (32, True, False), (48, False, False), (32, False, True)],
)
def test_gptq_is_the_papers_algorithm(group, sym, act_order, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(quant, "CLIPPED_RANGES", [1])  # those are not in the paper
    mixing = torch.randn(200, 200, dtype=torch.float64)
    x = torch.randn(500, 200, dtype=torch.float64) @ mixing
    weight = torch.randn(24, 200, dtype=torch.float64)
    H = x.T @ x
    recipe = quant.Recipe(4, group, sym, act_order)
    *parts, found_order = quant.gptq_round(weight, H, recipe)
    ours = quant.GroupLinear(*parts, 4, group, found_order).dequantize()
    order = torch.arange(200)
    if act_order:
        order = H.diagonal().argsort(descending=True)
    sorted_H = H[order][:, order]
    whole = 200 if group < 0 else group
    expected = plain_gptq(weight[:, order], sorted_H, 4, whole, sym, 0.01)
    assert (ours[:, order] - expected).abs().max() < 1e-5


@pytest.mark.parametrize("recipe", [{}, {"act_order": True}])
def test_gptq_changes_outputs_less_than_rounding_to_nearest(recipe):
    torch.manual_seed(0)
    x = torch.randn(400, 96) @ torch.randn(96, 96)
    weight = torch.randn(40, 96)

    def change(codes, scales, zeros, order=None):
        layer = quant.GroupLinear(codes, scales, zeros, 4, 32, order)
        error = layer.dequantize() - weight
        return (x @ error.T).norm()

    nearest = quant.round_to_nearest(weight, 4, 32, True)
    recipe = quant.Recipe(4, 32, **recipe)
    rounded = quant.gptq_round(weight, x.T @ x, recipe)
    assert change(*rounded) < 0.8 * change(*nearest)


def test_damping_rises_until_a_singular_hessian_factors_and_dead_inputs_are_rounded_as_they_are():
    torch.manual_seed(0)
    x = torch.randn(3, 64) * 1e3
    weight = torch.randn(8, 64)
    x[:, 10:20] = 0  # never fired
    H = x.T @ x
    damped = H + torch.eye(64) * 1e-12 * H.diagonal().mean()
    assert torch.linalg.cholesky_ex(damped).info > 0
    recipe = quant.Recipe(4, -1, damp=1e-12)
    codes, scales, zeros, _ = quant.gptq_round(weight, H, recipe)
    rounded = quant.GroupLinear(codes, scales, zeros, 4, -1).dequantize()
    assert torch.isfinite(rounded).all()
    half_step = scales.max() / 2
    errors = (rounded - weight).abs()
    assert errors[:, 10:20].max() <= half_step * 1.01


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_walking_the_blocks_is_the_models_own_forward(kind):
    model = small_model(kind)
    with torch.no_grad():
        states = []
        for batch in ids().split(2):
            x, rope, (mask, _) = model.start(batch)
            states.append(x)
        for block in model.layers:
            for _ in quant.stages(block, states, rope, mask):
                pass
        walked = model.norm(torch.cat(states))
        assert torch.allclose(walked, model.hidden(ids()), atol=1e-5)


@pytest.mark.slow
def test_gptq_recovers_half_of_what_rounding_loses_and_int8_loses_next_to_nothing(data_dir):
    from generate import Engine, Sampling
    from training import quality

    folder = data_dir / "stories260K"
    original = Transformer.from_pretrained(folder)
    tok = quant.Tokenizer.load(folder)
    rows = quality.sample_rows(Engine.of(original, tok), Sampling, 128, 128, 0)

    def loss(change):
        model = change(Transformer.from_pretrained(folder))
        perplexity, base, _ = quality.score(model, original, rows[64:])
        return perplexity / base - 1

    def rounded(model):
        batches = rows[:64].split(8)
        return quant.gptq(model, batches, 4, 64, act_order=True)

    def nearest(model):
        return quant.quantize(model, "int4", 64)

    def eight_bits(model):
        return quant.quantize(model, "int8")

    with torch.inference_mode():
        assert loss(rounded) < loss(nearest) / 2
        assert abs(loss(eight_bits)) < 0.005


# --------------------------------------------------------------------------------------- bad input
def test_nan_in_weights_is_refused():
    weight = torch.randn(64, 64)
    weight[3, 5] = torch.nan
    with pytest.raises(UserError, match="1 of 4,096 values are NaN"):
        quant.nf4_quantize(weight)
    model = small_model()
    model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.inf
    with pytest.raises(UserError, match="mlp.down_proj.*NaN or infinite"):
        quant.gptq(copy.deepcopy(model), [ids()])
    with pytest.raises(UserError, match="mlp.down_proj.*NaN or infinite"):
        quant.quantize(model, "int4")


def test_what_cannot_be_quantized_is_refused_in_one_line():
    model = quant.quantize(small_model(), "int8")
    large = torch.full((2, 8), 1e9)
    for run, words in (
        (lambda: quant.quantize(model, "int4"), "quantized already"),
        (lambda: quant.gptq(model, [ids()]), "quantized already"),
        (lambda: quant.quantize(small_model(), "int5"), "choose one of int8"),
        (lambda: quant.quantize(small_model(), "int4", 0), "group size 0"),
        (lambda: quant.gptq(small_model(), [ids()], bits=1), "2 to 8"),
        (lambda: quant.gptq(small_model(), [ids()], damp=float("nan")), "damp nan from 0 to 1"),
        (lambda: quant.round_to_nearest(large, 4, 8, True), "float16's 65,504"),
        (lambda: quant.nf4_quantize(torch.ones(3, 3)), "odd number"),
    ):
        with pytest.raises(UserError, match=words):
            run()


@pytest.mark.parametrize(
    "flags,words",
    [
        ("m", "--out"),
        ("m --out m", "the model itself"),
        ("m --format int5 --out q", "int5: choose from int8"),
        ("m --out q --samples 0", "samples 0"),
        ("m --out q --bits 9", "bits 9 must be from 2 to 8"),
        ("m --out q --group-size 0", "group size 0"),
        ("m --out q --group-size 999999999", "group size 999999999 from 1 to 16,777,216"),
        ("m --out q --format int4 --bits 4 --act-order", "nothing with --bits, --act-order"),
        ("m --out q --format nf4 --no-sym --damp 0.1", "nf4 does nothing with --sym, --damp"),
        ("m --out q --format int8 --group-size 64", "int8 does nothing with --group-size"),
    ],
)
def test_flags_that_cannot_be_meant_are_refused(flags, words):
    with pytest.raises(UserError, match=words):
        quant.read_quant_args(flags.split())


# ------------------------------------------------------------------------------------- the command
def run_command(monkeypatch, *flags):
    argv = ["quant.py", *map(str, flags), "--device", "cpu"]
    monkeypatch.setattr("sys.argv", argv)
    quant.main()


def test_the_command_writes_a_folder_that_opens(tmp_path, data_dir, monkeypatch, capsys):
    out = tmp_path / "q"
    few = ("--samples", 4, "--held-out-rows", 2, "--length", 64)
    shape = ("--format", "gptq", "--group-size", 64)
    run_command(monkeypatch, data_dir / "stories260K", "--out", out, *shape, *few)
    assert Transformer.from_pretrained(out).quantization["bits"] == 4
    same = [Tokenizer.load(folder).sha256 for folder in (data_dir / "stories260K", out)]
    assert same[0] == same[1]
    assert "gptq: 0.27 MB instead of 1.04, held-out perplexity" in capsys.readouterr().out
    with pytest.raises(UserError, match="quantized already"):
        run_command(monkeypatch, out, "--out", tmp_path / "again", *few)


def test_a_folder_written_by_the_script_itself_opens(tmp_path, data_dir):
    """As a script, quant.py is another module than the one that formats/ imports."""
    few = ("--samples", "4", "--held-out-rows", "2", "--length", "64", "--device", "cpu")
    command = [sys.executable, ROOT / "quant.py", data_dir / "stories260K", "--format", "int8"]
    subprocess.run([*command, "--out", tmp_path / "q", *few], check=True, cwd=tmp_path)
    assert Transformer.from_pretrained(tmp_path / "q").quantization["bits"] == 8


@pytest.mark.parametrize("format", ["int8", "int4", "nf4"])
def test_a_tiled_layer_compiles_without_a_graph_break(format):
    layer = quant.pack_linear(nn.Linear(256, 128), format, 64)
    tiled = quant.TiledLinear(layer, layer.tiles())
    compiled = torch.compile(lambda x: tiled(x), fullgraph=True, backend="eager")
    x = torch.randn(70, 256)
    assert torch.allclose(compiled(x), layer(x), atol=1e-5)
    x.requires_grad_()
    compiled(x).sum().backward()
    assert x.grad.isfinite().all()


def test_a_group_larger_than_a_row_is_the_row_and_takes_no_more_memory():
    linear = torch.nn.Linear(48, 64)
    with within(memory=100 << 20):
        large = quant.GroupLinear.from_linear(linear, 4, 1 << 24)
        weight = large.dequantize()
    assert torch.equal(weight, quant.GroupLinear.from_linear(linear, 4, -1).dequantize())
