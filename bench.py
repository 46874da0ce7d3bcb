"""Every speed figure of the README, from one command each.

    python bench.py train                        # the CPU presets' seconds and validation loss
    python bench.py train --presets shakespeare-char-10m --target 1.4697        # on a GPU
    python bench.py optimizers                   # Muon at 0.7 of the steps against tuned AdamW
    python bench.py pretrain --rows 32           # tokens/s, memory: eager, compiled, recomputing
    python bench.py qlora --shape 7b             # QLoRA, estimated and measured; 1b for a CPU
    python bench.py sft MODEL --data D           # fine-tuning beside TRL's SFTTrainer
    python bench.py dpo MODEL --data prefs.jsonl # preference tuning beside TRL's DPOTrainer
    python bench.py kernels                      # on a GPU: GB/s of each kernel beside the card's
    python bench.py linear                       # one linear layer on the CPU, by format
    python bench.py tokenizer corpus.txt --vocab-size 32000     # beside HF tokenizers and tiktoken
    python bench.py decode 7b                    # one text and eight; random weights, or:
    python bench.py decode FOLDER --gguf f16.gguf q8_0.gguf --transformers bfloat16    # with peers
    python bench.py throughput FOLDER --requests 64    # random lengths, all at once
    python bench.py prefix FOLDER                # first token of 64 requests that begin alike
    python bench.py serve FOLDER                 # the server under load, and what it costs
    python bench.py serve http://127.0.0.1:8000 --rate 4    # a running one, 4 requests a second
    python bench.py compare before.json after.json    # two measurements, written with --json FILE

A measurement yields its figures, a dict a row; they are printed under their names. The programs
that some of them run beside ours are in peers/.
"""

import asyncio
import contextlib
import importlib.util
import inspect
import itertools
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

import chat
import dpo
import finetune
import kernels
import lora
import train
from common import Metrics, UserError, cli, from_preset, parse_flags, read_json, usable_cpus
from engine.sampler import Sampling
from generate import Engine
from model import Config, Transformer
from quant import NF4Linear, pack_linear
from runtime import resolve
from tokenizer import Tokenizer
from training.loop import backward, passes, update
from training.memory import print_estimate
from training.optim import MuonAdamW

ROOT = Path(__file__).parent


# ----------------------------------------------------------------------------------------- figures
def machine_facts():
    """What a figure depends on beside the program."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        names = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        cpu = names[1] if names else ""
    commit = ""
    with contextlib.suppress(OSError):  # no git here
        command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
        commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return dict(
        platform=platform.platform(),
        cpu=cpu or platform.machine(),
        cores=usable_cpus(),
        threads=torch.get_num_threads(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        torch=torch.__version__,
        commit=commit,
    )


def machine_text(facts):
    return ", ".join(f"{name} {value}" for name, value in facts.items() if value != "")


def figure_text(value):
    if isinstance(value, str):
        return value
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.5g}"


def show_figures(rows):
    """Print rows as they are measured, the names of their figures above the first of a kind
    -> all of them."""
    shown, names = [], None
    for row in rows:
        # texts are on the left of a wide column, numbers on the right of one as wide as their name
        widths = [f"<{34}" if isinstance(v, str) else f">{max(10, len(k))}" for k, v in row.items()]
        texts = [figure_text(value) for value in row.values()]
        if names != list(row):
            names = list(row)
            print_cells(names, widths)
        print_cells(texts, widths)
        shown.append(row)
    return shown


def print_cells(texts, widths):
    cells = [f"{text:{width}}" for text, width in zip(texts, widths)]
    print(" ".join(cells).rstrip(), flush=True)


# -------------------------------------------------------------------------------------- stopwatches
def mean_seconds(function, device, repeats, warm_up=3):
    """Mean seconds of a call, after some to warm up."""
    for _ in range(warm_up):
        function()
    wait_for(device)
    begin = time.perf_counter()
    for _ in range(repeats):
        function()
    wait_for(device)
    return (time.perf_counter() - begin) / repeats


def wait_for(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(function, *args):
    begin = time.perf_counter()
    function(*args)
    return time.perf_counter() - begin


def best_seconds(functions, repeats):
    """{name: function} -> {name: best seconds}. They take turns, so that a busy machine is busy for
    all of them."""
    best = dict.fromkeys(functions, float("inf"))
    for _ in range(repeats):
        for name, function in functions.items():
            best[name] = min(best[name], seconds_of(function))
    return best


def memory_held(device, reset=False):
    """(bytes held now, most since the reset), of the GPU or of this process."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    if sys.platform != "linux":
        return float("nan"), float("nan")
    if reset:  # the high-water mark falls to what is held now
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    now, most = (re.search(rf"{name}:\s*(\d+)", status) for name in ("VmRSS", "VmHWM"))
    return int(now[1]) * 1024, int(most[1]) * 1024


# ------------------------------------------------------------------------------------------- shapes
# type, vocabulary, width, MLP, layers, heads, key/value heads, head dim, context
SHAPES = {
    "7b": Config("llama", 32000, 4096, 11008, 32, 32, 32, 128, 4096, tie_word_embeddings=False),
    "1b": Config("llama", 32000, 2048, 5632, 22, 32, 4, 64, 2048, tie_word_embeddings=False),
    "qwen3-0.6b": Config("qwen3", 151_936, 1024, 3072, 28, 16, 8, 128, 40_960),
    "135m": Config("llama", 49_152, 576, 1536, 30, 9, 3, 64, 8192),
    "tiny": Config("llama", 512, 128, 384, 2, 4, 2, 32, 1024, tie_word_embeddings=False),
}


def random_base(config, packed, runtime):
    """A model of random weights on the device, made one matrix at a time: in NF4 it is never there
    whole in 16 bits."""
    with torch.device("meta"):
        model = Transformer(config).to(runtime.dtype)
    for name, module in list(model.named_modules()):
        own = list(module.parameters(recurse=False))
        if not own:
            continue
        module.to_empty(device=runtime.device, recurse=False)
        for p in module.parameters(recurse=False):
            if p.ndim > 1:
                torch.nn.init.normal_(p, std=0.02)
            else:
                torch.nn.init.ones_(p)
        if packed and isinstance(module, torch.nn.Linear) and name != "lm_head":
            model.set_submodule(name, NF4Linear.from_linear(module))
    return model.to(runtime.device)


