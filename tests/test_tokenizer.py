"""The tokenizer against its plain forms, tiktoken and sentencepiece, and bad input."""

import json
import os
import random
import subprocess
import sys
import time
import unicodedata
from dataclasses import replace

import pytest
import regex
import tiktoken
from conftest import within
from hypothesis import example, given, settings
from hypothesis import strategies as st

import tokenizer
from common import UserError, cli
from deploy.docker_test import ROOT
from formats.vocab import CHAR_TO_BYTE, to_json
from tokenizer import PATTERNS, Tokenizer, main
from training import bpe, corpora

# Characters that every Unicode table in use agrees on: newer ones are letters to one library and
# unassigned to another.
OLD = st.characters(exclude_categories=["Cn", "Co", "Cs"], max_codepoint=0x1FFFF).filter(
    lambda c: unicodedata.ucd_3_2_0.category(c) == unicodedata.category(c) or ord(c) >= 0x1F300
)
STRANGE = st.sampled_from(
    [
        "\x00",
        "\x1c",
        "\x85",
        "\u00a0",
        "\u3000",
        "\u2028",
        "\ufeff",
        "\r\n",
        "\n\n",
        "   ",
        " \t ",
        "'ſ",
        "'LL",
        "🙂",
        "👩‍👩‍👧",
        "🇨🇭",
        "e\u0301",
        "ﬁ",
        "½",
        "١٢٣",
        "'S",
        "'ll",
        "it's",
        "1234567",
        "ſ",
        "K",
        "<|endoftext|>",
        "<PAD>",
        "<EOS>",
        "<|im_start|>",
        "<s>",
        "<0x0A>",
        "▁",
        "Ġ",
        "日本語",
        "한국어",
    ]
)
TEXT = st.lists(
    st.one_of(st.text(OLD, max_size=8), STRANGE, st.text("ab '\n1.", max_size=12)), max_size=12
).map("".join)
LONE = st.lists(
    st.one_of(st.just("\ud83d"), st.just("\ude42"), st.just("\udcff"), st.text(OLD, max_size=4)),
    max_size=6,
).map("".join)
PROSE = (
    "The tokenizer's job is to turn text into numbers, and back; it's done 1,000,000 times a day. "
    "Zürich, naïve, 日本語のテキスト, привет мир!\n\n    def f(x):\n        return x + 1\n"
) * 20
SCRIPT = ROOT / "tokenizer.py"
CODE = SCRIPT.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def ours():
    return Tokenizer.train([PROSE, CODE], 600)


@pytest.fixture(scope="module")
def gpt2(data_dir):
    return Tokenizer.load(data_dir / "gpt2-tokenizer" / "vocab.bpe")


@pytest.fixture(scope="module")
def llama(data_dir):
    return Tokenizer.load(data_dir / "stories260K" / "tokenizer.model")


@pytest.fixture
def corpus(tmp_path):
    """A file of 0.4 MB, without blank lines, and with lines long enough to be cut."""
    words = random.Random(0).choices(PROSE.split() + ["don't", "x=1;", "中文，", "🙂"], k=60_000)
    lines = [" ".join(words[i : i + 12]) for i in range(0, len(words), 12)]
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


# ---- learning


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.text("ab", min_size=1, max_size=20) | st.text("abcdef", min_size=1, max_size=6),
        st.integers(1, 5),
        min_size=1,
        max_size=20,
    ),
    st.integers(0, 80),
)
@example({"aaaaaaa": 1, "aaaa": 2, "abababab": 1}, 20)
def test_fast_trainer_learns_what_the_ten_lines_learn(chunks, n_merges):
    assert bpe.learn_merges(chunks, n_merges) == tokenizer.learn_merges_simply(chunks, n_merges)


def test_fast_trainer_learns_what_the_ten_lines_learn_from_prose():
    chunks = bpe.count_chunks([PROSE], [], PATTERNS["gpt4"])
    assert bpe.learn_merges(chunks, 300) == tokenizer.learn_merges_simply(chunks, 300)


