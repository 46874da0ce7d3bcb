"""GGUF against llama.cpp (llama-cpp-python) and the gguf package: each opens the other's files."""

import random

import numpy as np
import pytest
import torch
from test_gguf import FAMILIES, SPLIT_TOKENIZERS, TEXT_PARTS, make_folder, relative_error

from formats import gguf
from model import Transformer
from tokenizer import Tokenizer

pytestmark = pytest.mark.peers
FTYPES = {
    "q4_0": 2,
    "q4_1": 3,
    "q8_0": 7,
    "q5_0": 8,
    "q5_1": 9,
    "q2_k": 10,
    "q3_k_m": 12,
    "q4_k_s": 14,
    "q4_k_m": 15,
    "q5_k_s": 16,
    "q5_k_m": 17,
    "q6_k": 18,
}


@pytest.fixture(scope="module")
def package():
    """The gguf package, llama.cpp's own reader and writer."""
    import gguf as theirs

    return theirs


def llama_cpp(path, **options):
    from llama_cpp import Llama

    return Llama(
        str(path),
        n_ctx=512,
        verbose=False,
        n_threads=1,
        n_threads_batch=1,
        type_k=0,
        type_v=0,
        **options,
    )


def logits_of(path, ids):
    llama = llama_cpp(path, logits_all=True)
    llama.eval(ids)
    out = torch.tensor(np.array(llama.scores[: len(ids)]))
    llama.close()
    return out


def llama_quantize(source, target, mix):
    import llama_cpp as lib

    params = lib.llama_model_quantize_default_params()
    params.ftype, params.nthread = FTYPES[mix], 1
    assert lib.llama_model_quantize(str(source).encode(), str(target).encode(), params) == 0


def random_ids(tok):
    return torch.randint(0, tok.vocab_size, (200,), generator=torch.Generator().manual_seed(1))


def our_logits(path, ids):
    model, _ = gguf.load(path)
    with torch.no_grad():
        return model(ids[None])[0]


FLOATS = [(family, "f32") for family in FAMILIES]
FLOATS += [(family, "f16") for family in ("llama", "gpt2", "qwen2", "qwen3")]


@pytest.mark.parametrize("family, mix", FLOATS)
def test_llama_cpp_computes_our_logits_over_200_tokens(family, mix, tmp_path):
    model, tok = make_folder(tmp_path / "m", family)
    gguf.write(tmp_path / "m", tmp_path / "m.gguf", mix)
    ids = random_ids(tok)
    expected = our_logits(tmp_path / "m.gguf", ids)
    if mix == "f32":
        with torch.no_grad():
            assert torch.equal(expected, model(ids[None])[0])
    limit = 2e-5
    if mix == "f16" or model.config.is_gpt2:  # ggml's GELU is a table of float16
        limit = 2e-3
    assert relative_error(logits_of(tmp_path / "m.gguf", ids.tolist()), expected) < limit


IN_FEW_BITS = [mix for mix in gguf.MIXES if mix not in ("f32", "f16")]
PACKED = [("llama", mix) for mix in IN_FEW_BITS]
PACKED += [("gpt2", "q4_k_m"), ("odd", "q4_k_m"), ("odd", "q4_0"), ("qwen3", "q4_k_m")]


@pytest.mark.parametrize("family, mix", PACKED)
def test_llama_cpp_computes_the_logits_of_our_dequantized_weights(family, mix, tmp_path):
    _, tok = make_folder(tmp_path / "m", family)
    gguf.write(tmp_path / "m", tmp_path / "m.gguf", mix)
    ids = random_ids(tok)
    expected = our_logits(tmp_path / "m.gguf", ids)
    error = logits_of(tmp_path / "m.gguf", ids.tolist()) - expected
    # llama.cpp rounds activations to 8 bits, we do not
    assert error.norm() < 2e-2 * expected.norm()


@pytest.mark.parametrize("mix", IN_FEW_BITS)
def test_llama_cpp_computes_the_logits_of_a_trained_model_in_every_type(mix, data_dir, tmp_path):
    gguf.write(data_dir / "stories260K", tmp_path / "s.gguf", mix)
    model, tok = gguf.load(tmp_path / "s.gguf")
    original = Transformer.from_pretrained(data_dir / "stories260K")
    ids = list(original.generate([tok.bos_id], 200, temperature=1.0))
    with torch.no_grad():
        expected = model(torch.tensor([ids]))[0]
    assert relative_error(logits_of(tmp_path / "s.gguf", ids), expected) < 2e-2