def folder_of(args):
    """A model folder as it is; for the name of a shape one of random weights under runs/, made the
    first time."""
    if args.model not in SHAPES or Path(args.model).exists():
        return args.model
    folder = f"runs/random-{args.model}"
    if not Path(folder, "config.json").is_file():
        runtime = resolve(args.device, "bfloat16", "off")
        random_base(SHAPES[args.model], False, runtime).save_pretrained(folder)
    return folder


# ----------------------------------------------------------------------------------------- training
@dataclass
class BenchArgs:
    json: str = ""  # also write the rows to this file


@dataclass
class DeviceBench(BenchArgs):
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    dtype: str = "auto"  # auto, float32, bfloat16, float16


@dataclass
class TrainBench(BenchArgs):
    presets: tuple = ("shakespeare-char-fast", "shakespeare-char")  # train.py's
    data: str = "shakespeare"  # a corpus or a file of text
    target: float = 1.886  # report the time to this validation loss
    nanogpt_seconds: float | None = None  # wall time of nanoGPT's CPU recipe on this machine
    nanogpt_loss: float = 1.886  # its loss over the whole validation split


def run_train(*flags):
    """train.py as a user runs it -> (seconds, Python's start included; the rows with a validation
    loss; what it printed)."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, ROOT / "train.py", "--out", f"{out}/run", "--sample", 1, *flags]
        command = [str(word) for word in command]
        begin = time.time()
        done = subprocess.run(command, capture_output=True, text=True)
        seconds = time.time() - begin
        if done.returncode:
            said = done.stderr.strip().splitlines()
            raise UserError(f"{' '.join(command[1:])} failed: {said[-1]}")
        rows = [row for row in Metrics.read(f"{out}/run/metrics.jsonl") if "val_loss" in row]
    return seconds, rows, done.stdout


def bench_train(args):
    """Train each preset in a process of its own: seconds, validation loss, seconds to the target,
    how much faster than nanoGPT."""
    given = args.nanogpt_seconds
    if given:
        yield dict(
            preset="nanoGPT (given)",
            parameters=804_096,
            wall=given,
            val_loss=args.nanogpt_loss,
            reached=None,
            speed=1.0,
        )
    for preset in args.presets:
        wall, losses, said = run_train("--preset", preset, "--data", args.data)
        before = wall - losses[-1]["seconds"]  # the start, which the run's own clock does not count
        reached = [r["seconds"] + before for r in losses if r["val_loss"] <= args.target]
        size = re.search(r"([\d,]+) parameters", said)[1]
        yield dict(
            preset=preset,
            parameters=int(size.replace(",", "")),
            wall=wall,
            val_loss=losses[-1]["val_loss"],
            reached=reached[0] if reached else None,
            speed=given / wall if given else None,
        )


@dataclass
class OptimizersBench(BenchArgs):
    data: str = "shakespeare"  # a corpus or a file of text
    steps: int = 400  # AdamW's
    seeds: tuple = (1, 2, 3)


def bench_optimizers(args):
    """Does Muon with 0.7 of the steps reach what tuned AdamW reaches with all? Same model, text,
    batch, order, for each seed."""
    shape = ("--dim", 96, "--mlp", 192, "--batch", 32)
    never = ("--eval-every", 10**6, "--save-every", 10**6)
    muon_steps = round(args.steps * 0.7)

    def final_loss(seed, steps, *flags):
        flags = (*shape, *never, "--data", args.data, "--seed", seed, "--steps", steps, *flags)
        _, losses, _ = run_train(*flags)
        return losses[-1]["val_loss"]

    def adamw_loss(seed, schedule, lr):
        flags = ("--optimizer", "adamw", "--warmup", args.steps // 20)
        return final_loss(seed, args.steps, *flags, "--schedule", schedule, "--lr", lr)

    seeds = whole_numbers("--seeds", args.seeds)
    tried = {}
    for schedule in ("wsd", "cosine"):
        # AdamW gets the better schedule, and rates until the next one is worse
        for lr in (0.001, 0.002, 0.004, 0.008, 0.016):
            loss = adamw_loss(seeds[0], schedule, lr)
            tried[schedule, lr] = loss
            yield dict(adamw_schedule=schedule, adamw_lr=lr, seed=seeds[0], val_loss=loss)
            if loss > tried.get((schedule, lr / 2), loss):
                break
    schedule, lr = min(tried, key=tried.get)
    for seed in seeds:
        yield dict(
            seed=seed,
            adamw=adamw_loss(seed, schedule, lr),
            steps=args.steps,
            muon=final_loss(seed, muon_steps),
            muon_steps=muon_steps,
        )


@dataclass
class PretrainBench(DeviceBench):
    preset: str = "125m"  # train.py's
    rows: int = 32  # rows a step
    steps: int = 20  # timed steps
    vocab_size: int = 32_768


def bench_pretrain(args):
    """Whole training steps (forward, backward, optimizer) on random tokens: tokens/s, share of the
    rate of one large matrix product (the best that the device does here), peak memory."""
    runtime = resolve(args.device, args.dtype, "off")
    settings = from_preset(train.Args, train.PRESETS, dict(preset=args.preset, batch=args.rows))
    tok = SimpleNamespace(vocab_size=args.vocab_size, bos_id=None, eos_id=None)
    config = train.model_config(settings, tok)
    n = 8192 if runtime.device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=runtime.device, dtype=runtime.dtype) for _ in range(2))
    peak = 2 * n**3 / mean_seconds(lambda: a @ b, runtime.device, repeats=20)
    yield dict(matrix_products=str(runtime.dtype).removeprefix("torch."), tflops=peak / 1e12)
    shape = (args.rows, settings.context + 1)
    for compiled, recompute in itertools.product((False, True), repeat=2):
        memory_held(runtime.device, reset=True)
        model = Transformer(config).to(runtime.device)
        model.init_weights()
        model.train().recompute = recompute
        ids = torch.randint(args.vocab_size, shape, device=runtime.device)
        step_model = torch.compile(model, dynamic=False) if compiled else model
        step = training_step(step_model, MuonAdamW(model), runtime, ids)
        seconds = mean_seconds(step, runtime.device, args.steps)
        rate = args.rows * settings.context / seconds
        yield dict(
            name=("compiled" if compiled else "eager") + ", recomputing" * recompute,
            seconds=seconds,
            tokens_per_s=rate,
            of_matrix_rate=rate * model.flops_per_token(settings.context) / peak,
            peak_mib=memory_held(runtime.device)[1] / 2**20,
        )


def training_step(model, optimizer, runtime, ids):
    """-> a function that takes one step on ids (B, T + 1)."""
    optimizer.set_lr(1.0)

    def step():
        with runtime.autocast():
            loss = model(ids[:, :-1], ids[:, 1:]) / ids[:, 1:].numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


@dataclass
class QLoRABench(DeviceBench):
    shape: str = "7b"  # one of SHAPES
    context: int = 512  # tokens in a row
    r: int = 32  # rank
    steps: int = 3  # timed steps
    estimate: bool = False  # only the estimate


def bench_qlora(args):
    """QLoRA's memory and speed, estimated and measured; on a GPU also LoRA's on a 16-bit base."""
    if args.shape not in SHAPES:
        raise UserError(f"--shape {args.shape}: use one of {', '.join(SHAPES)}")
    runtime = resolve(args.device, args.dtype, "off")
    config = SHAPES[args.shape]
    for quant in ("nf4", "") if runtime.device.type == "cuda" else ("nf4",):
        flags = lora.Args(
            r=args.r,
            quant=quant,
            optimizer="adamw8bit",
            recompute=True,
            context=args.context,
            batch=1,
        )
        parts, trained, total = lora.estimate_adapter_memory(config, flags, runtime, 1)
        print_estimate(parts, 1, flags, runtime)
        row = dict(
            shape=args.shape,
            base=quant or str(runtime.dtype),
            trained=trained / total,
            estimated_gib=sum(parts.values()) / 2**30,
        )
        yield row if args.estimate else row | measure_qlora(args, config, quant, runtime)


def measure_qlora(args, config, quant, runtime):
    model = random_base(config, bool(quant), runtime)
    loaded, _ = memory_held(runtime.device, reset=True)
    lora.apply(model, args.r, 2 * args.r).train().recompute = True
    optimizer = MuonAdamW(model, adam_lr=1e-4, muon=False, eight_bit=True)
    ids = torch.randint(config.vocab_size, (1, args.context + 1), device=runtime.device)
    step = training_step(model, optimizer, runtime, ids)
    seconds = mean_seconds(step, runtime.device, args.steps, warm_up=1)
    _, peak = memory_held(runtime.device)
    return dict(
        base_gib=loaded / 2**30,
        peak_gib=peak / 2**30,
        to_train_gib=(peak - loaded) / 2**30,
        tokens_per_s=args.context / seconds,
    )


@dataclass
class SFTBench(BenchArgs):
    model: str = ""  # a base model's folder
    data: str = "data/toybox"  # conversations
    rows: int = 16  # packed rows a step
    context: int = 256  # tokens in a row
    steps: int = 12  # timed steps
    device: str = "cpu"  # auto, cpu, cuda, cuda:N


def bench_sft(args):
    """Conversations a second through whole steps of fine-tuning: packed rows beside TRL's
    SFTTrainer, which pads; the same model, conversations, optimizer (AdamW) and number of
    conversations a step; start-up is not counted."""
    from peers.trl import sft_trainer_speed

    with tempfile.TemporaryDirectory() as out:
        flags = finetune.Args(
            model=args.model,
            data=(args.data,),
            out=out,
            context=args.context,
            batch=args.rows,
            device=args.device,
            optimizer="adamw",
            steps=args.steps + 2,
        )
        run = finetune.prepare_finetuning(flags, None)
        per_row = len(run.batches.split.pairs) / len(run.batches.plan(0).order)
        conversations = round(args.rows * per_row)
        finetune_step(run, 0)  # the first two warm up
        finetune_step(run, 1)
        steps = range(2, args.steps + 2)
        seconds = sum(seconds_of(finetune_step, run, step) for step in steps)
        run.batches.close()
        yield dict(
            name="finetune.py, packed",
            per_step=conversations,
            conversations_per_second=conversations * args.steps / seconds,
        )
        folder = f"{out}/model"
        run.tok.save(folder)
        Transformer.save_pretrained(finetune.open_model(args.model, "cpu")[1], folder)
        file = Path(args.data)
        if file.is_dir():
            file = file / "train.jsonl"
        talks = [messages for _, messages, _ in chat.read_records(file)]
        for name, order in (("SFTTrainer", "random"), ("SFTTrainer, by length", "group_by_length")):
            speed = sft_trainer_speed(
                folder,
                talks,
                rows=conversations,
                context=args.context,
                steps=args.steps,
                order=order,
                device=args.device,
                out=f"{out}/trl",
            )
            yield dict(name=name, per_step=conversations, conversations_per_second=speed)


def finetune_step(run, step):
    batch = run.batches.next()
    run.optimizer.zero_grad()
    count = (batch.y != -100).sum().item()
    for part in passes(run, batch):
        with run.runtime.autocast():
            loss = finetune.packed_loss(run.step_model, part, run.args)
        backward(run, loss, count)
    update(run, step)


@dataclass
class DPOBench(BenchArgs):
    model: str = ""  # a chat model's folder
    data: str = "toybox"  # preferences
    passes: int = 8  # pairs a forward pass, 32 a step
    steps: int = 4  # timed steps


def bench_dpo(args):
    """Seconds a step of 32 pairs, forward, backward and AdamW: rows that share their prompt, beside
    TRL's DPOTrainer on the same weights and ids. Both have the reference's log-probs already."""
    from peers.trl import dpo_trainer, dpo_trainer_loss

    tok, model = finetune.open_model(args.model, "cpu", torch.float32)
    records = itertools.islice(dpo.read_preferences(args.data, "train", 400), 400)
    found = dpo.usable_pairs(tok, records, model.config.max_position_embeddings)
    found = found[: 32 * args.steps]
    pairs = dpo.Pairs(found)
    with tempfile.TemporaryDirectory() as folder:
        tok.save(folder)
        model.save_pretrained(folder)
        trainer = dpo_trainer(folder)
    settings = dpo.Args()

    def ours(rows):
        batch = pairs.fill(rows, 0)
        for at in range(0, 32, args.passes):
            part = batch._make(t[at : at + args.passes] for t in batch)
            loss, _ = dpo.pair_loss(model, part, settings)
            (loss / 32).backward()

    def theirs(rows):
        for at in range(0, 32, args.passes):
            part = [found[r] for r in rows[at : at + args.passes]]
            loss = dpo_trainer_loss(trainer, part)
            (loss * (args.passes / 32)).backward()

    def epoch(step, optimizer):
        for at in range(0, len(found) - 31, 32):
            step(range(at, at + 32))
            optimizer.step()
            optimizer.zero_grad()

    programs = (("dpo.py", ours, model), ("DPOTrainer", theirs, trainer.model))
    for warming_up in (True, False):
        for name, step, net in programs:
            optimizer = torch.optim.AdamW(net.train().parameters(), 1e-6)
            seconds = seconds_of(epoch, step, optimizer) / (len(found) // 32)
            if not warming_up:
                yield dict(name=name, seconds=seconds)


# ------------------------------------------------------------------------------------------ kernels
class KernelCase(NamedTuple):
    size: int  # bytes read and written
    function: Any
    draw: Any  # () -> its arguments, at random


def graph_seconds(case):
    """Seconds of a call, from a CUDA graph of calls on so many drawn inputs that no cache holds
    them."""
    inputs = [case.draw() for _ in range(min(max(2, 512_000_000 // case.size), 64))]
    for arguments in inputs:
        case.function(*arguments)  # compiles and tunes
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for arguments in inputs:
            case.function(*arguments)
    return mean_seconds(graph.replay, torch.device("cuda"), repeats=20) / len(inputs)


def bf16(*shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def codes(*shape):
    return torch.randint(0, 256, shape, device="cuda", dtype=torch.uint8)


def linear_cases(M, N, K):
    """{name: KernelCase}; the others are measured against the first."""

    def packed(kind):
        if kind == "nf4":
            scales = torch.rand(N * K // 64, device="cuda")
            weight = kernels.Packed(kind, codes(N * K // 2), scales, N, K, 64)
        elif kind == "int4":
            weight = kernels.Packed(kind, codes(N, K // 2), bf16(N, K // 128), N, K, 128)
        else:
            weight = kernels.Packed(kind, codes(N, K).view(torch.int8), bf16(N), N, K)
        return bf16(M, K), weight

    def tinygemm():
        weight = torch.ops.aten._convert_weight_to_int4pack(codes(N, K // 2), 8)
        return bf16(M, K), weight, 128, bf16(K // 128, N, 2)

    linear = kernels.linear
    cases = {  # bytes a weight, scales included
        "cuBLAS bf16": (2, F.linear, lambda: (bf16(M, K), bf16(N, K))),
        "int8": (1, linear, lambda: packed("int8")),
        "int8 x int8": (1, linear, lambda: packed("int8x8")),
        "int4 g128": (1 / 2 + 1 / 64, linear, lambda: packed("int4")),
        "nf4": (1 / 2 + 1 / 16, linear, lambda: packed("nf4")),
        "int4 g128, torch tinygemm": (1 / 2 + 1 / 32, torch._weight_int4pack_mm, tinygemm),
    }
    if importlib.util.find_spec("bitsandbytes"):
        from peers.bitsandbytes import nf4_arguments, nf4_product

        theirs = (1 / 2 + 1 / 16, nf4_product, lambda: nf4_arguments(bf16(M, K), N, K))
        cases["nf4, bitsandbytes"] = theirs
    rows = 2 * M * (N + K)
    return {
        name: KernelCase(int(N * K * width) + rows, function, draw)
        for name, (width, function, draw) in cases.items()
    }


def attention_cases(S, length, rows, KH, cache_dtype=torch.bfloat16):
    """S sequences of `length` tokens with `rows` new ones each, beside torch's attention on unpaged
    keys -> {name: KernelCase}."""
    H, D, page = 32, 128, 16
    pages = S * length // page

    def paged():
        shape = (pages, page, KH, D)
        keys, values = (
            torch.randint(-99, 99, shape, device="cuda").to(cache_dtype) for _ in range(2)
        )
        scales = []
        if cache_dtype.itemsize == 1:
            scales = [torch.rand(shape[:-1], device="cuda") for _ in range(2)]
        table = torch.randperm(pages, device="cuda").int().view(S, -1)
        lengths = torch.full((S,), length, dtype=torch.int32, device="cuda")
        starts = torch.arange(0, S * rows + 1, rows, dtype=torch.int32, device="cuda")
        q = bf16(S * rows, H, D)
        return q, keys, values, table, lengths, starts, D**-0.5, None, *scales

    def unpaged():
        return bf16(S, H, rows, D), bf16(S, KH, length, D), bf16(S, KH, length, D)

    def torch_attention(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=rows > 1, enable_gqa=True)

    values = 2 * S * length * KH * D
    ours = KernelCase(values * cache_dtype.itemsize, kernels.paged_attention, paged)
    return {
        "torch bf16, unpaged": KernelCase(2 * values, torch_attention, unpaged),
        f"paged, {str(cache_dtype).removeprefix('torch.')}": ours,
    }


def kernel_groups():
    """Llama-7B's shapes -> {name: {name: KernelCase}}"""
    groups = {}
    for N, K in ((4096, 4096), (12_288, 4096), (22_016, 4096), (4096, 11_008)):
        groups[f"linear {N} x {K}, 1 row"] = linear_cases(1, N, K)
        groups[f"linear {N} x {K}, 16 rows"] = linear_cases(16, N, K)
    for S, KH in itertools.product((1, 16), (32, 8)):
        name = f"decode, {S} x 4096 tokens, {KH} key heads"
        groups[name] = attention_cases(S, 4096, 1, KH)
    groups["decode, 16 x 4096 tokens, 8 key heads, int8"] = attention_cases(
        16, 4096, 1, 8, torch.int8
    )
    groups["prefill 4096 tokens, 8 key heads"] = attention_cases(1, 4096, 4096, 8)
    return groups