def test_a_word_ends_with_its_file(tmp_path):
    paths = [tmp_path / name for name in ("a.txt", "b.txt")]
    for path, text in zip(paths, ("foo", "bar\n")):
        path.write_text(text)
    assert bpe.count_chunks([], paths, PATTERNS["gpt2"]) == {"foo": 1, "bar": 1, "\n": 2}


def test_counts_above_two_to_the_31_do_not_overflow():
    assert bpe.learn_merges(
        {"the": 1 << 40, "then": 1, "zzz": 1 << 33}, 2
    ) == tokenizer.learn_merges_simply({"the": 1 << 40, "then": 1, "zzz": 1 << 33}, 2)


@pytest.mark.parametrize("pattern", ["gpt2", "gpt4", r"\w+|\W"])
def test_same_tokenizer_for_any_number_of_processes_and_any_block_size(
    corpus, pattern, monkeypatch
):
    made = {Tokenizer.train(files=[corpus], vocab_size=400, pattern=pattern, processes=1).sha256}
    for block, processes in ((100_003, 2), (30_011, 3)):
        monkeypatch.setattr(bpe, "BLOCK", block)
        monkeypatch.setattr(corpora, "BLOCK", block)
        made.add(
            Tokenizer.train(
                files=[corpus], vocab_size=400, pattern=pattern, processes=processes
            ).sha256
        )
    lines = corpus.read_text(encoding="utf-8").splitlines(keepends=True)
    made.add(Tokenizer.train(lines, 400, pattern).sha256)
    assert len(made) == 1


def test_long_texts_are_counted_in_parts_without_changing_the_chunks(monkeypatch):
    for pattern in PATTERNS.values():
        whole = bpe.count_chunks([PROSE], [], pattern)
        with monkeypatch.context() as m:
            m.setattr(bpe, "BLOCK", 100)
            assert len(list(bpe.parts_of_texts([PROSE], pattern))) > 10
            assert bpe.count_chunks([PROSE], [], pattern) == whole


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(max_codepoint=127), max_size=60))
def test_ascii_split_is_the_unicode_split(text):
    for pattern in PATTERNS.values():
        assert bpe.ascii_splitter(pattern)(text) == regex.findall(pattern, text)


def test_training_stops_early_and_says_how_far_the_text_goes(capsys):
    tok = Tokenizer.train(["abab"], 1000)
    assert (
        tok.vocab_size == 256 + 6 + 2
        and f"--vocab-size {tok.vocab_size}" in capsys.readouterr().err
    )


def test_special_tokens_have_the_first_ids():
    tok = Tokenizer.train([PROSE, CODE], 300, special_tokens=["<A>", "<B>"])
    assert tok.special == {"<A>": 0, "<B>": 1} and tok.decode([1, 0]) == "<B><A>"
    assert tok.decode(tok.encode(PROSE)) == PROSE and tok.vocab_size == 300
    assert sorted(tok.vocab.values()) == list(range(2, 300))


def test_no_merge_spells_a_special_token():
    tok = Tokenizer.train(["<EOS><EOS>" * 50], 300, pattern=r"\S+", special_tokens=["<EOS>"])
    assert (
        b"<EOS>" not in tok.vocab
        and tok.decode(tok.encode("<EOS>")) == "<EOS>"
        and 0 not in tok.encode("<EOS>")
    )


@pytest.mark.slow
def test_wikitext_10k_takes_under_a_second_and_a_half_of_cpu_time(data_dir, tmp_path):
    before = os.times()
    run("train", "--data", data_dir / "wikitext-2", "--vocab-size", 10_000, "--out", tmp_path)
    after = os.times()  # CPU time of all processes: wall time depends on what else is running
    assert (
        after.children_user + after.children_system - before.children_user - before.children_system
        < 1.5
    )
    assert Tokenizer.load(tmp_path).vocab_size == 10_000


# ---- encoding


