"""lora.py against PEFT, transformers and bitsandbytes."""

import pytest
import torch

import lora
from model import Config, Transformer
from peers.hf import open_transformers
from quant import quantize

pytestmark = pytest.mark.peers
KINDS = {
    "lora": {},
    "rslora": dict(rslora=True),
    "dora": dict(dora=True),
    "both": dict(rslora=True, dora=True),
}


def tiny(kind="llama", tied=False, C=32, M=48):
    config = Config(
        kind, 61, C, M, 2, 4, 2, C // 4, 64, tie_word_embeddings=tied, qkv_bias=kind == "qwen2"
    )
    torch.manual_seed(0)
    model = Transformer(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.15)
    return model


def shake(model, seed=1):
    """Adapters as training leaves them: no B at zero, magnitudes off the norms."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith((".m", "magnitude_vector.default.weight")):
                p.mul_(1 + 0.2 * torch.rand_like(p))
            elif name.endswith((".A", ".B")) or "lora_" in name:
                p.add_(0.1 * torch.randn_like(p))
    return model


def open_peft(base, adapter, **options):
    from peft import PeftModel

    return PeftModel.from_pretrained(open_transformers(base), adapter, **options).eval()


def logits(model, ids):
    with torch.no_grad():
        out = model(ids)
    return getattr(out, "logits", out)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "shape,targets", [("llama", "all"), ("qwen2", "attn"), ("llama", "q_proj,lm_head")]
)
def test_peft_opens_our_adapter_with_equal_logits(tmp_path, kind, shape, targets):

    model = tiny(shape)
    model.save_pretrained(tmp_path / "base")
    model = shake(
        lora.apply(Transformer.from_pretrained(tmp_path / "base"), 4, 8, targets, **KINDS[kind])
    )
    lora.save_adapter(model, tmp_path / "adapter")
    peft = open_peft(tmp_path / "base", tmp_path / "adapter")
    ids = torch.randint(61, (2, 20))
    ours, base = logits(model, ids), logits(open_transformers(tmp_path / "base"), ids)
    assert (ours - base).abs().max() > 0.1
    torch.testing.assert_close(ours, logits(peft, ids), atol=1e-5, rtol=1e-5)
    ours_merged, theirs_merged = lora.merge(model), peft.merge_and_unload()
    torch.testing.assert_close(logits(ours_merged, ids), ours, atol=1e-5, rtol=1e-5)
    ours_merged.save_pretrained(tmp_path / "merged")
    reopened = logits(open_transformers(tmp_path / "merged"), ids)
    torch.testing.assert_close(reopened, logits(theirs_merged, ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "shape,targets", [("llama", ["q_proj", "down_proj"]), ("tied", ["o_proj", "lm_head"])]
)
def test_our_model_opens_pefts_adapter_with_equal_logits(tmp_path, kind, shape, targets, capsys):
    from peft import LoraConfig, get_peft_model

    tiny("llama" if shape == "tied" else shape, shape == "tied").save_pretrained(tmp_path / "base")
    k = KINDS[kind]
    config = LoraConfig(
        r=3,
        lora_alpha=5,
        use_rslora=k.get("rslora", False),
        use_dora=k.get("dora", False),
        target_modules=targets,
        task_type="CAUSAL_LM",
        rank_pattern={"down_proj": 5},
        alpha_pattern={"down_proj": 7},
    )
    peft = shake(get_peft_model(open_transformers(tmp_path / "base"), config)).eval()
    peft.save_pretrained(tmp_path / "adapter")
    model = lora.load_adapter(Transformer.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert "ignored" not in capsys.readouterr().err
    ids = torch.randint(61, (2, 20))
    torch.testing.assert_close(logits(model, ids), logits(peft, ids), atol=1e-5, rtol=1e-5)
    lora.save_adapter(
        model, tmp_path / "again"
    )  # and what we make of it opens in PEFT again, as in ours

    again = open_peft(tmp_path / "base", tmp_path / "again")
    torch.testing.assert_close(logits(again, ids), logits(peft, ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_pefts(tmp_path, kind):

    tiny().save_pretrained(tmp_path / "base")
    model = shake(lora.apply(Transformer.from_pretrained(tmp_path / "base"), 4, 8, **KINDS[kind]))
    lora.save_adapter(model, tmp_path / "adapter")
    peft = open_peft(tmp_path / "base", tmp_path / "adapter", is_trainable=True)
    ids = torch.randint(61, (2, 20))
    model(ids).square().sum().backward()
    peft(ids).logits.square().sum().backward()
    got = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    for name, p in peft.named_parameters():
        if p.requires_grad:
            layer, _, leaf = name.removeprefix("base_model.model.model.").partition(".lora_")
            ours = got[f"{layer}.{leaf[0]}"]  # A, B or magnitude_vector
            torch.testing.assert_close(ours, p.grad, atol=1e-3, rtol=1e-4)
    assert len(got) == (3 if "dora" in KINDS[kind] else 2) * 14


def test_qlora_equals_peft_on_the_weights_that_bitsandbytes_packs_and_unpacks(tmp_path):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    from peft import PeftModel

    tiny(C=64, M=128).save_pretrained(
        tmp_path / "base"
    )  # bitsandbytes' CPU code misreads rows that end inside a block of 64
    reference = open_transformers(tmp_path / "base")
    for name, layer in reference.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            codes, state = quantize_4bit(
                layer.weight.data, quant_type="nf4", compress_statistics=True
            )
            layer.weight.data = dequantize_4bit(codes, state)
    model = shake(lora.apply(quantize(Transformer.from_pretrained(tmp_path / "base"), "nf4"), 4, 8))
    lora.save_adapter(model, tmp_path / "adapter")
    peft = PeftModel.from_pretrained(reference, tmp_path / "adapter", is_trainable=True)
    ids = torch.randint(61, (2, 20))
    torch.testing.assert_close(logits(model, ids), logits(peft, ids), atol=1e-5, rtol=1e-5)
    model(ids).square().sum().backward()
    peft(ids).logits.square().sum().backward()
    got = model.layers[1].mlp.up_proj.A.grad
    want = (
        peft.get_submodule("base_model.model.model.layers.1.mlp.up_proj")
        .lora_A["default"]
        .weight.grad
    )
    torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-4)