def bench_kernels(args):
    """Every kernel at Llama-7B's shapes: microseconds, GB/s, share of the card's copy bandwidth,
    speed over the first of its group."""
    if not torch.cuda.is_available() or kernels.triton is None:
        raise UserError(
            "bench.py kernels times the Triton kernels on a CUDA device, and here is none; that "
            "they compute the right thing is shown by: python -m pytest tests/test_kernels.py"
        )
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    copying = KernelCase(source.nbytes, torch.empty_like(source).copy_, lambda: (source,))
    copy = 2 * source.nbytes / graph_seconds(copying)
    yield dict(group="copy, read + written", gb_per_s=copy / 1e9)
    for group, cases in kernel_groups().items():
        first = None
        for name, case in cases.items():
            with torch.inference_mode():
                seconds = graph_seconds(case)
            first = first or seconds
            yield dict(
                group=group,
                name=name,
                us=seconds * 1e6,
                gb_per_s=case.size / seconds / 1e9,
                of_copy=case.size / seconds / copy,
                speed_up=first / seconds,
            )
        torch.cuda.empty_cache()


@dataclass
class LinearBench(BenchArgs):
    rows: tuple = (1, 8)  # rows of activations
    repeats: int = 6  # of which the best counts
    gguf: str = ""  # a folder with f16, q8_0 and q4_0.gguf of the same shape, for llama.cpp


