"""Other people's chat templates: a folder's chat_template (Jinja) runs in a sandbox and is
believed.

`chat.render` opens this file for a folder whose template is not our own ChatML."""

import contextlib
import re
from dataclasses import replace
from datetime import datetime
from functools import lru_cache

from chat import CHAT_FORMATS, Piece, json_text, marker_pattern, named_pieces
from common import UserError

# Unicode noncharacters, which no text contains: the first two stand around what {% generation %}
# encloses, the third inside the name of a marker that somebody typed.
OPEN, CLOSE, GUARD = "\ufdd0", "\ufdd1", "\ufdd2"
BARE = {ord(c): None for c in (OPEN, CLOSE, GUARD)}


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
    markers = marker_pattern(tuple(tok.special))
    given = {
        name: defused(getattr(chat, name), markers) for name in ("messages", "tools", "options")
    }
    rendered = run_template(template, replace(chat, **given))
    pieces, said = [], False if OPEN in rendered else None
    for part in re.split(f"([{OPEN}{CLOSE}])", rendered):
        if part in (OPEN, CLOSE):
            said = part == OPEN
            continue
        for text in markers.split(part):
            pieces.append(Piece(text.replace(GUARD, ""), said, text in tok.special))
    return pieces


def defused(value, markers):
    """The same JSON value, each marker in its strings broken by GUARD, so that it stays text."""
    if isinstance(value, str):
        return markers.sub(lambda m: m[0][0] + GUARD + m[0][1:], value.translate(BARE))
    if isinstance(value, dict):
        return {defused(k, markers): defused(v, markers) for k, v in value.items()}
    if isinstance(value, list):
        return [defused(v, markers) for v in value]
    return value


def run_template(template, chat):
    """The text a template makes of a chat. What it refuses ("roles must alternate"): UserError."""
    known = {
        "messages": chat.messages,
        "tools": chat.tools,
        "documents": None,
        "add_generation_prompt": chat.prompt,
        "bos_token": chat.bos,
        "eos_token": chat.eos,
    }
    try:
        compiled, names = compile_template(template)
        unknown = chat.options.keys() - (names - known.keys())
        if not unknown:
            return compiled.render(known | chat.options)
    except Exception as e:  # a program from outside: what it stumbles over is this conversation
        raise UserError(f"the folder's chat_template refuses this conversation: {e}") from None
    raise UserError(f"the folder's chat_template does not take {', '.join(sorted(unknown))}")


@lru_cache(maxsize=8)
def compile_template(template):
    """A chat_template as transformers compiles it, with its sandbox, whitespace rules and extras
    -> (jinja2.Template, the names that it reads)."""
    import jinja2
    import jinja2.meta
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message):
        raise jinja2.TemplateError(message)

    # {% generation %}...{% endgeneration %} is what the assistant says. Two blocks in place of a
    # tag keep what its - and + say about white space on either side.
    for name, tag, mark in (("generation", "if 1", OPEN), ("endgeneration", "endif", CLOSE)):
        pattern = rf"{{%([-+]?)\s*{name}\s*([-+]?)%}}"
        template = re.sub(pattern, rf"{{%\1 {tag} %}}{mark}{{% {tag} \2%}}", template)
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    env.filters["tojson"] = json_text
    env.globals["raise_exception"] = refuse
    env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    names = jinja2.meta.find_undeclared_variables(env.parse(template))
    return env.from_string(template), names