@pytest.mark.parametrize("pattern", PATTERNS)
def test_plain_and_fast_encoders_agree(pattern):
    tok = Tokenizer.train([PROSE, CODE], 1000, pattern)
    assert tok.fast is not None

    @settings(max_examples=40, deadline=None)
    @given(TEXT)
    def agree(text):
        assert tok.encode_slowly(text) == tok.encode(text)

    agree()


@settings(max_examples=60, deadline=None)
@given(TEXT | LONE)
def test_gpt2_ids_are_tiktokens(gpt2, reference, text):
    assert gpt2.encode(text) == reference.encode_ordinary(text)
    assert gpt2.encode_slowly(bpe.well_formed(text)) == reference.encode_ordinary(text)


@pytest.fixture(scope="module")
def reference(data_dir):
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    folder = data_dir / "gpt2-tokenizer"
    ranks = data_gym_to_mergeable_bpe_ranks(str(folder / "vocab.bpe"), str(folder / "encoder.json"))
    return tiktoken.Encoding(
        "gpt2", pat_str=PATTERNS["gpt2"], mergeable_ranks=ranks, special_tokens={}
    )


def test_the_gpt2_fast_path_is_proven_and_in_use(gpt2):
    assert gpt2.fast is not None and gpt2.vocab_size == 50257 and gpt2.eos_id == 50256
    assert gpt2.encode("Hello world") == [15496, 995]


@settings(max_examples=60, deadline=None)
@given(TEXT)
def test_pieces_are_sentencepieces(llama, sentencepiece, text):
    assert llama.encode(text) == sentencepiece.encode(text)


@pytest.fixture(scope="module")
def sentencepiece(data_dir):
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_file=str(data_dir / "stories260K" / "tokenizer.model"))


@settings(max_examples=60, deadline=None)
@given(TEXT)
def test_text_survives_and_never_makes_a_special_id(ours, gpt2, llama, text):
    for tok in (ours, gpt2, llama):
        if tok is llama:
            text = text.replace("▁", "_")  # which SentencePiece uses for a space
        ids = tok.encode(text)
        assert tok.decode(ids) == text
        assert not {*tok.special.values()} & {*ids}
        stream = tok.stream()
        assert "".join(map(stream.push, ids)) + stream.flush() == text
        assert (
            "".join(tok.token_bytes(i).decode("latin1") for i in ids)
            .encode("latin1")
            .endswith(text.encode())
        )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 599), max_size=30))
def test_streaming_equals_decoding_for_any_ids(ours, ids):
    stream = ours.stream()
    pushed = [stream.push(i) for i in ids]
    assert "".join(pushed) + stream.flush() == ours.decode(ids)


def test_streaming_holds_back_half_a_character(ours):
    stream, (a, b, c, d) = ours.stream(), [ours.vocab[bytes([b])] for b in "🙂".encode()]
    assert [stream.push(i) for i in (a, b, c, d)] == ["", "", "", "🙂"]
    assert (
        stream.push(a) == ""
        and stream.push(ours.special["<EOS>"]) == "\ufffd<EOS>"
        and stream.flush() == ""
    )


def test_specials_are_shown_or_hidden(ours):
    ids = ours.encode("hi", bos=True, eos=True)
    assert ours.decode(ids) == "<BOS>hi<EOS>" and ours.decode(ids, skip_special=True) == "hi"
    assert ours.token_bytes(ours.bos_id) == b"" and ids[0] == ours.bos_id and ids[-1] == ours.eos_id


@pytest.mark.parametrize(
    "text",
    ["a" * 1_000_000, " " * 1_000_000, "\n" * 300_000, "!" * 300_000, "🙂" * 100_000, ""],
    ids=["letter", "space", "newline", "punctuation", "emoji", "nothing"],
)
def test_a_megabyte_of_one_character_takes_seconds(ours, text):
    start = time.process_time()
    ids = ours.encode(text)
    assert ours.decode(ids) == text and time.process_time() - start < 5
    assert ours.encode_slowly(text[:10_000]) == ours.encode(text[:10_000])


