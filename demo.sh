#!/usr/bin/env bash
# The life of a language model on a laptop CPU, as the commands a person would type. `make demo` runs it inside .venv.
# It goes on where it stopped: a stage that is done is skipped, one that was interrupted is resumed.
set -euo pipefail
cd "$(dirname "$0")"

say() { printf '\n\033[1m# %s\033[0m\n$ %s\n' "$1" "${*:2}"; "${@:2}"; }
stage() {  # WHY OUT COMMAND...: skipped if OUT is complete, resumed if it was begun
    if [ -e "$2/.done" ]; then return; fi
    local resume=(); if compgen -G "$2/state/step-*" > /dev/null; then resume=(--resume); fi
    say "$1" "${@:3}" --out "$2" "${resume[@]}"
    touch "$2/.done"
}

stage "A world to learn, and the plays of Shakespeare: text, questions with checkable answers, preferences" data/toybox \
    python data.py toybox
stage "A tokenizer: the most frequent pair of neighbours becomes a new symbol, again and again" runs/demo-tokenizer \
    python tokenizer.py train --data data/toybox/text.txt --vocab-size 1536 --pattern qwen2 \
    --special-tokens '<|endoftext|>' '<|im_start|>' '<|im_end|>'
stage "Pre-training: a million parameters learn to continue that text" runs/demo \
    python train.py --preset demo
stage "Supervised fine-tuning: from a text that goes on to an answer that ends" runs/demo-sft \
    python finetune.py runs/demo --data data/toybox --context 128 --batch 8 --steps 2200 --muon-lr 0.014 --lr 0.009 --cooldown 0.6 \
    --eval-every 1100
stage "LoRA: a skill it was never shown, in 2 % of the parameters; old questions mixed in against forgetting" runs/demo-lora \
    python lora.py train runs/demo-sft --data data/toybox/withheld-train.jsonl data/toybox/train.jsonl:0.2 \
    --val data/toybox/withheld-test.jsonl --r 2 --alpha 4 --lr 0.01 --steps 200 --batch 8 --context 128
stage "Merged: one ordinary folder again" runs/demo-merged \
    python lora.py merge runs/demo-sft runs/demo-lora
stage "Preference tuning: courteous over curt, right over wrong" runs/demo-dpo \
    python dpo.py runs/demo-merged --data data/toybox/preferences-train.jsonl --val data/toybox/preferences-test.jsonl \
    --beta 0.3 --sft-weight 4 --lr 2e-4 --batch 16 --steps 240 --context 128 --eval-every 120
say "What it can do now, beside what it could when it had only read" \
    python finetune.py eval runs/demo-dpo --data data/toybox --before runs/demo --max-tokens 40
stage "In 4 bits: GPTQ rounds each matrix so that its outputs change least" runs/demo-int4 \
    python quant.py runs/demo-dpo --format gptq --group-size 64 --act-order
say "And as one file for llama.cpp" \
    python quant.py runs/demo-dpo --format gguf-q8_0 --out runs/demo.gguf
say "Ask it" \
    python generate.py runs/demo-int4 "Reverse this list: fox plum iron" --chat --temperature 0
if [ "${SERVE:-1}" != 0 ]; then
    say "Serve it: the page at http://127.0.0.1:${PORT:-8000}, the API at /v1; Ctrl-C ends it" \
        python serve.py runs/demo-dpo --port "${PORT:-8000}"
fi
