"""GGUF: what is written comes back, and damaged files are refused in one line."""

import struct
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import within

from common import UserError
from engine import native
from engine.runner import StepBatch
from formats import gguf
from generate import Engine
from model import Config, Transformer
from tokenizer import PATTERNS, Tokenizer

LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=50000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=128,
)
SIZE = dict(
    model_type="llama",
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=512,
)
GPT2 = SIZE | dict(
    model_type="gpt2",
    num_key_value_heads=4,
    norm_eps=1e-5,
    rope={},
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
)
FAMILIES = {
    "llama": SIZE,
    "untied": SIZE | dict(tie_word_embeddings=False),
    "gpt2": GPT2,
    "gpt2-untied": GPT2 | dict(tie_word_embeddings=False, intermediate_size=768),
    "biases": SIZE | dict(qkv_bias=True, out_bias=True, mlp_bias=True),
    "odd": SIZE
    | dict(
        hidden_size=96, intermediate_size=160, head_dim=24
    ),  # rows of 96 and 160: no multiples of 256
    "llama3.1": SIZE | dict(rope=LLAMA3),
    "mistral": SIZE | dict(model_type="mistral", head_dim=48),
    "qwen2": SIZE | dict(model_type="qwen2", qkv_bias=True),
    "qwen3": SIZE | dict(model_type="qwen3", head_dim=32, tie_word_embeddings=False),
    "tiny": SIZE
    | dict(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=32,
    ),
}
TEXT_PARTS = [
    "Hello",
    " world",
    " the",
    " a",
    "'s",
    "'LL",
    "n't",
    " 1234567",
    "42",
    " 3.14",
    "  ",
    "   ",
    "\n",
    "\n\n\n",
    " \n ",
    "\t",
    "\r\n",
    "...",
    "?!",
    " (x)",
    "foo_bar",
    "==",
    "</s>",
    "<s>",
    "<|im_start|>",
    "<EOS>",
    "é",
    "Zürich",
    "naïve",
    "日本語",
    "한국어",
    "Привет",
    "مرحبا",
    "🙂",
    "👩‍👩‍👧",
    "ﬁ",
    "½",
    "²",
    "e\u0301",
    "\u3000",
    "\xa0",
    "▁",
    "𝔘",
    "\x00",
    "ᚠ",
    "I",
    "A",
    "ß",
    "_",
    "-",
    ",",
    "`",
    " $",
]


def texts():
    return [
        p.read_text(encoding="utf-8")
        for p in sorted(Path(__file__).parent.parent.glob("test_*.py"))[:4]
    ] + TEXT_PARTS * 3


def train(pattern, **options):
    return lambda data_dir: Tokenizer.train(texts(), 700, pattern, **options)


def smollm(data_dir):
    tok = Tokenizer.train(texts(), 700, "gpt2")
    return Tokenizer(
        "bytes", tok.vocab, tok.merges, patterns=[r"\p{N}", PATTERNS["gpt2"]], special=tok.special
    )


def with_added_tokens(data_dir):
    tok = Tokenizer.train(texts(), 700, "qwen2")
    return Tokenizer(
        "bytes",
        tok.vocab,
        tok.merges,
        patterns=tok.patterns,
        special=tok.special,
        added={"<think>": 700, "==": 701, "???": 705},
    )


SPLIT_TOKENIZERS = {
    **{name: train(name) for name in ("gpt2", "gpt4", "llama3", "qwen2")},
    "smollm": smollm,
    "added": with_added_tokens,
    "GPT-2's own": lambda data_dir: Tokenizer.load(data_dir / "gpt2-tokenizer" / "vocab.bpe"),
    "SentencePiece": lambda data_dir: Tokenizer.load(data_dir / "stories260K"),
}


