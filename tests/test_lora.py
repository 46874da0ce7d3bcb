"""lora.py: adapters, their folder, merging, 4-bit bases, the command line."""

import json
import re
import shutil
import sys

import pytest
import torch

import chat
import lora
from common import Metrics, UserError
from formats.hub import config_to_dict
from model import Config, Transformer
from quant import NF4Linear, quantize
from runtime import read_tensors, write_tensors
from tokenizer import Tokenizer
from training import toybox

ADAPTER = (".A", ".B", ".m")  # the parameters of an adapter
KINDS = {"lora": {}, "rslora": dict(rslora=True), "dora": dict(dora=True)}


def tiny(kind="qwen3", tied=True):
    gpt2 = kind == "gpt2"
    config = Config(
        kind,
        vocab_size=61,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4 if gpt2 else 2,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        qkv_bias=gpt2,
        out_bias=gpt2,
        mlp_bias=gpt2,
    )
    return with_random_weights(config).eval()


def with_random_weights(config):
    torch.manual_seed(0)
    model = Transformer(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.15)
    return model


@torch.no_grad()
def shake(model):
    """The adapter as training leaves it: no B at zero, magnitudes off the norms."""
    for name, p in model.named_parameters():
        if name.endswith(".m"):
            p.mul_(1 + 0.2 * torch.rand_like(p))
        elif name.endswith(ADAPTER):
            p.add_(0.1 * torch.randn_like(p))
    return model


def ids(B=2, T=12):
    return torch.randint(61, (B, T), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_changes_nothing_and_the_base_stays_as_it_was(kind):
    model = tiny()
    model.layers[1].mlp.up_proj.weight.data[5] = 0
    before = model(ids())
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lora.apply(model, 4, 8, **KINDS[kind])
    torch.testing.assert_close(model(ids()), before, atol=1e-6, rtol=1e-6)
    model.train()(ids()).sum().backward()
    for name, p in model.named_parameters():
        assert p.requires_grad == name.endswith(ADAPTER) == (p.grad is not None)
    for name, tensor in shake(model).state_dict().items():
        if not name.endswith(ADAPTER):
            assert torch.equal(tensor, weights[name.replace(".base.", ".")])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", ["all", "lm_head,q_proj"])
def test_merged_equals_unmerged_and_saved_equals_loaded(tmp_path, targets, kind):
    tiny().save_pretrained(tmp_path / "base")
    model = Transformer.from_pretrained(tmp_path / "base")
    shake(lora.apply(model, 3, 8, targets, dropout=0.5, **KINDS[kind]))
    want, off = model(ids()), tiny()(ids())
    assert (want - off).abs().max() > 0.05
    with pytest.raises(KeyError), lora.adapter_off(model):
        assert torch.equal(model(ids()), off)
        raise KeyError
    lora.save_adapter(model, tmp_path / "adapter")
    again = Transformer.from_pretrained(tmp_path / "base")
    lora.load_adapter(again, tmp_path / "adapter")
    assert torch.equal(again(ids()), want)
    lora.merge(again).save_pretrained(tmp_path / "merged")
    assert again.source is None  # its weights are no longer the base folder's
    merged = Transformer.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(ids()), want, atol=1e-5, rtol=1e-5)
    assert merged.config.tie_word_embeddings == ("lm_head" not in targets)


def test_an_adapted_head_is_in_the_loss():
    model, targets = shake(lora.apply(tiny(), 4, 8, "lm_head")), ids()
    want = torch.nn.functional.cross_entropy(
        model(ids()).flatten(0, 1), targets.flatten(), reduction="sum"
    )
    torch.testing.assert_close(model(ids(), targets), want)
    model(ids(), targets).backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


def test_targets_choose_layers():
    def chosen(model, targets):
        names = lora.choose_layers(model, targets)
        return {name.removeprefix("layers.0.") for name in names if "layers.1." not in name}

    attention = {f"self_attn.{p}_proj" for p in "qkvo"}
    mlp = {f"mlp.{p}_proj" for p in ("gate", "up", "down")}
    model = tiny()
    assert chosen(model, "all") == attention | mlp
    assert chosen(model, "attn") == attention
    assert chosen(model, "mlp") == mlp
    assert chosen(model, "q_proj,lm_head,mlp") == {"self_attn.q_proj", "lm_head"} | mlp
    assert lora.choose_layers(model, "layers.1.mlp.up_proj") == ["layers.1.mlp.up_proj"]


