"""Packed layers, GPTQ, folders and the command: quant.py and packed.py."""

import json

import pytest
import torch
import torch.nn as nn

import quant
from common import UserError
from formats import packed
from model import Config, Transformer

SHAPES = [(64, 64), (172, 64), (64, 172), (48, 200)]


def small_model(kind="llama", seed=0):
    torch.manual_seed(seed)
    shape = dict(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=16,
    )
    if kind == "gpt2":
        shape |= dict(
            intermediate_size=256,
            num_key_value_heads=4,
            qkv_bias=True,
            out_bias=True,
            mlp_bias=True,
            rope={},
        )
    model = Transformer(Config(model_type=kind, **(dict(num_key_value_heads=2) | shape)))
    for p in model.parameters():
        p.data = torch.randn_like(p) * 0.1 + (p.ndim == 1)
    return model.eval()


def ids(rows=4, length=48, seed=1):
    return torch.randint(96, (rows, length), generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------ linear layers
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("shape", SHAPES)
def test_fast_products_are_near_their_dequantized_twin(shape, rows):
    torch.manual_seed(0)
    linear, x = nn.Linear(shape[1], shape[0]), torch.randn(2, rows, shape[1])
    groups = [
        packed.GroupLinear.from_linear(linear, *how)
        for how in ((4, 64), (4, 32, False), (4, 48), (3, -1), (6, 128))
    ]
    for layer, bound in (
        (packed.Int8Linear.from_linear(linear), 1e-2),
        (packed.Int8Linear.from_linear(linear, True), 2e-2),
        (packed.NF4Linear.from_linear(linear), 1e-5),
        *((layer, 1e-2) for layer in groups),
    ):
        twin = nn.functional.linear(x, layer.dequantize(), layer.bias)
        assert layer(x).shape == twin.shape and (layer(x) - twin).norm() < bound * twin.norm()
        assert (layer.dequantize() - linear.weight).norm() < 0.2 * linear.weight.norm()


def test_int8_weights_meet_activations_of_sixteen_bits():
    torch.manual_seed(0)
    layer, x = packed.Int8Linear.from_linear(nn.Linear(256, 64)), torch.randn(5, 256)
    twin = nn.functional.linear(x, layer.dequantize(), layer.bias)
    assert (layer(x) - twin).norm() < 1e-4 * twin.norm()


def test_a_row_of_int8_activations_does_not_depend_on_its_neighbours():
    x = torch.randn(3, 64) * torch.tensor([[1.0], [1e4], [1e-4]])
    codes, scale = quant.int8_rows(x)
    alone, alone_scale = quant.int8_rows(x[2:])
    assert torch.equal(codes[2:], alone) and torch.equal(scale[2:], alone_scale)


@pytest.mark.parametrize("bits", range(2, 9))
def test_no_rounding_error_exceeds_half_a_step(bits):
    torch.manual_seed(0)
    weight = torch.randn(8, 100)
    for sym in (True, False):
        codes, scales, zeros = quant.round_to_nearest(weight, bits, 32, sym)
        layer = packed.GroupLinear(codes, scales, zeros, bits, 32)
        steps = scales.repeat_interleave(32, 1)[:, :100]
        assert ((layer.dequantize() - weight).abs() / steps).max() < (
            1.0 if sym else 0.51
        )  # symmetric: the top end is cut
        assert codes.max() <= 2**bits - 1


def test_groups_of_zeros_stay_zero():
    for sym in (True, False):
        assert (
            packed.GroupLinear(*quant.round_to_nearest(torch.zeros(4, 64), 4, 32, sym), 4, 32)
            .dequantize()
            .abs()
            .max()
            == 0
        )


def test_fused_layers_are_their_parts_stacked():
    torch.manual_seed(0)
    parts, x = (
        [nn.Linear(64, n, bias=b) for n, b in ((32, True), (16, False), (16, True))],
        torch.randn(3, 64),
    )
    for make in (
        packed.Int8Linear.from_linear,
        packed.GroupLinear.from_linear,
        packed.NF4Linear.from_linear,
        lambda part: packed.GroupLinear.from_linear(part, 4, 32, sym=False),
    ):
        layers = [make(part) for part in parts]
        assert torch.allclose(
            quant.fuse(layers)(x), torch.cat([layer(x) for layer in layers], -1), atol=2e-2
        )
        assert torch.equal(
            quant.fuse(layers).dequantize(), torch.cat([layer.dequantize() for layer in layers])
        )


def test_gradient_through_nf4_is_that_of_its_dequantized_twin():
    torch.manual_seed(0)
    layer = packed.NF4Linear.from_linear(nn.Linear(64, 24))
    x = torch.randn(5, 64, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    y, expected = layer(x), nn.functional.linear(twin, layer.dequantize(), layer.bias)
    (y**2).sum().backward()
    (expected**2).sum().backward()
    assert torch.equal(y, expected) and torch.allclose(x.grad, twin.grad)
    assert not any(p.requires_grad for p in layer.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("format", ["int8", "int8-dynamic", "int4"])
def test_packed_layers_compile_without_a_break(format):
    torch.manual_seed(0)
    layer, x = quant.pack_linear(nn.Linear(128, 64), format, 64), torch.randn(2, 128)
    with torch.inference_mode():
        assert torch.allclose(torch.compile(layer, fullgraph=True)(x), layer(x), atol=3e-2)


# --------------------------------------------------------------------------------------------- GPTQ
def plain_gptq(weight, H, bits, group, sym, damp):
    """Frantar et al. 2023, section 3, from the equations: after each column its row and column leave the inverse (eq. 3)."""
    weight, result = weight.clone(), torch.zeros_like(weight)
    inverse = torch.linalg.inv(H + damp * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype))
    for j in range(weight.size(1)):
        if j % group == 0:
            scale, zero = quant.grid(weight[:, j : j + group], bits, sym)
        result[:, j] = ((weight[:, j] / scale + zero).round().clamp(0, 2**bits - 1) - zero) * scale
        error = (weight[:, j] - result[:, j]) / inverse[j, j]
        weight[:, j:] -= error[:, None] * inverse[j, j:]
        inverse = inverse - inverse[:, j : j + 1] @ inverse[j : j + 1] / inverse[j, j]
    return result


@pytest.mark.parametrize(
    "group,sym,act_order",
    [(-1, True, False), (32, True, False), (48, False, False), (32, False, True)],
)
def test_gptq_is_the_papers_algorithm(group, sym, act_order):
    torch.manual_seed(0)
    mixing = torch.randn(200, 200, dtype=torch.float64)
    x = torch.randn(500, 200, dtype=torch.float64) @ mixing
    weight, H = torch.randn(24, 200, dtype=torch.float64), x.T @ x
    recipe = quant.Recipe(4, group, sym, act_order, clip=False)
    codes, scales, zeros, order, damp = quant.gptq_round(weight, H, recipe)
    ours = packed.GroupLinear(codes, scales, zeros, 4, group, order).dequantize()
    perm = H.diagonal().argsort(descending=True) if act_order else torch.arange(200)
    expected = plain_gptq(
        weight[:, perm], H[perm][:, perm], 4, 200 if group < 0 else group, sym, 0.01
    )
    assert damp == 0.01 and (ours[:, perm] - expected).abs().max() < 1e-5


def test_gptq_changes_outputs_less_than_rounding_to_nearest():
    torch.manual_seed(0)
    x, weight = torch.randn(400, 96) @ torch.randn(96, 96), torch.randn(40, 96)
    H = x.T @ x

    def change(codes, scales, zeros, order=None):
        return (
            x @ (packed.GroupLinear(codes, scales, zeros, 4, 32, order).dequantize() - weight).T
        ).norm()

    nearest = change(*quant.round_to_nearest(weight, 4, 32, True))
    for more in (
        {},
        {"act_order": True},
        {"act_order": True, "static_groups": True},
        {"clip": False},
    ):
        assert (
            change(*quant.gptq_round(weight, H, quant.Recipe(4, 32, **more))[:4]) < 0.8 * nearest
        ), more


def test_damping_rises_until_a_singular_hessian_factors_and_dead_inputs_are_rounded_as_they_are():
    torch.manual_seed(0)
    x, weight = torch.randn(3, 64) * 1e3, torch.randn(8, 64)
    x[:, 10:20] = 0  # never fired
    codes, scales, zeros, order, damp = quant.gptq_round(
        weight, x.T @ x, quant.Recipe(4, -1, damp=1e-12)
    )
    assert damp > 1e-12
    layer = packed.GroupLinear(codes, scales, zeros, 4, -1)
    assert torch.isfinite(layer.dequantize()).all()
    assert (layer.dequantize() - weight)[:, 10:20].abs().max() <= scales.max() * 1.01 / 2


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_walking_the_blocks_is_the_models_own_forward(kind):
    model = small_model(kind)
    calibration = quant.Calibration(model, ids().split(2), "cpu")
    with torch.no_grad():
        for block in model.layers:
            for _ in quant.stages(block, calibration, False):
                pass
        assert torch.allclose(
            model.norm(torch.cat(calibration.states)), model.hidden(ids()), atol=1e-5
        )


def test_awq_leaves_the_function_as_it_was():
    model = small_model()
    model.embed_tokens.weight.data[:, 3] *= 30  # a channel that matters
    before, calibration = model(ids()), quant.Calibration(model, ids().split(2), "cpu")
    old = model.layers[0].input_layernorm.weight.clone()
    with torch.no_grad():
        quant.scale_channels(model.layers[0], calibration, False, quant.Recipe(4, 32))
    assert not torch.allclose(model.layers[0].input_layernorm.weight, old)
    assert torch.allclose(model(ids()), before, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_gptq_recovers_half_of_what_rounding_loses_and_int8_loses_next_to_nothing(data_dir):
    folder = data_dir / "stories260K"
    model = Transformer.from_pretrained(folder)
    with torch.inference_mode():
        rows = quant.sample_rows(model, 128, 128, 0)
        base = quant.score(model, model, rows[64:])[0]

        def loss(change):
            return (
                quant.score(change(Transformer.from_pretrained(folder)), model, rows[64:])[0] / base
                - 1
            )

        nearest = loss(lambda m: quant.quantize(m, "int4", 64))
        recovered = loss(
            lambda m: quant.gptq(
                m, rows[:64].split(8), 4, 64, act_order=True, log=lambda line: None
            )
        )
        assert recovered < nearest / 2
        assert abs(loss(lambda m: quant.quantize(m, "int8"))) < 0.005


# ------------------------------------------------------------------------------------------ folders
@pytest.mark.parametrize("bits", range(2, 9))
def test_words_hold_any_codes_of_any_length(bits):
    codes = torch.randint(2**bits, (77, 5))
    words = packed.to_words(codes, bits)
    assert words.shape == (3 * bits, 5) and words.dtype == torch.int32
    assert torch.equal(packed.from_words(words, bits, 77), codes.to(torch.uint8))


def test_version_1_stores_zero_points_less_one_and_version_2_as_they_are():
    codes, scales = torch.randint(16, (32, 32), dtype=torch.uint8), torch.ones(32, 1)
    for zero, version, stored in (
        (8, "gptq", 0x77777777),
        (8, "gptq_v2", 0x88888888 - (1 << 32)),
        (0, "gptq_v2", 0),
        (15, "gptq", 0xEEEEEEEE - (1 << 32)),
        (1, "gptq", 0),
    ):
        layer = packed.GroupLinear(codes, scales, torch.full((32, 1), zero), 4, 32)
        tensors = packed.write_gptq(layer, "q", version)
        assert (tensors["q.qzeros"] == stored).all()
        back = packed.read_gptq(
            tensors, "q", (32, 32), {"bits": 4, "group_size": 32, "checkpoint_format": version}
        )
        assert torch.equal(back.dequantize(), layer.dequantize())


def test_a_zero_point_of_zero_is_never_written_as_version_1():
    model = small_model()
    model.layers[0].self_attn.q_proj.weight.data.abs_()  # all positive: the zero point is code 0
    quant.quantize(model, "int4-asym", 32)
    assert model.quantization["checkpoint_format"] == "gptq_v2"
    assert quant.quantize(small_model(), "int4", 32).quantization["checkpoint_format"] == "gptq"


RECIPES = [
    ("int8", {}),
    ("int8-dynamic", {}),
    ("int4", {}),
    ("int4-asym", {}),
    ("nf4", {}),
    ("gptq", dict(bits=4, act_order=True)),
    ("gptq", dict(bits=3)),
    ("gptq", dict(bits=8, sym=False)),
    ("gptq", dict(bits=5, awq=True, rounding="rtn")),
]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("format,recipe", RECIPES)
def test_a_quantized_folder_comes_back_as_it_was(kind, format, recipe, tmp_path):
    model = small_model(kind)
    if format == "gptq":
        quant.gptq(model, ids().split(2), group_size=48, log=lambda line: None, **recipe)
    else:
        quant.quantize(model, format, 48)
    if kind == "gpt2" and format == "nf4":
        with pytest.raises(UserError, match="GPT-2"):
            model.save_pretrained(tmp_path)
        return
    model.save_pretrained(tmp_path)
    again = Transformer.from_pretrained(tmp_path)
    assert torch.equal(again(ids()), model(ids())) and again.quantization == model.quantization
    assert not isinstance(again.layers[0].mlp.up_proj, nn.Linear)
    assert torch.allclose(
        Transformer.from_pretrained(tmp_path, dtype=torch.bfloat16)(ids()),
        model(ids()),
        rtol=0.3,
        atol=0.3,
    )


# ---------------------------------------------------------------------------------------- bad input
def test_nan_in_weights_is_refused():
    weight = torch.randn(64, 64)
    weight[3, 5] = torch.nan
    with pytest.raises(UserError, match="1 of 4,096 values are NaN"):
        quant.nf4_quantize(weight)
    for run in (lambda m: quant.quantize(m, "int4"), lambda m: quant.gptq(m, [ids()], log=print)):
        model = small_model()
        model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.inf
        with pytest.raises(UserError, match="mlp.down_proj.*NaN or infinite"):
            run(model)


def test_what_cannot_be_quantized_is_refused_in_one_line():
    model = quant.quantize(small_model(), "int8")
    for run, words in (
        (lambda: quant.quantize(model, "int4"), "quantized already"),
        (lambda: quant.gptq(model, [ids()]), "quantized already"),
        (lambda: quant.quantize(small_model(), "int5"), "choose one of int8"),
        (lambda: quant.quantize(small_model(), "int4", 0), "group size 0"),
        (lambda: quant.gptq(small_model(), [ids()], bits=1), "2 to 8"),
        (lambda: quant.round_to_nearest(torch.full((2, 8), 1e9), 4, 8, True), "float16's 65,504"),
    ):
        with pytest.raises(UserError, match=words):
            run()


def test_damaged_folders_are_refused(tmp_path):
    quant.quantize(small_model(), "int4", 32).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, words in (
        ({"bits": 3}, "of another shape"),
        ({"group_size": 64}, "of another shape"),
        ({"bits": 99}, "bits 99"),
        ({"quant_method": "fp8"}, "'fp8'"),
        ({"checkpoint_format": "marlin"}, "marlin"),
    ):
        broken = config | {"quantization_config": config["quantization_config"] | change}
        (tmp_path / "config.json").write_text(json.dumps(broken))
        with pytest.raises(UserError, match=words):
            Transformer.from_pretrained(tmp_path)


def test_groups_that_are_not_of_the_stated_size_are_refused():
    layer = packed.GroupLinear.from_linear(nn.Linear(64, 32), 4, 32)
    tensors = packed.write_gptq(layer, "q", "gptq")
    tensors["q.g_idx"] = torch.zeros(64, dtype=torch.int32)
    with pytest.raises(UserError, match="2 groups of 32"):
        packed.read_gptq(
            tensors, "q", (32, 64), {"bits": 4, "group_size": 32, "checkpoint_format": "gptq"}
        )


def test_damaged_bitsandbytes_statistics_are_refused():
    layer = packed.NF4Linear.from_linear(nn.Linear(64, 64))
    good = packed.write_bnb(layer, "q")
    for key, value in (
        ("q.weight", good["q.weight"][:-1]),
        ("q.weight.absmax", good["q.weight.absmax"][:-1]),
        ("q.weight.quant_map", torch.arange(16.0)),
        (
            "q.weight.quant_state.bitsandbytes__nf4",
            torch.tensor(list(b'{"blocksize": 1e99'), dtype=torch.uint8),
        ),
    ):
        with pytest.raises(UserError, match="q.weight"):
            packed.read_bnb(good | {key: value}, "q", (64, 64))


# -------------------------------------------------------------------------------------- the command
def test_calibration_text_shorter_than_a_row_is_refused_and_rows_do_not_overlap(tmp_path, data_dir):
    tok = quant.Tokenizer.load(data_dir / "stories260K")
    (tmp_path / "a.txt").write_text("Once upon a time there was a girl. " * 40)
    with pytest.raises(UserError, match="less than one row of 5,000"):
        quant.read_rows(tmp_path / "a.txt", tok, 4, 5000)
    rows = quant.read_rows(tmp_path / "a.txt", tok, 100, 64)
    assert rows.size(1) == 64 and len(rows) > 2
    (tmp_path / "a.jsonl").write_text('{"text": "Lily ran to the big tree and saw a bird."}\n' * 30)
    assert quant.read_rows(tmp_path / "a.jsonl", tok, 4, 32).shape == (4, 32)


def test_the_report_compares_formats_and_fails_where_gptq_is_worse(
    tmp_path, data_dir, monkeypatch, capsys
):
    args = quant.read_args(
        [
            "report",
            str(data_dir / "stories260K"),
            "--formats",
            "original,int4,gptq",
            "--group-size",
            "64",
            "--samples",
            "8",
            "--held-out-rows",
            "8",
            "--length",
            "64",
            "--out",
            str(tmp_path),
            "--device",
            "cpu",
        ]
    )
    quant.report(args)
    table = (tmp_path / "quantization.md").read_text()
    assert (
        (tmp_path / "quantization.png").exists() and "| gptq |" in table and table.count("\n|") == 5
    )
    monkeypatch.setattr(quant, "gptq", lambda model, *a, **k: quant.quantize(model, "int4", 256))
    with pytest.raises(UserError, match="worse than round-to-nearest"):
        quant.report(args)


def test_the_command_writes_a_folder_that_opens(tmp_path, data_dir, monkeypatch):
    out = tmp_path / "q"
    monkeypatch.setattr(
        "sys.argv",
        [
            "quant.py",
            str(data_dir / "stories260K"),
            "--format",
            "gptq",
            "--group-size",
            "64",
            "--out",
            str(out),
            "--samples",
            "4",
            "--held-out-rows",
            "2",
            "--length",
            "64",
            "--device",
            "cpu",
        ],
    )
    quant.main()
    assert (
        Transformer.from_pretrained(out).quantization["bits"] == 4
        and (out / "tokenizer.model").exists()
    )
