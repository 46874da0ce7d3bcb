"""The tokenizer against HF tokenizers, transformers and mistral-common: merges, ids, files."""

import json
import random
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from test_tokenizer import CODE, PROSE, TEXT, corpus  # noqa: F401  (corpus is a fixture)

from formats.vocab import to_json
from tokenizer import PATTERNS, Tokenizer, normalize
from training import bpe

pytestmark = pytest.mark.peers
TEXTS = [
    CODE,
    PROSE,
    *(p.read_text(encoding="utf-8") for p in sorted(Path(__file__).parent.glob("*.py"))),
]


def hf_byte_level(pattern, vocab_size, special_tokens=(), texts=None, files=None):
    """HF tokenizers' own byte-level BPE of the same text."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    tok = tokenizers.Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tok.decoder = tokenizers.decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(special_tokens),
        show_progress=False,
    )
    if files:
        tok.train([str(f) for f in files], trainer)
    else:
        tok.train_from_iterator(texts, trainer)
    return tok


def assert_same_ids(ours, theirs, examples=150):
    """ours.encode(text) is theirs(text) for text of all sorts that spells no special token."""

    @settings(max_examples=examples, deadline=None)
    @given(TEXT)
    def same(text):
        for name in ours.special:
            text = text.replace(name, "")
        if not any(name in text for name in ours.special):
            assert ours.encode(text) == theirs(text)
            if ours.kind == "bytes":
                assert (
                    ours.encode_slowly(normalize(text, ours.normalizer)) == theirs(text)
                    or ours.added
                )

    same()
    for text in TEXTS[:3]:
        for name in ours.special:
            text = text.replace(name, "")
        assert ours.encode(text) == theirs(text)


def transformers_ids(folder):
    from transformers import AutoTokenizer

    tok = AutoTokenizer.from_pretrained(str(folder))
    return lambda text: tok.encode(text, add_special_tokens=False)


# ---- learning


@pytest.mark.parametrize("pattern", [*PATTERNS, r"[\p{L}\p{M}]+|\p{N}|[^\s\p{L}\p{M}\p{N}]+|\s+"])
@pytest.mark.parametrize("vocab_size", [300, 3000, 100_000])
def test_same_merges_and_ids_as_hf_from_texts(pattern, vocab_size):
    pattern = PATTERNS.get(pattern, pattern)
    specials = ["<PAD>", "<EOS>"]
    theirs = json.loads(hf_byte_level(pattern, vocab_size, specials, texts=TEXTS).to_str())["model"]
    ours = to_json(Tokenizer.train(TEXTS, vocab_size, pattern, specials))["model"]
    assert ours["merges"] == [m if isinstance(m, str) else " ".join(m) for m in theirs["merges"]]
    assert ours["vocab"] == theirs["vocab"]


@pytest.mark.parametrize("pattern", ["gpt2", "gpt4"])
def test_same_merges_as_hf_from_files(corpus, pattern, monkeypatch):  # noqa: F811
    monkeypatch.setattr(bpe, "BLOCK", 100_003)
    other = Path(__file__)
    theirs = json.loads(hf_byte_level(PATTERNS[pattern], 2000, files=[corpus, other]).to_str())[
        "model"
    ]["vocab"]
    assert (
        to_json(
            Tokenizer.train(
                files=[corpus, other], vocab_size=2000, pattern=pattern, special_tokens=[]
            )
        )["model"]["vocab"]
        == theirs
    )


def test_same_merges_as_hf_from_real_text(data_dir):
    files = sorted((data_dir / "wikitext-2").glob("*.txt"))
    theirs = json.loads(hf_byte_level(PATTERNS["gpt4"], 10_000, files=files).to_str())["model"][
        "vocab"
    ]
    ours = Tokenizer.train(files=files, vocab_size=10_000, special_tokens=[])
    assert to_json(ours)["model"]["vocab"] == theirs


# ---- our files, opened by transformers


def test_transformers_opens_what_we_save(tmp_path):
    from transformers import AutoTokenizer

    for pattern in PATTERNS:
        ours = Tokenizer.train(TEXTS, 1500, pattern)
        ours.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        ours.save(tmp_path / pattern)
        assert_same_ids(ours, transformers_ids(tmp_path / pattern), examples=60)
        theirs = AutoTokenizer.from_pretrained(str(tmp_path / pattern))
        for role in ("bos", "eos", "pad"):
            assert getattr(theirs, role + "_token_id") == getattr(ours, role + "_id") is not None
        assert theirs.chat_template == ours.chat_template and len(theirs) == ours.vocab_size
        assert theirs.encode("a<EOS>", add_special_tokens=False) == ours.encode("a", eos=True)
        ids = ours.encode(PROSE, bos=True, eos=True)
        assert theirs.decode(ids) == ours.decode(ids) == "<BOS>" + PROSE + "<EOS>"
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids, skip_special=True)


def test_transformers_opens_a_character_tokenizer(tmp_path):
    text = "First Citizen:\nBefore we proceed any further, hear me speak. Zürich 日本 🙂 ▁"
    ours = Tokenizer.char(text).with_special(["<EOS>"])
    ours.save(tmp_path)
    for part in (text, " h\n\n"):
        assert transformers_ids(tmp_path)(part) == ours.encode(part)
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(str(tmp_path)).decode(ours.encode(text)) == text


@pytest.mark.parametrize("prefix", [False, True])
def test_transformers_opens_gpt2_that_we_save(prefix, data_dir, tmp_path):
    shutil.copytree(data_dir / "gpt2-tokenizer", tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_prefix_space": prefix}))
    ours = Tokenizer.load(tmp_path)
    assert (ours.encode("a") == ours.encode(" a")) == prefix
    ours.save(tmp_path)
    assert_same_ids(ours, transformers_ids(tmp_path))


# ---- their files, opened by us


def save_hf(tok, folder, **config):
    folder.mkdir(exist_ok=True)
    tok.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **config})
    )
    return Tokenizer.load(folder)


def family(name):
    """A small tokenizer with the parts of that family's tokenizer.json."""
    import tokenizers
    from tokenizers import AddedToken, normalizers, pre_tokenizers

    tok = hf_byte_level(PATTERNS.get(name, PATTERNS["gpt2"]), 1200, texts=TEXTS)
    if name == "gpt2":
        tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tok.add_special_tokens(["<|endoftext|>"])
    elif name == "smollm":
        tok.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        tok.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    elif name == "qwen2":
        tok.normalizer = normalizers.NFC()
        tok.add_special_tokens(["<|im_start|>", "<|im_end|>"])
        tok.add_tokens(
            [AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)]
        )
    elif name == "llama3":
        content = json.loads(tok.to_str())  # all ways to make each token, and whole chunks first
        vocab = content["model"]["vocab"]
        content["model"]["merges"] = [
            [token[:i], token[i:]]
            for token in sorted(vocab, key=vocab.get)
            for i in range(1, len(token))
            if token[:i] in vocab and token[i:] in vocab
        ]
        content["model"]["ignore_merges"] = True
        tok = tokenizers.Tokenizer.from_str(json.dumps(content))
        tok.add_special_tokens(["<|begin_of_text|>", "<|eot_id|>"])
    return tok