def test_recompute_passes_the_same_gradients_with_a_frozen_base():
    grads = []
    for recompute in (False, True):
        model = shake(lora.apply(tiny(), 4, 8, dora=True)).train()
        model.recompute = recompute
        model(ids(), ids()).backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert len(grads[0]) == 2 * 7 * 3
    assert all(torch.equal(a, b) and a.abs().sum() > 0 for a, b in zip(*grads))


# --------------------------------------------------------------------------------- a base in 4 bits
def test_qlora_equals_lora_on_the_dequantized_base_forward_and_backward():
    packed = quantize(tiny(), "nf4")
    plain = tiny()
    for name, layer in lora.linear_layers(packed).items():
        if name != "lm_head":
            plain.get_submodule(name).weight.data = layer.dequantize()
    torch.manual_seed(5)
    a = shake(lora.apply(packed, 4, 8, dora=True))
    torch.manual_seed(5)
    b = shake(lora.apply(plain, 4, 8, dora=True))
    for model in (a, b):
        model.train()(ids(), ids()).backward()
    assert isinstance(a.layers[0].mlp.up_proj.base, NF4Linear)
    torch.testing.assert_close(a(ids()), b(ids()))
    for p, q in zip(*([p for p in m.parameters() if p.requires_grad] for m in (a, b))):
        torch.testing.assert_close(p.grad, q.grad)
    torch.testing.assert_close(lora.merge(a).eval()(ids()), b.eval()(ids()), atol=1e-5, rtol=1e-5)


def test_backward_keeps_no_unpacked_weight_alive():
    model, kept = lora.apply(quantize(tiny(), "nf4"), 4, 8), []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(tuple(t.shape)) or t, lambda t: t
    ):
        model.train()(ids(), ids())
    assert (64, 32) not in kept and (32, 64) not in kept  # the MLP's matrices, either way round


BASES = {
    "whole model": lambda: tiny(tied=False),
    "lora": lambda: shake(lora.apply(tiny(), 4, 8, "q_proj,up_proj")),
    "qlora": lambda: shake(lora.apply(quantize(tiny(), "nf4"), 4, 8, "q_proj,up_proj")),
}


@pytest.mark.parametrize("base", BASES)
def test_a_compiled_training_step_has_no_graph_break_and_the_gradients_of_an_eager_one(
    base, monkeypatch
):
    """Packed documents, recomputed layers, a loss in chunks; fullgraph makes a break an error."""
    monkeypatch.setattr("model.LOGITS_AT_ONCE", 61 * 10)
    docs = torch.arange(12).expand(2, 12) // 5
    positions = torch.arange(12) % 5
    model = BASES[base]().train()
    model.recompute = True
    torch._dynamo.reset()
    grads = []
    for step in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        step(ids(), ids().roll(-1, 1), docs=docs, positions=positions.expand(2, 12)).backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for eager, compiled in zip(*grads):
        assert eager.abs().sum() > 0
        torch.testing.assert_close(compiled, eager, atol=1e-4, rtol=1e-4)


def test_an_adapter_adds_two_products_to_a_layer_and_nothing_else():
    layer = lora.apply(tiny(), 4, 8).layers[0].mlp.up_proj
    x = torch.randn(3, 32)
    with torch.no_grad(), torch.profiler.profile() as profile:
        layer(x)
    ran = [event.name.removeprefix("aten::") for event in profile.events()]
    assert (ran.count("mm"), ran.count("addmm_")) == (2, 1)
    assert not {"mul", "add", "copy_"} & set(ran)


