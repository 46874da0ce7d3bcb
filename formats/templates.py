"""Other people's chat templates: a folder's chat_template (Jinja) runs in a sandbox, a process with
limits, and what it says is believed.

`chat.render` opens this file for a folder whose template is not our own ChatML."""

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from chat import CHAT_FORMATS, Piece, named_pieces
from common import UserError, any_of

# Unicode noncharacters, which no text contains: the first two stand around what {% generation %}
# encloses, the third behind each character of a marker's name that somebody typed.
OPEN, CLOSE, GUARD = "\ufdd0", "\ufdd1", "\ufdd2"
BARE = {ord(c): None for c in (OPEN, CLOSE, GUARD)}
SANDBOX = str(Path(__file__).with_name("sandbox.py"))
# What one conversation may cost there.
MOST_SECONDS = 1  # of computing
MOST_MEMORY = 400 << 20  # bytes


def pieces_of_template(tok, chat, template):
    """A chat through its folder's template -> pieces; said is None where nobody knows it.

    The template renders this very conversation, and so does each format of chat.py. The one that
    gives the same text knows who said which part of it: nothing is guessed, and a template that
    merely resembles a known one is never taken for it. Failing that, a template's own {% generation
    %} says who spoke. Failing that there are ids but no mask."""
    text = run_template(template, chat).translate(BARE)
    for tool in chat.tools or ():
        if str(tool["function"].get("name", "")) not in text:
            raise UserError("the folder's chat_template has no place for tools")
    for name in CHAT_FORMATS:
        with contextlib.suppress(UserError):
            pieces = named_pieces(name, tok, chat)
            if "".join(piece.text for piece in pieces) == text:
                return pieces
    markers = any_of(tuple(tok.special))
    safe = replace(
        chat,
        messages=defused(chat.messages, markers),
        tools=defused(chat.tools, markers),
        options=defused(chat.options, markers),
    )
    rendered = run_template(template, safe)
    own_markers = re.compile(f"{markers.pattern}(?!{GUARD})")
    pieces = []
    said = False if OPEN in mark_generation(template) else None
    for part in re.split(f"([{OPEN}{CLOSE}])", rendered):  # the brackets keep what it splits at
        if part in (OPEN, CLOSE):
            said = part == OPEN
            continue
        for words in own_markers.split(part):
            pieces.append(Piece(words.replace(GUARD, ""), said, words in tok.special))
    if "".join(piece.text for piece in pieces) != text:
        raise UserError(
            "the folder's chat_template does something else with a special token's name in a "
            "message than with other text: take it out of the message"
        )
    return pieces


def defused(value, markers):
    """The same JSON value, each marker in its strings broken by GUARD, so that it stays text."""
    if isinstance(value, str):
        return markers.sub(lambda m: GUARD.join(m[0]) + GUARD, value.translate(BARE))
    if isinstance(value, dict):
        return {defused(k, markers): defused(v, markers) for k, v in value.items()}
    if isinstance(value, list):
        return [defused(v, markers) for v in value]
    return value


def run_template(template, chat):
    """The text a template makes of a chat. What it refuses ("roles must alternate"): UserError."""
    variables = {
        "messages": chat.messages,
        "tools": chat.tools,
        "documents": None,
        "add_generation_prompt": chat.prompt,
        "bos_token": chat.bos,
        "eos_token": chat.eos,
    }
    request = json.dumps([mark_generation(template), variables, chat.options])
    answer = sandbox(os.getpid()).ask(request.encode() + b"\n")
    if "text" in answer:
        return answer["text"]
    raise UserError(f"the folder's chat_template refuses this conversation: {answer['error']}")


@lru_cache(maxsize=8)
def mark_generation(template):
    """{% generation %}...{% endgeneration %} is what the assistant says: OPEN and CLOSE in it.

    Two blocks in place of a tag keep what its - and + say about white space on either side:
    {%- generation %} becomes {%- if 1 %}, OPEN, {% if 1 %}; and endgeneration two endif."""
    for name, tag, mark in (("generation", "if 1", OPEN), ("endgeneration", "endif", CLOSE)):
        pattern = rf"{{%([-+]?)\s*{name}\s*([-+]?)%}}"
        template = re.sub(pattern, rf"{{%\1 {tag} %}}{mark}{{% {tag} \2%}}", template)
    return template


@lru_cache
def sandbox(pid):
    """The Sandbox of the process `pid`, this one: one that was forked shares no pipe."""
    return Sandbox()


class Sandbox:
    """sandbox.py in a process of its own, started when it is needed, and again after it died."""

    def __init__(self):
        self.lock = threading.Lock()
        self.process = None

    def ask(self, request):
        """A line -> the answer. All threads share the process, one at a time."""
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                self.process = subprocess.Popen(
                    [sys.executable, SANDBOX, str(MOST_SECONDS), str(MOST_MEMORY)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,  # a Ctrl-C is not for it: it ends when its input does
                )
            line = b""
            try:
                with contextlib.suppress(BrokenPipeError):
                    self.process.stdin.write(request)
                    self.process.stdin.flush()
                    line = self.process.stdout.readline()
            finally:
                if not line.endswith(b"\n"):  # it died, or this thread was interrupted
                    self.process.kill()
                    self.process.wait()
        if line.endswith(b"\n"):
            return json.loads(line)
        return {"error": f"it takes more than {MOST_SECONDS} s or {MOST_MEMORY >> 20} MB"}
