"""A tokenizer in the layouts that it is published in, and what stands beside it."""

import base64
import contextlib
import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import UserError
from formats import vocab
from formats.vocab import to_json
from tokenizer import Tokenizer

TEXTS = ["(foo) (foo) .append(item) I'LL it's Café e\u0301 12345\n" * 9]
IM = {"<|endoftext|>": 400, "<|im_start|>": 401, "<|im_end|>": 402}


def write(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps(content), encoding="utf-8")
    return folder


def merges_folder(folder, change=lambda merges: merges, texts=TEXTS, **files):
    """vocab.json and merges.txt of a byte-level BPE without special tokens, and files beside."""
    tok = Tokenizer.train(texts, 280, "gpt2", special_tokens=[])
    model = to_json(tok)["model"]
    write(folder, vocab=model["vocab"], **files)
    text = change("".join(merge + "\n" for merge in model["merges"]))
    (folder / "merges.txt").write_text(text, newline="", encoding="utf-8")
    return tok


def ids_of(tok, text="(foo).append(item) I'LL 123 Cafe\u0301"):
    return tok.encode(text)


@pytest.mark.parametrize(
    "change",
    [
        lambda merges: merges,
        lambda merges: "#version: 0.2\n" + merges,
        lambda merges: merges.replace("\n", "\r\n"),
        lambda merges: "#version: 0.2\r\n" + merges.replace("\n", "\r\n") + "\r\n",
        lambda merges: merges + merges.splitlines()[-1] + "\n",
    ],
    ids=["plain", "version", "crlf", "both", "last merge twice"],
)
def test_merges_are_read_however_they_are_written(tmp_path, change):
    plain = merges_folder(tmp_path, change)
    tok = Tokenizer.load(tmp_path)
    assert ids_of(tok) == ids_of(plain)
    assert Tokenizer.load(tmp_path / "vocab.json").sha256 == tok.sha256


def test_a_vocab_json_may_have_the_words_model_and_config(tmp_path):
    """As GPT-2's has: they do not make a tokenizer.json or a tekken.json of it."""
    plain = merges_folder(tmp_path, texts=["model\nconfig\n" * 9])
    assert {b"model", b"config"} <= plain.vocab.keys()
    assert ids_of(Tokenizer.load(tmp_path / "vocab.json")) == ids_of(plain)


def test_a_space_before_every_text_is_saved(tmp_path):
    merges_folder(tmp_path, tokenizer_config={"add_prefix_space": True})
    tok = Tokenizer.load(tmp_path)
    assert tok.encode("(foo)") == tok.encode(" (foo)") != tok.encode("  (foo)")
    tok.save(tmp_path / "again")
    assert Tokenizer.load(tmp_path / "again").sha256 == tok.sha256


def test_of_a_merge_that_is_listed_twice_the_last_place_counts(tmp_path):
    merges_folder(tmp_path, lambda merges: merges + merges.splitlines()[0] + "\n")
    last = Tokenizer.load(tmp_path)
    merges_folder(tmp_path, lambda merges: merges.partition("\n")[2] + merges.splitlines()[0])
    assert ids_of(last) == ids_of(Tokenizer.load(tmp_path))


@pytest.mark.parametrize(
    "tokenizer_class, model, fault",
    [
        ("GPT2TokenizerFast", "llama", None),
        ("PreTrainedTokenizerFast", "gpt2", None),
        (None, "qwen2", "'qwen2'"),
        ("Qwen2Tokenizer", "gpt2", "'Qwen2Tokenizer'"),
    ],
)
def test_merges_that_may_not_be_gpt2s_are_refused(tokenizer_class, model, fault, tmp_path):
    said = {"tokenizer_class": tokenizer_class}
    plain = merges_folder(tmp_path, tokenizer_config=said, config={"model_type": model})
    if fault:
        with pytest.raises(UserError, match=f"{fault} without a tokenizer.json"):
            Tokenizer.load(tmp_path)
    else:
        assert ids_of(Tokenizer.load(tmp_path), "I'LL") == ids_of(plain, "I'LL")


