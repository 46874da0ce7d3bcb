"""Records and their files, for every stage alike: what a user wrote is used, is known to say
nothing, or is refused by name."""

import contextlib
import gzip
import io
import json
import os
import random
import subprocess
import sys
from collections import Counter
from datetime import datetime
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from test_chat import CALL, Tok, say, supervised

import chat
import dpo
import finetune
import generate
from common import UserError
from engine.sampler import Sampling
from model import Config, Transformer
from tokenizer import Tokenizer
from training import corpora

TEMPLATES = ROOT / "tests" / "chat_templates"
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
# A little of everything that a record may hold.
PARTS = [{"type": "text", "text": "q"}]
CALLING = {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [CALL]}
TALK = [
    {"role": "user", "content": PARTS, "name": "ann"},
    CALLING,
    {"role": "tool", "content": "7", "tool_call_id": "123456789"},
]
SFT = {"id": 1, "system": "s", "messages": [*TALK, say("q", "a")[1]], "tools": TOOLS}
DPO = {"id": 1, "system": "s", "prompt": TALK, "chosen": "a", "rejected": "b", "tools": TOOLS}
BATCH = {"id": 1, "system": "s", "messages": TALK, "tools": TOOLS, "n": 1, "max_tokens": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model that talks as Qwen 3 does."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    tok = Tokenizer.train(["the cat sat on the mat, and the dog ran"], 300)
    tok.chat_template = (TEMPLATES / "qwen3.jinja").read_text()
    tok.save(folder)
    model = Transformer(Config("qwen3", tok.vocab_size, 16, 32, 1, 2, 2, 8, 2048))
    model.init_weights()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def engine(folder):
    return generate.Engine(folder, device="cpu")


def answers(engine, path, out, **flags):
    """The rows that `generate.py --batch` writes."""
    args = SimpleNamespace(batch=str(path), out=str(out), ignore_keys="", adapter=None, **flags)
    generate.run_batch(engine, args, Sampling(max_tokens=1, temperature=0))
    rows = map(json.loads, out.read_text(encoding="utf-8").splitlines())
    return [row for _, row in sorted((row["line"], row) for row in rows)]


def objects(value):
    """Every object in a record of which we know the keys: what a tool's own is, is data."""
    if isinstance(value, list):
        for each in value:
            yield from objects(each)
    elif isinstance(value, dict):
        yield value
        for key, each in value.items():
            if "parameters" not in str(each) or key == "tools":
                yield from objects(each)


def with_a_strange_key(record, seed):
    """-> (a copy with a key that nobody knows somewhere in it, that key)."""
    rng = random.Random(seed)
    key = "".join(rng.choices("abcxyz_é", k=9))
    copy = json.loads(json.dumps(record))
    value = rng.choice([0, 1, "", "x", True, False, [], {}, [1], {"role": "user"}])
    rng.choice([*objects(copy)])[key] = value
    return copy, key


@pytest.mark.parametrize("record, read", [(SFT, chat.as_messages), (DPO, dpo.as_preference)])
def test_a_key_that_nobody_knows_is_refused_by_name_wherever_it_stands(record, read):
    read(record)
    for seed in range(200):
        strange, key = with_a_strange_key(record, seed)
        with pytest.raises(UserError, match=f"unknown key '{key}'"):
            read(strange)


def test_so_it_is_in_a_batch(engine, tmp_path):
    strange = [with_a_strange_key(BATCH, seed) for seed in range(100)]
    lines = [json.dumps(record) + "\n" for record in (BATCH, *(record for record, _ in strange))]
    (tmp_path / "in.jsonl").write_text("".join(lines))
    good, *rest = answers(engine, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert good["answers"][0]["tokens"] == 1
    assert len(rest) == 100
    for row, (_, key) in zip(rest, strange):
        assert f"unknown key '{key}'" in row["error"]
        assert row["id"] == 1


def test_the_line_is_named_and_keys_can_be_ignored(tmp_path):
    path = tmp_path / "x.jsonl"
    odd = {"messages": [{**say("q")[0], "mood": 1}, *say("q", "a")[1:]], "score": 2}
    path.write_text(json.dumps({"messages": say("q", "a")}) + "\n\n" + json.dumps(odd))
    with pytest.raises(UserError, match=r"x.jsonl:3: .*unknown key 'mood'.*--ignore-keys"):
        list(chat.read_records(path))
    with pytest.raises(UserError, match=r"x.jsonl:3: .*unknown key 'score'"):
        list(chat.read_records(path, "mood"))
    assert [talk for _, talk, _ in chat.read_records(path, "mood,score")] == [say("q", "a")] * 2
    arguments = {"mood": 1}
    calls = [{"function": {"name": "f", "arguments": arguments}}]
    talk = [*say("q"), {"role": "assistant", "tool_calls": calls, "mood": 1}]
    path.write_text(json.dumps({"messages": talk}))
    [(_, talk, _)] = chat.read_records(path, "mood")
    assert talk[1]["tool_calls"][0]["function"]["arguments"] == arguments


SYSTEM = say("q", "a", system="s")
PAST = say("q1", "a1", "q", "a")


@pytest.mark.parametrize(
    "record, talk",
    [
        ({"system": "s", "messages": say("q", "a")}, SYSTEM),
        ({"system_prompt": "s", "prompt": "q", "completion": "a"}, SYSTEM),
        ({"system": "s", "messages": SYSTEM}, SYSTEM),
        ({"system": "", "question": "q", "answer": "a"}, say("q", "a")),
        ({"conversations": say("q", "a")}, say("q", "a")),
        ({"conversation": [{"from": "human", "content": "q"}, say("q", "a")[1]]}, say("q", "a")),
        ({"messages": [{"role": "developer", "content": "s"}, *say("q", "a")]}, SYSTEM),
        ({"query": "q", "response": "a", "history": [["q1", "a1"]]}, PAST),
        ({"messages": say("q", "a"), "history": say("q1", "a1")}, PAST),
        ({"input": "q", "output": "a"}, say("q", "a")),
        ({"instruction": "q", "context": "i", "response": "a"}, say("q\n\n### Input:\ni", "a")),
        ({"instruction": "", "input": "q", "output": "a"}, say("q", "a")),
        (
            {"prompt": "q", "prompt_id": "7", "messages": say("q", "a"), "tools": None},
            say("q", "a"),
        ),
    ],
)
def test_one_conversation_has_many_spellings(record, talk):
    assert chat.as_messages(record)[1:] == (talk, None)
    *asked, said = talk
    answer = next((key for key in ("output", "completion", "response") if key in record), None)
    if answer:  # the same in a preference
        preference = {"chosen" if key == answer else key: record[key] for key in record}
        assert dpo.as_preference({**preference, "rejected": "b"})[:2] == (asked, said)


@pytest.mark.parametrize(
    "record, words",
    [
        ({"system": "t", "messages": SYSTEM}, "two system prompts"),
        ({"prompt": "other", "messages": say("q", "a")}, "prompt is no part"),
        ({"system": 0, "messages": say("q", "a")}, "content must be a string"),
        ({"history": 5, "messages": say("q", "a")}, "message 0 is a int"),
        ({"messages": [*say("q"), {"role": "Assistant", "content": "a"}]}, "role 'Assistant'"),
        ({"conversations": ["q", "a"]}, "message 0 is a str"),
        ({"messages": json.dumps(say("q", "a"))}, "non-empty list"),
        ({"messages": say("q", "a"), "chosen": "x"}, "unknown key 'chosen'"),
        ({"instruction": "q", "prompt": "p", "output": "a"}, "unknown key 'prompt'"),
        ({"question": "q", "response": "r", "answer": "a"}, "beside another .* key 'answer'"),
        ({"messages": say("q", "a"), "tools": "[{"}, "a tool is a str"),
        ({"messages": say("q", "a"), "tools": [{"type": "code", "function": {}}]}, "tools must be"),
        ({"messages": [{**say("q")[0], "from": "gpt"}]}, "says twice what its role is"),
        ({"messages": [{**say("q")[0], "tool_calls": [CALL]}]}, "only the assistant makes"),
        ({"messages": [{**say("q")[0], "name": 5}]}, "name must be a text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "text": "x"}]}]},
            "a part of type 'image'",
        ),
    ],
)
def test_what_cannot_be_used_is_said(record, words):
    with pytest.raises(UserError, match=words):
        chat.as_messages(record)


@pytest.mark.parametrize("name", sorted(chat.CHAT_FORMATS))
def test_a_turn_of_weight_0_is_context_alone(name):
    tok = Tok()
    plain, _ = chat.example(tok, say("q1", "bad", "q2", "good"), format=name)
    spelled = [("weight", 0, 1), ("train", False, True), ("loss", False, 1), ("weight", 0.0, 1.0)]
    for key, no, yes in spelled:
        talk = say("q1", "bad", "q2", "good")
        for message, value in zip(talk, (no, no, no, yes)):
            message[key] = value
        ids, mask = chat.example(tok, talk, format=name)
        [said] = supervised(tok, ids, mask)
        assert "good" in said and ids == plain


def test_weights_that_say_nothing_clear_are_refused():
    tok = Tok()
    for weight in (0.5, 2, "yes", "", [], "1"):
        with pytest.raises(UserError, match="weight is .*neither yes nor no"):
            chat.example(tok, [*say("q"), {**say("q", "a")[1], "weight": weight}])
    for odd, told in (
        ({"weight": 1, "train": False}, "twice what its weight is"),
        ({"role": "user", "train": True}, "only the assistant's turns are learned"),
    ):
        with pytest.raises(UserError, match=told):
            chat.example(tok, [*say("q"), {**say("q", "a")[1], **odd}])
    with pytest.raises(UserError, match="no turn is in the loss"):
        chat.example(tok, [*say("q"), {**say("q", "a")[1], "weight": 0}])
    with pytest.raises(UserError, match="weight 0 teaches nothing"):
        dpo.as_preference(
            {"prompt": "q", "chosen": [{**say("q", "a")[1], "weight": 0}], "rejected": "b"}
        )
    tok.chat_template = (
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    twice = [{"role": "assistant", "content": "a", "weight": 0}, say("q", "a")[1]]
    with pytest.raises(UserError, match="does not tell turns apart"):
        chat.example(tok, twice)


@pytest.mark.parametrize("arguments", ["", None, "{}", {}, " \n"])
def test_a_call_without_arguments_has_none(arguments):
    tok = Tok()
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    talk = [*say("q"), {"role": "assistant", "content": None, "tool_calls": [call]}]
    [said] = supervised(tok, *chat.example(tok, talk, TOOLS, format="qwen2.5"))
    assert '{"name": "f", "arguments": {}}' in said


@pytest.mark.parametrize("arguments", [0, False, "[]", [["a", 1]], '{"a": 1, "a": 2}', '"{}"', "{"])
def test_arguments_that_are_no_object_are_refused(arguments):
    call = {"function": {"name": "f", "arguments": arguments}}
    with pytest.raises(UserError, match="arguments a JSON object"):
        chat.render(Tok(), [{"role": "assistant", "tool_calls": [call]}], True, format="qwen2.5")


@pytest.mark.parametrize("name", ["chatml", "llama3.1", "mistral-v3"])
def test_training_refuses_a_format_that_loses_what_was_said(name):
    thinking = [*say("q"), {"role": "assistant", "content": "a", "reasoning_content": "hm"}]
    with pytest.raises(UserError, match="loses the reasoning_content"):
        chat.example(Tok(), thinking, format=name)
    chat.example(Tok(), thinking, format="qwen3")
    chat.example(Tok(), [*thinking, *say("q2", "a2")], format="qwen3")  # as it drops earlier ones
    calling = [*say("q"), {"role": "assistant", "content": "I look", "tool_calls": [CALL]}]
    if name != "chatml":
        with pytest.raises(UserError, match="loses the answer"):
            chat.example(Tok(), calling, TOOLS, format=name)


def test_a_template_without_a_place_for_tools_is_not_given_any():
    tok = Tok("{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(UserError, match="no place for tools"):
        chat.render(tok, say("q"), True, TOOLS)


def test_a_preferred_call_is_learned_as_a_call(folder):
    tok = Tokenizer.load(folder)
    record = {"prompt": TALK, "chosen": [CALLING], "rejected": "b", "tools": TOOLS}
    preference = dpo.as_preference(json.loads(json.dumps(record)))
    prompt, chosen, rejected = dpo.pair_ids(tok, preference, 4096, Counter())
    assert '"name": "f", "parameters"' in tok.decode(prompt)
    assert tok.decode(prompt).count('{"name": "f", "arguments": {"x": "é"}}') == 1
    assert '{"name": "f", "arguments": {"x": "é"}}' in tok.decode(chosen)
    assert "hm" in tok.decode(chosen) and "b<|im_end|>" in tok.decode(rejected)
    tok.chat_template = chat.CHATML_TEMPLATE
    with pytest.raises(UserError, match="chatml has no tools"):
        dpo.pair_ids(tok, preference, 4096, Counter())


def test_a_template_that_has_no_answer_in_the_loss_makes_no_pair():
    tok = Tok(
        "{% for m in messages %}{{ m.content }}{% generation %}{% endgeneration %}{% endfor %}"
    )
    preference = dpo.as_preference({"prompt": "q", "chosen": "a", "rejected": "b", "answer": "3"})
    with pytest.raises(UserError, match="no answer in the loss"):
        dpo.pair_ids(tok, preference, 99, Counter())


@pytest.mark.parametrize(
    "record, words",
    [
        ({"prompt": "other", "chosen": say("q", "a"), "rejected": say("q", "b")}, "no part of"),
        ({"messages": say("q"), "chosen": say("q", "a"), "rejected": say("q", "b")}, "unknown key"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "label": True}, "unknown key 'label'"),
        ({"prompt": "q", "chosen": "a", "rejected": None}, "its keys are .prompt., .chosen.;"),
        ({"prompt": "q", "chosen": 1, "rejected": "b"}, "content must be a string"),
        ({"prompt": "q", "chosen": [], "rejected": "b"}, "differ before their last"),
    ],
)
def test_of_a_preference_nothing_is_dropped(record, words):
    with pytest.raises(UserError, match=words):
        dpo.as_preference(record)


# ------------------------------------------------------------------------------------------- files
ODD = "a\u2028b\x85c\x0cd\x1ee é"  # what other splitters of lines take for the end of one


def write_rows(path, rows, how):
    """Rows as JSON Lines, or as `how` says: bom, crlf, gz, list, parquet, one after the other."""
    lines = [json.dumps(row, ensure_ascii=False, default=str) for row in rows]
    text = "\n".join(lines) + "\n"
    if "list" in how:
        text = "\n [" + ",\n".join(lines) + "]"
    if "crlf" in how:
        text = text.replace("\n", "\r\n")
    data = text.encode("utf-8-sig" if "bom" in how else "utf-8")
    if "gz" in how:
        data = gzip.compress(data, mtime=0)
    path.write_bytes(data)
    if "parquet" in how:
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.Table.from_pylist(rows), path)
    return path


FILES = [
    ("x.jsonl", ""),
    ("x.ndjson", "bom crlf"),
    ("x.JSONL", ""),
    ("x.json", "list"),
    ("x.json", ""),
    ("x.jsonl", "list bom"),
    ("x.jsonl.gz", "gz"),
    ("x.JSON.GZ", "gz list bom"),
    ("x.jsonl", "gz"),
    ("x.jsonl.gz", ""),
    ("x.parquet", "parquet"),
    ("x.jsonl", "parquet"),
    ("x", ""),
    ("x.dat", "list"),
    ("x", "gz"),
    ("x", "parquet"),
]


@pytest.mark.parametrize("name, how", FILES)
def test_a_file_means_the_same_to_every_command(name, how, tmp_path, engine):
    path = write_rows(tmp_path / name, [{"messages": say(ODD, "a")}] * 2, how)
    assert [talk for _, talk, _ in chat.read_records(path)] == [say(ODD, "a")] * 2
    path = write_rows(tmp_path / name, [{"prompt": ODD, "chosen": "a", "rejected": "b"}] * 2, how)
    assert [pair.prompt for pair in dpo.read_preferences(path)] == [say(ODD)] * 2
    path = write_rows(tmp_path / name, [{"prompt": ODD, "id": i} for i in "ab"], how)
    rows = answers(engine, path, tmp_path / "out")
    assert [row["id"] for row in rows] == ["a", "b"] and all("answers" in row for row in rows)
    path = write_rows(tmp_path / name, [{"text": ODD, "n": 1}, {"text": "two", "n": 2}], how)
    assert [text.decode() for text, _, _ in corpora.documents([path], ())] == [ODD, "two"]
    assert corpora.read_text(str(path)) == f"{ODD}\ntwo"
    assert b"".join(corpora.text_parts([path], ())).decode() == f"{ODD}\ntwo\n"
    if "." in name and name != "x.dat":
        assert corpora.expand([str(tmp_path)])[-1].name.lower() == name.lower() or "out" in name


def test_a_text_may_be_gzip_or_begin_with_a_bom_and_look_like_anything(tmp_path):
    (tmp_path / "x.txt").write_bytes(gzip.compress(b"\xef\xbb\xbfone", mtime=0))
    (tmp_path / "y.txt").write_bytes(b"\xef\xbb\xbfone")
    (tmp_path / "z.txt").write_bytes(b"one")
    paths = [tmp_path / name for name in ("x.txt", "y.txt", "z.txt")]
    for path in paths:
        assert corpora.read_text(str(path)) == "one"
    assert list(corpora.text_parts(paths, ())) == [b"one\n"] * 3
    for name, text in (("a.txt", '{"text": "x"}'), ("a", "[Enter Hamlet]"), ("a.md", "{ x }")):
        (tmp_path / name).write_text(text)
        assert corpora.read_text(str(tmp_path / name)) == text


@pytest.mark.parametrize(
    "data, words",
    [
        (gzip.compress(b'{"text": "x"}' * 99, mtime=0)[:-9], "damaged gzip"),
        (b"\x1f\x8bnonsense", "damaged gzip"),
        (b'{"text": "a", "text": "b"}', "x.jsonl:1: .*key 'text' is there twice"),
        (b'{"text": "a"}\r{"text": "b"}', "x.jsonl:1: not valid JSON"),
        ('{"text": "a"}'.encode("utf-16"), "x.jsonl:1: not valid JSON"),
        (b'{"text": "\xed\xa0\xbd"}', "x.jsonl:1: not valid JSON"),
        (b'[{"text": "a"},', "x.jsonl: record 1: not valid JSON"),
        (b'[{"text": "a"}, 5]', "x.jsonl: record 2: a int"),
        (b'{"messages": []}', "no field 'text', only 'messages'"),
    ],
)
def test_a_broken_file_is_one_line(data, words, tmp_path):
    (tmp_path / "x.jsonl").write_bytes(data)
    with pytest.raises(UserError, match=words) as error:
        corpora.read_text(str(tmp_path / "x.jsonl"))
    assert "\n" not in str(error.value)


def test_half_a_surrogate_pair_in_a_file_is_a_replacement_character(tmp_path):
    said = [r"bad \ud83d half", r"\ude00\uD83D", r"\ud83d\ude00 \\ud83d \u00e9"]
    meant = ["bad \ufffd half", "\ufffd\ufffd", "\U0001f600 \\ud83d é"]
    line = (
        '{"messages": [{"role": "user", "content": "%s"}, {"role": "assistant", "content": "%s"}]}'
    )
    path = tmp_path / "x.jsonl"
    path.write_text("".join(line % (text, text) + "\n" for text in said))
    assert [talk for _, talk, _ in chat.read_records(path)] == [say(m, m) for m in meant]
    with contextlib.redirect_stdout(io.StringIO()):
        chat.convert_command([str(path), "--out", str(tmp_path), "--split", "1/0/0"])
    assert list(chat.read_records(tmp_path / "train.jsonl")) == list(chat.read_records(path))


def test_what_parquet_has_and_json_has_not_is_written_as_text(tmp_path):
    row = {"messages": say("q", "a"), "timestamp": datetime(2026, 1, 2)}
    path = write_rows(tmp_path / "x.parquet", [row], "parquet")
    chat.convert_command([str(path), "--out", str(tmp_path), "--split", "1/0/0"])
    [(record, _, _)] = chat.read_records(tmp_path / "train.jsonl")
    assert record["timestamp"] == "2026-01-02 00:00:00"


def test_an_empty_tokenizer_file_is_called_empty(tmp_path):
    (tmp_path / "tokenizer.json").touch()
    with pytest.raises(UserError, match="tokenizer.json is empty"):
        Tokenizer.load(tmp_path)


def test_a_folder_has_one_file_of_a_split(tmp_path):
    from training.exam import split_file

    assert split_file(tmp_path, "val") == tmp_path / "val.jsonl"
    write_rows(tmp_path / "val.json.gz", [], "gz list")
    assert split_file(tmp_path, "val") == tmp_path / "val.json.gz"
    write_rows(tmp_path / "val.ndjson", [], "")
    with pytest.raises(UserError, match="val.json.gz and .*val.ndjson: name the one"):
        split_file(tmp_path, "val")


# ------------------------------------------------------------------------------------------- batch
@pytest.mark.parametrize(
    "record, words",
    [
        ({"prompt": "a", "messages": say("q")}, 'either "prompt" or "messages"'),
        ({"prompt": "a", "system": "s"}, "unknown key 'system'"),
        ({"messages": say("q"), "guided_choice": ["a"]}, "unknown key 'guided_choice'"),
        ({"messages": say("q"), "response_format": {}}, "unknown key 'response_format'"),
        ({"prompt": "a", "constraint": 1}, "unknown key 'constraint'"),
        ({"prompt": 5}, "prompt is 5"),
        ({"prompt": [True]}, "token id True"),
        ({"prompt": "a", "max_tokens": True}, "max_tokens is True"),
        ({"prompt": "a", "max_tokens": 1.0}, "max_tokens is 1.0"),
        ({"prompt": "a", "temperature": "0"}, "temperature is '0'"),
        ({"prompt": "a", "ignore_eos": "false"}, "ignore_eos is 'false'"),
        ({"prompt": "a", "ignore_eos": 1}, "ignore_eos is 1"),
        ({"prompt": "a", "stop": 5}, "stop is 5"),
        ({"prompt": "a", "stop_ids": 5}, "stop_ids is 5"),
        ({"prompt": "a", "stop_ids": [True]}, "stop_ids has True"),
        ({"prompt": "a", "logit_bias": {"1": "x"}}, "logit_bias adds 'x'"),
        ({"prompt": "a", "logit_bias": [1]}, r"logit_bias is \[1\]"),
        ("text", "the record is a str"),
    ],
)
def test_a_field_of_a_batch_is_applied_or_refused(record, words, engine, tmp_path):
    path = write_rows(tmp_path / "in.jsonl", [record], "")
    [row] = answers(engine, path, tmp_path / "out.jsonl")
    with pytest.raises(UserError, match=words):
        raise UserError(row["error"])


def test_the_end_of_a_turn_ends_an_answer_whatever_else_does(engine):
    end = chat.stop_id(engine.tok)
    for own, ends in ({}, [end]), ({"stop_ids": [9]}, [9, end]), ({"ignore_eos": True}, []):
        record = {"messages": say("q"), **own}
        _, sampling = generate.read_request(record, Sampling(), engine.tok)
        assert list(sampling.stop_ids) == ends


def test_an_answer_has_one_form():
    args = generate.Args(regex="a", json_schema="any")
    with pytest.raises(UserError, match="--regex and --json-schema"):
        generate.read_constraint(args, None)


def test_a_batch_stops_at_a_text_and_writes_the_logprobs_it_was_asked_for(engine, tmp_path):
    texts = [{"prompt": "the", "max_tokens": 20, "logprobs": 1, "seed": None}]
    texts.append({**texts[0], "stop": "zz", "logit_bias": {"40": 100.0}})
    rows = answers(engine, write_rows(tmp_path / "in.jsonl", texts, ""), tmp_path / "out.jsonl")
    plain, biased = (row["answers"][0] for row in rows)
    assert len(plain["logprobs"]) == plain["tokens"] and "logprob" in plain["logprobs"][0]
    assert biased["tokens"] == 20 and len(set(biased["text"])) == 1


# -------------------------------------------------------------------------- templates, the terminal
def command(*arguments, **environment):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        cwd=ROOT,
        env={**os.environ, **environment},
    )
    assert b"Traceback" not in done.stderr, done.stderr.decode()
    return done


UNKNOWN = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ': ' + m['content'] + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant: ' }}{% endif %}"
)


