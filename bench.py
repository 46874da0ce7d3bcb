"""Every speed figure of the README, from one command each.

    python bench.py train                        # the CPU presets' seconds and validation loss
    python bench.py train --presets shakespeare-char-10m --target 1.4697        # on a GPU
    python bench.py optimizers                   # Muon against AdamW, and in 0.9 of the steps
    python bench.py pretrain                     # tokens/s, memory, where the time goes
    python bench.py pretrain --arch gpt2 --nanogpt ../nanoGPT    # beside nanoGPT, at its shape
    python bench.py qlora --shape 7b             # QLoRA, estimated and measured; 1b for a CPU
    python bench.py sft MODEL --data D           # fine-tuning beside TRL's SFTTrainer
    python bench.py dpo MODEL --data prefs.jsonl # preference tuning beside TRL's DPOTrainer
    python bench.py grpo MODEL                   # reinforcement learning beside TRL's GRPOTrainer
    python bench.py kernels                      # on a GPU: GB/s of each kernel beside the card's
    python bench.py sass                         # without one: instructions a weight
    python bench.py tokenizer corpus.txt --vocab-size 32000     # beside HF tokenizers and tiktoken
    python bench.py decode 7b                    # one text and eight; random weights, or:
    python bench.py decode FOLDER --gguf f16.gguf q8_0.gguf --transformers bfloat16    # with peers
    python bench.py throughput FOLDER --requests 64    # random lengths, all at once
    python bench.py overhead                     # Python's share of a step: the model costs nothing
    python bench.py prefix FOLDER                # first token of 64 requests that begin alike
    python bench.py serve FOLDER                 # the server under load, and what it costs
    python bench.py gpu --nanogpt DIR --gptfast DIR  # all that needs a GPU, beside the peers
    python bench.py compare before.json after.json    # two measurements, written with --json FILE

A measurement is a generator: it yields its figures, a dict a row, which are printed under their
names. Its parameters are its flags. To add one, write it and name it in MEASUREMENTS, at the end;
to add a figure, put it into the dict. The programs that some run beside ours are in peers/.
"""

import argparse
import asyncio
import contextlib
import gc
import inspect
import itertools
import json
import platform
import random
import re
import string
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean, median
from types import SimpleNamespace
from urllib.parse import urlsplit

from common import (  # isort: skip
    Metrics,
    Parser,
    UserError,
    cli,
    flag,
    in_processes,
    read_json,
    usable_cpus,
)

import torch
import torch.nn.functional as F

import chat
import dpo
import kernels
import lora
from data import encode_job, shard_jobs
from engine.graphs import Graphs
from engine.sampler import Sampling
from generate import Engine
from model import Config, Transformer
from quant import pack_linear, tiled
from runtime import compile_or_say_why, peak_flops, resolve
from tokenizer import Tokenizer
from training.corpora import documents
from training.exam import read_questions
from training.optim import MuonAdamW

ROOT = Path(__file__).parent


# ----------------------------------------------------------------------------------------- figures
def machine_facts():
    """What a figure depends on beside the program."""
    cpu = platform.machine()
    with contextlib.suppress(OSError, TypeError):  # there is no such file, or no such line
        cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    return dict(
        date=time.strftime("%Y-%m-%d"),
        platform=platform.platform(),
        cpu=cpu,
        cores=usable_cpus(),
        threads=torch.get_num_threads(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        torch=torch.__version__,
        commit=subprocess.getoutput(f"git -C '{ROOT}' describe --always --dirty 2>/dev/null"),
    )


def machine_text(facts):
    return ", ".join(f"{name} {value}" for name, value in facts.items() if value != "")


def figure_text(value):
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.5g}"


def show_figures(rows):
    """Print rows as they are measured, the names of their figures above the first of a kind
    -> all of them."""
    shown, names = [], []
    for row in rows:
        # texts are on the left of a wide column, numbers on the right of one as wide as their name
        widths = ["<34" if isinstance(v, str) else f">{max(10, len(k))}" for k, v in row.items()]
        lines = [[figure_text(value) for value in row.values()]]
        if names != list(row):
            names = list(row)
            lines.insert(0, names)
        for line in lines:
            cells = [f"{text:{width}}" for text, width in zip(line, widths)]
            print(" ".join(cells).rstrip(), flush=True)
        shown.append(row)
    return shown


# ----------------------------------------------------------------------- what is measured, and with
def seconds_of(function, *args, repeats=1, warm_up=0):
    """Mean seconds of a call, after some to warm up; the GPU's work is waited for."""
    for _ in range(warm_up):
        function(*args)
    wait_for_gpu()
    begin = time.perf_counter()
    for _ in range(repeats):
        function(*args)
    wait_for_gpu()
    return (time.perf_counter() - begin) / repeats


def wait_for_gpu():
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def memory_held(reset=False):
    """(bytes held now, most since the reset), of the GPU or else of this process."""
    if reset:
        gc.collect()  # a compiled model that was measured before
    if torch.cuda.is_available():
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    if sys.platform != "linux":
        return float("nan"), float("nan")
    if reset:  # the high-water mark falls to what is held now
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return tuple(1024 * int(re.search(rf"{n}:\s*(\d+)", status)[1]) for n in ("VmRSS", "VmHWM"))


def read_bandwidth(device):
    """Bytes a second at which a sum reads more than any cache holds."""
    big = torch.ones((4 if device.type == "cuda" else 1) << 27, dtype=torch.int64, device=device)
    return big.nbytes / seconds_of(big.sum, repeats=3, warm_up=3)


# type, vocabulary, width, MLP, layers, heads, key/value heads, head dim, context
SHAPES = {
    "7b": Config("llama", 32000, 4096, 11008, 32, 32, 32, 128, 4096, tie_word_embeddings=False),
    "1b": Config("llama", 32000, 2048, 5632, 22, 32, 4, 64, 2048, tie_word_embeddings=False),
    "qwen3-0.6b": Config("qwen3", 151_936, 1024, 3072, 28, 16, 8, 128, 40_960),
    "135m": Config("llama", 49_152, 576, 1536, 30, 9, 3, 64, 8192),
    "qwen3": Config("qwen3", 32_768, 768, 2560, 12, 6, 6, 128, 1024),  # the preset 125m
    "gpt2": Config("gpt2", 50_304, 768, 3072, 12, 12, 12, 64, 1024, norm_eps=1e-5),  # nanoGPT's
}