# q+k+v, o, gate+up and down of a 135M Llama, 30 layers: 106M weights
LINEAR_SHAPES = 30 * ((960, 576), (576, 576), (3072, 576), (576, 1536))


def linear_in(format, N, K):
    layer = torch.nn.Linear(K, N, bias=False)
    if format == "float32":
        return layer
    return layer.bfloat16() if format == "bfloat16" else pack_linear(layer, format, 64)


@torch.inference_mode()
def bench_linear(args):
    """Billions of weights a second through all linear layers of a 135M model, streamed from memory,
    by rows of activations; beside them llama.cpp's decode of the same shape (all 135M weights,
    attention included)."""

    from engine.native import install_products

    def run(layers, inputs):
        for layer in layers:
            layer(inputs[layer.in_features])

    weights = sum(N * K for N, K in LINEAR_SHAPES)
    for format in ("float32", "bfloat16", "int8", "int8-dynamic", "int4"):
        layers = torch.nn.ModuleList(linear_in(format, N, K) for N, K in LINEAR_SHAPES)
        install_products(layers)
        dtype = torch.bfloat16 if format == "bfloat16" else torch.float32
        for M in whole_numbers("--rows", args.rows):
            inputs = {K: torch.randn(M, K, dtype=dtype) for K in (576, 1536)}
            seconds = min(seconds_of(run, layers, inputs) for _ in range(args.repeats))
            rate = weights / seconds / 1e9
            yield dict(format=format, rows=M, gigaweights_per_s=rate, gflops=2 * M * rate)
    for name in ("f16", "q8_0", "q4_0") if args.gguf else ():
        from peers.llama_cpp import llama_writer

        write, weights = llama_writer(Path(args.gguf, name + ".gguf"))
        rate = weights * max(writing_speed(write, 1, 26) for _ in range(args.repeats)) / 1e9
        name = f"llama.cpp {name}, whole model"
        yield dict(format=name, rows=1, gigaweights_per_s=rate, gflops=2 * rate)