def ids_in_parts(tok, path, monkeypatch):
    """The ids of a file as data.py makes them: part by part, cut where the tokenizer lets it."""
    monkeypatch.setattr(corpora, "BLOCK", 10_001)
    parts = list(corpora.documents([path], tok.cuts))
    assert len(parts) > 10 or not tok.cuts
    ids = []
    for text, begins, _ in parts:
        ids += tok.encode_bytes(text, "first" if begins else "inside")
    return ids


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_file_in_parts_has_the_ids_of_the_whole_text(corpus, pattern, monkeypatch):
    tok = Tokenizer.train([PROSE, CODE], 1000, pattern)
    assert ids_in_parts(tok, corpus, monkeypatch) == tok.encode_bytes(corpus.read_bytes())


def test_a_file_of_pieces_in_parts_has_the_ids_of_the_whole_text(corpus, llama, monkeypatch):
    assert ids_in_parts(llama, corpus, monkeypatch) == llama.encode_bytes(corpus.read_bytes())


def test_a_file_of_pieces_is_not_cut_behind_an_added_token(tmp_path, llama, monkeypatch):
    tok = replace(llama, added={"<think>": llama.vocab_size})
    (tmp_path / "x").write_text("<think> foo " * 5000)
    assert ids_in_parts(tok, tmp_path / "x", monkeypatch) == tok.encode("<think> foo " * 5000)


def test_a_file_is_cut_only_where_the_pattern_would(tmp_path, monkeypatch):
    tok = Tokenizer.train(["ab ab ab\n" * 9], 270, pattern=r"[^\n]+|\n")
    assert tok.cuts == ()
    (tmp_path / "x").write_text("ab ab ab " * 20_000)
    assert ids_in_parts(tok, tmp_path / "x", monkeypatch) == tok.encode("ab ab ab " * 20_000)


@pytest.mark.parametrize("pattern", ["[a-z]+", r"(?=b)|[a-z]+|\s+", r"\w+(?= )", r"\b|\w+"])
def test_text_a_pattern_leaves_out_is_kept(pattern):
    tok = Tokenizer.train(["abc bab 123"], 262, pattern=pattern)
    for text in ("ab, cd! 日本", "abc bab", "1" * 2000):
        assert tok.decode(tok.encode(text)) == text


# ---- characters


def test_a_character_tokenizer_has_one_id_per_character(tmp_path):
    tok = Tokenizer.char("hello world\n").with_special(["<EOS>"])
    assert (
        tok.vocab_size == 10
        and tok.encode("\n") == [0]
        and tok.decode(tok.encode("low\nroll")) == "low\nroll"
    )
    tok.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.sha256 == tok.sha256 and again.kind == "chars"
    assert again.encode("dew", eos=True) == tok.encode("dew") + [9]
    assert again.with_special(["<PAD>"]).pad_id == 10
    for known in (again, replace(again, special={}, added=again.special)):
        with pytest.raises(UserError, match="'<EOS>' is a token already"):
            known.with_special(["<PAD>", "<EOS>"])
    with pytest.raises(
        UserError, match=r"2 of the text's characters not in this tokenizer's 9: 'z', 'é'"
    ):
        again.encode("zé hello")


# ---- files


def test_a_saved_tokenizer_is_the_same_tokenizer(ours, gpt2, llama, tmp_path):
    for i, tok in enumerate((ours, gpt2, llama)):
        tok.chat_template = "{{ messages }}"
        tok.save(tmp_path / str(i))
        again = Tokenizer.load(tmp_path / str(i))
        assert (
            again.sha256 == tok.sha256
            and again.special == tok.special
            and again.vocab_size == tok.vocab_size
        )
        assert (again.bos_id, again.eos_id, again.pad_id) == (tok.bos_id, tok.eos_id, tok.pad_id)
        assert again.chat_template == "{{ messages }}" and again.encode(PROSE) == tok.encode(PROSE)
        again.save(tmp_path / "copy")
        assert (tmp_path / "copy/tokenizer.json").read_bytes() == (
            tmp_path / str(i) / "tokenizer.json"
        ).read_bytes()
        assert not list(tmp_path.glob("*/*.tmp"))