def random_base(config, packed, runtime):
    """A model of random weights on the device, made one matrix at a time: in NF4 it is never there
    whole in 16 bits."""
    with torch.device("meta"):
        model = Transformer(config).to(runtime.dtype)
    for name, module in list(model.named_modules()):
        module.to_empty(device=runtime.device, recurse=False)
        for p in module.parameters(recurse=False):
            torch.nn.init.normal_(p, mean=float(p.ndim == 1), std=0.02)  # a norm's are around 1
        if packed and isinstance(module, torch.nn.Linear) and name != "lm_head":
            model.set_submodule(name, tiled(pack_linear(module, "nf4", 64)))
    return model.to(runtime.device)


def folder_of(model):
    """A model folder as it is; for the name of a shape one of random weights under runs/, made the
    first time."""
    if model not in SHAPES:
        return model
    folder = f"runs/random-{model}"
    if not Path(folder, "config.json").is_file():
        random_base(SHAPES[model], False, resolve("auto", "bfloat16")).save_pretrained(folder)
    return folder


# ----------------------------------------------------------------------------------------- training
def run_stage(command):
    """A training as a user runs it -> (seconds, Python's start included; the rows of its metrics;
    what it printed)."""
    with tempfile.TemporaryDirectory() as out:
        words = f"{command} --out {out}/run".split()
        begin = time.perf_counter()
        done = subprocess.run([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        seconds = time.perf_counter() - begin
        if done.returncode:
            raise UserError(f"{command} failed")
        return seconds, Metrics.read(f"{out}/run/metrics.jsonl"), done.stdout


def number_before(words, text):
    """Where a stage printed `1,234 words` -> 1234."""
    return int(re.search(rf"([\d,]+) {words}", text)[1].replace(",", ""))


def tuning_step(command):
    """A fine-tuning on the CPU -> (its seconds a step, after twelve; what it printed)."""
    flags = "--device cpu --dtype float32 --steps 25 --log-every 12"
    _, rows, said = run_stage(f"{command} {flags}")
    first, last = [row["seconds"] for row in rows if "loss" in row][-2:]
    return (last - first) / 12, said


def bench_train(presets=("shakespeare-char-fast", "shakespeare-char"), target=1.898):
    """Train each of train.py's presets in a process of its own: seconds, validation loss, seconds
    to the target loss."""
    for preset in presets:
        wall, rows, said = run_stage(f"train.py --sample 1 --preset {preset}")
        losses = [row for row in rows if "val_loss" in row]
        before = wall - losses[-1]["seconds"]  # the start, which the run's own clock does not count
        reached = [row["seconds"] + before for row in losses if row["val_loss"] <= target]
        yield dict(
            preset=preset,
            parameters=number_before("parameters", said),
            wall=wall,
            val_loss=losses[-1]["val_loss"],
            reached=reached[0] if reached else None,
        )


def bench_optimizers():
    """Validation loss at each quarter of the steps, of AdamW, of Muon, and of Muon with a rate of
    its own for embedding and norms; and does the last reach Muon's end in 0.9 of the steps? Same
    model, text, batch, order, for each seed. AdamW's schedule and rate are the best of those in
    NOTES.md."""
    shape = "--layers 4 --dim 96 --heads 4 --kv-heads 4 --mlp 192 --save-every 1000000 --sample 1"
    tried = {
        "AdamW": "--steps 280 --eval-every 70 --embed-lr 0 --optimizer adamw --warmup 20",
        "Muon": "--steps 280 --eval-every 70 --embed-lr 0 --muon-lr 0.02",
        "Muon, embed_lr": "--steps 280 --eval-every 70 --muon-lr 0.03",
        "Muon, embed_lr, 0.9 of the steps": "--steps 252 --eval-every 63 --muon-lr 0.03",
    }
    for seed in (1, 2, 3):
        for name, flags in tried.items():
            _, rows, _ = run_stage(f"train.py {shape} --seed {seed} {flags}")
            losses = [row["val_loss"] for row in rows if "val_loss" in row]
            quarters = dict(zip(("1/4", "1/2", "3/4", "end"), losses[-4:]))
            yield dict(optimizer=name, seed=seed) | quarters


def training_step(model, optimizer, runtime, ids, passes=1):
    """-> a function that takes one step on ids (B, T + 1), as often as there are passes."""
    x = ids[:, :-1].contiguous()
    y = ids[:, 1:].contiguous()

    def step():
        for _ in range(passes):
            with runtime.autocast():
                loss = model(x, y) / (passes * y.numel())
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def try_compiling(model, compiled, optimizer, runtime, ids):
    """The model, compiled where that is wanted and a step works."""
    how = replace(runtime, compile=compiled)
    return compile_or_say_why(model, how, lambda it: training_step(it, optimizer, runtime, ids)())


def time_by_operation(step):
    """Where a step's time goes: the GPU's kernels or the CPU's operations that take longest."""
    with torch.profiler.profile() as profile:
        step()
        wait_for_gpu()
    own = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    spent = {event: getattr(event, own) for event in profile.key_averages()}
    total = sum(spent.values()) or 1  # a container may keep a GPU's times from the profiler
    for event in sorted(spent, key=spent.get, reverse=True)[:12]:
        share = spent[event] / total
        yield dict(operation=event.key[:60], ms=spent[event] / 1000, share=share, calls=event.count)


def our_program(config, device):
    """-> (a fresh model, the optimizer that goes with its shape)."""
    model = Transformer(config).to(device).train()
    model.init_weights()
    return model, MuonAdamW(model, kind="adamw" if config.is_gpt2 else "muon")


def bench_pretrain(
    arch="qwen3",
    rows=32,
    passes=16,
    steps=20,
    ways=("eager", "compiled", "compiled recomputing"),
    nanogpt="",
):
    """Whole training steps (forward, backward, optimizer) of one pass and of --passes on random
    tokens: tokens/s, share of the device's peak rate where that is known, peak memory; then where
    the time of a step goes.

    --arch qwen3: the preset 125m under Muon; gpt2: nanoGPT's shape under AdamW, beside which
    --nanogpt runs its own source (a folder with its model.py)."""
    if arch not in ("qwen3", "gpt2") or (nanogpt and arch != "gpt2"):
        raise UserError(f"--arch {arch}: use qwen3 or gpt2, the one that goes with --nanogpt")
    unknown = set(" ".join(ways).split()) - {"eager", "compiled", "recomputing"}
    if unknown:
        raise UserError(f"--ways {unknown.pop()}: use eager, compiled or 'compiled recomputing'")
    runtime = resolve()
    peak = peak_flops(runtime.device)
    config = SHAPES[arch]
    context = config.max_position_embeddings
    ids = torch.randint(config.vocab_size, (rows, context + 1), device=runtime.device)

    flops = Transformer(config).flops_per_token(context)
    programs = {"ours": our_program}
    if nanogpt:
        from peers.nanogpt import nanogpt_program

        programs["nanoGPT"] = partial(nanogpt_program, nanogpt)

    def measured(program, way):  # a function, so that no model is there while the next is measured
        memory_held(reset=True)
        model, optimizer = programs[program](config, runtime.device)
        if "recomputing" in way:
            model.recompute = True
        model = try_compiling(model, "compiled" in way, optimizer, runtime, ids)
        for n in dict.fromkeys((1, passes)):
            step = training_step(model, optimizer, runtime, ids, n)
            seconds = seconds_of(step, repeats=max(2, steps // n), warm_up=3 if n == 1 else 1)
            rate = n * rows * context / seconds
            yield dict(
                name=f"{program}, {way}",
                arch=arch,
                passes=n,
                seconds=seconds,
                tokens_per_s=rate,
                mfu=rate * flops / peak if peak else None,
                peak_mib=memory_held()[1] / 2**20,
            )
        if "recomputing" not in way:
            yield from time_by_operation(training_step(model, optimizer, runtime, ids))

    for way in ways:
        for program in programs:
            if program == "ours" or "recomputing" not in way:  # nanoGPT cannot
                yield from measured(program, way)


def bench_qlora(shape="7b"):
    """The memory and speed of QLoRA (rank 32, a row of 512 tokens, 8-bit AdamW), estimated and
    measured; on a GPU also compiled, and LoRA's on a 16-bit base. --shape: 7b, 1b, qwen3-0.6b or
    135m."""
    if shape not in SHAPES:
        raise UserError(f"--shape {shape}: use one of {', '.join(SHAPES)}")
    runtime = resolve(compile="off")
    config = SHAPES[shape]
    ways = [("nf4", False)]
    if runtime.device.type == "cuda":
        ways += [("nf4", True), ("", True)]
    for quant, compiled in ways:
        yield qlora_figures(config, quant, compiled, runtime)


def qlora_figures(config, quant, compiled, runtime):
    """One row of `bench_qlora`; its model is gone when the next one is made."""
    args = lora.Args(r=32, quant=quant, optimizer="adamw8bit", recompute=True, context=512, batch=1)
    with torch.device("meta"):
        planned = lora.adapt(Transformer(config).to(runtime.dtype), args)
    parts = lora.print_fit(planned, args, runtime)
    model = random_base(config, bool(quant), runtime)
    loaded, _ = memory_held(reset=True)
    lora.apply(model, args.r).train().recompute = True
    optimizer = MuonAdamW(model, adam_lr=1e-4, kind="adamw8bit")
    ids = torch.randint(config.vocab_size, (1, 513), device=runtime.device)
    model = try_compiling(model, compiled, optimizer, runtime, ids)
    step = training_step(model, optimizer, runtime, ids)
    seconds = seconds_of(step, repeats=3, warm_up=1)
    _, peak = memory_held()
    return dict(
        base=(quant or str(runtime.dtype)) + ", compiled" * compiled,
        estimated_gib=sum(parts.values()) / 2**30,
        base_gib=loaded / 2**30,
        peak_gib=peak / 2**30,
        to_train_gib=(peak - loaded) / 2**30,
        tokens_per_s=512 / seconds,
    )


def bench_sft(model, data="data/toybox/train.jsonl"):
    """Conversations a second through whole steps of fine-tuning on the CPU: packed rows beside
    TRL's SFTTrainer, which pads; the same model, conversations, optimizer (AdamW) and number of
    conversations a step; start-up is not counted."""
    from peers.trl import trainer_speed

    flags = "--context 256 --batch 16 --optimizer adamw --sample 0"
    seconds, said = tuning_step(f"finetune.py {model} --data {data} {flags}")
    per_step = 16 * number_before("to train on", said) / number_before("rows of", said)
    conversations = round(per_step)
    speed = per_step / seconds
    yield dict(name="finetune.py, packed", per_step=conversations, conversations_per_s=speed)
    speed = trainer_speed(
        "SFT",
        model,
        [{"messages": messages} for _, messages, _ in chat.read_records(data)],
        max_steps=12,
        per_device_train_batch_size=conversations,
        max_length=256,
        assistant_only_loss=True,
    )
    yield dict(name="SFTTrainer", per_step=conversations, conversations_per_s=speed)


def bench_dpo(model, data="data/toybox/preferences-train.jsonl"):
    """Seconds a step of 32 pairs, 8 at a time, on the CPU: rows that share their prompt, beside
    TRL's DPOTrainer on the same model and pairs. Both have the reference's log-probs already."""
    from peers.trl import trainer_speed

    seconds, _ = tuning_step(f"dpo.py {model} --data {data} --batch 32 --micro-batch 8")
    yield dict(name="dpo.py", seconds=seconds)
    pairs = []
    for prompt, chosen, rejected, _ in itertools.islice(dpo.read_preferences(data), 12 * 32):
        pairs.append({"prompt": prompt, "chosen": [chosen], "rejected": [rejected]})
    speed = trainer_speed(
        "DPO",
        model,
        pairs,
        max_steps=12,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=4,
        precompute_ref_log_probs=True,
    )
    yield dict(name="DPOTrainer", seconds=32 / speed)


def bench_grpo(model, data="toybox", questions=16, steps=6):
    """Answer tokens a second through whole steps of GRPO on the CPU, from eight answers to each
    question to the update: grpo.py, and what share of it the engine takes, beside TRL's GRPOTrainer
    with transformers' generation. The first step of each is not counted."""
    if steps < 2:
        raise UserError("--steps 1: the first step is not counted, so use 2 or more")
    from peers.trl import policy_trainer_speed

    flags = f"--batch {questions} --steps {steps} --eval-every {steps} --max-tokens 40"
    flags += " --context 128 --device cpu --dtype float32"
    _, rows, _ = run_stage(f"grpo.py {model} --data {data} {flags}")
    rows = [row for row in rows if "reward" in row][1:]
    share = fmean(row["generate_share"] for row in rows)
    ours = fmean(row["tokens_per_s"] for row in rows)
    yield dict(name="grpo.py", tokens_per_s=ours, generate_share=share)
    source = SimpleNamespace(data=[data], examples=questions * steps, ignore_keys="")
    theirs = policy_trainer_speed(model, read_questions(source, "train"), questions, 8, steps)
    yield dict(name="GRPOTrainer", tokens_per_s=theirs, grpo_is_faster=ours / theirs)


# ------------------------------------------------------------------------------------------ kernels
def graph_seconds(size, function, draw):
    """Seconds of a call that reads and writes `size` bytes, from a CUDA graph of calls on so many
    drawn inputs that no cache holds them."""
    inputs = [draw() for _ in range(min(max(2, 512_000_000 // size), 64))]
    for arguments in inputs:
        function(*arguments)  # compiles and tunes
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for arguments in inputs:
            function(*arguments)
    return seconds_of(graph.replay, repeats=20, warm_up=3) / len(inputs)


def bf16(*shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def linear_cases(M, N=12_288, K=4096):
    """Products of M rows with a layer (N, K) -> {name: (bytes, function, function that draws its
    arguments)}; the first is what the others are measured against."""

    def packed(kind, groups):
        codes = torch.randint(0, 256 if kind == "int8" else 16, (N, K), device="cuda")
        scales = torch.rand(N, groups, device="cuda", dtype=torch.float16)
        return bf16(M, K), kernels.tile(kind, codes.to(torch.uint8), scales, K // groups)

    rows = 2 * M * (N + K)
    cases = {"cuBLAS bf16": (2 * N * K + rows, F.linear, lambda: (bf16(M, K), bf16(N, K)))}
    # scales of a row, and bytes of a weight with its part of them
    formats = {"int8": (1, 1), "int4": (K // 128, 1 / 2 + 1 / 64), "nf4": (K // 64, 1 / 2 + 1 / 16)}
    for kind, (groups, width) in formats.items():
        size = int(N * K * width) + rows
        cases[kind] = (size, kernels.linear, partial(packed, kind, groups))
    return cases


def attention_cases(S, rows, length=4096):
    """S sequences of `length` tokens with `rows` new ones each, beside torch's attention on unpaged
    keys -> as linear_cases."""
    H, KH, D, page = 32, 8, 128, 16
    pages = S * length // page

    def paged(dtype):
        shape = (2, pages, page, KH, D)
        cache = torch.randint(-99, 99, shape, device="cuda").to(dtype)
        scales = torch.rand(shape[:-1], device="cuda") if dtype == torch.int8 else None
        table = torch.randperm(pages, device="cuda").int().view(S, -1)
        lengths = torch.full((S,), length, dtype=torch.int32, device="cuda")
        starts = torch.arange(0, S * rows + 1, rows, dtype=torch.int32, device="cuda")
        q = bf16(S * rows, H, D)
        return q, cache, table, lengths, starts, D**-0.5, None, scales

    def unpaged():
        return bf16(S, H, rows, D), bf16(S, KH, length, D), bf16(S, KH, length, D)

    def torch_attention(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=rows > 1, enable_gqa=True)

    values = 2 * S * length * KH * D
    cases: dict = {"torch bf16, unpaged": (2 * values, torch_attention, unpaged)}
    for dtype in (torch.bfloat16, torch.int8):
        size = values * dtype.itemsize
        cases[f"paged, {dtype}"] = (size, kernels.paged_attention, partial(paged, dtype))
    return cases


def between_cases(T=8192, C=4096, K=8, D=128, page=16):
    """What a layer does between its products, for T tokens -> as linear_cases."""
    norm = torch.nn.RMSNorm(C, 1e-6, device="cuda", dtype=torch.bfloat16)
    heads = C // D + 2 * K

    def heads_to_store():
        slots = torch.randperm(T, device="cuda")
        cache = bf16(2, T // page, page, K, D)
        rope = bf16(T, 1, D), bf16(T, 1, D)
        return bf16(T, heads, D), bf16(heads - K, D), 1e-6, rope, slots, cache

    def rows():
        return bf16(T, C), bf16(T, C), norm

    size = 2 * T * C
    return {
        "residual + RMSNorm, torch": (4 * size, kernels.add_norm_twin, rows),
        "residual + RMSNorm": (4 * size, kernels.add_norm, rows),
        "q/k norm + RoPE + store": (4 * T * (heads + 1) * D, kernels.store_heads, heads_to_store),
        "SwiGLU": (3 * size, kernels.swiglu, lambda: (bf16(T, 2 * C),)),
    }


KERNEL_GROUPS: dict = {
    "linear, 1 row": partial(linear_cases, 1),
    "linear, 1 row, 22016 x 4096": partial(linear_cases, 1, 22_016),
    "linear, 1 row, 4096 x 4096": partial(linear_cases, 1, 4096),
    "linear, 16 rows": partial(linear_cases, 16),
    "linear, 64 rows": partial(linear_cases, 64),
    "decode, 16 x 4096 tokens": partial(attention_cases, 16, 1),
    "prefill, 4096 tokens": partial(attention_cases, 1, 4096),
    "between products, 8192 tokens": between_cases,
}


def bench_kernels(only=""):
    """Every kernel at Llama's shapes: microseconds, GB/s, share of the bandwidth at which the card
    reads, speed over the first of its group. --only: those groups whose name contains it."""
    groups = {name: cases for name, cases in KERNEL_GROUPS.items() if only in name}
    if not groups:
        raise UserError(f"--only {only}: a part of one of these: {'; '.join(KERNEL_GROUPS)}")
    if not torch.cuda.is_available() or kernels.triton is None:
        raise UserError(
            "bench.py kernels times the Triton kernels on a CUDA device, and here is none; that "
            "they compute the right thing is shown by: python -m pytest tests/test_kernels.py"
        )
    peak = read_bandwidth(torch.device("cuda"))
    yield dict(group="sum, read", gb_per_s=peak / 1e9)
    for group, cases in groups.items():
        first = None
        for name, case in cases().items():
            with torch.inference_mode():
                seconds = graph_seconds(*case)
            first = first or seconds
            rate = case[0] / seconds
            yield dict(
                group=group,
                name=name,
                us=seconds * 1e6,
                gb_per_s=rate / 1e9,
                of_read=rate / peak,
                speed_up=first / seconds,
            )


# A Hopper SM issues 128 lanes a clock: 132 of them at 1.75 GHz take 3 microseconds for 90M weights
# and each instruction a weight, where memory delivers as many in 4 bits within 10.
# A byte a value leaves it 6 at an H200's bandwidth, if there is never a pause.
INSTRUCTIONS_GOAL = {"int4": 2.6, "int8": 2.6, "nf4": 6.5, "attention": 4.5}  # up to 16 rows


def machine_code(kernel, pointers, numbers, constants, unaligned=()):
    """A kernel for sm_90 as Triton lists its SASS; this needs no GPU.

    pointers, numbers: {argument: type, of what is there}; all others are constants, None where not
    given. What is not named in `unaligned` is a multiple of 16, as Triton finds it at a launch.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = dict(enable_fp_fusion=True)
    for name in ("num_warps", "num_stages"):
        options[name] = constants.pop(name)
    names = kernel.arg_names
    signature = dict.fromkeys(names, "constexpr") | numbers
    for name, kind in pointers.items():
        signature[name] = "*" + kind
    constants = {name: constants.get(name) for name in names if signature[name] == "constexpr"}
    aligned = [name for name in (*pointers, *numbers) if name not in unaligned]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = kernels.triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return compiled.asm["sass"]


def product_machine_code(format, group, zeros, config):
    pointers = dict(x="bf16", words="i16", table="fp32", sums="fp32", done="i32", out="bf16")
    pointers["scales"] = "fp32" if format == "nf4" else "fp16"
    if zeros:
        pointers["zeros"] = "u8"
    constants = dict(FORMAT=format, GROUP=group, SPLIT=8, **config)
    constants["TOGETHER"] = kernels.parts_together(group)
    numbers = dict.fromkeys("MNK", "i32")
    return machine_code(kernels._product, pointers, numbers, constants, "M")


def attention_machine_code(cached, config, query="bf16"):
    """kernels._attend for 32 heads of 128 on 8 key heads, over a cache of the type `cached`."""
    pointers = dict(q=query, k_cache=cached, v_cache=cached, out="fp32", lses="fp32")
    pointers |= dict.fromkeys(("tables", "lengths", "starts"), "i32")
    if cached == "i16":  # pairs of int8
        pointers |= dict(k_scale="fp32", v_scale="fp32")
    numbers = dict(scale="fp32", S="i32", T="i32", table_stride="i32")
    constants = dict(H=32, KH=8, D=128, PAGE_SIZE=16, BLOCK_D=128, SPLIT=4, **config)
    unaligned = ("tables", "lengths", "starts", *numbers)
    return machine_code(kernels._attend, pointers, numbers, constants, unaligned)


def longest_loop(code):
    """-> the instructions from a label to the branch back to it, of the longest loop."""
    places = {}  # of the labels that came already
    instructions = []
    longest = []
    for line in code.splitlines():
        label = line.rstrip(":;").rpartition(" ")[2]  # "LBB7:", "BRA LBB7;"
        if line.endswith(":"):
            places[label] = len(instructions)
        elif line.endswith(";"):
            instructions.append(line)
            loop = instructions[places.get(label, len(instructions)) :]
            longest = max(longest, loop, key=len)
    return longest


def loop_figures(name, rows, code, config, values, goal):
    """One row of `bench_sass`: what a lane of a warp does for each value. A pass of the loop takes
    `values` for each of BLOCK_N."""
    loop = longest_loop(code)
    block = config["BLOCK_N"]
    warps = config["num_warps"]
    return dict(
        loop=name,
        rows=rows,
        block=block,
        warps=warps,
        stages=config["num_stages"],
        spilled=sum("LDL" in line or "STL" in line for line in loop),
        per_value=len(loop) * warps * 32 / (block * values),
        goal=goal,
    )


def bench_sass(rows=(16, 64)):
    """Instructions a weight in the loop of each quantized product, and a cached value (keys and
    values together) in attention's of one new token, in machine code for sm_90. It needs no GPU."""
    if kernels.triton is None or kernels.INTERPRET:
        raise UserError("bench.py sass compiles with Triton: install it; unset TRITON_INTERPRET")
    cases = ("int4", 128, False), ("int4", 128, True), ("int4", 64, False), ("int4", 32, False)
    cases += ("int8", 1 << 30, False), ("nf4", 64, False)
    for format, group, zeros in cases:
        columns = "" if format == "int8" else f" in groups of {group}"
        name = f"{format}{columns}{', zero points' * zeros}"
        for M in rows:
            goal = INSTRUCTIONS_GOAL[format] if M <= 16 else None
            for config in kernels.product_configs(M)[:2]:
                code = product_machine_code(format, group, zeros, config)
                yield loop_figures(name, M, code, config, kernels.COLUMNS, goal)
    for cached, name in (("bf16", "bf16"), ("i16", "int8")):
        for config in kernels.attention_configs(4, 4)[:2]:
            code = attention_machine_code(cached, config)
            goal = INSTRUCTIONS_GOAL["attention"]
            yield loop_figures(f"attention, {name}", 1, code, config, 2 * 128, goal)


# ---------------------------------------------------------------------------------------- tokenizer
def encode_file(tok, file, processes):
    """A file's ids, as data.py makes them."""
    parts = documents([Path(file)], tok.cuts)
    encode = partial(encode_job, tok=tok)
    return list(in_processes(encode, shard_jobs(parts, ()), processes))


def bench_tokenizer(file, vocab_size=10_000):
    """Train and encode with ours, HF tokenizers and tiktoken on the same text, best of 10 MB or
    more: the first 5 MB as a string, in turns, and the whole file by ours in one process and in
    two."""
    from peers.tokenizers import hf_encoder, tiktoken_encoder, train_hf

    size = Path(file).stat().st_size

    def train_ours(folder):
        Tokenizer.train(files=[file], vocab_size=vocab_size, special_tokens=[]).save(folder)

    made = []
    with tempfile.TemporaryDirectory() as out:
        for name, learn in (("ours", train_ours), ("HF", partial(train_hf, file, vocab_size))):
            seconds = seconds_of(learn, f"{out}/{name}")
            tok = Tokenizer.load(f"{out}/{name}")
            made.append((tok.vocab, tok.merges))
            rate = size / seconds / 1e6
            yield dict(train=name, seconds=seconds, mb_per_s=rate, merges=len(tok.merges))
        encode_hf = hf_encoder(f"{out}/HF")
    if made[0] != made[1]:
        raise UserError("ours and HF have not learned the same merges from this text")
    encode_tiktoken = tiktoken_encoder(tok)
    text = Path(file).read_bytes()[:5_000_000].decode("utf-8", "ignore")
    if tok.encode(text) != encode_tiktoken(text):
        raise UserError("ours and tiktoken disagree on this text")
    encoders = {
        "ours, on tiktoken's core": (tok.encode, text),
        "tiktoken": (encode_tiktoken, text),
        "ours, plain Python": (tok.encode_slowly, text),
        "HF": (encode_hf, text),
        "ours, file to array": (encode_file, tok, file, 1),
        "ours, file to array, two processes": (encode_file, tok, file, 2),
    }
    rounds = [{name: seconds_of(*call) for name, call in encoders.items()} for _ in range(3)]
    for name in encoders:
        seconds = min(took[name] for took in rounds)
        encoded = size if "file" in name else len(text.encode())
        yield dict(encode=name, mb_per_s=encoded / seconds / 1e6)


# --------------------------------------------------------------------------------------- generation
def greedy(new):
    return Sampling(max_tokens=new, temperature=0, ignore_eos=True)


def open_engine(model, quant=None, dtype="auto", **options):
    """An engine over a folder, a file or a shape, warmed up."""
    loaded = None
    if model in SHAPES and torch.cuda.is_available():  # random weights, made where they are used
        runtime = resolve("auto", dtype, "off")
        loaded = random_base(SHAPES[model], False, runtime).eval(), None, runtime
    else:
        model = folder_of(model)
    engine = Engine(model, "auto", dtype, quant, loaded=loaded, **options)
    engine.warm_up()
    return engine


def engine_writer(model, quant=None, dtype="auto"):
    """-> (a function (texts, tokens of a prompt, new tokens) that writes so much; bytes of the
    weights that a decode step reads)"""
    engine = open_engine(model, quant, dtype, kv_tokens=16 * 1024, max_seqs=8)

    def write(texts, prompt, new):
        prompts = torch.randint(1, engine.vocab_size, (texts, prompt)).tolist()
        engine.generate(prompts, greedy(new))

    # of the embedding one row is read, unless it is the head too
    table = engine.runner.forward.embedding
    if engine.runner.native:
        unread = 4 * table.numel()
    else:
        unread = 0 if engine.config.tie_word_embeddings else table.nbytes
    return write, engine.runner.forward.weight_bytes - unread


def writing_speed(write, texts):
    """tok/s of texts being written: the time of 32 tokens less that of two."""
    seconds = seconds_of(write, texts, 64, 32) - seconds_of(write, texts, 64, 2)
    return texts * 30 / seconds


def bench_decode(
    model, formats=("float32", "float16", "int8", "int4"), gguf=(), transformers=(), rounds=3
):
    """tok/s of a prompt being read and of one and eight texts being written, every program in turn,
    the median of the rounds. The roofline is the rate at which memory is read (a sum over more than
    any cache holds) over the bytes of the weights.

    MODEL: a folder or a shape (7b, 1b, qwen3-0.6b, 135m); --formats of our weights; --gguf: the
    model as files, for llama.cpp and for us; --transformers: its dtypes to measure too."""
    device = resolve().device
    bandwidth = read_bandwidth(device)
    yield dict(memory="read", gb_per_s=bandwidth / 1e9)
    programs, size = {}, {}
    packed_from = "auto" if device.type == "cuda" else "float32"
    for name in formats:
        how = (name, packed_from) if name in ("int8", "int4") else (None, name)
        programs[name], size[name] = engine_writer(model, *how)
    for path in map(Path, gguf):
        from peers.llama_cpp import llama_writer

        programs[path.name], size[path.name] = engine_writer(path)
        programs[f"llama.cpp {path.stem}"] = llama_writer(path)
    for dtype in transformers:
        from peers.hf import transformers_writer

        programs[f"transformers {dtype}"] = transformers_writer(folder_of(model), dtype, device)
    figures = {name: [] for name in programs}
    for _ in range(rounds):
        for name, write in programs.items():
            reading = 512 / seconds_of(write, 1, 512, 1)
            figures[name].append([reading, writing_speed(write, 1), writing_speed(write, 8)])
    for name, measured in figures.items():
        prompt, one, eight = map(median, zip(*measured))
        yield {
            "program": name,
            "prompt of 512": prompt,
            "1 text": one,
            "8 texts": eight,
            "roofline": bandwidth / size[name] if name in size else None,
        }


def random_requests(count, low, high, vocab_size):
    """-> (prompts, numbers of new tokens), both of --low to --high tokens, always the same."""
    rng = random.Random(0)
    prompts = []
    for _ in range(count):
        prompts.append([rng.randrange(1, vocab_size) for _ in range(rng.randint(low, high))])
    return prompts, [rng.randint(low, high) for _ in range(count)]


def bench_throughput(model, requests=64, low=16, high=128, transformers=()):
    """Requests of random lengths (prompts and answers of --low to --high tokens), all there at the
    start: output tok/s, greedy and drawn, beside transformers' static batches of 32 of the same, in
    its dtypes. The engine's longest wait is between two of its steps."""
    if low > high:
        raise UserError(f"--low {low} is more than --high {high}")
    engine = open_engine(model)
    prompts, new = random_requests(requests, low, high, engine.vocab_size)
    engine.generate(prompts[0], greedy(4))
    speeds = []
    for name, temperature in (("greedy", 0), ("temperature 0.6", 0.6)):
        engine.scheduler.pool.forget()
        asked = [replace(greedy(tokens), temperature=temperature, seed=1) for tokens in new]
        seconds = seconds_of(engine.generate, prompts, asked)
        speeds.append(sum(new) / seconds)
        yield dict(
            program=name,
            seconds=seconds,
            tokens_per_s=speeds[-1],
            longest_wait=engine.stats()["longest_wait"],
        )
    for dtype in transformers:
        from peers.hf import transformers_writer, write_in_static_batches

        write = transformers_writer(folder_of(model), dtype, engine.runner.device)
        seconds = seconds_of(write_in_static_batches, write, prompts, new, 32)
        yield dict(
            program=f"transformers {dtype}, batches of 32",
            seconds=seconds,
            tokens_per_s=sum(new) / seconds,
            engine_is_faster=speeds[0] * seconds / sum(new),
        )


class IdleGraphs(Graphs):
    """A replay costs nothing, and computes nothing."""

    def record(self, function):
        return SimpleNamespace(replay=lambda: None)


def idle_engine(sequences, room, tok, in_graph):
    """An engine whose model computes nothing: a step's inputs are made, its logits are constant.

    room: tokens of all sequences together."""
    config = Config("qwen3", 512, 16, 16, 1, 1, 1, 8, 4096)  # forward.cpp does no heads of 8
    model = Transformer(config)
    with contextlib.redirect_stdout(None):
        sizes = dict(kv_tokens=room, max_seqs=sequences, step_tokens=room)
        engine = Engine.of(model, tok, "float32", **sizes)
    constant = torch.randn(sequences, config.vocab_size)
    forward = engine.runner.forward
    forward.step = lambda longs, ints, ids: constant[: longs[2]].clone()
    if in_graph:
        forward.graphs = IdleGraphs()
        forward.logits = constant
        forward.step = lambda longs, ints, ids: constant[: longs[2]]
    return engine


def bench_overhead(steps=200):
    """Microseconds of a decode step and of each of its sequences that are not the model's: the
    scheduler, the inputs of forward.py, sampling from 512 logits, text. It needs no GPU: the last
    rows are what a GPU's steps cost, launched ahead, where replaying a graph costs nothing."""
    text = "".join(random.choices(string.ascii_letters + " ", k=20_000))
    tok = Tokenizer.train([text], 512)
    drawn = Sampling(max_tokens=steps + 8, ignore_eos=True, seed=1)
    requests = {
        "greedy": (None, replace(drawn, temperature=0)),
        "sampled": (None, drawn),
        "top-p": (None, replace(drawn, top_p=0.9)),
        "streaming": (tok, drawn),
        "stop strings": (tok, replace(drawn, stop=("never seen", "nor this"))),
        "drawn in a CUDA graph": (None, drawn),
    }
    for name, (tokenizer, sampling) in requests.items():
        for sequences in (1, 16, 64, 256):
            room = sequences * (steps + 312)
            engine = idle_engine(sequences, room, tokenizer, "graph" in name)
            for i in range(sequences):
                engine.submit([i + 1] * 256, sampling)
            for _ in range(4):  # the prompts, the caches
                engine.step()
            took = [seconds_of(engine.step) for _ in range(steps)]
            a_step = median(took) * 1e6
            yield dict(
                answers=name,
                sequences=sequences,
                us_a_step=a_step,
                us_a_sequence=a_step / sequences,
            )


def bench_prefix(model, requests=64, length=1000):
    """Requests with the same --length tokens in front: seconds to their first token on average and
    at the latest, without and with the prefix cache."""
    means = []
    for cached in (False, True):
        engine = open_engine(model, kv_tokens=128 * 1024, max_seqs=64, prefix_cache=cached)
        prefix = [1 + i % (engine.vocab_size - 1) for i in range(length)]
        begin = time.perf_counter()
        for i in range(requests):
            engine.submit([*prefix, i + 1, i + 2], greedy(1))
        first = {}
        while engine.has_work:
            for delta in engine.step():
                if delta.token_ids:
                    first[delta.request_id] = time.perf_counter() - begin
        means.append(fmean(first.values()))
        yield dict(
            prefix_cache="on" if cached else "off",
            mean=means[-1],
            last=max(first.values()),
            sooner=means[0] / means[-1],
        )


# ------------------------------------------------------------------------------------------- server
@contextlib.contextmanager
def served(folder, concurrency):
    """serve.py over a folder, in a process of its own -> its URL."""
    command = [sys.executable, ROOT / "serve.py", folder, "--port", "0"]
    command += ["--concurrency", str(concurrency)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        for line in child.stdout:
            if line.startswith("ready"):
                yield line.split()[1]
                return
        raise UserError(f"serve.py {folder} did not start: run it by hand to see why")
    finally:
        child.terminate()
        child.wait()


class Client(asyncio.Protocol):
    """POSTs a completion over its connection and keeps what comes as it comes, to be read when
    nothing is measured any more. HTTP by hand: the load runs on the server's cores."""

    answer: asyncio.Future | None = None  # once it has asked

    def connection_made(self, transport):
        self.transport = transport

    def ask(self, request):
        """-> a future of [(seconds since the call, bytes that came)]"""
        self.begin = time.perf_counter()
        self.came = []
        self.end = b""  # the last bytes that came
        self.answer = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return self.answer

    def data_received(self, data):
        self.came.append((time.perf_counter() - self.begin, data))
        self.end = (self.end + data)[-7:]
        # A chunk without bytes is the last; what was refused is no stream.
        if self.end == b"\r\n0\r\n\r\n" or not self.came[0][1].startswith(b"HTTP/1.1 200"):
            self.answer.set_result(self.came)

    def connection_lost(self, error):
        if self.answer and not self.answer.done():
            self.answer.set_result(self.came)


async def send_load(url, bodies, concurrency):
    """All bodies as requests over so many connections, on each one after the other
    -> (seconds, what came for each (see Client), the load's own seconds of CPU)."""
    host = urlsplit(url)
    requests = []
    for content in map(json.dumps, bodies):
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host.netloc}"
        head += "\r\nContent-Type: application/json"
        requests.append(f"{head}\r\nContent-Length: {len(content)}\r\n\r\n{content}".encode())
    begin, busy = time.perf_counter(), time.process_time()
    left = iter(requests)  # a client that is free takes the next
    answers = []

    async def client():
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(Client, host.hostname, host.port or 80)
        for request in left:
            answers.append(await connection.ask(request))
        connection.transport.close()

    await asyncio.gather(*(client() for _ in range(concurrency)))
    return time.perf_counter() - begin, answers, time.process_time() - busy


def read_answer(came):
    """What came for a completion -> {ttft, tpot, e2e in seconds, tokens}"""
    whole = b"".join(data for _, data in came)
    used = re.search(rb'"completion_tokens": ?(\d+)', whole)
    if not used:
        raise UserError(f"the server answered {whole[-200:]!r}")
    ttft = next(seconds for seconds, data in came if b"data:" in data)  # heads may come before
    e2e = came[-1][0]
    tokens = int(used[1])
    return dict(ttft=ttft, tpot=(e2e - ttft) / max(tokens - 1, 1), e2e=e2e, tokens=tokens)


def bench_serve(model, requests=64, concurrency=16, seqs=0, new=64, rounds=3):
    """Completions of random words by a server, --concurrency at once, --seqs of them in its engine
    (0: all), --new tokens each: time to the first token, per token, end to end, tok/s, the longest
    time between two steps since the start; and what the server costs over the engine: both do the
    same work in turns, and the median over the rounds counts. MODEL: a folder, or the http://
    address of a running server."""
    import uvloop

    from serve import spare_the_collector

    rng = random.Random(1)
    words = "the of and a to in is you that it he was for on are as with his they at".split()
    prompts = [" ".join(rng.choices(words, k=32)) for _ in range(requests)]
    sampling = [Sampling(max_tokens=new, ignore_eos=True, seed=i) for i in range(requests)]
    streamed = dict(stream=True, stream_options={"include_usage": True})
    bodies = [
        dict(prompt=prompt, max_tokens=new, ignore_eos=True, seed=i, **streamed)
        for i, prompt in enumerate(prompts)
    ]
    running = model.startswith("http://")
    if running and seqs:
        raise UserError("--seqs is a setting of the server, which runs already: leave it out")
    seqs = seqs or concurrency
    measured, alone = [], []
    with contextlib.nullcontext(model) if running else served(model, seqs) as url:
        engine = None if running else Engine(model, max_seqs=seqs)
        spare_the_collector()  # as in the server
        for _ in range(rounds + 1):
            measured.append(uvloop.run(send_load(url, bodies, concurrency)))
            if engine:
                alone.append(seconds_of(engine.generate, prompts, sampling))
        gc.unfreeze()
        del measured[0], alone[:1]  # the first is slower
        longest_wait = None
        if not running:
            with urllib.request.urlopen(f"{url}/stats") as answer:
                longest_wait = json.load(answer)["longest_wait"]
    costs = [1 - own / seconds for own, (seconds, _, _) in zip(alone, measured)]
    seconds, answers, busy = sorted(measured)[rounds // 2]
    rows = list(map(read_answer, answers))
    for name in ("ttft", "tpot", "e2e"):
        values = sorted(row[name] for row in rows)
        yield {"ms": name} | {f"p{p}": 1000 * values[requests * p // 100] for p in (50, 90, 99)}
    made = sum(row["tokens"] for row in rows)
    yield dict(
        load=f"{requests} requests, {concurrency} at once",
        seconds=seconds,
        tokens_per_s=made / seconds,
        longest_wait=longest_wait,
        load_cpu_seconds=busy,
    )
    if alone:
        yield dict(
            beside="the engine by itself",
            tokens_per_s=made / median(alone),
            server_costs=median(costs),
            of_it_load=busy / seconds / usable_cpus(),  # as all cores compute all the time
        )


# ------------------------------------------------------------------------------ what needs a GPU
def bench_gpu(nanogpt="", gptfast="", model="runs/demo-dpo", minutes=10, dry=False):
    """One table of all that is timed on a GPU, ours beside the peers that are at hand: all programs
    compile side by side, then each is timed alone. What fails says why, and the next one runs.

    --nanogpt, --gptfast: folders of their sources; --model: the folder that is served; --dry prints
    the commands."""
    from peers import side_by_side

    todo = side_by_side.timings(nanogpt, gptfast, model)
    if dry:
        for timing in todo:
            yield dict(program=timing.program, command=timing.command, compiled_by=timing.compile)
        return
    if not torch.cuda.is_available():
        raise UserError("bench.py gpu needs a CUDA device, and here is none; --dry shows the plan")
    free_gib = torch.cuda.mem_get_info()[0] / 2**30
    table, failed = side_by_side.measure(todo, free_gib, minutes)
    yield from side_by_side.rows_of(table)
    for program, command, why in failed:
        yield dict(failed=program, command=command, why=why)


# --------------------------------------------------------------------------------- two measurements
def read_measurement(path):
    """A file that --json wrote -> its content."""
    file = read_json(path)
    if not file.keys() >= {"machine", "rows"}:
        raise UserError(f"{path}: not a file that another command of bench.py wrote with --json")
    return file


def rows_by_name(rows):
    """-> {a row's texts, and a number where it is not the first so called: {name: figure}}"""
    found, seen = {}, Counter()
    for row in rows:
        name = " ".join(v for v in row.values() if isinstance(v, str))
        seen[name] += 1
        if seen[name] > 1:
            name += f" ({seen[name]})"
        found[name] = {k: v for k, v in row.items() if isinstance(v, int | float)}
    return found


def bench_compare(before, after):
    """Every figure of two --json files beside its other, and their ratio; changes of over 5 % are
    marked."""
    files = {"A": read_measurement(before), "B": read_measurement(after)}
    for name, file in files.items():
        print(f"{name}  {machine_text(file['machine'])}")
    old, new = (rows_by_name(file["rows"]) for file in files.values())
    for row in old | new:
        if row not in old or row not in new:
            yield dict(row=row, figure=f"only in {'A' if row in old else 'B'}")
            continue
        for name, a in old[row].items():
            b = new[row].get(name)
            if b is None or (a == b and a == int(a)):  # a setting, such as the number of rows
                continue
            ratio = b / a if a else float("nan")
            changed = "" if 0.95 <= ratio <= 1.05 else "<"
            yield dict(row=row, figure=name, a=a, b=b, ratio=ratio, changed=changed)


# ----------------------------------------------------------------------------------------- commands
MEASUREMENTS: dict = {
    "train": bench_train,
    "optimizers": bench_optimizers,
    "pretrain": bench_pretrain,
    "qlora": bench_qlora,
    "sft": bench_sft,
    "dpo": bench_dpo,
    "grpo": bench_grpo,
    "kernels": bench_kernels,
    "sass": bench_sass,
    "tokenizer": bench_tokenizer,
    "decode": bench_decode,
    "throughput": bench_throughput,
    "overhead": bench_overhead,
    "prefix": bench_prefix,
    "serve": bench_serve,
    "gpu": bench_gpu,
    "compare": bench_compare,
}


def number_from_1(word):
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word} must be a whole number from 1")
    return int(word)


def reader_of(default):
    """-> the function that makes a word a value of a parameter with that default."""
    if isinstance(default, tuple):
        return reader_of(default[0]) if default else str
    return number_from_1 if type(default) is int and default else type(default)


def parse_command(argv):
    """Command line -> {"command", "json", and the measurement's own parameters}. A parameter with a
    default is a --flag of that type (a number from 1 on, unless the default is 0), a tuple a flag
    with several values."""
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for command, measure in MEASUREMENTS.items():
        own = commands.add_parser(command, description=measure.__doc__)
        own.add_argument("--json", metavar="FILE", help="also write the rows to this file")
        for name, parameter in inspect.signature(measure).parameters.items():
            default = parameter.default
            if default is parameter.empty:
                own.add_argument(name)
            elif isinstance(default, bool):
                own.add_argument(flag(name), action="store_true")
            else:
                options = dict(default=default, type=reader_of(default), help=f"[{default}]")
                if isinstance(default, tuple):
                    options["nargs"] = "+"
                own.add_argument(flag(name), **options)
    return vars(parser.parse_args(argv))


def main():
    flags = parse_command(sys.argv[1:])
    command = flags.pop("command")
    file = flags.pop("json")
    if file and not Path(file).parent.is_dir():
        raise UserError(f"--json {file}: there is no folder {Path(file).parent}")
    machine = machine_facts()
    if command != "compare":
        print(machine_text(machine), end="\n\n")
    try:
        rows = show_figures(MEASUREMENTS[command](**flags))
    except ImportError as error:
        raise UserError(f"{error}: install requirements-peers.txt") from None
    if file:
        Path(file).write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))


if __name__ == "__main__":
    cli(main)