def whole_numbers(flag, words):
    try:
        return [int(word) for word in words]
    except ValueError:
        raise UserError(f"{flag} {' '.join(words)}: whole numbers, please") from None


# ---------------------------------------------------------------------------------------- tokenizer
@dataclass
class TokenizerBench(BenchArgs):
    file: str = ""  # a text file, best of 10 MB or more
    vocab_size: int = 10_000


# Timed in an interpreter of their own: FILE VOCAB_SIZE OUT.
TIMED_TRAININGS = {
    "ours": """
import sys; from tokenizer import Tokenizer
Tokenizer.train(
    files=[sys.argv[1]], vocab_size=int(sys.argv[2]), special_tokens=[]
).save(sys.argv[3])
""",
    "HF": "import sys; from peers.tokenizers import train_hf; train_hf(*sys.argv[1:])",
}


def bench_tokenizer(args):
    """Train and encode with ours, HF tokenizers and tiktoken on the same text: the first 5 MB as a
    string, in turns, and the whole file by ours in one process and in two."""
    if sys.platform != "linux":
        raise UserError(
            "bench.py tokenizer reads memory from /proc, which only Linux has; "
            f"this is {sys.platform}"
        )
    from peers.tokenizers import hf_encoder, tiktoken_encoder

    file = os.path.abspath(args.file)
    size = os.path.getsize(file) / 1e6
    made = {}
    with tempfile.TemporaryDirectory() as out:
        for name, code in TIMED_TRAININGS.items():
            folder = f"{out}/{name}"
            seconds, peak = time_training(code, file, str(args.vocab_size), folder)
            made[name] = Tokenizer.load(folder)
            yield dict(
                train=name,
                seconds=seconds,
                mb_per_second=size / seconds,
                peak_mb=peak,
                merges=len(made[name].merges),
            )
        encode_hf = hf_encoder(f"{out}/HF")
    tok = made["ours"]
    if (tok.vocab, tok.merges) != (made["HF"].vocab, made["HF"].merges):
        raise UserError("ours and HF have not learned the same merges from this text")
    encode_tiktoken = tiktoken_encoder(tok)
    text = Path(file).read_bytes()[:5_000_000].decode("utf-8", "ignore")
    if tok.encode(text) != encode_tiktoken(text):
        raise UserError("ours and tiktoken disagree on this text")
    fast = {
        "ours, on tiktoken's core": lambda: tok.encode(text),
        "tiktoken": lambda: encode_tiktoken(text),
    }
    slow = {"ours, plain Python": lambda: tok.encode_slowly(text), "HF": lambda: encode_hf(text)}
    seconds = best_seconds(fast, 5) | best_seconds(slow, 1)
    for name, took in seconds.items():
        yield dict(encode=name, mb_per_second=len(text.encode()) / 1e6 / took)
    whole = {
        "ours, file to array": lambda: tok.encode_corpus([file], 1),
        "ours, file to array, two processes": lambda: tok.encode_corpus([file], 2),
    }
    for name, took in best_seconds(whole, 2).items():
        yield dict(encode=name, mb_per_second=size / took)