# --------------------------------------------------------------------------------- the command line
@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model folder with a chat template, and conversations beside it."""
    folder = tmp_path_factory.mktemp("base")
    rows = list(toybox.conversations("train", 60))
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tok = Tokenizer.char(
        "".join(m["content"] for row in rows for m in row["messages"])
    ).with_special(list(chat.IM))
    tok.chat_template = chat.CHATML_TEMPLATE
    tok.save(folder)
    config = Config(
        "qwen3", tok.vocab_size, 32, 64, 2, 4, 2, 8, 128, eos_token_id=chat.stop_id(tok)
    )
    with_random_weights(config).save_pretrained(folder)
    return folder


def command(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["lora.py", *map(str, words)])
    lora.main()


def trained(monkeypatch, base, out, *flags):
    command(
        monkeypatch,
        "train",
        base,
        "--data",
        base / "chat.jsonl",
        "--out",
        out,
        "--context",
        128,
        "--batch",
        4,
        "--dtype",
        "float32",
        "--steps",
        4,
        "--eval-every",
        4,
        "--sample",
        0,
        "--r",
        2,
        *flags,
    )


QLORA = (
    "--quant",
    "nf4",
    "--optimizer",
    "adamw8bit",
    "--dora",
    "--lora-dropout",
    0.1,
    "--recompute",
    "--targets",
    "all,lm_head",
)


def test_a_resumed_run_is_the_same_bit_for_bit(monkeypatch, tmp_path, base):
    trained(monkeypatch, base, tmp_path / "a", *QLORA, "--save-every", 2, "--keep", 2)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b/state/step-00000004")
    moments = tmp_path / "b/state/step-00000002/optimizer.safetensors"
    old = re.compile(r"_proj(?=\.[ABm]\.)")  # the names that older runs have
    tensors = {old.sub("_proj.adapters.default", k): t for k, t in read_tensors(moments).items()}
    write_tensors(moments, tensors)
    trained(monkeypatch, base, tmp_path / "b", *QLORA, "--resume")
    for name in (
        "adapter_model.safetensors",
        "state/step-00000004/optimizer.safetensors",
        "state/step-00000004/rng.safetensors",
    ):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    rows = [
        [
            {k: v for k, v in r.items() if k not in ("seconds", "tokens_per_s")}
            for r in Metrics.read(tmp_path / d / "metrics.jsonl")
        ]
        for d in "ab"
    ]
    assert rows[0] == rows[1]


def test_a_checkpoint_holds_the_adapter_and_its_moments_alone(monkeypatch, tmp_path, base):
    trained(monkeypatch, base, tmp_path / "a", "--targets", "q_proj")
    files = {f.name for f in (tmp_path / "a/state/step-00000004").iterdir()}
    assert files == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "optimizer.safetensors",
        "rng.safetensors",
        "state.json",
    }
    names = {
        f"layers.{i}.self_attn.q_proj.{p}.{k}"
        for i in (0, 1)
        for p in "AB"
        for k in ("mean", "square")
    }
    assert set(read_tensors(tmp_path / "a/state/step-00000004/optimizer.safetensors")) == names | {
        "steps"
    }


def test_training_lowers_the_loss_and_merge_writes_a_folder_that_says_the_same(
    monkeypatch, tmp_path, base, capsys
):
    trained(
        monkeypatch,
        base,
        tmp_path / "a",
        "--steps",
        30,
        "--lr",
        0.05,
        "--log-every",
        1,
        "--r",
        16,
        "--targets",
        "all,lm_head",
    )
    losses = [r["loss"] for r in Metrics.read(tmp_path / "a/metrics.jsonl") if "loss" in r]
    assert losses[-1] < losses[0] - 0.5
    command(monkeypatch, "merge", base, tmp_path / "a", "--out", tmp_path / "m")
    assert "largest logit difference" in capsys.readouterr().out
    adapted = lora.load_adapter(Transformer.from_pretrained(base), tmp_path / "a")
    torch.testing.assert_close(
        Transformer.from_pretrained(tmp_path / "m")(ids()), adapted(ids()), atol=1e-5, rtol=1e-5
    )
    assert Tokenizer.load(tmp_path / "m").chat_template == chat.CHATML_TEMPLATE
    with pytest.raises(UserError, match="already holds a model"):
        command(monkeypatch, "merge", base, tmp_path / "a", "--out", tmp_path / "m")
    with pytest.raises(UserError, match="is the base itself"):
        command(monkeypatch, "merge", base, tmp_path / "a", "--out", base, "--overwrite")


def test_the_base_must_be_the_one_the_run_began_with(monkeypatch, tmp_path, base):
    shutil.copytree(base, tmp_path / "base")
    trained(monkeypatch, tmp_path / "base", tmp_path / "a", "--save-every", 2, "--keep", 2)
    shutil.rmtree(tmp_path / "a/state/step-00000004")
    model = Transformer.from_pretrained(tmp_path / "base")
    model.norm.weight.data += 0.01
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="trained on a base whose weights have sha256"):
        trained(monkeypatch, tmp_path / "base", tmp_path / "a", "--resume")


def test_a_run_knows_the_models_context_and_where_an_answer_ends(tmp_path, base, capsys):
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").unlink()
    config = json.loads((base / "config.json").read_text()) | {"eos_token_id": None}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    data = (str(base / "chat.jsonl"),)
    args = lora.Args(model=str(tmp_path / "base"), data=data, out=str(tmp_path / "a"))
    args.context = 999
    run = lora.prepare_adapter(args, None)
    assert run.model.config.end_ids == [chat.stop_id(run.tok)]
    assert "context  128 tokens a row, not 999" in capsys.readouterr().out


def test_fit_prints_parts_without_weights(monkeypatch, tmp_path, capsys):
    config = Config("llama", 32000, 4096, 11008, 32, 32, 32, 128, 4096, tie_word_embeddings=False)
    (tmp_path / "config.json").write_text(json.dumps(config_to_dict(config)))
    command(
        monkeypatch,
        "train",
        tmp_path,
        "--fit",
        "--context",
        512,
        "--batch",
        1,
        "--r",
        32,
        "--dtype",
        "bfloat16",
        *QLORA[:4],
        "--recompute",
        "--out",
        tmp_path / "a",
    )
    told = capsys.readouterr().out
    assert "79,953,920 of 6,818,369,536 parameters are trained: 1.17%" in told
    total = int(told.split("memory   ")[1].split(" MiB")[0].replace(",", ""))
    assert 4 * 1024 < total < 6.5 * 1024


def test_mistakes_on_the_command_line_are_named(monkeypatch, tmp_path, base):
    with pytest.raises(UserError, match="--quant int3: use nf4"):
        trained(monkeypatch, base, tmp_path / "a", "--quant", "int3")
    for flags, words in (
        (("--r", 0), "--r 0 must be at least 1"),
        (("--alpha", 0), "--alpha 0.0 above 0"),
        (("--lora-dropout", 1), "--lora-dropout 1.0 in"),
        (("--targets", "query"), "--targets query: no linear layer"),
    ):
        with pytest.raises(UserError, match=words):  # before the data is read
            trained(monkeypatch, base, tmp_path / "a", "--data", "nowhere.jsonl", *flags)
    shutil.copytree(base, tmp_path / "bare")
    tok = Tokenizer.load(base)
    tok.chat_template = None
    tok.save(tmp_path / "bare")
    with pytest.raises(UserError, match="no chat template"):
        trained(monkeypatch, tmp_path / "bare", tmp_path / "a")
    with pytest.raises(UserError, match="no command .*: use train, merge"):
        command(monkeypatch, "fuse")


# ---------------------------------------------------------------------------------------- bad input
def test_mistakes_are_named():
    model = tiny()
    with pytest.raises(
        UserError,
        match="no linear layer.*down_proj, gate_proj, k_proj, lm_head, .*, up_proj, v_proj",
    ):
        lora.apply(model, targets="query")
    with pytest.raises(
        UserError,
        match="--r 33 is above the rank that layers.0.*q_proj, 32 x 32, can have: at most 32",
    ):
        lora.apply(model, r=33)
    with pytest.raises(UserError, match="--r 0"):
        lora.apply(model, r=0)
    with pytest.raises(UserError, match="q, k and v in one matrix"):
        lora.apply(tiny("gpt2"))
    with pytest.raises(UserError, match="the model has an adapter already: merge it first"):
        lora.apply(lora.apply(tiny()))
    with pytest.raises(UserError, match="quantized already"):
        quantize(quantize(model, "nf4"), "nf4")
