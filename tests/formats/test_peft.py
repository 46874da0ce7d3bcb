"""formats/peft.py: whose adapter it is, and what is no adapter of ours. tests/test_lora.py and
tests/test_peers_lora.py write and read them."""

import json

import pytest
import torch
from conftest import within
from test_lora import tiny

import lora
from common import UserError
from formats.peft import base_sha256
from runtime import read_tensors, write_tensors


def test_an_adapter_of_another_base_is_refused_with_both_hashes(tmp_path):
    model = lora.apply(tiny(), 4, 8)
    lora.save_adapter(model, tmp_path)
    other = tiny()
    other.norm.weight.data[3] += 1e-3
    with pytest.raises(UserError, match=base_sha256(model) + ".*" + base_sha256(other)):
        lora.load_adapter(other, tmp_path)
    assert not any(isinstance(m, lora.LoRALinear) for m in other.modules())


@pytest.mark.parametrize(
    "key,value,message",
    [
        ("peft_type", "LOHA", "peft_type 'LOHA'"),
        ("bias", "all", "bias 'all'"),
        ("init_lora_weights", "pissa", "pissa"),
        ("r", "8", "r is '8'"),
        ("r", -1, "r is -1"),
        ("modules_to_save", ["lm_head"], "modules_to_save"),
        ("use_qalora", True, "use_qalora True"),
        ("use_rslora", "false", "use_rslora 'false'"),
        ("alpha_pattern", {"(": 3}, "alpha_pattern"),
        ("alpha_pattern", {"q_proj": "x"}, "alpha_pattern"),
        ("alpha_pattern", {f"q{i}": 3 for i in range(10**4)}, "10,000 keys"),
        ("alpha_pattern", 5, "alpha_pattern"),
        ("alpha_pattern", {"(?:(?:.|..|...)*(?:.|..)*)*[A-Z]": 3}, "alpha_pattern .*timed out"),
        ("lora_dropout", 1e30, "lora_dropout is 1e"),
        ("lora_alpha", float("nan"), "lora_alpha is nan"),
        ("r", 10**12, "r is 1000000000000"),
        ("r", True, "r is True"),
    ],
)
def test_what_is_not_plain_lora_is_refused(tmp_path, key, value, message):
    lora.save_adapter(lora.apply(tiny(), 4, 8), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {key: value}))
    with within(), pytest.raises(UserError, match=message):
        lora.load_adapter(tiny(), tmp_path)


def test_what_an_adapter_asks_for_in_vain_is_named(tmp_path, capsys):
    lora.save_adapter(lora.apply(tiny(), 4, 8), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config |= {"scale_more": 2, "velora_config": None, "layers_pattern": None}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    lora.load_adapter(tiny(), tmp_path)
    assert capsys.readouterr().err.endswith("adapter_config.json: ignored: 'scale_more'\n")


def test_a_pattern_that_takes_re_for_ever_is_matched_at_once(tmp_path):
    lora.save_adapter(lora.apply(tiny(), 4, 8), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["alpha_pattern"] = {"(?:[a-z0-9_.]+)+[A-Z]": 3}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with within():
        lora.load_adapter(tiny(), tmp_path)


def test_tensors_that_do_not_fit_are_refused(tmp_path):
    lora.save_adapter(lora.apply(tiny(), 4, 8), tmp_path)
    file, key = (
        tmp_path / "adapter_model.safetensors",
        "base_model.model.model.layers.0.mlp.up_proj.lora_{}.weight",
    )
    good = read_tensors(file)
    for change, message in (
        ({key.format("A"): torch.zeros(4, 31)}, "layers.0.mlp.up_proj has tensors"),
        ({key.format("B"): torch.zeros(64, 5)}, "layers.0.mlp.up_proj has tensors"),
        ({key.format("embedding_A"): torch.zeros(4, 4)}, "tensor .*lora_embedding_A"),
        ({key.format("A").replace("0", "9"): torch.zeros(4, 32)}, "no such linear layer"),
    ):
        write_tensors(file, {**good, **change})
        with pytest.raises(UserError, match=message):
            lora.load_adapter(tiny(), tmp_path)
    with pytest.raises(UserError, match="no adapter_config.json"):
        lora.load_adapter(tiny(), tmp_path / "nowhere")