def time_training(code, *arguments):
    """(seconds, peak MB) of one training in a fresh interpreter, start-up included; what its
    processes share counts for each."""
    begin = time.perf_counter()
    command = [sys.executable, "-c", code, *arguments]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    peak = 0.0
    while child.poll() is None:
        peak = max(peak, resident_bytes(child.pid) / 1e6)
        time.sleep(0.02)
    if child.returncode:
        said = child.stderr.read().strip() or f"exit status {child.returncode}"
        raise UserError(f"training failed: {said.splitlines()[-1]}")
    return time.perf_counter() - begin, peak


def resident_bytes(pid):
    """Memory of a process and of its children."""
    total, family = 0, [pid]
    for p in family:  # grows as children are found
        with contextlib.suppress(OSError):  # it has just ended
            pages = int(Path(f"/proc/{p}/statm").read_text().split()[1])
            total += pages * os.sysconf("SC_PAGE_SIZE")
            family += map(int, Path(f"/proc/{p}/task/{p}/children").read_text().split())
    return total


# --------------------------------------------------------------------------------------- generation
@dataclass
class DecodeBench(BenchArgs):
    model: str = ""  # a model folder, or a shape: 7b, 1b, qwen3-0.6b, 135m, tiny
    formats: tuple = ("float32", "float16", "int8", "int4")  # of our weights
    gguf: tuple = ()  # the model as GGUF files, for llama.cpp and for us
    transformers: tuple = ()  # its dtypes to measure too
    prompt: int = 512  # tokens of the prompt that is read
    new: int = 32  # tokens a text
    rounds: int = 3  # of which the median counts
    device: str = "auto"  # auto, cpu, cuda, cuda:N


def engine_writer(args, model, quant=None, dtype="auto"):
    """-> (a function (texts, tokens of a prompt, new tokens) that writes so much; bytes of the
    weights that a decode step reads)"""
    engine = Engine(model, args.device, dtype, quant, kv_tokens=16 * 1024)

    def write(texts, prompt, new):
        prompts = torch.randint(1, engine.vocab_size, (texts, prompt)).tolist()
        engine.generate(prompts, Sampling(max_tokens=new, temperature=0, ignore_eos=True))

    # of the embedding one row is read, unless it is the head too
    table = engine.runner.forward.embedding
    if engine.runner.native:
        unread = 4 * table.numel()
    else:
        unread = 0 if engine.config.tie_word_embeddings else table.nbytes
    return write, engine.runner.forward.weight_bytes - unread


def writing_speed(write, texts, new):
    """tok/s of texts being written: the time of many tokens less that of two."""
    seconds = seconds_of(write, texts, 64, new) - seconds_of(write, texts, 64, 2)
    return texts * (new - 2) / seconds


def bench_decode(args):
    """tok/s of a prompt being read and of one and eight texts being written, every program in turn,
    the median of the rounds. The roofline is the rate at which memory is read (a sum over more than
    any cache holds) over the bytes of the weights."""
    device = resolve(args.device).device
    big = torch.ones((4 if device.type == "cuda" else 1) << 27, dtype=torch.int64, device=device)
    bandwidth = big.nbytes / mean_seconds(big.sum, device, 3)
    yield dict(memory="read", gb_per_s=bandwidth / 1e9)
    folder = folder_of(args)
    programs, size = {}, {}
    for name in args.formats:
        packed = name in ("int8", "int4")
        how = (name, "float32") if packed else (None, name)
        programs[name], size[name] = engine_writer(args, folder, *how)
    for path in map(Path, args.gguf):
        from peers.llama_cpp import llama_writer

        programs[path.name], size[path.name] = engine_writer(args, path)
        programs[f"llama.cpp {path.stem}"], _ = llama_writer(path)
    for dtype in args.transformers:
        from peers.hf import transformers_writer

        programs[f"transformers {dtype}"] = transformers_writer(folder, dtype, device)
    figures: dict[str, list] = {name: [] for name in programs}
    for _ in range(args.rounds):
        for name, write in programs.items():
            reading = args.prompt / seconds_of(write, 1, args.prompt, 1)
            writing = [writing_speed(write, texts, args.new) for texts in (1, 8)]
            figures[name].append([reading, *writing])
    for name, rounds in figures.items():
        prompt, one, eight = map(median, zip(*rounds))
        yield {
            "program": name,
            f"prompt of {args.prompt}": prompt,
            "1 text": one,
            "8 texts": eight,
            "roofline": bandwidth / size[name] if name in size else None,
        }


@dataclass
class ThroughputBench(DeviceBench):
    model: str = ""  # a model folder, or a shape: 7b, 1b, qwen3-0.6b, 135m, tiny
    requests: int = 64  # how many, all there at the start
    low: int = 16  # shortest prompt and answer
    high: int = 128  # longest prompt and answer
    transformers: tuple = ()  # its dtypes to measure too
    batch: int = 32  # rows of transformers' batches
    quant: str | None = None  # int8 or int4: pack the weights so
    kv_tokens: int | None = None  # tokens' keys and values to keep


def bench_throughput(args):
    """Requests of random lengths, all there at the start: output tok/s beside transformers' static
    batches of the same."""
    folder = folder_of(args)
    engine = Engine(folder, args.device, args.dtype, args.quant, kv_tokens=args.kv_tokens)
    draw = torch.Generator().manual_seed(0)
    sizes = torch.randint(args.low, args.high + 1, (args.requests, 2), generator=draw).tolist()
    prompts = [torch.randint(1, engine.vocab_size, (n,), generator=draw).tolist() for n, _ in sizes]
    new = [tokens for _, tokens in sizes]
    engine.generate(prompts[0], Sampling(max_tokens=4))
    sampling = [Sampling(max_tokens=n, temperature=0, ignore_eos=True) for n in new]
    ours = seconds_of(engine.generate, prompts, sampling)
    yield dict(program="engine", seconds=ours, tokens_per_s=sum(new) / ours, engine_is_faster=1.0)
    for dtype in args.transformers:
        from peers.hf import transformers_writer, write_in_static_batches

        write = transformers_writer(folder, dtype, resolve(args.device).device)
        seconds = seconds_of(write_in_static_batches, write, prompts, new, args.batch)
        yield dict(
            program=f"transformers {dtype}, batches of {args.batch}",
            seconds=seconds,
            tokens_per_s=sum(new) / seconds,
            engine_is_faster=seconds / ours,
        )