def test_the_hash_tells_tokenizers_apart(ours):
    others = [
        Tokenizer.train([PROSE, CODE], 599),
        Tokenizer.train([PROSE, CODE], 600, "gpt2"),
        Tokenizer.train(
            [PROSE, CODE], 600, special_tokens=["<PAD>", "<UNK>", "<BOS>", "<EOS>", "<x>", "<y>"]
        ),
    ]
    assert len({ours.sha256, *(o.sha256 for o in others)}) == 4
    assert Tokenizer.train([PROSE, CODE], 600).sha256 == ours.sha256


def test_rank_files_are_read(gpt2, tmp_path):
    import base64

    path = tmp_path / "r50k_base.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for t, i in gpt2.vocab.items()))
    tok = Tokenizer.load(path)
    assert tok.encode(PROSE) == gpt2.encode(PROSE) == tok.encode_slowly(PROSE)
    assert {p: new for p, (_, new) in tok.merges.items()} == {
        p: new for p, (_, new) in gpt2.merges.items()
    }
    path.rename(tmp_path / "my.tiktoken")
    with pytest.raises(UserError, match="does not say how text is split"):
        Tokenizer.load(tmp_path / "my.tiktoken")
    assert Tokenizer.load(tmp_path / "my.tiktoken", pattern="gpt2").encode(PROSE) == gpt2.encode(
        PROSE
    )


def test_a_tokenizer_survives_pickling(ours):
    import pickle

    assert pickle.loads(pickle.dumps(ours)).encode(PROSE) == ours.encode(PROSE)


def tokenizer_json(**changes):
    content = to_json(Tokenizer.train(["abcd abab"], 265))
    for key, value in changes.items():
        part, _, key = key.rpartition("__")
        (content[part] if part else content)[key] = value
    return content


@pytest.mark.parametrize(
    "tokens, merges, ids",
    [
        (
            ["bc", "ab", "abc"],
            ["b c", "a b", "ab c"],
            ["a", "bc"],
        ),  # tiktoken: abc, a token that no merge reaches
        (["bc", "ab"], ["a b", "b c"], ["ab", "c"]),  # tiktoken: a bc, by id and not by rank
    ],
)
def test_merges_that_tiktoken_would_not_follow_get_the_plain_encoder(tmp_path, tokens, merges, ids):
    content = tokenizer_json(added_tokens=[], post_processor=None)
    vocab = {c: i for i, c in enumerate([*CHAR_TO_BYTE, *tokens])}
    content["model"] |= {"vocab": vocab, "merges": merges}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tok = Tokenizer.load(tmp_path)
    assert tok.fast is None and tok.encode("abc") == [vocab[token] for token in ids]