LISTED = {str(i): {"content": text, "special": True} for text, i in IM.items()}


@pytest.mark.parametrize(
    "files, special, added",
    [
        ({"tokenizer_config": {"added_tokens_decoder": LISTED}}, IM, {}),
        ({"added_tokens": IM}, {}, IM),
        ({"added_tokens": IM, "tokenizer_config": {"added_tokens_decoder": LISTED}}, IM, {}),
        (
            {"added_tokens": IM, "special_tokens_map": {"eos_token": "<|im_end|>"}},
            {"<|im_end|>": 402},
            {"<|endoftext|>": 400, "<|im_start|>": 401},
        ),
        (  # without ids: the next free ones, in transformers' order
            {"tokenizer_config": {"eos_token": {"content": "<e>"}, "pad_token": "<p>"}},
            {"<e>": 280, "<p>": 281},
            {},
        ),
        (
            {"tokenizer_config": {"extra_special_tokens": {"image": "<i>"}, "bos_token": "<b>"}},
            {"<b>": 280, "<i>": 281},
            {},
        ),
    ],
)
def test_added_tokens_are_found_wherever_they_are_listed(tmp_path, files, special, added):
    merges_folder(tmp_path, **files)
    tok = Tokenizer.load(tmp_path)
    assert (tok.special, tok.added) == (special, added)
    tok.save(tmp_path / "again")
    again = Tokenizer.load(tmp_path / "again")
    assert again.sha256 == tok.sha256 and again.eos_id == tok.eos_id


def test_a_token_of_the_vocabulary_that_is_added_too_is_there_once(tmp_path):
    merges_folder(tmp_path, added_tokens={"<x>": 280})
    content = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    write(tmp_path, vocab=content | {"<x>": 280, "<|endoftext|>": 281})
    tok = Tokenizer.load(tmp_path)
    assert (tok.special, tok.added) == ({"<|endoftext|>": 281}, {"<x>": 280})


def test_an_ordinary_token_that_is_named_stays_an_ordinary_one(tmp_path):
    merges_folder(tmp_path, tokenizer_config={"pad_token": "!"})
    tok = Tokenizer.load(tmp_path)
    assert tok.special == {} and tok.encode("!") == [0]


@pytest.mark.parametrize(
    "files, message",
    [
        ({"added_tokens": {"(": 400}}, "has two ids"),
        ({"added_tokens": {"<x>": 5}}, "same id: 5"),
        ({"added_tokens": {"<x>": "5"}}, "not a whole number"),
        ({"tokenizer_config": {"add_bos_token": "false"}}, "add_bos_token is 'false'"),
        ({"tokenizer_config": {"add_prefix_space": 0}}, "add_prefix_space is 0"),
        ({"tokenizer_config": {"chat_template": 3}}, "chat_template is no text"),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": {"content": "y"}}}}, "is not a"),
        ({"tokenizer_config": ["x"]}, "not a JSON object"),
        ({"tokenizer_config": {"additional_special_tokens": "<x>"}}, "'<x>', expected a list"),
    ],
)
def test_what_cannot_be_beside_a_vocabulary_is_one_line(tmp_path, files, message):
    merges_folder(tmp_path, **files)
    with pytest.raises(UserError, match=message) as error:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(error.value)


def with_bos(**config):
    """A saved tokenizer's folder files, whose tokenizer.json puts <BOS> before a prompt."""
    content = to_json(Tokenizer.train(TEXTS, 280))
    assert content["post_processor"]["type"] == "TemplateProcessing"
    return {"tokenizer": content, "tokenizer_config": {"bos_token": "<BOS>", **config}}