def relative_error(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def make_folder(folder, family="llama", tok=None, eos=None):
    """A random model of that family (or fields of Config), saved with a tokenizer -> both."""
    tok = tok or Tokenizer.train(TEXT_PARTS, 400)
    torch.manual_seed(0)
    config = Config(
        **(FAMILIES[family] if isinstance(family, str) else family),
        vocab_size=tok.vocab_size + 8,
        eos_token_id=eos or tok.eos_id,
        bos_token_id=tok.bos_id,
    )
    if config.model_type == "mistral":
        config.sliding_window = 300
        config.sliding_layers = (0, 1, 2)
    model = Transformer(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p.normal_(std=0.1)
            else:
                p.normal_(std=0.3 if "embed_tokens" in name else 0.03)
            if "norm" in name and name.endswith("weight"):
                p.add_(1.0)
    model.save_pretrained(folder)
    tok.save(folder)
    return model, tok


# ---- numbers


@pytest.mark.parametrize(
    "bits, group", [(4, 16), (4, 32), (4, 64), (2, 32), (2, 4), (1, 32), (1, 1)]
)
def test_unpack_undoes_pack_and_takes_low_bits_first(bits, group):
    q = torch.randint(0, 1 << bits, (5, 256), dtype=torch.uint8)
    assert torch.equal(gguf.unpack_bits(gguf.pack_bits(q, bits, group), bits, group), q)
    first = gguf.pack_bits(torch.arange(256).remainder(1 << bits)[None], bits, group)[0, 0]
    assert first & (1 << bits) - 1 == 0 and first >> bits & (1 << bits) - 1 == group % (1 << bits)


# Relative error of a bell curve of weights. One bit more halves it.
ERRORS = {
    "F32": 0,
    "F16": 3e-4,
    "BF16": 2e-3,
    "Q8_0": 0.006,
    "Q6_K": 0.018,
    "Q5_K": 0.037,
    "Q4_K": 0.075,
    "Q4_0": 0.090,
}


def there_and_back(x, name):
    return gguf.GGUFTensor(name, x.shape, gguf.encode_rows(x, name)).dequantize()


@pytest.mark.parametrize("name", ERRORS)
def test_quantized_weights_keep_their_error(name):
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)) * 0.02
    error = there_and_back(x, name) - x
    assert error.norm() <= ERRORS[name] * x.norm()


@pytest.mark.parametrize("name", ERRORS)
def test_zeros_and_constants_stay_what_they_are(name):
    for value in (0.0, 0.5, -0.5):
        x = torch.full((1, 256), value)
        error = (there_and_back(x, name) - x).abs().max()
        rounded = value and name in ("Q8_0", "Q6_K", "Q4_K", "Q5_K")
        assert error < 5e-3 if rounded else error == 0
    x = torch.cat((torch.zeros(1, 256), torch.full((1, 256), 1e-30), torch.randn(1, 256)), 1)
    assert there_and_back(x, name).isfinite().all()


CODED = [name for name, kind in gguf.BLOCK_TYPES.items() if kind.block > 1]


def any_blocks(kind, rows, blocks):
    """Random bytes, but finite float16 scales."""
    data = torch.randint(256, (rows, blocks, kind.bytes), dtype=torch.uint8)
    at = 0
    for field, width in kind.layout.items():
        if field in "dm":
            data[:, :, at : at + 2] = torch.tensor([0, 30], dtype=torch.uint8)
        at += width
    return data.view(rows, -1)


