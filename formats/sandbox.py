"""The process in which a folder's chat template runs. A template is a program from outside, and
only the system can hold a program to an amount of time and memory, whatever it is made of.

templates.py starts it. A line of its input is [template, variables, options] in JSON, a line of its
output {"text": ...} or {"error": ...}; a conversation that takes too long ends the process."""

import json
import resource
import signal
import sys
from datetime import datetime
from functools import lru_cache

import jinja2
import jinja2.meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

MOST_TEXT = 4 << 20  # characters that come out


@lru_cache(maxsize=8)
def compile_template(template):
    """A chat_template as transformers compiles it, with its sandbox, whitespace rules and extras
    -> (jinja2.Template, the names that it reads)."""
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )

    def refuse(message):
        raise jinja2.TemplateError(message)

    def plain_json(value, ensure_ascii=False, **options):
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    env.filters["tojson"] = plain_json
    env.globals["raise_exception"] = refuse
    env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return env.from_string(template), jinja2.meta.find_undeclared_variables(env.parse(template))


def answer(line):
    try:
        template, variables, options = json.loads(line)
        compiled, names = compile_template(template)
        unknown = options.keys() - (names - variables.keys())
        if unknown:
            return {"error": f"it does not take {', '.join(sorted(unknown))}"}
        text = compiled.render(variables | options)
        if len(text) <= MOST_TEXT:
            return {"text": text}
        return {"error": f"{len(text):,} characters come out, more than {MOST_TEXT:,}"}
    except Exception as error:  # what a program from outside stumbles over is this conversation
        return {"error": " ".join(str(error)[:200].split()) or type(error).__name__}


def main():
    seconds, memory = map(int, sys.argv[1:])
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, seconds)  # at its end the system ends this process
        made = json.dumps(answer(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(made, flush=True)


if __name__ == "__main__":
    main()