@dataclass
class PrefixBench(DeviceBench):
    model: str = ""  # a model folder, or a shape: 7b, 1b, qwen3-0.6b, 135m, tiny
    requests: int = 64  # how many
    length: int = 1000  # tokens that they share
    quant: str | None = None  # int8 or int4: pack the weights so
    kv_tokens: int = 128 * 1024  # tokens' keys and values to keep


def bench_prefix(args):
    """Requests with the same tokens in front: seconds to their first token on average and at the
    latest, without and with the prefix cache."""
    folder = folder_of(args)
    means = []
    for cached in (False, True):
        engine = Engine(
            folder,
            args.device,
            args.dtype,
            args.quant,
            kv_tokens=args.kv_tokens,
            max_seqs=64,
            prefix_cache=cached,
        )
        prefix = [1 + i % (engine.vocab_size - 1) for i in range(args.length)]
        sampling = Sampling(max_tokens=1, temperature=0, ignore_eos=True)
        begin = time.perf_counter()
        for i in range(args.requests):
            engine.submit([*prefix, i + 1, i + 2], sampling)
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
@dataclass
class ServeBench(BenchArgs):
    model: str = ""  # a model folder, or the http:// address of a running server
    requests: int = 64  # how many
    concurrency: int = 16  # requests at once
    seqs: int | None = None  # of which so many in the engine, the rest in its queue [all]
    rate: float | None = None  # requests a second on average instead, whatever the server does
    prompt: int = 32  # words of a prompt
    new: int = 64  # tokens of an answer
    ttft: float = 1.0  # seconds to the first token that are good enough
    tpot: float = 0.1  # seconds a token that are good enough
    rounds: int = 3  # of which the best counts
    key: str = ""  # API key