@pytest.mark.parametrize("name", CODED)
def test_codes_scales_and_zero_points_are_the_weights(name):
    """Of any bytes with finite scales, groups of one value included."""
    kind = gguf.BLOCK_TYPES[name]
    if kind.encode:
        x = torch.randn(16, 512) * torch.tensor([1.0, 1e-3]).repeat(8)[:, None]
        x[3, :64] = 0.25
        x[4, 100:300] = 0
        data = gguf.encode_rows(x, name)
    else:
        data = any_blocks(kind, 16, 512 // kind.block)
    packed = gguf.GGUFTensor(name, (16, 512), data)
    codes, scale, zero, group, _, bits = gguf.PackedLinear(packed).groups()
    assert bits == (4 if name[1] in "234" else 8) and group == 512 // scale.size(1)
    assert codes.dtype == torch.uint8 and int(codes.max()) < 1 << bits
    weights = (codes.view(16, scale.size(1), -1) - zero[:, :, None]) * scale[:, :, None]
    assert torch.allclose(weights.view(16, 512), packed.dequantize(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("mix", ["f32", "f16", "q8_0", "q4_0", "q4_k_m", "q6_k"])
def test_the_engine_multiplies_what_lies_in_the_file(tmp_path, mix):
    """Nothing is quantized again; activations are rounded to 8 bits, and no matrix is in floats."""
    torch.manual_seed(0)
    model = Transformer(Config("llama", 320, 256, 512, 2, 4, 2, 64, 64)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(std=0.05)
            else:
                p.fill_(1)
    model.save_pretrained(tmp_path)
    Tokenizer.train(["some text"], 260, special_tokens=["<|endoftext|>"]).save(tmp_path)
    gguf.write(tmp_path, tmp_path / "x.gguf", mix)
    engine = Engine(tmp_path / "x.gguf", "cpu")
    twin, _ = gguf.load(tmp_path / "x.gguf")
    ids = torch.randint(256, (40,)).tolist()
    batch = StepBatch()
    batch.add([0, 1, 2], ids, 0, range(40))
    with torch.inference_mode():
        engine.runner.allocate(4)
        got = engine.runner(batch)
        expected = twin(torch.tensor([ids]))[0]
    limit = 1e-3 if mix in ("f32", "f16") else 0.02
    assert (got - expected).norm() < limit * expected.norm()
    matrices = [p for n, p in twin.named_parameters() if p.ndim > 1 and "embed" not in n]
    weights = sum(p.numel() for p in matrices)
    most = {"f32": 4, "f16": 2, "q4_0": 0.7, "q4_k_m": 1.1}.get(mix, 1.3)
    assert engine.runner.forward.weight_bytes < most * weights + 9e5  # and the embedding
    if mix.startswith("q"):
        with pytest.raises(UserError, match="packed already"):
            Engine(tmp_path / "x.gguf", "cpu", quant="int4")


def test_an_engine_without_cpp_computes_the_same_with_torch(tmp_path, monkeypatch):
    """q, k and v are one product where they are of one type, and three where they are not."""

    def missing():
        raise native.Unavailable("there is no compiler")

    model, _ = make_folder(tmp_path / "m")
    ids = torch.randint(model.config.vocab_size, (40,)).tolist()
    batch = StepBatch()
    batch.add([0, 1, 2], ids, 0, range(40))
    monkeypatch.setattr(native, "library", missing)
    for mix in ("q4_0", "q4_k_m"):
        gguf.write(tmp_path / "m", tmp_path / "x.gguf", mix)
        engine = Engine(tmp_path / "x.gguf", "cpu")
        twin, _ = gguf.load(tmp_path / "x.gguf")
        with torch.inference_mode():
            engine.runner.allocate(4)
            assert relative_error(engine.runner(batch), twin(torch.tensor([ids]))[0]) < 1e-5


def test_the_mix_is_llama_cpps():
    """Of Q4_K_M the first and last eighth and every third layer between get six bits."""
    config = Config("llama", num_hidden_layers=16, tie_word_embeddings=False)
    six = []
    for i in range(16):
        if gguf.type_in_mix(f"blk.{i}.attn_v.weight", (256, 512), "q4_k_m", config) == "Q6_K":
            six.append(i)
    assert six == [0, 1, 4, 7, 10, 13, 14, 15]
    assert gguf.type_in_mix("output.weight", (1000, 512), "q4_0", config) == "Q6_K"
    assert gguf.type_in_mix("blk.3.attn_norm.weight", (512,), "q4_k_m", config) == "F32"


def test_rows_that_a_type_does_not_divide_get_one_that_does():
    assert gguf.type_that_fits("Q4_K", 512) == "Q4_K" and gguf.type_that_fits("Q4_K", 576) == "Q8_0"
    assert gguf.type_that_fits("Q4_0", 96) == "Q4_0" and gguf.type_that_fits("Q4_0", 65) == "F16"
    assert gguf.type_that_fits("Q6_K", 65) == "F16" and gguf.type_that_fits("F32", 65) == "F32"


# ---- there and back


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_comes_back_bit_for_bit(family, tmp_path):
    model, tok = make_folder(tmp_path / "m", family)
    gguf.write(tmp_path / "m", tmp_path / "m.gguf", "f32")
    again, tok_again = gguf.load(tmp_path / "m.gguf")
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], t) for name, t in model.state_dict().items())
    ids = torch.arange(100)[None]
    with torch.no_grad():
        assert relative_error(again(ids), model(ids)) < 1e-6
    ends = (again.config.eos_token_id, again.config.bos_token_id)
    assert ends == (tok.eos_id, tok.bos_id) == (tok_again.eos_id, tok_again.bos_id)
    again.save_pretrained(tmp_path / "again")  # and is a folder like any other
    assert Transformer.from_pretrained(tmp_path / "again").num_params() == model.num_params()


@pytest.mark.parametrize("name", SPLIT_TOKENIZERS)
def test_a_tokenizer_comes_back_with_its_ids(name, tmp_path, data_dir):
    tok = SPLIT_TOKENIZERS[name](data_dir)
    tok.chat_template = "{{ messages }}"
    make_folder(tmp_path / "m", "tiny", tok)
    gguf.write(tmp_path / "m", tmp_path / "m.gguf", "q8_0")
    back = gguf.read_gguf(tmp_path / "m.gguf")[2]
    for text in ["".join(TEXT_PARTS), *TEXT_PARTS]:
        ids = tok.encode(text)
        assert back.encode(text) == ids
        assert back.decode(ids) == tok.decode(ids)
    assert back.special == tok.special
    assert back.added == tok.added
    assert back.chat_template == tok.chat_template
    for i in range(min(back.vocab_size, tok.vocab_size)):
        assert back.token_bytes(i) == tok.token_bytes(i)


def test_a_bias_stays_beside_a_packed_weight(tmp_path):
    model, _ = make_folder(tmp_path / "m", "gpt2")
    gguf.write(tmp_path / "m", tmp_path / "m.gguf", "q8_0")
    again, _ = gguf.load(tmp_path / "m.gguf", keep_packed=True)
    for ours, packed in zip(model.layers[1].modules(), again.layers[1].modules(), strict=True):
        if isinstance(packed, gguf.PackedLinear):
            assert torch.equal(packed.bias, ours.bias)


def test_packed_tensors_are_the_files_bytes(tmp_path):
    make_folder(tmp_path / "m", "llama")
    gguf.write(tmp_path / "m", tmp_path / "m.gguf", "q4_k_m")
    _, state, _ = gguf.read_gguf(tmp_path / "m.gguf")
    plain = gguf.load(tmp_path / "m.gguf", dtype=torch.bfloat16)[0].state_dict()
    assert all(torch.equal(p.dequantize(torch.bfloat16), plain[name]) for name, p in state.items())
    assert {p.type for p in state.values()} == {"F32", "Q4_K", "Q6_K"}


def gguf_command(*args):
    command = [sys.executable, "-m", "formats.gguf", *args]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_command_writes_warns_and_shows(tmp_path):
    make_folder(tmp_path / "m", "odd")
    made = gguf_command(tmp_path / "m", "--type", "q4_k_m", "--out", tmp_path / "x.gguf")
    assert made.returncode == 0
    warning = "blk.2.ffn_down.weight: rows of 160 do not divide by 256, so Q6_K becomes Q8_0"
    assert warning in made.stderr
    shown = gguf_command("show", tmp_path / "x.gguf")
    assert "general.architecture" in shown.stdout
    assert "bits a weight" in shown.stdout
    for args, message in (
        ([tmp_path / "m", "--type", "q4"], "unknown type 'q4'"),
        ([tmp_path / "m", tmp_path / "y.gguf"], "name a model folder, with --type and --out, or"),
        (["show"], "show and a .gguf alone"),
        (["show", tmp_path / "x.gguf", "--type", "f16"], "show and a .gguf alone"),
        (["show", tmp_path / "no.gguf"], "No such file"),
    ):
        failed = gguf_command(*args)
        assert failed.returncode == 2
        assert message in failed.stderr
        assert failed.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "out, name",
    [
        ("Llama-3.2-1B", "Llama-3.2-1B.gguf"),
        ("Qwen2.5-0.5B.gguf", "Qwen2.5-0.5B.gguf"),
        ("v1.0/", "v1.0.gguf"),
        ("a.b/c", "a.b/c.gguf"),
        ("a.b/c.gguf.bin", "a.b/c.gguf.bin.gguf"),
    ],
)
def test_what_out_names_is_written_whole(out, name):
    assert gguf.gguf_path(out) == Path(name)


