#!/usr/bin/env bash
# The life of a language model, from text to server, as the commands a person would type.
#
#   make demo                     makes .venv, installs, runs this: a million parameters on a
#                                 laptop's CPU, in minutes
#   bash demo.sh --fast           the same with less practice
#   bash demo.sh --preset 125m    the same at scale: WikiText-103 and 124 million parameters on a
#                                 GPU; GPUS=8 for eight of them
#   --dry-run                     only print the commands
#   --no-serve, or SERVE=0        end before the server
#   --from dpo, --to sft          that stage and all that follow anew; no further than that one
#
# It goes on where it stopped: what is done is skipped, a training run that was cut short is
# resumed. What each stage took and reached stands in runs/demo-report/report.md (runs/fast-...).
# Your own chats (any of chat.py's layouts) and preferences (any of dpo.py's) join in with
# INSTRUCT=FILE and PREFS=FILE.
set -euo pipefail
cd "$(dirname "$0")"
if [ -x .venv/bin/python ]; then PATH=$PWD/.venv/bin:$PATH; fi
if ! command -v python > /dev/null; then python() { python3 "$@"; }; fi

size=demo from="" to="" dry="" serve=${SERVE:-1}
while [ $# -gt 0 ]; do
    case $1 in
    --fast) size=fast ;;
    --preset) size=${2:?"--preset needs a name: demo, fast or 125m"}; shift ;;
    --from) from=${2:?"--from needs the name of a stage"}; shift ;;
    --to) to=${2:?"--to needs the name of a stage"}; shift ;;
    --no-serve) serve=0 ;;
    --dry-run) dry=1 ;;
    *) echo "error: unknown argument $1: the head of demo.sh says what there is" >&2; exit 2 ;;
    esac
    shift
done

P=${RUNS:-runs/$size}  # every size has folders of its own
world=${TOYBOX:-data/toybox} text=${TOYBOX:-data/toybox}/text.txt
case $size in  # only the amounts differ; each can be given from outside
demo)
    vocabulary=1536 data=$text group=64
    PRETRAIN=${PRETRAIN:---steps 750}
    SFT=${SFT:---context 128 --batch 12 --steps 1800 --muon-lr 0.014 --lr 0.009 --cooldown 0.6 \
        --eval-every 900 --save-every 200}
    LORA=${LORA:---r 2 --alpha 4 --lr 0.01 --steps 200 --batch 8 --context 128}
    DPO=${DPO:---beta 0.3 --sft-weight 4 --lr 3e-4 --batch 16 --steps 280 --context 128 \
        --eval-every 120}
    GRPO=${GRPO:---steps 500 --lr 3e-4 --schedule wsd --cooldown 0 --average 0.995 \
        --max-tokens 40 --context 128 --eval-every 100 --log-every 5}
    EVAL=${EVAL:---max-tokens 40} ;;
fast)
    vocabulary=1536 data=$text group=64
    PRETRAIN=${PRETRAIN:---steps 250 --eval-every 125}
    SFT=${SFT:---context 128 --batch 8 --steps 1000 --muon-lr 0.014 --lr 0.009 --cooldown 0.6 \
        --eval-every 500 --save-every 200}
    LORA=${LORA:---r 2 --alpha 4 --lr 0.01 --steps 100 --batch 8 --context 128}
    DPO=${DPO:---beta 0.3 --sft-weight 4 --lr 2e-4 --batch 16 --steps 80 --context 128 \
        --eval-every 40}
    GRPO=${GRPO:---examples 5000 --steps 60 --lr 3e-4 --schedule wsd --cooldown 0 --average 0.98 \
        --max-tokens 40 --context 128 --log-every 5}
    EVAL=${EVAL:---max-tokens 40 --examples 280} ;;
125m)
    vocabulary=32768 data=data/wikitext-103 text=data/wikitext-103/train.txt group=128
    PRETRAIN=${PRETRAIN:---steps 2000}
    SFT=${SFT:---context 512 --batch 32 --epochs 3 --muon-lr 0.005 --lr 0.0005}
    LORA=${LORA:---r 8 --alpha 16 --lr 0.001 --steps 200 --batch 16 --context 256}
    DPO=${DPO:---beta 0.1 --sft-weight 1 --lr 3e-5 --batch 32 --steps 240 --context 512 \
        --eval-every 120}
    GRPO=${GRPO:---batch 64 --steps 200 --lr 2e-5 --max-tokens 64 --context 256}
    EVAL=${EVAL:---max-tokens 128} ;;
*) echo "error: no size $size: --preset takes demo, fast or 125m" >&2; exit 2 ;;
esac
chats=("$world") questions=("$world" "$world/withheld-test.jsonl")
prefs=(--data "$world/preferences-train.jsonl" --val "$world/preferences-test.jsonl")
if [ -n "${INSTRUCT:-}" ]; then
    chats=("$P-chats" "${chats[@]}") questions=("$P-chats" "${questions[@]}")