@pytest.mark.parametrize("name", ["gpt2", "smollm", "qwen2", "llama3"])
def test_byte_level_families_have_the_ids_of_transformers(name, tmp_path):
    ours = save_hf(family(name), tmp_path)
    assert ours.fast is not None
    assert_same_ids(ours, transformers_ids(tmp_path))
    for text in ("<think>a</think> b  12 345\n", "Cafe\u0301 e\u0301"):
        assert ours.encode(text) == transformers_ids(tmp_path)(text)
    again = tmp_path / "again"
    ours.save(again)
    assert Tokenizer.load(again).sha256 == ours.sha256
    assert (again / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("prepend", ["normalizer", "always", "first", "never", "split"])
def test_sentencepiece_style_families_have_the_ids_of_transformers(prepend, tmp_path):
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    tok = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    scheme = {"normalizer": "always", "split": "always"}.get(prepend, prepend)
    tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tok.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=900,
            show_progress=False,
            limit_alphabet=120,
            special_tokens=["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)],
        ),
    )
    if prepend == "normalizer":  # Llama 2's file; the others are Mistral's newer ones
        tok.pre_tokenizer = None
        tok.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    elif prepend != "split":
        tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tok.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + [decoders.Strip(" ", 1, 0)] * (prepend != "never")
    )
    content = json.loads(tok.to_str())
    content["added_tokens"] = content["added_tokens"][:3]
    ours = save_hf(tokenizers.Tokenizer.from_str(json.dumps(content)), tmp_path)
    assert_same_ids(ours, transformers_ids(tmp_path))
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in (PROSE, " a  b ", "日本\x00🙂"):
        ids = ours.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)


def mistral_data():
    import mistral_common

    return Path(mistral_common.__file__).parent / "data"


@pytest.mark.parametrize(
    "name", ["tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3"]
)
def test_mistrals_sentencepiece_models_have_sentencepieces_ids(name, tmp_path):
    from sentencepiece import SentencePieceProcessor

    path = tmp_path / "tokenizer.model"
    path.write_bytes((mistral_data() / name).read_bytes())
    ours, theirs = Tokenizer.load(tmp_path), SentencePieceProcessor(model_file=str(path))
    assert_same_ids(ours, theirs.encode)
    assert (ours.vocab_size, ours.bos_id, ours.eos_id) == (theirs.get_piece_size(), 1, 2)
    ours.save(tmp_path / "json")  # and transformers opens what we make of it
    assert_same_ids(ours, transformers_ids(tmp_path / "json"), examples=60)
    assert Tokenizer.load(tmp_path / "json").encode(PROSE) == ours.encode(PROSE)


