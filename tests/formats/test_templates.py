"""formats/templates.py: a folder's template is a program from outside, in a process with limits."""

import os
import threading

import pytest
from conftest import within
from serving import Stub, ask, error_of, make_tokenizer, running
from test_chat import Tok, say

import chat
from common import UserError
from formats import templates

SPIN = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLED = "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}"
SHARED = DOUBLED.replace("ns.x ~ ns.x", "[ns.x, ns.x]")
BOMBS = [
    SPIN,
    "{{ 'a' * 10**9 }}",
    "{{ 'a'.center(10**9) }}",
    "{{ '%0999999999d' % 1 }}",
    "{{ '{:>999999999}'.format(1) }}",
    "{{ ['a']|batch(10**9, 'b')|list }}",
    "{{ messages|tojson(indent=10**9) }}",
    "{{ ('a' * 10**6).replace('', 'b' * 10**6) }}",
    "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    DOUBLED + "{% endfor %}{{ ns.x }}",
    SHARED + "{% endfor %}{{ ns.x }}",
    "{% for i in range(9999) %}{{ 'a' * 1000 }}{% endfor %}",
    "{{ " + "(" * 100_000 + ")" * 100_000 + " }}",
]


@pytest.mark.parametrize("template", BOMBS, ids=range(len(BOMBS)))
def test_a_template_that_takes_too_much_is_refused_in_under_two_seconds_and_64_mb(template):
    before = os.times()
    with within(seconds=0.5, memory=64 << 20), pytest.raises(UserError, match="refuses") as error:
        chat.render(Tok(template), say("q"), True)
    after = os.times()  # children's: of the process that was killed
    assert after.children_user + after.children_system < 2 + sum(before[2:4])
    assert "\n" not in str(error.value)
    assert chat.render(Tok("{{ messages[0].content }}"), say("q"), True)[0]  # it lives again


def test_a_sandbox_that_was_killed_is_started_again():
    chat.render(Tok("a"), say("q"), True)
    (sandbox,) = [templates.sandbox(os.getpid())]
    sandbox.process.kill()
    sandbox.process.wait()
    assert chat.render(Tok("a"), say("q"), True)[0]


def test_a_template_that_takes_long_is_not_run_in_the_servers_event_loop():
    tok = make_tokenizer()
    tok.chat_template = SPIN
    with running(Stub(tok=tok)) as server:
        asking = threading.Thread(target=lambda: error_of(ask(server), 400))
        asking.start()
        answered = 0
        while asking.is_alive():
            ask(server, "/tokenize", prompt="a")
            answered += 1
        asking.join()
    assert answered > 2  # in the event loop it lets one through, or two