def test_a_gguf_is_named_after_the_whole_folder_also_after_dot(tmp_path, monkeypatch):
    folder = tmp_path / "Qwen2.5-0.5B-Instruct"
    make_folder(folder, "tiny")
    for model, out in (
        (str(folder), folder.parent),
        (f"{folder}/", folder.parent),
        (".", folder),
        ("../Qwen2.5-0.5B-Instruct", folder.parent),
        ("./.", folder),
    ):
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["gguf", model, "--type", "f16"])
        gguf.main()
        written = out / "Qwen2.5-0.5B-Instruct-f16.gguf"
        assert gguf.open_gguf(written)[0]["general.name"] == "Qwen2.5-0.5B-Instruct"
        written.unlink()
    assert not [*folder.glob(".*")]


def test_whether_a_prompt_begins_with_bos_goes_with_the_file(tmp_path):
    make_folder(tmp_path / "m", "tiny")
    for said, before in ((None, [2]), (False, []), (True, [2])):
        tok = Tokenizer.load(tmp_path / "m")
        tok.chat_template = "{{ messages }}"
        if said is not None:
            tok.config["add_bos_token"] = said
        tok.save(tmp_path / "m")
        gguf.write(tmp_path / "m", tmp_path / "m.gguf", "q8_0")
        for path in (tmp_path / "m", tmp_path / "m.gguf"):
            assert Engine(path, "cpu").encode("Hello") == before + tok.encode("Hello")