@pytest.mark.parametrize("name", ["tekken_240718.json", "tekken_240911.json"])
def test_tekken_files_have_mistral_commons_ids(name, tmp_path):
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    theirs = Tekkenizer.from_file(mistral_data() / name)
    ours = Tokenizer.load(mistral_data() / name)
    assert_same_ids(ours, lambda text: theirs.encode(text, bos=False, eos=False))
    assert ours.encode("hi", bos=True, eos=True) == theirs.encode("hi", bos=True, eos=True)
    assert ours.vocab_size == theirs.n_words


def test_no_user_text_makes_a_special_id_in_any_family(tmp_path):
    toks = [
        save_hf(family(name), tmp_path / name) for name in ("gpt2", "smollm", "qwen2", "llama3")
    ]
    toks.append(Tokenizer.load(mistral_data() / "tekken_240911.json"))
    for tok in toks:
        names, rng = list(tok.special), random.Random(0)
        for _ in range(50):
            text = "".join(rng.choices(names + [" ", "a", "<", "|", ">", "\n"], k=20))
            ids = tok.encode(text)
            assert not {*tok.special.values()} & {*ids} and tok.decode(ids) == text


# ---- every layout that transformers' own classes save


def made_by(name, folder):
    """A small tokenizer of transformers' class `name`, saved in the usual layout."""
    import transformers

    if name in ("Qwen2", "GPT2"):
        model = to_json(Tokenizer.train(TEXTS, 900, "qwen2" if name == "Qwen2" else "gpt2", []))
        model = model["model"]
        merges = [tuple(merge.split(" ")) for merge in model["merges"]]
        made = getattr(transformers, f"{name}Tokenizer")(vocab=model["vocab"], merges=merges)
    else:  # from SentencePiece models that Mistral publishes; v1 is Llama 2's but for its ids
        source = folder / "source"
        source.mkdir()
        version = "tokenizer.model.v1"
        if name == "Mistral":
            version = "mistral_instruct_tokenizer_240323.model.v3"
        (source / "tokenizer.model").write_bytes((mistral_data() / version).read_bytes())
        made = transformers.LlamaTokenizer.from_pretrained(str(source))
    extra = [transformers.AddedToken("<think>", special=False, normalized=False)]
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.add_tokens(extra)
    return made


def edit_json(path, **changes):
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content | changes), encoding="utf-8")


def without_tokenizer_json(made, folder):
    """The files of before tokenizer.json: vocab.json, merges.txt and who is special."""
    made._tokenizer.model.save(str(folder))
    (folder / "tokenizer.json").unlink()
    decoder = {}
    for i, token in made.added_tokens_decoder.items():
        decoder[i] = {"content": token.content, "special": token.special, "normalized": False}
    edit_json(folder / "tokenizer_config.json", added_tokens_decoder=decoder)


def with_added_tokens_json(made, folder):
    """Their older names: added_tokens.json, special_tokens_map.json. And bos and eos are asked for:
    with a tokenizer.json transformers 5 would not read that."""
    made._tokenizer.model.save(str(folder))
    (folder / "tokenizer.json").unlink()
    edit_json(folder / "tokenizer_config.json", add_bos_token=True, add_eos_token=True)
    for name, content in (
        ("added_tokens", made.get_added_vocab()),
        ("special_tokens_map", made.special_tokens_map),
    ):
        (folder / f"{name}.json").write_text(json.dumps(content))


LAYOUTS = {
    "as saved": lambda made, folder: None,
    "bos off": lambda made, folder: edit_json(
        folder / "tokenizer_config.json", add_bos_token=False
    ),
    "vocab and merges": without_tokenizer_json,
    "added_tokens.json": with_added_tokens_json,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["Qwen2", "GPT2", "Llama", "Mistral"])
def test_a_folder_of_transformers_gives_its_ids_in_every_layout(name, layout, tmp_path):
    from transformers import AutoTokenizer

    if layout in ("vocab and merges", "added_tokens.json") and name != "GPT2":
        pytest.skip("these have a tokenizer.json or a SentencePiece model")
    made = made_by(name, tmp_path)
    folder = tmp_path / "made"
    made.save_pretrained(str(folder))
    LAYOUTS[layout](made, folder)
    theirs, ours = AutoTokenizer.from_pretrained(str(folder)), Tokenizer.load(folder)
    rng = random.Random(0)
    parts = [*"aé'  \n\t1_日🙂", *PROSE.split()[:40], "<think>", " the", "\r\n", "I'LL", "e\u0301"]
    for n in range(500):
        text = "".join(rng.choices(parts, k=rng.randint(0, 12)))
        assert ours.encode_prompt(text) == theirs(text).input_ids, repr(text)
    for role in ("bos", "eos", "pad"):
        assert getattr(ours, f"{role}_id") == getattr(theirs, f"{role}_token_id")