def test_what_goes_round_a_prompt_is_what_the_files_say(tmp_path):
    bare = with_bos(add_bos_token=None)
    bare["tokenizer"] = bare["tokenizer"] | {"post_processor": None}
    after = with_bos(add_bos_token=True, add_eos_token=True, eos_token="<EOS>")
    for files, before, behind in (
        (with_bos(), [2], []),
        (with_bos(add_bos_token=False), [], []),
        (with_bos(add_bos_token=False, add_eos_token=False), [], []),
        (with_bos(add_bos_token=True, bos_token=None), [], []),
        (bare, [], []),
        (after, [2], [3]),
    ):
        tok = Tokenizer.load(write(tmp_path, **files))
        plain = tok.encode("(foo)")
        assert tok.encode_prompt("(foo)") == before + plain + behind
        tok.save(tmp_path / "again")
        assert Tokenizer.load(tmp_path / "again").encode_prompt("(foo)") == before + plain + behind


def test_what_tokenizer_json_says_is_special_stays_so_if_another_file_lists_it_without_a_word(
    tmp_path,
):
    tok = Tokenizer.load(write(tmp_path, **with_bos(), added_tokens={"<EOS>": 3}))
    assert tok.special["<EOS>"] == 3 and 3 not in tok.encode("<EOS>")


def pieces_json(**more):
    """A tokenizer.json of pieces; more: {token: id} besides."""
    vocab = {"<unk>": 0, "▁": 1, "a": 2, "▁a": 3} | more
    tok = Tokenizer("pieces", vocab, {(1, 2): (0, 3)}, normalizer=[("replace", " ", "▁")])
    return to_json(tok)


@pytest.mark.parametrize("unknown", ["<unk>", None])
@pytest.mark.parametrize("option", ["byte_fallback", "fuse_unk"])
def test_unknown_characters_that_would_get_other_ids_are_refused(tmp_path, option, unknown):
    """An unknown token each, or in place of bytes that are there."""
    byte_tokens = {f"<0x{b:02X}>": 4 + b for b in range(256)}
    content = pieces_json(**byte_tokens if option == "byte_fallback" else {})
    content["model"] |= {"unk_token": unknown, option: False}
    if unknown or option == "byte_fallback":
        with pytest.raises(UserError, match=f"{option} = False is not supported"):
            Tokenizer.load(write(tmp_path, tokenizer=content))
    content["model"][option] = True
    assert Tokenizer.load(write(tmp_path, tokenizer=content)).encode("a a") == [2, 3]


METASPACE = {"type": "Metaspace", "replacement": "▁"}


@pytest.mark.parametrize(
    "more, text",
    [
        ({}, "a a"),
        ({"add_prefix_space": True}, "a a"),
        ({"add_prefix_space": False}, " a a"),
        ({"prepend_scheme": "first", "split": False}, "a a"),
        ({"prepend_scheme": "never"}, " a a"),
    ],
)
def test_a_metaspace_takes_the_first_space_back_if_it_puts_one(more, text, tmp_path):
    content = pieces_json() | {"decoder": METASPACE | more}
    assert Tokenizer.load(write(tmp_path, tokenizer=content)).decode([3, 3]) == text


@pytest.mark.parametrize(
    "part, step",
    [
        ("decoder", METASPACE | {"replacement": "_"}),
        ("pre_tokenizer", METASPACE | {"replacement": "."}),
        ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [{"type": "Digits"}, METASPACE]}),
        ("decoder", {"type": "Replace", "pattern": {"String": "▁"}, "content": "-"}),
        ("decoder", {"type": "Strip", "content": " ", "start": 0, "stop": 1}),
    ],
)
def test_what_happens_to_spaces_otherwise_than_here_is_refused(part, step, tmp_path):
    with pytest.raises(UserError, match="is not supported"):
        Tokenizer.load(write(tmp_path, tokenizer=pieces_json() | {part: step}))


def test_special_tokens_of_tekken_have_the_ids_of_their_ranks(tmp_path):
    named = {"<s>": 1, "</s>": 2, "[INST]": 4}
    vocab = []
    for b in range(256):
        token = base64.b64encode(bytes([b])).decode()
        vocab.append({"rank": b, "token_bytes": token})
    config = {"default_num_special_tokens": 6, "default_vocab_size": 262, "pattern": r"\w+|\W"}
    special = [{"rank": i, "token_str": name} for name, i in named.items()]
    content = {"config": config, "vocab": vocab, "special_tokens": special}
    tok = Tokenizer.load(write(tmp_path, tekken=content))
    assert named.items() <= tok.special.items() and tok.special["<SPECIAL_3>"] == 3
    assert tok.encode_prompt("a") == [1, 6 + ord("a")]
    vocab[97]["token_bytes"] = "Y!Q=="  # "a", if what is not base64 does not count
    with pytest.raises(UserError, match="base64"):
        Tokenizer.load(write(tmp_path, tekken=content))