def test_stories260k_tells_the_same_story_in_llama_cpp(data_dir, tmp_path):
    gguf.write(data_dir / "stories260K", tmp_path / "s.gguf", "f32")
    llama, tok = llama_cpp(tmp_path / "s.gguf"), Tokenizer.load(data_dir / "stories260K")
    story = llama("Once upon a time", max_tokens=200, temperature=0)["choices"][0]["text"]
    model = Transformer.from_pretrained(data_dir / "stories260K")
    ids = list(model.generate(tok.encode("Once upon a time", bos=True), 200, temperature=0))
    assert story == tok.decode_bytes(ids).decode() and len(ids) == 200


# ---- the tokenizer


def fuzzed(n=1000):
    """Texts of all sorts: words, numbers, spaces, newlines, accents, other scripts, markup."""
    rng = random.Random(0)
    for i in range(n):
        yield "".join(rng.choices(TEXT_PARTS, k=rng.randint(1, 14)))


@pytest.mark.parametrize("name", SPLIT_TOKENIZERS)
def test_llama_cpp_gives_our_ids_to_a_thousand_texts(name, tmp_path, data_dir):
    tok = SPLIT_TOKENIZERS[name](data_dir)
    make_folder(tmp_path / "m", "tiny", tok)
    gguf.write(tmp_path / "m", tmp_path / "m.gguf", "f16")
    llama = llama_cpp(tmp_path / "m.gguf", vocab_only=True)
    _, _, back = gguf.read_gguf(tmp_path / "m.gguf")
    for text in fuzzed():
        ids = tok.encode(text)
        assert llama.tokenize(text.encode(), add_bos=False) == ids, text
        assert back.encode(text) == ids, text
        assert back.decode(ids) == tok.decode(ids)
    for i in [*tok.special.values(), *tok.added.values()]:
        name = back.decode([i]).encode()
        assert llama.tokenize(name, add_bos=False, special=True)[-1] == i
    assert llama.token_eos() == tok.eos_id
    assert llama.token_bos() == (tok.eos_id if tok.bos_id is None else tok.bos_id)