def test_ends_and_defaults_of_sampling_go_with_the_file(tmp_path):
    model, _ = make_folder(tmp_path / "m", "tiny", eos=[3, 5, 7])
    model.config.generation = {"temperature": 0.6, "top_k": 20, "repetition_penalty": 1.1}
    model.save_pretrained(tmp_path / "m")
    gguf.write(tmp_path / "m", tmp_path / "m.gguf", "q8_0")
    engine = Engine(tmp_path / "m.gguf", "cpu")
    assert engine.eos == {3, 5, 7}
    assert engine.sampling_defaults == model.config.generation


def split(path, tensors_of):
    """A GGUF -> its parts beside it, as llama-gguf-split writes them; tensors_of: [names]."""
    meta, tensors = gguf.open_gguf(path)
    count = len(tensors_of)
    parts = []
    for number, names in enumerate(tensors_of):
        own = {"split.no": number, "split.count": count, "split.tensors.count": len(tensors)}
        parts.append(path.with_name(f"{path.stem}-{number + 1:05}-of-{count:05}.gguf"))
        plan = planned({name: tensors[name] for name in names})
        gguf.write_container(parts[-1], own if number else meta | own, plan)
    return parts


@pytest.mark.parametrize("first_empty", [False, True])
def test_a_split_gguf_is_read_with_its_neighbours(first_empty, good, tmp_path):
    path = tmp_path / "Llama-3.2-1B.gguf"
    path.write_bytes(good)
    names = list(gguf.open_gguf(path)[1])
    shares = [[], names] if first_empty else [names[:2], names[2:5], names[5:]]
    parts = split(path, shares)
    expected = gguf.load(path)[0].state_dict()
    for part in parts:  # any of them
        model, tok = gguf.load(part)
        assert tok is not None
        assert all(torch.equal(model.state_dict()[name], t) for name, t in expected.items())
    renamed = parts[-1].rename(tmp_path / "x.gguf")
    count = len(parts)
    lacking = f"one of {count} parts, which lacks"
    refused(renamed, renamed.read_bytes(), f"{lacking} x-00001-of-{count:05}.gguf beside it")
    refused(parts[0], parts[0].read_bytes(), f"{lacking} {parts[-1].name} beside it")