def test_a_token_round_a_prompt_that_has_another_id_there_is_refused(tmp_path):
    files = with_bos()
    files["tokenizer"]["post_processor"]["special_tokens"]["<BOS>"]["ids"] = [3]
    with pytest.raises(UserError, match="'<BOS>' round a prompt with other ids"):
        Tokenizer.load(write(tmp_path, **files))


def test_an_unknown_post_processor_is_refused(tmp_path):
    files = with_bos()
    files["tokenizer"]["post_processor"] = {"type": "BertProcessing"}
    with pytest.raises(UserError, match="post-processor 'BertProcessing'"):
        Tokenizer.load(write(tmp_path, **files))


def test_a_sentencepiece_model_is_known_by_its_content(tmp_path, data_dir):
    source = data_dir / "stories260K" / "tokenizer.model"
    expected = Tokenizer.load(source)
    for name in ("tokenizer.model.v3", "mistral.model.v3", "vocab", "x.txt.bin"):
        (tmp_path / name).write_bytes(source.read_bytes())
        assert Tokenizer.load(tmp_path / name).sha256 == expected.sha256
    assert Tokenizer.load(tmp_path).sha256 == expected.sha256  # a folder with tokenizer.model.v3
    assert expected.encode_prompt("a")[0] == expected.bos_id  # as llama.cpp does it
    write(tmp_path, tokenizer_config={"add_bos_token": False, "add_prefix_space": False})
    assert Tokenizer.load(tmp_path).encode_prompt("a") == [expected.vocab["a"]]


def test_user_defined_symbols_of_sentencepiece_that_stay_ordinary_text_are_named(tmp_path, capsys):
    from sentencepiece import SentencePieceTrainer

    (tmp_path / "text").write_text("to be or not to be that is the question\n" * 99)
    SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        user_defined_symbols=["<sep>", "\n", "<bos>"],
        minloglevel=3,
    )
    write(tmp_path, tokenizer_config={"bos_token": "<bos>"})
    tok = Tokenizer.load(tmp_path)
    assert "user-defined symbols: ignored: '<sep>'\n" in capsys.readouterr().err
    assert tok.decode(tok.encode("a<sep>b\n")) == "a<sep>b\n" and "<bos>" in tok.special


def test_the_template_in_a_file_of_its_own_goes_first_and_is_saved_in_the_config(tmp_path):
    write(tmp_path, **with_bos(chat_template="{{ 'old' }}"))
    (tmp_path / "chat_template.jinja").write_text("{{ 'new' }}")
    tok = Tokenizer.load(tmp_path)
    assert tok.chat_template == "{{ 'new' }}"
    tok.chat_template = "{{ 'third' }}"
    tok.save(tmp_path)
    assert Tokenizer.load(tmp_path).chat_template == "{{ 'third' }}"


VALUES = st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=4) | st.just([1])


@settings(max_examples=100, deadline=None)
@given(st.text("abcdef_ \n", min_size=1, max_size=9), VALUES, st.sampled_from(range(4)))
def test_no_key_of_a_tokenizer_config_is_dropped_without_a_word(
    tmp_path_factory, key, value, level
):
    token = {"content": "<x>", key: value}
    content = [{}, {key: value}, {"added_tokens_decoder": {"7": token}}, {"eos_token": token}]
    files = {"tokenizer_config": content[level], "special_tokens_map": {} if level else token}
    folder = write(tmp_path_factory.getbasetemp() / "beside", **files)
    with contextlib.redirect_stderr(io.StringIO()) as told:
        vocab.read_beside(folder)
    assert repr(key) in told.getvalue() or key.startswith("_")
    assert told.getvalue().count("\n") <= 1