def test_llama_cpp_renders_our_chat_template_and_stops_at_its_end(tmp_path):
    from chat import CHATML_TEMPLATE, render

    tok = Tokenizer.train(TEXT_PARTS, 400)
    tok.chat_template = CHATML_TEMPLATE
    ends = [tok.eos_id, tok.special["<|im_end|>"]]
    make_folder(tmp_path / "m", "llama", tok, eos=ends)
    gguf.write(tmp_path / "m", tmp_path / "m.gguf", "f16")
    llama = llama_cpp(tmp_path / "m.gguf", vocab_only=True)
    assert llama.metadata["tokenizer.chat_template"] == CHATML_TEMPLATE
    assert llama.metadata["tokenizer.ggml.add_bos_token"] == "false"
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    ids, _ = render(tok, [{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    assert llama.tokenize(text.encode(), add_bos=True, special=True) == ids
    config, _, back = gguf.read_gguf(tmp_path / "m.gguf")
    assert config.eos_token_id == ends
    assert back.chat_template == CHATML_TEMPLATE


# ---- numbers, and files of others


def samples(columns=1024):
    torch.manual_seed(0)
    x = torch.randn(300, columns) * torch.rand(300, 1) * 0.1
    x[3] = 0
    x[5, :32] = 1.5
    x[6, :256] = -0.25
    x[7, :64] = 1e-30
    x[8] = x[8].abs()
    return x


@pytest.mark.parametrize("name", [n for n in gguf.BLOCK_TYPES if n != "F32"])
def test_every_type_decodes_and_the_simple_ones_encode_as_in_the_gguf_package(name, package):
    kind, theirs = gguf.BLOCK_TYPES[name], package.GGMLQuantizationType[name]
    row = kind.size((1024,))
    noise = np.random.default_rng(0).integers(256, size=(64, row), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = package.quants.dequantize(noise, theirs)
    ours = gguf.GGUFTensor(name, (64, 1024), torch.from_numpy(noise)).dequantize().numpy()
    assert np.array_equal(ours, expected, equal_nan=True)
    if kind.encode and not name.endswith("_K"):
        x = samples()
        expected = package.quants.quantize(x.numpy(), theirs).view(np.uint8)
        assert np.array_equal(gguf.encode_rows(x, name).numpy(), expected)


@pytest.mark.parametrize(
    "family, mix",
    [
        *(("llama", mix) for mix in FTYPES),
        ("gpt2", "q4_k_m"),
        ("gpt2", "q2_k"),
        ("odd", "q4_k_s"),
        ("odd", "q4_k_m"),
        ("odd", "q5_k_m"),
        ("untied", "q4_k_m"),
        ("untied", "q4_0"),
    ],
)
def test_llama_cpps_own_files_load_and_ours_choose_the_same_types(family, mix, tmp_path, package):
    """Same bytes for the simple types; for k-quants an error as small, mostly the same bytes."""
    make_folder(tmp_path / "m", family)
    gguf.write(tmp_path / "m", tmp_path / "f32.gguf", "f32")
    llama_quantize(tmp_path / "f32.gguf", tmp_path / "theirs.gguf", mix)
    config, state, tok = gguf.read_gguf(tmp_path / "theirs.gguf")
    f32_config, exact, _ = gguf.read_gguf(tmp_path / "f32.gguf")
    assert config == f32_config
    assert tok.encode("a b") == Tokenizer.load(tmp_path / "m").encode("a b")
    if not config.is_gpt2:  # there three of ours are one of theirs
        assert_the_package_reads_the_same(state, config, tmp_path / "theirs.gguf", package)
    if mix not in gguf.MIXES or family == "odd":  # ours fall back to Q8_0, theirs to Q5_0 too
        return
    gguf.write(tmp_path / "m", tmp_path / "ours.gguf", mix)
    _, ours, _ = gguf.read_gguf(tmp_path / "ours.gguf")
    for name, a in ours.items():
        b = state[name]
        assert a.type == b.type, (name, a.type, b.type)
        if a.type.endswith("_K"):
            weights = exact[name].dequantize()
            error_a, error_b = ((p.dequantize() - weights).norm() for p in (a, b))
            assert error_a < error_b * 1.002, (name, error_a / error_b)
            assert (a.data == b.data).float().mean() > 0.97
        else:
            assert torch.equal(a.data, b.data), name


def assert_the_package_reads_the_same(state, config, path, package):
    reference = {}
    for tensor in package.GGUFReader(path).tensors:
        reference[tensor.name] = package.quants.dequantize(tensor.data, tensor.tensor_type)
    for name, tensor in state.items():
        there = gguf.gguf_name(name, config)
        expected = torch.tensor(reference[there])
        expected = gguf.reorder_rows(expected, there, config, back=True)
        assert torch.equal(tensor.dequantize(), expected), name


def test_files_of_the_gguf_packages_writer_load(tmp_path, package):
    model, tok = make_folder(tmp_path / "m", "llama")
    gguf.write(tmp_path / "m", tmp_path / "ours.gguf", "f16")
    meta, tensors = gguf.open_gguf(tmp_path / "ours.gguf")
    out = package.GGUFWriter(tmp_path / "theirs.gguf", "llama")
    for key, value in meta.items():
        if key == "general.architecture":
            continue
        if isinstance(value, list):
            out.add_array(key, value)
        else:
            kinds = {bool: "bool", int: "uint32", float: "float32", str: "string"}
            getattr(out, f"add_{kinds[type(value)]}")(key, value)
    for name, t in tensors.items():
        out.add_tensor(
            name,
            t.data.numpy().view(np.float16 if t.type == "F16" else np.float32).reshape(t.shape),
        )
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    a_config, a_state, a_tok = gguf.read_gguf(tmp_path / "ours.gguf")
    b_config, b_state, b_tok = gguf.read_gguf(tmp_path / "theirs.gguf")
    assert a_config == b_config and a_tok.sha256 == b_tok.sha256
    assert all(torch.equal(tensor.data, b_state[name].data) for name, tensor in a_state.items())
    assert {f.name for f in package.GGUFReader(tmp_path / "ours.gguf").fields.values()} >= set(meta)
