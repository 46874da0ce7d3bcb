"""Other people's chat templates: a folder's chat_template runs in Jinja2's sandbox and is believed."""

from datetime import datetime
from functools import lru_cache

from chat import to_json
from common import UserError

# Unicode noncharacters, which no text contains: around what {% generation %} encloses, and inside defused markers
OPEN, CLOSE, GUARD = "\ufdd0", "\ufdd1", "\ufdd2"


BARE = {ord(c): None for c in (OPEN, CLOSE, GUARD)}


@lru_cache(maxsize=8)
def compile_template(template):
    """A chat_template as transformers compiles it: same sandbox, same whitespace rules, same extras."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = frozenset({"generation"})

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("enclose"), [], [], body).set_lineno(
                line
            )

        def enclose(self, caller):
            return OPEN + caller() + CLOSE

    def refuse(message):
        raise jinja2.TemplateError(message)

    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    env.filters["tojson"] = to_json
    env.globals.update(
        raise_exception=refuse, strftime_now=lambda form: datetime.now().strftime(form)
    )
    return env.from_string(template)


def run_template(template, chat):
    """The text a template makes of a chat. A template's own refusal ("roles must alternate") becomes a UserError."""
    import jinja2

    names = {key: name for key, name in (("bos_token", chat.bos), ("eos_token", chat.eos)) if name}
    try:
        return compile_template(template).render(
            messages=chat.messages,
            tools=chat.tools,
            documents=None,
            add_generation_prompt=chat.prompt,
            **names,
        )
    except (
        jinja2.TemplateError,
        ArithmeticError,
        AttributeError,
        LookupError,
        MemoryError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as e:  # a program from outside: whatever it stumbles over is about this conversation
        raise UserError(f"the folder's chat_template refuses this conversation: {e}") from None


def defused(value, pattern):
    """The same JSON value with every marker in its strings broken by GUARD, so that it stays text."""
    if isinstance(value, str):
        return pattern.sub(lambda m: m[0][0] + GUARD + m[0][1:], value.translate(BARE))
    if isinstance(value, dict):
        return {defused(k, pattern): defused(v, pattern) for k, v in value.items()}
    return [defused(v, pattern) for v in value] if isinstance(value, list) else value
