"""What comes back: text, tool calls and logprobs in OpenAI's shapes, streamed or whole."""

# ruff: noqa: F811 (a fixture's name is also the argument's)
import base64
import json
import struct

import pytest
from conftest import ROOT  # noqa: F401  (puts the root on the path)
from serving import (  # noqa: F401
    SAID,
    TEMPLATE_WITH_TOOLS,
    TOOLS,
    Stub,
    ask,
    events,
    make_tokenizer,
    real,
    running,
    stub,
)

from server import answers


def test_text_cut_anywhere_never_shows_a_replacement_character(stub):
    total = len(stub.engine.tok.encode(SAID))
    for most in range(1, total + 1):
        chunks = events(ask(stub, stream=True, max_tokens=most).text)
        streamed = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
        whole = ask(stub, max_tokens=most).json()["choices"][0]
        assert streamed == whole["message"]["content"]
        assert SAID.startswith(streamed)
        assert "\ufffd" not in streamed
        assert whole["finish_reason"] == ("stop" if most == total else "length")


def test_completions_echo_prompts_of_all_four_shapes(stub):
    tok = stub.engine.tok
    for prompt in ("ab", ["ab"], tok.encode("ab"), [tok.encode("ab")]):
        choice = ask(stub, "/v1/completions", prompt=prompt, echo=True).json()["choices"][0]
        assert choice["text"] == "ab" + SAID
    both = ask(stub, "/v1/completions", prompt=["ab", "the"], echo=True, n=2, stream=True).text
    texts = {}
    for c in events(both):
        texts[c["choices"][0]["index"]] = (
            texts.get(c["choices"][0]["index"], "") + c["choices"][0]["text"]
        )
    assert texts == {0: "ab" + SAID, 1: "ab" + SAID, 2: "the" + SAID, 3: "the" + SAID}


CALL = '{"name": "add", "arguments": {"x": 1}}'
OTHER = f'[{CALL}, {{"name": "other", "arguments": {{}}}}]'


@pytest.mark.parametrize(
    "said, content, calls",
    [
        (f"Sure.<tool_call>\n{CALL}\n</tool_call>", "Sure.", 1),
        (f"<tool_call>{CALL}</tool_call>\n" * 2, None, 2),
        (CALL, None, 1),
        (f"[{CALL}, {CALL}]", None, 2),
        ("See [1] and {2}.", "See [1] and {2}.", 0),
        ("a < b <tool", "a < b <tool", 0),
        ("<tool_call>no", "<tool_call>no", 0),
        (f"<tool_call>{CALL}</tool_call> so.\n<tool_call>{CALL}", " so.\n", 2),
        (f"<tool_call>{{</tool_call><tool_call>{CALL}", "<tool_call>{</tool_call>", 1),
        (f"[1]: <tool_call>{CALL}</tool_call>", "[1]: ", 1),
        (OTHER, OTHER, 0),
    ],
)
def test_tool_calls_are_told_from_text_in_both_modes(said, content, calls):
    tok = make_tokenizer()
    tok.chat_template = TEMPLATE_WITH_TOOLS
    with running(Stub(said, tok=tok)) as server:
        whole = ask(server, tools=TOOLS).json()["choices"][0]
        chunks = [c["choices"][0] for c in events(ask(server, tools=TOOLS, stream=True).text)]
        single = ask(server, tools=TOOLS, parallel_tool_calls=False).json()["choices"][0]
        off = ask(server, tools=TOOLS, tool_choice="none").json()["choices"][0]
        said_in = len(tok.encode(said))
        cut = ask(server, tools=TOOLS, max_tokens=said_in - 1).json()["choices"][0]
    assert whole["message"]["content"] == content
    assert whole["finish_reason"] == ("tool_calls" if calls else "stop")
    found = whole["message"].get("tool_calls", [])
    assert [json.loads(c["function"]["arguments"]) for c in found] == [{"x": 1}] * calls
    assert len({c["id"] for c in found}) == calls
    assert "".join(c["delta"].get("content") or "" for c in chunks) == (content or "")
    assert sum(len(c["delta"].get("tool_calls", ())) for c in chunks) == calls
    assert chunks[-1]["finish_reason"] == whole["finish_reason"]
    assert len(single["message"].get("tool_calls", ())) == min(calls, 1)
    assert cut["finish_reason"] == "length"  # whatever calls were whole by then
    assert off["message"]["content"] == said
    assert "tool_calls" not in off["message"]


def test_embeddings_come_as_lists_and_as_base64(stub):
    plain = ask(stub, "/v1/embeddings", input=["a", "b"]).json()["data"]
    packed = ask(stub, "/v1/embeddings", input="a", encoding_format="base64").json()["data"][0][
        "embedding"
    ]
    assert [d["embedding"] for d in plain] == [[0.6, 0.8]] * 2
    assert struct.unpack("<2f", base64.b64decode(packed)) == pytest.approx((0.6, 0.8))


def test_echoed_logprobs_are_those_the_model_wrote_with(real):
    ids = real.engine.tok.encode("the quick")
    made = ask(
        real,
        "/v1/completions",
        prompt=ids,
        max_tokens=20,
        temperature=0,
        logprobs=3,
        ignore_eos=True,
        return_token_ids=True,
    ).json()["choices"][0]
    again = ask(
        real, "/v1/completions", prompt=ids + made["token_ids"], max_tokens=0, echo=True, logprobs=3
    ).json()["choices"][0]
    assert again["logprobs"]["token_logprobs"][0] is None
    assert len(made["token_ids"]) == 20
    assert again["logprobs"]["token_logprobs"][len(ids) :] == pytest.approx(
        made["logprobs"]["token_logprobs"], abs=1e-3
    )
    assert again["logprobs"]["tokens"][len(ids) :] == made["logprobs"]["tokens"]


