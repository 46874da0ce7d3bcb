"""An export that is not its source is found, by the commands that write it."""

import json
import sys

import pytest
import torch.nn as nn
from test_gguf import make_folder

import chat
import lora
import quant
from common import UserError, cli
from formats import gguf, hub
from formats.verify import WrongExport, compare_weights
from formats.vocab import read_tokenizer
from model import Transformer
from tokenizer import Tokenizer


@pytest.fixture
def source(tmp_path):
    """A model whose chats end with another token than its texts."""
    tok = Tokenizer.train(["some text, and more of it"], 270)
    tok.chat_template = chat.CHATML_TEMPLATE
    make_folder(tmp_path / "m", "llama", tok, eos=[3, 5])
    return tmp_path / "m"


@pytest.mark.parametrize("mix", [*gguf.MIXES])
def test_a_right_gguf_is_verified_in_one_line(source, mix, capsys):
    gguf.export(source, source.parent / "x", mix)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and said[1].startswith(f"verified {source.parent / 'x.gguf'}: KL ")


def swapped_rows(monkeypatch):
    right = gguf.reorder_rows

    def wrong(rows, name, config, back=False):
        return right(rows, name, config, back) if back else rows

    monkeypatch.setattr(gguf, "reorder_rows", wrong)


def lost_metadata(key):
    def change(monkeypatch):
        right = gguf.tokenizer_metadata

        def without(tok, config):
            return {k: v for k, v in right(tok, config).items() if not k.endswith(key)}

        monkeypatch.setattr(gguf, "tokenizer_metadata", without)

    return change


def lost_merges(monkeypatch):
    right = gguf.bytes_metadata
    monkeypatch.setattr(gguf, "bytes_metadata", lambda *args: right(*args) | {"merges": []})


def scaled(name):
    def change(monkeypatch):
        kind = gguf.BLOCK_TYPES[name]
        wrong = kind._replace(encode=lambda x: kind.encode(x * (1 + 1 / 16)))
        monkeypatch.setitem(gguf.BLOCK_TYPES, name, wrong)

    return change


@pytest.mark.parametrize(
    "mix, change, cause",
    [
        ("f16", swapped_rows, "self_attn.q_proj.weight is"),
        ("q4_0", swapped_rows, "self_attn.k_proj.weight is"),
        ("q8_0", lost_metadata("eot_token_id"), "end ids [5] are lost"),
        ("q4_0", lost_metadata("chat_template"), "the chat template is another, or lost"),
        ("q8_0", lost_metadata("ggml.model"), "held-out text gets other ids"),
        ("q8_0", lost_merges, "held-out text gets other ids"),
        ("q8_0", scaled("Q8_0"), "is 1.062 of the source's"),
        ("q4_0", scaled("Q4_0"), "of the source's"),
        ("q4_k_m", scaled("Q6_K"), "is 1.062 of the source's"),
    ],
)
def test_a_gguf_that_is_not_its_source_ends_with_status_1_and_the_cause(
    source, mix, change, cause, monkeypatch, capsys
):
    change(monkeypatch)
    arguments = ["gguf", str(source), "--type", mix, "--out", str(source.parent / "x.gguf")]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stopped:
        cli(gguf.main)
    said = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 1 and cause in said and said.startswith("error: ")


def test_a_weight_that_is_lost_or_of_another_shape_is_named():
    source, written = nn.Sequential(nn.Linear(4, 2)), nn.Sequential(nn.Linear(4, 3, bias=False))
    assert compare_weights(source, written, 8) == [
        "0.weight is (3, 4), not (2, 4)",
        "0.bias is (0,), not (2,)",
    ]


def quantized(source):
    few = ["--samples", "2", "--held-out-rows", "2", "--length", "32", "--device", "cpu"]
    command = ["quant.py", str(source), "--format", "nf4", "--out", str(source.parent / "q"), *few]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command)
        quant.main()


def test_a_quantized_folder_is_verified_and_a_wrong_one_found(source, monkeypatch, capsys):
    quantized(source)
    assert "verified " in capsys.readouterr().out
    assert Tokenizer.load(source.parent / "q").chat_template == chat.CHATML_TEMPLATE
    written = json.loads((source.parent / "q/generation_config.json").read_text())
    assert written["eos_token_id"] == [3, 5]
    right = quant.NF4Linear.dequantize
    monkeypatch.setattr(quant.NF4Linear, "dequantize", lambda *args: right(*args) * 17 / 16)
    with pytest.raises(WrongExport, match="1.0.. of the source's"):
        quantized(source)
    monkeypatch.undo()
    monkeypatch.setattr(Tokenizer, "save", lambda tok, folder: None)
    (source.parent / "q/tokenizer_config.json").write_text("{}")  # the template is left out
    with pytest.raises(WrongExport, match="chat template"):
        quantized(source)


# -------------------------------------------------------------------------------------- lora merge
@pytest.fixture
def adapter(source):
    model = lora.apply(Transformer.from_pretrained(source), r=2)
    lora.save_adapter(model, source.parent / "a")
    return source.parent / "a"


def merged(source, adapter, monkeypatch):
    out = source.parent / "merged"
    arguments = ["merge", source, adapter, "--out", out, "--overwrite"]
    monkeypatch.setattr(sys, "argv", ["lora.py", *map(str, arguments)])
    lora.main()
    return out, Transformer.from_pretrained(out).config, Tokenizer.load(out)


def test_merging_keeps_the_bases_words(source, adapter, monkeypatch, capsys):
    said = {"temperature": 0.6, "eos_token_id": [5, 3]}
    (source / "generation_config.json").write_text(json.dumps(said))
    _, config, tok = merged(source, adapter, monkeypatch)
    assert config.eos_token_id == [5, 3] and config.generation == {"temperature": 0.6}
    assert tok.chat_template == chat.CHATML_TEMPLATE
    told = capsys.readouterr().out
    assert f"chat template of {source}" in told and "verified" in told


def test_merging_keeps_the_adapters_words_where_it_has_its_own(
    source, adapter, monkeypatch, capsys
):
    (adapter / "generation_config.json").write_text('{"eos_token_id": [4], "top_p": 0.9}')
    tok = Tokenizer.load(source)
    template = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + "
    template += "'<|im_end|>' + '\n' }}{% endfor %}"
    (adapter / "chat_template.jinja").write_text(template)
    out, config, again = merged(source, adapter, monkeypatch)
    assert config.eos_token_id == [tok.special["<|im_end|>"], 4]  # its end of a turn, too
    assert config.generation == {"top_p": 0.9} and again.chat_template == template
    told = capsys.readouterr().out
    assert f"tokenizer of {source}" in told and f"chat template of {adapter}" in told
    more = tok.with_special(["<|more|>"])  # the embedding has rows to spare
    more.save(adapter)
    assert merged(source, adapter, monkeypatch)[2].special["<|more|>"] == tok.vocab_size
    tok.with_special([f"<|{i}|>" for i in range(99)]).save(adapter)
    with pytest.raises(UserError, match="ids, the base has"):
        merged(source, adapter, monkeypatch)


def test_a_merge_that_loses_an_end_is_found(source, adapter, monkeypatch):
    right = hub.config_to_dict
    monkeypatch.setattr(hub, "config_to_dict", lambda config: right(config) | {"eos_token_id": 3})
    with pytest.raises(WrongExport, match=r"end ids \[5\] are lost"):
        merged(source, adapter, monkeypatch)
    assert read_tokenizer(source, None).chat_template