def test_added_tokens_that_are_not_special_are_matched_in_text(tmp_path):
    content = tokenizer_json()
    content["added_tokens"] += [
        {"id": 300, "content": "<think>", "special": False},
        {"id": 301, "content": "<think>>", "special": False},
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tok = Tokenizer.load(tmp_path)
    ids = tok.encode("a<think>b<think>><PAD>")
    assert 300 in ids and 301 in ids and tok.special["<PAD>"] not in ids
    assert (
        tok.decode(ids) == "a<think>b<think>><PAD>"
        and tok.token_bytes(300) == b"<think>"
        and tok.vocab_size == 302
    )


BAD = {
    "duplicate ids": (lambda c: c["model"]["vocab"].update({"a": 70, "b": 70}), "same id: 70"),
    "a huge id": (lambda c: c["model"]["vocab"].update({"zzz": 1 << 40}), "not a whole number"),
    "an id that is text": (
        lambda c: c["model"]["vocab"].update({"zzz": "7"}),
        "not a whole number",
    ),
    "a negative id": (lambda c: c["model"]["vocab"].update({"zzz": -1}), "not a whole number"),
    "a merge of nothing": (
        lambda c: (c["model"]["vocab"].update({"": 999}), c["model"]["merges"].append(["", "a"])),
        "merge",
    ),
    "a merge of what is no token": (
        lambda c: c["model"]["merges"].append("x yz"),
        "no ordinary token",
    ),
    "a merge that makes a special token": (
        lambda c: (
            c["model"]["vocab"].update({"<P": 998, "AD>": 999}),
            c["model"]["merges"].append("<P AD>"),
        ),
        "no ordinary token",
    ),
    "a character for no byte": (
        lambda c: c["model"]["vocab"].update({"日": 999}),
        "stands for no byte",
    ),
    "another model": (lambda c: c["model"].update(type="WordPiece"), "'WordPiece'"),
    "dropout": (lambda c: c["model"].update(dropout=0.1), "dropout"),
    "another pre-tokenizer": (
        lambda c: c.update(pre_tokenizer={"type": "BertPreTokenizer"}),
        "'BertPreTokenizer'",
    ),
    "another split": (
        lambda c: c["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"),
        "'Removed'",
    ),
    "another normalizer": (lambda c: c.update(normalizer={"type": "Precompiled"}), "'Precompiled'"),
    "another decoder": (lambda c: c.update(decoder={"type": "WordPiece"}), "'WordPiece'"),
    "a broken pattern": (
        lambda c: c["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": "(["}),
        "regular expression",
    ),
    "two ids for one token": (lambda c: c["added_tokens"][0].update(id=5000), "two ids"),
    "a special token listed twice": (
        lambda c: c["added_tokens"].append({**c["added_tokens"][0], "id": 5000}),
        "twice",
    ),
    "merges that are numbers": (
        lambda c: c["model"].update(merges=[1, 2]),
        "is not a tokenizer.json",
    ),
    "no model": (lambda c: c.pop("model"), "is not a tokenizer.json"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_tokenizer_json_is_refused_in_one_line(name, tmp_path):
    content = tokenizer_json()
    change, message = BAD[name]
    change(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as error:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{",
        "[" * 100_000,
        '{"model": {"a": 1, "a": 2}}',
        "null",
        "\x00\x01",
        '{"model": 3}',
    ],
    ids=range(8),
)
def test_files_that_are_no_tokenizer_are_refused(content, tmp_path):
    for name in ("tokenizer.json", "tekken.json", "tokenizer.model", "x.tiktoken", "vocab.bpe"):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError):
            Tokenizer.load(tmp_path / name)


def split_by(pattern):
    """A Split step of a tokenizer.json."""
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}


def json_with(**changes):
    """The files of a folder whose tokenizer.json has these parts."""
    return lambda: {"tokenizer.json": json.dumps(tokenizer_json(**changes))}


def added(text, count=1):
    return [{"id": 1000 + i, "content": text + str(i), "special": True} for i in range(count)]


def tekken(n_special):
    config = {"default_num_special_tokens": n_special, "default_vocab_size": 300, "pattern": "."}
    return {"tekken.json": json.dumps({"config": config, "vocab": []})}


def chain(step, count, key):
    return {"type": "Sequence", key: [step] * count}


DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
HOSTILE = {
    "100,000 splits": (
        json_with(pre_tokenizer=chain(split_by("a|b"), 100_000, "pretokenizers")),
        "more than 64 pretokenizers",
    ),
    "a pattern bomb": (
        json_with(pre_tokenizer=split_by("(?:a+)+[^a_]")),
        "takes too long on 2,001 characters",
    ),
    "a long pattern": (json_with(pre_tokenizer=split_by("a|" * 10**6 + "b")), "8,192"),
    "a pattern of a billion": (json_with(pre_tokenizer=split_by("(?:a{1000}b){0999999}")), "8,192"),
    "doubling": (json_with(normalizer=chain(DOUBLE, 60, "normalizers")), "characters of one"),
    "one large replacement": (
        json_with(normalizer=DOUBLE | {"content": "a" * 10**7}),
        "makes 10,000,000 characters of one",
    ),
    "a replacement of nothing": (
        json_with(normalizer=DOUBLE | {"pattern": {"String": ""}}),
        "makes inf characters of one",
    ),
    "a replacement that is a number": (json_with(normalizer=DOUBLE | {"content": 5}), "TypeError"),
    "an added token of 20 MB": (
        json_with(added_tokens=added("a" * (20 << 20)), post_processor=None),
        "20,971,5",
    ),
    "100,000 added tokens": (
        json_with(added_tokens=added("t", 100_000), post_processor=None),
        "more than 80,000",
    ),
    "16M special tokens": (lambda: tekken(1 << 24), "should have 16777216"),
    "16M lines": (lambda: {"x.tiktoken": "YQ== 1\n" + "\n" * (1 << 24)}, "1,048,576 lines"),
    "a template that is a list of numbers": (
        lambda: json_with()() | {"tokenizer_config.json": '{"chat_template": [5]}'},
        "tokenizer_config.json",
    ),
    "a template that is a number": (
        lambda: json_with()() | {"tokenizer_config.json": '{"chat_template": 5}'},
        "chat_template is no text",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_tokenizer_is_refused_in_under_two_seconds_and_500_mb(name, tmp_path):
    make, message = HOSTILE[name]
    for file, text in make().items():
        (tmp_path / file).write_text(text)
    path = tmp_path / file if file.endswith(".tiktoken") else tmp_path
    with within(), pytest.raises(UserError, match=message) as error:
        Tokenizer.load(path, "gpt4")
    assert "\n" not in str(error.value) and len(str(error.value)) < 2000


def test_a_pattern_that_explodes_on_a_text_is_stopped():
    split = tokenizer.splitter("(?:xyz|x|y|z)+[^x-z_]")  # fine on runs of what is usual
    with within(), pytest.raises(UserError, match="takes too long on 301 characters"):
        split("xyz" * 100 + "_")


def test_ten_million_merges_of_garbage_are_refused_at_once(tmp_path):
    content = json.dumps(tokenizer_json(model__merges=[]))
    for n, message, seconds in (
        (10_000_000, "66 MB, more than", 0.5),
        (1_000_000, "merge 0 of 'x'", 3),
    ):
        merges = '"x yz",' * (n - 1) + '"x yz"'
        (tmp_path / "tokenizer.json").write_text(
            content.replace('"merges": []', f'"merges": [{merges}]')
        )
        start = time.process_time()
        with pytest.raises(UserError, match=message):
            Tokenizer.load(tmp_path)
        assert time.process_time() - start < seconds


# ---- bad input to training, and the commands


def run(*arguments):
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)],
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        encoding="utf-8",
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"texts": ["abc"], "vocab_size": 200},
            "200 is too small or large: 256 bytes and 6 special tokens need 262",
        ),
        ({"texts": [], "vocab_size": 300}, "no text to learn from"),
        ({"texts": ["", ""], "vocab_size": 300}, "no text to learn from"),
        ({"texts": ["abc"], "vocab_size": 300, "pattern": "(["}, "not a regular expression"),
        ({"texts": ["abc"], "vocab_size": 300, "pattern": "a*"}, "must match no empty text"),
        ({"texts": ["abc"], "vocab_size": 300, "pattern": "gtp-4"}, "unknown pattern 'gtp-4': use"),
        ({"texts": ["abc"], "vocab_size": 300, "pattern": "(?x)a # b"}, r"no \(\?x\)"),
        (
            {"texts": ["abc"], "vocab_size": 300, "pattern": "(?:" * 999 + ")" * 999},
            "not a regular",
        ),
        ({"texts": ["abc"], "vocab_size": 300, "pattern": "(?r)a+"}, "characters, or changes them"),
        ({"texts": ["abc"], "vocab_size": 300, "pattern": r"a\Kb"}, "characters, or changes them"),
        ({"texts": ["abc"], "vocab_size": 1 << 21}, "too small or large: .* there may be 1048576"),
        (
            {"texts": ["abc"], "vocab_size": 300, "special_tokens": ["<A>", "<A>"]},
            "'<A>' is listed twice",
        ),
        (
            {"texts": ["abc"], "vocab_size": 300, "special_tokens": ["a"]},
            "'a' is .* shorter than 2",
        ),
    ],
)
def test_bad_training_input_is_refused_in_one_line(arguments, message):
    with pytest.raises(UserError, match=message):
        Tokenizer.train(**arguments)