fi
if [ -n "${PREFS:-}" ]; then prefs=(--data "$PREFS"); fi
pretrain=(train.py --preset "${size/fast/demo}" --data "$data" --tokenizer "$P-tokenizer" $PRETRAIN
    --out "$P")
learn=(python) where="$(nproc 2> /dev/null || getconf _NPROCESSORS_ONLN) cores"
if [ "${GPUS:-1}" -gt 1 ]; then learn=(torchrun --nproc-per-node "$GPUS"); fi
if gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2> /dev/null | head -n 1); then
    where+=", ${GPUS:-1} x $gpu"
fi

typed() {  # the words as one would have to type them
    local word line=""
    for word; do
        case $word in *[!A-Za-z0-9_./:=,-]*) word="'$word'" ;; esac
        line+=" $word"
    done
    printf %s "${line# }"
}

say() { printf '\n\033[1m# %s\033[0m\n$ %s\n' "$1" "$(typed "${@:2}")"; }

# A stage that is done (its mark is there) is skipped. One that was cut short (its mark ends in
# .begun) is run again, with --resume if it has saved a step. One whose command has changed, that is
# older than what it was made from, or that --from names or comes before, is made anew, over what
# there is. What the demo has not made (there is a step, but no mark) is resumed, never thrown away.
number=0 names="" listing="" ran="" fresh="" past=""
# What a stage reads, and the file whose time says since when it is so.
known=("${INSTRUCT:-}=${INSTRUCT:-}" "${PREFS:-}=${PREFS:-}")
stage() {  # NAME WHY COMMAND...; what it took is written into its mark
    local name=$1 why=$2 out="" last="" more="" stale="" spent=0 begin=$SECONDS
    local word pair command mark own was state
    shift 2
    if [ -n "$listing" ]; then names+="$name "; return; fi
    number=$((number + 1))
    if [ -n "$past" ]; then return; elif [ "$name" = "$to" ]; then past=1; fi
    if [ "$name" = "$from" ]; then fresh=1; fi
    if [ -n "$dry" ]; then say "$why" "$@"; return; fi
    command=$(typed "$@")
    mark=$P-report/stages/$name  # a line: number, seconds, machine, why, command
    own=$mark; if [ ! -e "$own" ]; then own=$mark.begun; fi
    was=$(cut -f 5 "$own" 2> /dev/null) || true
    if [ -n "$was" ] && { [ -n "$fresh" ] || [ "$was" != "$command" ]; }; then stale=1; fi
    for word; do
        if [ "$last" = --out ]; then out=$word; fi
        last=$word
        if [ -z "$was" ]; then continue; fi
        for pair in "${known[@]}"; do
            case $word in "${pair%=*}" | "${pair%=*}"/*)
                if [ "${pair##*=}" -nt "$own" ]; then stale=1; fi ;;
            esac
        done
    done
    if [ -n "$out" ]; then known+=("$out=$mark"); fi
    if [ -z "$fresh$stale" ] && [ -e "$mark" ] && [ -e "${out:-.}" ]; then return; fi
    if [ -n "$stale" ] && [ -f "$out" ]; then rm "$out"; fi
    if compgen -G "$out/state/step-*" > /dev/null; then
        more=--resume state=$(ls -d "$out"/state/step-* | tail -n 1)
        if [ -n "$stale" ]; then
            more=--overwrite
        elif [ -e "$mark.begun" ]; then  # what was spent counts as far as it was saved
            spent=$(cut -f 2 "$mark.begun")
            if [ "$state" -nt "$mark.begun" ]; then
                spent=$((spent + $(date -r "$state" +%s) - $(date -r "$mark.begun" +%s)))
            fi
        fi
    fi
    mkdir -p "$P-report/stages"
    rm -f "$mark"
    write "$spent" > "$mark.begun"
    say "$why" "$@" $more
    "$@" $more
    write $((spent + SECONDS - begin)) > "$mark.begun"
    mv "$mark.begun" "$mark"
    ran=1
}
write() { printf '%s\t%s\t%s\t%s\t%s\n' "$number" "$1" "$where" "$why" "$command"; }

road() {
    stage world \
        "A small world to learn: text, questions whose answers can be checked, preferences" \
        python data.py toybox --out "$world"
    if [ "$size" = 125m ]; then
        stage corpus "WikiText-103: a hundred million words of good articles" \
            python data.py wikitext-103 --out "$data"
    fi
    if [ -n "${INSTRUCT:-}" ]; then
        stage chats "Your instructions, split by question into what is learned and what is asked" \
            python chat.py convert "$INSTRUCT" --out "$P-chats" --split 85/5/10
    fi
    stage tokenizer \
        "A BPE tokenizer: the most frequent pair of neighbours becomes a symbol, again and again" \
        python tokenizer.py train --data "$text" --vocab-size $vocabulary --pattern qwen2 \
        --special-tokens '<|endoftext|>' '<|im_start|>' '<|im_end|>' --out "$P-tokenizer"
    if [ "$size" = 125m ]; then
        stage shards "The articles as shards of tokens, made in parallel" \
            python data.py wikitext-103 --tokenizer "$P-tokenizer" --out "$data"
    fi
    stage pretrain "Pre-training: from random weights to a model that continues text" \
        "${learn[@]}" "${pretrain[@]}"
    if [ "$size" = 125m ]; then
        stage perplexity "How well it reads articles it has never seen" \
            python train.py eval "$P" --data "$data" --split test --out "$P-report/perplexity.json"
    fi
    stage eval-base "What does it answer? It has only read, so it goes on instead" \
        python finetune.py eval "$P" --data "${questions[@]}" $EVAL --out "$P-report/base"
    stage sft "Supervised fine-tuning: from a text that goes on to an answer that ends" \
        "${learn[@]}" finetune.py "$P" --data "${chats[@]}" $SFT --out "$P-sft"
    stage eval-sft "The same questions, none of which it has practised" \
        python finetune.py eval "$P-sft" --data "${questions[@]}" $EVAL --out "$P-report/sft"
    stage lora \
        "LoRA: a skill it was never shown, in a small adapter; old questions against forgetting" \
        "${learn[@]}" lora.py train "$P-sft" \
        --data "$world/withheld-train.jsonl" "$world/train.jsonl:0.2" \
        --val "$world/withheld-test.jsonl" $LORA --out "$P-lora"
    stage merge "Base and adapter merged: one ordinary folder again" \
        python lora.py merge "$P-sft" "$P-lora" --out "$P-merged" --overwrite
    stage eval-lora "Has it learned the one thing without losing the others?" \
        python finetune.py eval "$P-merged" --data "${questions[@]}" $EVAL --out "$P-report/lora"
    stage dpo "Preference tuning: courteous over curt, right over wrong" \
        "${learn[@]}" dpo.py "$P-merged" "${prefs[@]}" $DPO --out "$P-dpo"
    stage eval-dpo "Courteous now, and still right?" \
        python finetune.py eval "$P-dpo" --data "${questions[@]}" $EVAL --out "$P-report/dpo"
    stage grpo "Reinforcement learning: no more worked answers, only whether an answer is right" \
        "${learn[@]}" grpo.py "$P-dpo" --data "$world/practice.jsonl" --val "$world/test.jsonl" \
        $GRPO --out "$P-grpo"
    stage eval-grpo "Are the families better that were the worst?" \
        python finetune.py eval "$P-grpo" --data "${questions[@]}" $EVAL --out "$P-report/grpo"
    stage int8 "In 8 bits: one scale a row, rounded to the nearest" \
        python quant.py "$P-dpo" --format int8 --out "$P-int8"
    stage int4 "In 4 bits: GPTQ rounds each matrix so that its outputs change least" \
        python quant.py "$P-dpo" --format gptq --group-size $group --act-order --out "$P-int4"
    stage gguf "And as one file for llama.cpp" \
        python -m formats.gguf "$P-dpo" --type q8_0 --out "$P.gguf"
    stage eval-int8 "What 8 bits cost" \
        python finetune.py eval "$P-int8" --data "${questions[@]}" $EVAL --out "$P-report/int8"
    stage eval-int4 "What 4 bits cost" \
        python finetune.py eval "$P-int4" --data "${questions[@]}" $EVAL --out "$P-report/int4"
    stage batch \
        "Batched generation: every question at once, through the engine with its paged cache" \
        python generate.py "$P-int4" --batch "$world/prompts.jsonl" --temperature 0 \
        --max-tokens 40 --out "$P-answers.jsonl"
    stage ask "Ask it" \
        python generate.py "$P-int4" 'Reverse this list: fox plum iron' --chat --temperature 0
}

listing=1
road
listing=""
for name in $from $to; do
    case " $names" in *" $name "*) ;; *)
        echo "error: no stage $name; there are: $names" >&2
        exit 2 ;;
    esac
done
if [ "$size" = 125m ]; then
    cat << END
This wants one CUDA GPU (the rows a pass are chosen from its memory), 10 GB of disk and a network:
WikiText-103 is a download of 192 MB. Pre-training is 2,000 steps of 524,288 tokens; on several GPUs
all four trainings run as in this line, with GPUS=8 set:

    torchrun --nproc-per-node 8 $(typed "${pretrain[@]}")
END
fi
road

report=(python -m training.report "$P") server=(python serve.py "$P-dpo" --port "${PORT:-8000}")
if [ -n "$dry" ] || [ -n "$ran" ] || [ ! -e "$P-report/report.md" ]; then
    say "All of it on one page: times, curves, marks, and the same questions after each stage" \
        "${report[@]}"
    if [ -z "$dry" ]; then "${report[@]}"; fi
else
    echo "All of it is done: $P-report/report.md; --from STAGE does it anew ($names)"
fi
if [ "$serve" != 0 ] && [ -z "$past" ]; then
    say "The chat page at http://127.0.0.1:${PORT:-8000}, the API at /v1; Ctrl-C ends it" \
        "${server[@]}"
    if [ -z "$dry" ]; then "${server[@]}"; fi
fi