def test_an_unknown_template_answers_and_only_training_needs_a_mask(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "chat_template.jinja").write_text(UNKNOWN)
    tok = Tokenizer.load(tmp_path)
    assert chat.stop_id(tok) is None
    engine = generate.Engine(tmp_path, device="cpu")
    batch = write_rows(tmp_path / "in.jsonl", [{"messages": say("q")}], "")
    [row] = answers(engine, batch, tmp_path / "out.jsonl")
    assert row["answers"][0]["tokens"] == 1
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        generate.talk(engine, Sampling(max_tokens=1), None, "q")
    assert shown.getvalue()
    with pytest.raises(UserError, match="guessed mask"):
        chat.example(tok, say("q", "a"))
    data = write_rows(tmp_path / "test.jsonl", [{"messages": say("q", "a")}], "")
    with contextlib.redirect_stdout(io.StringIO()):
        flags = ["--data", str(data), "--max-tokens", "1", "--device", "cpu"]
        finetune.exam_command([str(tmp_path), *flags])


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "cp1252"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
)
def test_what_the_terminal_cannot_say_is_a_question_mark(environment, folder, tmp_path):
    data = write_rows(tmp_path / "x.jsonl", [{"messages": say("日本", "é")}], "")
    done = command("chat.py", "show", data, "--tokenizer", folder, **environment)
    assert done.returncode == 0 and b"??" in done.stdout
    done = command("tokenizer.py", "show", "日本", "--tokenizer", folder, **environment)
    assert done.returncode == 0