def test_commands_refuse_with_one_line_and_status_two(tmp_path, monkeypatch, capsys):
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 10)
    (tmp_path / "text.txt").write_bytes(b"some text\n" * 10)
    for arguments in (
        ["train", "--data", tmp_path / "empty.txt"],
        ["train", "--data", tmp_path / "binary.txt"],
        ["train", "--data", tmp_path / "none.txt"],
        ["show", "x", "--tokenizer", tmp_path / "none"],
        ["train", "--data", tmp_path / "text.txt", "--vocab-size", 10],
    ):
        monkeypatch.setattr(sys, "argv", ["tokenizer.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli(main)
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1, (
            said
        )


def test_commands_train_on_invalid_utf8_and_show_and_compare(tmp_path):
    text = "Grüezi mitenand, wie geits?\n".encode() + b"\xff\xfe\x80 latin1: \xe9\n"
    (tmp_path / "text.txt").write_bytes(text * 100)
    done = run(
        "train", "--data", tmp_path / "text.txt", "--vocab-size", 280, "--out", tmp_path / "tok"
    )
    assert done.returncode == 0 and "280 ids" in done.stdout
    done = run("show", "Grüezi 🙂", "--tokenizer", tmp_path / "tok")
    assert done.returncode == 0 and "bytes per token" in done.stdout
    done = run(
        "compare",
        tmp_path / "tok",
        tmp_path / "tok/tokenizer.json",
        "--data",
        tmp_path / "text.txt",
    )
    assert done.returncode == 0 and done.stdout.count("| 280 |") == 2


def test_a_tokenizer_of_a_few_characters_can_be_compared(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("12 21\n")
    Tokenizer.char("12 \n").save(tmp_path)
    tokenizer.compare_command([str(tmp_path), "--data", str(tmp_path / "text.txt")])
    assert "| 4 | 6 | 1.000 |" in capsys.readouterr().out


def test_importing_the_tokenizer_does_not_import_torch():
    done = subprocess.run(
        [sys.executable, "-c", "import sys, tokenizer; print('torch' in sys.modules)"],
        text=True,
        check=True,
        capture_output=True,
        cwd=SCRIPT.parent,
    )
    assert done.stdout.strip() == "False", done.stderr  # a second of start-up and 200 MB


def test_special_tokens_can_be_added_and_survive_the_folder(tmp_path):
    for tok in (Tokenizer.train(["a b c ab abc"], 280), Tokenizer.char("abc ")):
        more = tok.with_special(["<|new|>", "<|other|>"])
        assert more.special == tok.special | {
            "<|new|>": tok.vocab_size,
            "<|other|>": tok.vocab_size + 1,
        }
        assert more.encode("abc ab") == tok.encode("abc ab") and more.sha256 != tok.sha256
        tok.save(tmp_path)
        for grown in (
            more,
            Tokenizer.load(tmp_path).with_special(["<|new|>", "<|other|>"]),
        ):  # made here, and from a file
            grown.save(tmp_path)
            again = Tokenizer.load(tmp_path)
            assert (
                again.sha256 == more.sha256
                and again.special == more.special
                and again.decode([tok.vocab_size]) == "<|new|>"
            )