async def post_completion(host, body, key, pool):
    """POST one completion -> (status, [(seconds since the call, bytes that came)]), to be read when
    nothing is measured any more. pool: idle connections, of which one is taken and put back.

    HTTP by hand, so that the load's own cost is small and no client library's."""
    begin = time.perf_counter()
    if pool:
        reader, writer = pool.pop()
    else:
        reader, writer = await asyncio.open_connection(*host.split(":"), limit=1 << 24)
    with contextlib.ExitStack() as stack:
        stack.callback(writer.close)
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        content = json.dumps(body).encode()
        head = (
            f"POST /v1/{'chat/' * ('messages' in body)}completions HTTP/1.1\r\n"
            f"Host: {host}\r\nAuthorization: Bearer {key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        writer.write(head.encode() + content)
        head = await reader.readuntil(b"\r\n\r\n")
        status = int(head.split()[1])
        if status != 200:
            length = re.search(rb"content-length: (\d+)", head.lower())
            return status, [(0.0, await reader.readexactly(int(length[1]) if length else 0))]
        came = []
        while True:  # each chunk: its size in hexadecimal, its bytes; the last is empty
            size = int(await reader.readuntil(b"\n"), 16)
            chunk = await reader.readexactly(size + 2)
            if size == 0:
                break
            came.append((time.perf_counter() - begin, chunk[:-2]))
        stack.pop_all()  # it stays open
        pool.append((reader, writer))
    return status, came


def read_answer(status, came):
    """What `post_completion` returned -> {status, ttft, tpot, e2e in seconds, tokens}; status
    0: no answer, or not to its end."""
    row: dict = dict(status=status, ttft=None, tpot=None, e2e=None, tokens=0)
    if status != 200:
        row["error"] = came[0][1].decode("utf-8", "replace")
        return row
    data = b""
    for seconds, chunk in came:
        *events, data = (data + chunk).split(b"\n\n")
        for event in events:
            if event.startswith(b"data: {"):
                read_event(row, seconds, json.loads(event.removeprefix(b"data: ")))
        row["e2e"] = seconds
    if row["ttft"] is not None and row["tokens"] > 1:
        row["tpot"] = (row["e2e"] - row["ttft"]) / (row["tokens"] - 1)
    return row


def read_event(row, seconds, event):
    for choice in event.get("choices", ()):
        text = choice["delta"].get("content") if "delta" in choice else choice["text"]
        if text and row["ttft"] is None:
            row["ttft"] = seconds
    if event.get("usage"):
        row["tokens"] = event["usage"]["completion_tokens"]
    if "error" in event:
        row["status"] = 500


async def send_load(url, bodies, args):
    """All bodies as requests -> (rows in their order, seconds). Closed loop: --concurrency at once,
    each followed by the next on its connection. Open loop: arrivals at random, --rate a second on
    average (Poisson), however far behind the server is."""
    host = url.removeprefix("http://").split("/")[0]
    places = asyncio.Semaphore(len(bodies) if args.rate else args.concurrency)
    pool: list = []

    async def one(body):
        async with places:
            try:
                return await post_completion(host, body, args.key, pool)
            except (OSError, EOFError) as error:
                return 0, [(0.0, repr(error).encode())]

    rng = random.Random(0)
    begin = time.perf_counter()
    tasks = []
    for body in bodies:
        tasks.append(asyncio.ensure_future(one(body)))
        if args.rate:
            await asyncio.sleep(rng.expovariate(args.rate))
    answers = await asyncio.gather(*tasks)
    seconds = time.perf_counter() - begin
    for _, writer in pool:
        writer.close()
    return [read_answer(*answer) for answer in answers], seconds


def load_bodies(args):
    """Requests for completions of random words."""
    rng = random.Random(1)
    words = "the of and a to in is you that it he was for on are as with his they at".split()
    bodies = []
    for i in range(args.requests):
        prompt = " ".join(rng.choices(words, k=args.prompt))
        bodies.append(dict(prompt=prompt, max_tokens=args.new, ignore_eos=True, seed=i))
    return bodies


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


def bench_serve(args):
    """Requests against a server: TTFT, TPOT, E2E, tok/s, goodput; with a folder also what the
    server costs over the engine: both do the same work in turns, and the best round of each
    counts."""
    bodies = load_bodies(args)
    seqs = args.seqs or args.concurrency
    local = not args.model.startswith("http://")
    alone = None
    with served(args.model, seqs) if local else contextlib.nullcontext(args.model) as url:
        if local and not args.rate:
            engine = Engine(args.model, max_seqs=seqs)
            rows, seconds, alone = beside_engine(url, bodies, args, engine)
        else:
            rows, seconds = asyncio.run(send_load(url, bodies, args))
    made = print_load(rows, seconds, args)
    if alone:
        cost = 1 - alone / seconds
        print(f"engine  {made / alone:,.1f} tok/s by itself: the server costs {cost:.1%}")
    return rows


def beside_engine(url, bodies, args, engine):
    """-> (the best round's rows, its seconds, the engine's best seconds for the same work)"""
    prompts = [body["prompt"] for body in bodies]
    sampling = [
        Sampling(max_tokens=args.new, ignore_eos=True, seed=body["seed"]) for body in bodies
    ]
    # the first step of each size is slower
    asyncio.run(send_load(url, bodies[: args.concurrency], args))
    rounds, alone = [], []
    for _ in range(args.rounds):
        rounds.append(asyncio.run(send_load(url, bodies, args)))
        alone.append(seconds_of(engine.generate, prompts, sampling))
    rows, seconds = min(rounds, key=lambda result: result[1])
    return rows, seconds, min(alone)


def print_load(rows, seconds, args):
    """Percentiles of the latencies, and goodput: requests a second that were fast enough
    -> tokens made."""
    good = [row for row in rows if row["status"] == 200]
    made = sum(row["tokens"] for row in rows)
    how = f"{args.rate} a second" if args.rate else f"{args.concurrency} at once"
    print(machine_text(machine_facts()))
    print(
        f"{len(good)} of {len(rows)} requests answered in {seconds:.1f} s, {how}: "
        f"{made / seconds:,.1f} tok/s"
    )
    for name in ("ttft", "tpot", "e2e"):
        values = sorted(row[name] for row in good if row[name] is not None)
        if not values:
            continue
        line = f"{name.upper():5s}"
        for p in (50, 90, 99):
            value = values[min(len(values) * p // 100, len(values) - 1)]
            line += f"  p{p} {value * 1000:9.1f} ms"
        print(line)
    met = [r for r in good if (r["ttft"] or 0) <= args.ttft and (r["tpot"] or 0) <= args.tpot]
    print(
        f"goodput {len(met) / seconds:.2f} requests/s with TTFT <= {args.ttft:g} s "
        f"and TPOT <= {args.tpot:g} s"
    )
    return made


# --------------------------------------------------------------------------------- two measurements
@dataclass
class CompareBench(BenchArgs):
    a: str = ""  # a file written with --json, the earlier one
    b: str = ""  # the later one


def read_measurement(path):
    """-> the content of a file that --json wrote."""
    file = read_json(path)
    rows = file.get("rows") if isinstance(file, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(
            "bench.py compare reads two files that another of its commands wrote with --json"
        )
    return file


def rows_by_name(rows):
    """Rows of a --json file -> {their texts, and a number where they are not the first so called:
    {name: figure}}; rows without any text are many measurements of one thing, so their mean stands
    for them."""
    found, seen, nameless = {}, Counter(), []
    for row in rows:
        name = " ".join(v for v in row.values() if isinstance(v, str))
        figures = {k: v for k, v in row.items() if isinstance(v, (int, float))}
        seen[name] += 1
        if name:
            found[f"{name} ({seen[name]})" if seen[name] > 1 else name] = figures
        else:
            nameless.append(figures)
    if nameless:
        names = [k for k in nameless[0] if all(k in row for row in nameless)]
        means = {k: fmean(row[k] for row in nameless) for k in names}
        found[f"mean of {len(nameless)}"] = means
    return found


def bench_compare(args):
    """Every figure of two --json files beside its other, and their ratio; changes of over 5 % are
    marked."""
    files = {"A": read_measurement(args.a), "B": read_measurement(args.b)}
    for name, file in files.items():
        print(f"{name}  {machine_text(file.get('machine', {}))}")
    before, after = (rows_by_name(file["rows"]) for file in files.values())
    for row in before | after:
        if row not in before or row not in after:
            yield dict(row=row, figure=f"only in {'A' if row in before else 'B'}")
            continue
        for name, a in before[row].items():
            b = after[row].get(name)
            if b is None or (a == b and a == int(a)):  # a setting, such as the number of rows
                continue
            ratio = b / a if a else float("nan")
            changed = "" if 0.95 <= ratio <= 1.05 else "<"
            yield dict(row=row, figure=name, a=a, b=b, ratio=ratio, changed=changed)


# ----------------------------------------------------------------------------------------- commands
def measurements():
    """{command: (its flags, its measurement)}"""
    return {
        "train": (TrainBench, bench_train),
        "optimizers": (OptimizersBench, bench_optimizers),
        "pretrain": (PretrainBench, bench_pretrain),
        "qlora": (QLoRABench, bench_qlora),
        "sft": (SFTBench, bench_sft),
        "dpo": (DPOBench, bench_dpo),
        "kernels": (BenchArgs, bench_kernels),
        "linear": (LinearBench, bench_linear),
        "tokenizer": (TokenizerBench, bench_tokenizer),
        "decode": (DecodeBench, bench_decode),
        "throughput": (ThroughputBench, bench_throughput),
        "prefix": (PrefixBench, bench_prefix),
        "serve": (ServeBench, bench_serve),
        "compare": (CompareBench, bench_compare),
    }


def main():
    command, argv = "".join(sys.argv[1:2]), sys.argv[2:]
    commands = measurements()
    if command not in commands:
        print(__doc__)
        if command in ("-h", "--help"):
            return
        raise UserError(f"use one of: {', '.join(commands)} (each has --help)")
    flags, measure = commands[command]
    positional = ("model", "file", "a", "b")
    args = flags(**parse_flags(flags, measure.__doc__, argv, positional))
    try:
        rows = measure(args)
        if inspect.isgenerator(rows):  # `serve` prints for itself
            if command != "compare":
                print(machine_text(machine_facts()), end="\n\n")
            rows = show_figures(rows)
    except ImportError as error:
        raise UserError(
            f"{error}: the programs measured beside ours are in requirements-peers.txt"
        ) from None
    if args.json:
        content = {"machine": machine_facts(), "rows": rows}
        Path(args.json).write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    cli(main)
