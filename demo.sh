#!/usr/bin/env bash
# The life of a language model on a laptop CPU, as the commands a person would type. `make demo` runs it inside .venv.
set -euo pipefail
cd "$(dirname "$0")"

say() { printf '\n\033[1m# %s\033[0m\n$ %s\n' "$1" "${*:2}"; "${@:2}"; }

say "Get a text to learn from: the plays of Shakespeare" \
    python data.py shakespeare
resume=$(ls -d runs/shakespeare-char/state/step-* > /dev/null 2>&1 && echo --resume || true)  # a demo that was interrupted goes on
say "Train a character GPT on it: every letter is a token; watch the loss fall from ln V" \
    python train.py --preset shakespeare-char $resume
say "Let it write" \
    python generate.py runs/shakespeare-char "ROMEO:" --max-tokens 300 --seed 7