def test_an_echo_of_nothing_but_the_prompt_ends_in_both_modes(stub):
    body = dict(prompt=["ab", "c"], echo=True, max_tokens=0)
    whole = ask(stub, "/v1/completions", **body).json()["choices"]
    chunks = events(ask(stub, "/v1/completions", stream=True, **body).text)
    assert whole == [c["choices"][0] for c in chunks]
    assert [(c["text"], c["finish_reason"]) for c in whole] == [("ab", "length"), ("c", "length")]


def test_a_prompt_cut_within_a_character_goes_on_with_the_whole_one():
    tok = make_tokenizer()
    data = "ab 😀 é".encode()
    ids = [next(i for i in range(tok.vocab_size) if tok.token_bytes(i) == bytes([b])) for b in data]

    class Cut(Stub):
        def submit(self, prompt, sampling, request_id=None, adapter=None):
            rest = ids[len(prompt) :]
            self.live[request_id] = [sampling, rest, False, self.tok.stream(skip_special=True), 0]
            return request_id

    with running(Cut(tok=tok)) as server:
        for cut in range(1, len(ids)):
            body = dict(prompt=ids[:cut], return_token_ids=True)
            begun = data[:cut].decode("utf-8", "ignore")
            for echo in (True, False):
                whole = ask(server, "/v1/completions", echo=echo, **body).json()["choices"][0][
                    "text"
                ]
                chunks = events(ask(server, "/v1/completions", echo=echo, stream=True, **body).text)
                parts = [c["choices"][0]["text"] for c in chunks]
                assert whole == "".join(parts) == data.decode()[0 if echo else len(begun) :], cut


def test_completions_logprobs_tell_places_and_ids_of_every_token(real):
    body = dict(
        prompt="naïve 😀",
        max_tokens=25,
        seed=5,
        echo=True,
        logprobs=4,
        ignore_eos=True,
        return_token_ids=True,
    )
    choice, tok = ask(real, "/v1/completions", **body).json()["choices"][0], real.engine.tok
    l = choice["logprobs"]
    assert (
        len(
            set(
                map(
                    len,
                    (
                        l["tokens"],
                        l["token_logprobs"],
                        l["top_logprobs"],
                        l["text_offset"],
                        l["top_token_ids"],
                    ),
                )
            )
        )
        == 1
    )
    ids, data = tok.encode("naïve 😀") + choice["token_ids"], b""
    for i, token, at, top, top_ids in zip(
        ids, l["tokens"], l["text_offset"], l["top_logprobs"], l["top_token_ids"]
    ):
        assert token == answers.spell(tok, i)[0]
        assert "\ufffd" not in token
        assert at <= len(choice["text"])
        if len(data.decode("utf-8", "ignore").encode()) == len(data):
            assert at == len(data.decode())
        assert not top or (
            list(top) == list(top_ids)
            and all(answers.spell(tok, k)[0] == text for text, k in top_ids.items())
        )
        data += tok.token_bytes(i)
    streamed = [
        c["choices"][0]["logprobs"]
        for c in events(ask(real, "/v1/completions", stream=True, **body).text)
    ]
    assert sum((s["text_offset"] for s in streamed if s), []) == l["text_offset"]


def test_an_answer_without_tokens_has_an_empty_list_of_logprobs(real):
    tok = real.engine.tok
    body = dict(logit_bias={str(tok.special["<|im_end|>"]): 100}, temperature=0)
    (choice,) = ask(real, logprobs=True, **body).json()["choices"]
    assert choice["logprobs"] == {"content": [], "refusal": None}
    (choice,) = ask(real, **body).json()["choices"]
    assert choice["logprobs"] is None
    body = dict(prompt="a", logit_bias={str(tok.eos_id): 100}, temperature=0, logprobs=0)
    (choice,) = ask(real, "/v1/completions", **body).json()["choices"]
    assert choice["logprobs"]["tokens"] == choice["logprobs"]["text_offset"] == []


def test_chat_logprobs_of_parts_of_a_character_join_to_it(real):
    tok = real.engine.tok
    wanted = tok.encode("漢😀")
    bias = {str(i): 100 for i in wanted}
    answer = ask(real, logit_bias=bias, max_tokens=30, logprobs=True, top_logprobs=3, seed=3).json()
    content = answer["choices"][0]["logprobs"]["content"]
    assert any(t["token"].startswith("bytes:") for t in content) or all(
        len(tok.token_bytes(i)) > 1 for i in wanted
    )
    for t in content:
        for entry in (t, *t["top_logprobs"]):
            data = tok.token_bytes(entry["id"]) or tok.decode([entry["id"]]).encode()
            assert bytes(entry["bytes"]) == data
            assert entry["token"] == answers.spell(tok, entry["id"])[0]


def test_chat_logprobs_and_seeds_and_n_on_a_real_model(real):
    body = dict(max_tokens=12, n=3, seed=7, logprobs=True, top_logprobs=2)
    one, two = (ask(real, **body).json()["choices"] for _ in range(2))
    assert one == two
    assert len({c["message"]["content"] for c in one}) == 3
    for token in one[0]["logprobs"]["content"]:
        assert len(token["top_logprobs"]) == 2
        assert "\ufffd" not in token["token"]
        assert token["bytes"]
    streamed = {}
    for chunk in events(ask(real, stream=True, **body).text):
        c = chunk["choices"][0]
        streamed.setdefault(c["index"], []).extend((c["logprobs"] or {"content": []})["content"])
    assert [streamed[i] for i in range(3)] == [c["logprobs"]["content"] for c in one]