def test_a_tensor_in_two_parts_of_a_split_gguf_is_refused(good, tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(good)
    names = list(gguf.open_gguf(path)[1])
    with pytest.raises(UserError, match=f"00002.gguf has {names[0]}, which a part before"):
        gguf.load(split(path, [names, names[:1]])[0])


def test_what_other_programs_write_for_none_is_read(good, tmp_path):
    """One file that was split before has 0 parts; an id that there is not is -1 in 32 bits."""
    path = tmp_path / "m.gguf"
    path.write_bytes(good)
    meta, tensors = gguf.open_gguf(path)
    none = {f"tokenizer.ggml.{key}_token_id": (1 << 32) - 1 for key in ("padding", "eos")}
    gguf.write_container(path, meta | none | {"split.count": 0}, planned(tensors))
    assert gguf.read_gguf(path)[0].eos_token_id is None


def test_no_name_in_a_file_steers_the_terminal(good, tmp_path, capsys):
    path = tmp_path / "x.gguf"
    path.write_bytes(good)
    meta, tensors = gguf.open_gguf(path)
    plan = planned(tensors)
    plan.append(gguf.PlannedTensor("a\x1b[2J", "F32", (1,), partial(bytes, 4)))
    gguf.write_container(path, meta | {"\x1b]0;": 1}, plan)
    gguf.show_gguf(path)
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and r"\x1b]0; 1" in shown and r"a\x1b[2J F32" in shown
    refused(path, path.read_bytes(), r"a\\x1b\[2J is not part of this model")


def test_a_default_of_sampling_that_is_not_known_is_named(good, tmp_path, capsys):
    path = tmp_path / "m.gguf"
    path.write_bytes(good)
    meta, tensors = gguf.open_gguf(path)
    gguf.write_container(path, meta | {"general.sampling.mirostat": 2}, planned(tensors))
    gguf.load(path)
    assert "ignored: 'general.sampling.mirostat'" in capsys.readouterr().err


# ---- what cannot be written


def test_models_and_tokenizers_that_llama_cpp_has_no_way_to_run_are_refused(tmp_path, capsys):
    for change, message in (
        (dict(model_type="qwen2", qkv_bias=True, head_dim=16), "needs 4 heads"),
        (dict(model_type="qwen3", rope=LLAMA3), "only in Llama models"),
        (dict(rope=dict(rope_type="linear", rope_theta=1e4, factor=4.0)), "'linear' cannot be"),
    ):
        make_folder(tmp_path / "m", SIZE | change)
        with pytest.raises(UserError, match=message):
            gguf.write(tmp_path / "m", tmp_path / "x.gguf", "f16")
    for tok, message in (
        (Tokenizer.char("abc"), "character tokenizer"),
        (Tokenizer.train(TEXT_PARTS, 300, r"\p{L}+|\s+|\S"), "no pre-tokenizer"),
    ):
        make_folder(tmp_path / "t", "tiny", tok)
        with pytest.raises(UserError, match=message):
            gguf.write(tmp_path / "t", tmp_path / "x.gguf", "f16")
    assert not (tmp_path / "x.gguf").exists()
    make_folder(
        tmp_path / "w",
        "mistral",
        Tokenizer.train(TEXT_PARTS, 300, "tekken", special_tokens=["<s>"]),
    )
    gguf.write(tmp_path / "w", tmp_path / "w.gguf", "f16")
    warned = capsys.readouterr().err
    assert "no sliding window" in warned and "ASCII case" in warned
    assert gguf.read_gguf(tmp_path / "w.gguf")[0].max_position_embeddings == 300


def test_a_tokenizer_that_normalizes_is_written_with_a_warning(tmp_path, capsys):
    """As Qwen's does."""
    tok = Tokenizer.train(TEXT_PARTS, 300, "qwen2")
    tok.normalizer = [("unicode", "NFC")]
    make_folder(tmp_path / "m", "tiny", tok)
    assert Tokenizer.load(tmp_path / "m").normalizer == tok.normalizer
    gguf.write(tmp_path / "m", tmp_path / "m.gguf", "f16")
    assert "does not normalize" in capsys.readouterr().err
    assert gguf.read_gguf(tmp_path / "m.gguf")[2].encode("Hello") == tok.encode("Hello")


@pytest.mark.parametrize(
    "value, mix", [(float("nan"), "f32"), (float("inf"), "q8_0"), (1e5, "f16"), (-1e5, "q4_k_m")]
)
def test_weights_that_the_type_cannot_hold_are_refused_by_name(value, mix, tmp_path):
    model, _ = make_folder(tmp_path / "m", "llama")
    with torch.no_grad():
        model.layers[1].mlp.up_proj.weight[3, 5] = value
    model.save_pretrained(tmp_path / "m")
    with pytest.raises(UserError, match="blk.1.ffn_up.weight has values up to"):
        gguf.write(tmp_path / "m", tmp_path / "x.gguf", mix)
    assert not list(tmp_path.glob("x.gguf*"))


# ---- damaged and hostile files


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    make_folder(folder / "m", "tiny")
    gguf.write(folder / "m", folder / "m.gguf", "q8_0")
    return (folder / "m.gguf").read_bytes()


def planned(tensors):
    return [gguf.PlannedTensor(n, t.type, t.shape, t.data.numpy) for n, t in tensors.items()]


def refused(path, data, match="x.gguf"):
    """Reading it is one UserError of one line, soon."""
    path.write_bytes(data)
    start = time.process_time()
    with pytest.raises(UserError, match=match) as error:
        gguf.read_gguf(path)
    assert (
        time.process_time() - start < 2
        and "\n" not in str(error.value)
        and len(str(error.value)) < 2000
    )


def test_a_file_cut_anywhere_is_refused(good, tmp_path):
    for n in [*range(0, 200, 7), *range(200, len(good) - 32, len(good) // 60), len(good) - 33]:
        refused(tmp_path / "x.gguf", good[:n])


def test_a_file_with_any_byte_changed_loads_or_is_refused(good, tmp_path):
    rng, header = np.random.default_rng(0), good.index(b"token_embd.weight") + 3000
    for _ in range(400):
        data = bytearray(good)
        for at in rng.integers(0, min(header, len(good)), rng.integers(1, 4)):
            data[at] = rng.choice([0, 1, 127, 128, 255, rng.integers(256)])
        (tmp_path / "x.gguf").write_bytes(data)
        try:
            gguf.read_gguf(tmp_path / "x.gguf")
        except UserError as error:
            assert "\n" not in str(error)


def container(meta=(), tensors=(), n_meta=None, n_tensors=None, tail=b"", version=3):
    """A file made by hand: meta [(key, typed bytes)], tensors [(name, dims, type, offset)]."""
    n_meta, n_tensors = n_meta or len(meta), n_tensors or len(tensors)
    out = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_meta)
    out += b"".join(gguf.text_bytes(key) + value for key, value in meta)
    for name, dims, number, offset in tensors:
        out += gguf.text_bytes(name) + struct.pack(
            f"<I{len(dims)}QIQ", len(dims), *dims, number, offset
        )
    return out + bytes(-len(out) % 32) + tail


def one_value(code, *values, tail=b""):
    """A file with one key, whose typed value is as struct packs it."""
    return container([("a", struct.pack("<" + code, *values) + tail)])


def one_tensor(dims, number=0, offset=0):
    return container([], [("t", dims, number, offset)])


def two_tensors(name, offset):
    tensors = [("t", [32], 0, 0), (name, [32], 0, offset)]
    return container([], tensors, tail=bytes(256))


def aligned_to(n):
    return container([("general.alignment", struct.pack("<II", 4, n))])


def test_hostile_lengths_are_refused_before_memory_is_taken(tmp_path):
    four_million = struct.pack("<IIQ", 9, 8, 4 << 20) + bytes(32 << 20)  # empty texts
    numbers = struct.pack("<IIQ", 9, 0, 1 << 20) + bytes(1 << 20)
    for data, match in [
        (container([("tokenizer.ggml.tokens", four_million)]), "list of 4,194,304 values"),
        (container([(f"a{i}", numbers) for i in range(60)]), "list of"),
        (container(n_meta=1 << 60), "keys"),
        (container(n_tensors=1 << 60), "tensors"),
        (container(version=1), "version 1"),
        (container(version=3 << 24), "version"),
        (one_value("IQ", 8, 4 << 30, tail=b"a"), "4,294,967,296 bytes"),
        (one_value("IQ", 8, 1 << 20, tail=b"a"), "announces 1,048,576 bytes more"),
        (one_value("IIQ", 9, 8, 1 << 60), "list of"),
        (one_value("IIQ", 9, 8, 1 << 21), "announces"),
        (one_value("IIQ", 9, 4, 1 << 21), "announces 8,388,608 bytes"),
        (one_value("IIQIQ", 9, 9, 1, 9, 1), "9 is a list"),
        (one_value("I", 99), "type 99"),
        (container([("a", struct.pack("<IB", 7, 1))] * 2), "twice"),
        (aligned_to(24), "alignment 24"),
        (aligned_to(0), "alignment 0"),
        (one_tensor([32, 1 << 55], 8), "passes the end"),
        (one_tensor([1 << 63, 1 << 63, 1 << 63]), "passes the end"),
        (one_tensor([32, 0], 8), "empty"),
        (one_tensor([31], 8), "no whole blocks"),
        (one_tensor([32], 4), "unknown type 4"),
        (one_tensor([32], 20), "unknown type IQ4_NL"),
        (one_tensor([32], 39), "unknown type MXFP4"),
        (one_tensor([32], offset=1 << 63), "passes the end"),
        (one_tensor([32], offset=5) + bytes(256), "overlaps"),
        (one_tensor([1] * 5), "5 dimensions"),
        (two_tensors("u", offset=0), "overlaps"),
        (two_tensors("t", offset=128), "twice"),
        (container(), "architecture 'None'"),
        (b"GGML" + bytes(60), "do not begin"),
        (b"", "0 bytes"),
    ]:
        with within(memory=128 << 20):
            refused(tmp_path / "x.gguf", data, match)


@pytest.mark.parametrize(
    "key, value, match",
    [
        ("llama.block_count", 1 << 30, "1,024"),
        ("llama.block_count", 1 << 31, "1,024"),
        ("llama.block_count", 2, "blk.1.attn_norm.weight is missing"),
        ("llama.embedding_length", "wide", "wide"),
        ("llama.attention.head_count", 0, "heads"),
        ("llama.attention.key_length", 1 << 30, "one size"),
        ("llama.feed_forward_length", 1 << 30, "expected int"),
        ("llama.rope.freq_base", 0, "above 0"),
        ("llama.rope.scaling.factor", float("inf"), "inf"),
        ("general.architecture", ["llama"], "llama"),
        ("llama.rope.dimension_count", 8, "one size"),
        ("llama.rope.scaling.type", "longrope", "longrope"),
        ("llama.attention.layer_norm_rms_epsilon", float("nan"), "nan"),
        ("llama.expert_count", 8, "experts"),
        ("llama.vocab_size", 7, None),
        ("general.architecture", "mamba", "mamba"),
        ("tokenizer.ggml.pre", "mine", "pre-tokenizer 'mine'"),
        ("tokenizer.ggml.model", "t5", "t5"),
        ("tokenizer.ggml.tokens", ["a"] * 408, "twice"),
        ("tokenizer.ggml.merges", ["a b c"], "not two tokens"),
        ("tokenizer.ggml.merges", ["a zz"], "merge 0"),
        ("tokenizer.ggml.token_type", [1, 1, 1], "3 types"),
        ("tokenizer.ggml.token_type", [7] * 397, "token 0 is of type 7"),
        ("general.alignment", 32.0, "alignment is 32.0"),
        ("split.count", "2", "split.count is '2'"),
    ],
)
def test_metadata_that_makes_no_sense_is_refused(key, value, match, good, tmp_path):
    (tmp_path / "good.gguf").write_bytes(good)
    meta, tensors = gguf.open_gguf(tmp_path / "good.gguf")
    gguf.write_container(tmp_path / "x.gguf", meta | {key: value}, planned(tensors))
    if key == "llama.vocab_size":  # not believed: the rows of the embedding are counted
        config, _, _ = gguf.read_gguf(tmp_path / "x.gguf")
        assert config.vocab_size == len(meta["tokenizer.ggml.tokens"])
    else:
        refused(tmp_path / "x.gguf", (tmp_path / "x.gguf").read_bytes(), match)


def test_the_largest_published_rope_theta_comes_back(tmp_path):
    theta = 45845162328.0  # of a Llama 3 with a context of four million
    make_folder(tmp_path / "m", SIZE | dict(rope=dict(rope_type="default", rope_theta=theta)))
    gguf.write(tmp_path / "m", tmp_path / "m.gguf", "f16")
    assert gguf.read_gguf(tmp_path / "m.gguf")[0].rope["rope_theta"] == pytest.approx(theta)


def test_missing_extra_and_misshapen_tensors_are_named(good, tmp_path):
    (tmp_path / "good.gguf").write_bytes(good)
    meta, tensors = gguf.open_gguf(tmp_path / "good.gguf")
    plan = [tensor for tensor in planned(tensors) if tensor.name != "output_norm.weight"]
    plan.append(gguf.PlannedTensor("blk.0.extra.weight", "F32", (1,), partial(bytes, 4)))
    gguf.write_container(tmp_path / "x.gguf", meta, plan)
    refused(
        tmp_path / "x.gguf",
        (tmp_path / "x.gguf").read_bytes(),
        "2 faults: blk.0.extra.weight is not part of this model; output_norm.weight is missing",
    )
    shape = tensors["output_norm.weight"].shape
    plan[-1] = gguf.PlannedTensor(
        "output_norm.weight", "F32", (1, *shape), partial(bytes, 4 * shape[0])
    )
    gguf.write_container(tmp_path / "x.gguf", meta, plan)
    refused(
        tmp_path / "x.gguf",
        (tmp_path / "x.gguf").read_bytes(),
        "1 faults: output_norm.weight is .* expected",
    )
