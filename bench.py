"""Every speed figure of the README, from one command each.

    python bench.py train                        # seconds and validation loss of the CPU presets, beside nanoGPT's recipe
    python bench.py train --presets shakespeare-char-10m --target 1.4697        # on a GPU
    python bench.py optimizers                   # Muon at 0.7 of the steps against AdamW with its best learning rate
    python bench.py pretrain --rows 32           # tokens/s and memory of the 125m preset: eager, compiled, recomputing
    python bench.py kernels                      # on a GPU: GB/s of each Triton kernel beside the card's copy and torch's own
    python bench.py qlora --shape 7b             # memory and tokens/s of QLoRA training, estimated and measured; 1b for a CPU
    python bench.py sft MODEL --data D           # fine-tuning beside TRL's SFTTrainer
    python bench.py dpo MODEL --data prefs.jsonl # preference tuning beside TRL's DPOTrainer
    python bench.py linear                       # one linear layer on the CPU, by format, beside llama.cpp with --gguf DIR
    python bench.py tokenizer corpus.txt --vocab-size 32000     # ours beside HF tokenizers and tiktoken (on Linux)
    python bench.py decode 7b                    # one text and eight; a shape of random weights, or:
    python bench.py decode FOLDER --gguf f16.gguf q8_0.gguf --transformers bfloat16    # with peers in the same run
    python bench.py throughput FOLDER --requests 64 --transformers float32             # random lengths, all at once
    python bench.py prefix FOLDER                # time to the first token of 64 requests that begin alike
    python bench.py serve FOLDER                 # the server under load, and what it costs over the engine by itself
    python bench.py serve http://127.0.0.1:8000 --rate 4               # a running server, 4 requests a second whatever it does
    python bench.py serve http://127.0.0.1:8000 --batch prompts.jsonl --out answers.jsonl     # each line a request's body
    python bench.py compare before.json after.json             # any of these with --json FILE, before a change and after it

A measurement yields its figures, a dict a row, as it has them: they are printed under their names and written with --json.
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
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import kernels
import lora
import train
from common import Metrics, Parser, UserError, cli, from_preset, read_json, usable_cpus
from engine.sampler import Sampling
from generate import Engine
from model import Config, Transformer
from quant import NF4Linear, pack
from runtime import DTYPES, resolve
from tokenizer import PATTERNS, Tokenizer
from training import loop
from training.memory import print_estimate
from training.optim import MuonAdamW


def machine_facts():
    """What a figure depends on beside the program: {platform, cpu, cores, threads, gpu, torch, commit}."""
    cpu = (
        next(
            (
                line.split(":")[1].strip()
                for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")
            ),
            "",
        )
        if Path("/proc/cpuinfo").exists()
        else platform.processor()
    )
    commit = ""
    with contextlib.suppress(OSError):  # no git here
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude", "*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
        ).stdout.strip()
    return dict(
        platform=platform.platform(),
        cpu=cpu or platform.machine(),
        cores=usable_cpus(),
        threads=torch.get_num_threads(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        torch=torch.__version__,
        commit=commit,
    )


def machine():
    """One line that says what the figures were measured on."""
    at = machine_facts()
    return f"{at['threads']} threads of {at['cpu']}{', ' * bool(at['gpu'])}{at['gpu']}, torch {at['torch']}"


def show(rows):
    """Print rows as they are measured, the names of their figures above the first of a kind -> all of them."""
    shown, names = [], None
    for row in rows:
        texts = [
            value
            if isinstance(value, str)
            else "-"
            if value is None
            else f"{value:,}"
            if isinstance(value, int)
            else f"{value:,.0f}"
            if abs(value) >= 1000
            else f"{value:.5g}"
            for value in row.values()
        ]
        for line in (list(row), texts) if names != list(row) else (texts,):
            cells = (
                f"{cell:<34}" if isinstance(value, str) else f"{cell:>{max(10, len(name))}}"
                for cell, (name, value) in zip(line, row.items())
            )
            print(" ".join(cells).rstrip(), flush=True)
        names = list(row)
        shown.append(row)
    return shown


# -------------------------------------------------------------------------------------- stopwatches
def timed(function, device, repeats, warm_up=3):
    """Mean seconds of a call, after some to warm up."""
    for _ in range(warm_up):
        function()
    wait(device)
    begin = time.perf_counter()
    for _ in range(repeats):
        function()
    wait(device)
    return (time.perf_counter() - begin) / repeats


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(function, *args, **options):
    begin = time.perf_counter()
    function(*args, **options)
    return time.perf_counter() - begin


def best_seconds(functions, repeats):
    """{name: function} -> {name: best seconds}, taking turns so that a busy machine is busy for all of them."""
    rounds = [
        {name: seconds_of(function) for name, function in functions.items()} for _ in range(repeats)
    ]
    return {name: min(times[name] for times in rounds) for name in functions}


def memory(device, reset=False):
    """(bytes held now, most since the reset), of the GPU or of this process."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    if sys.platform != "linux":
        return float("nan"), float("nan")
    if reset:
        Path("/proc/self/clear_refs").write_text(
            "5"
        )  # the high-water mark falls to what is held now
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(status[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))


def quietly(function, *args, **options):
    """Call without what it prints."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        return function(*args, **options)


# ----------------------------------------------------------------------------------------- training
def run_train(*flags):
    """train.py as a user runs it -> (seconds, Python's start included; the rows with a validation loss; what it printed)."""
    with tempfile.TemporaryDirectory() as out:
        command = [
            sys.executable,
            Path(__file__).with_name("train.py"),
            "--out",
            f"{out}/run",
            "--sample",
            1,
            *flags,
        ]
        begin = time.time()
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
        seconds = time.time() - begin
        if done.returncode:
            raise UserError(
                f"{' '.join(map(str, command[1:]))} failed: {done.stderr.strip().splitlines()[-1]}"
            )
        return (
            seconds,
            [r for r in Metrics.read(f"{out}/run/metrics.jsonl") if "val_loss" in r],
            done.stdout,
        )


def bench_train(args):
    """Train each preset in a process of its own: seconds, validation loss, seconds to the target, how much faster than nanoGPT."""
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
        size = (
            next(line for line in said.splitlines() if line.startswith("model"))
            .split(":")[1]
            .split()[0]
        )
        reached = next(
            (
                r["seconds"] + wall - losses[-1]["seconds"]
                for r in losses
                if r["val_loss"] <= args.target
            ),
            None,
        )
        yield dict(
            preset=preset,
            parameters=int(size.replace(",", "")),
            wall=wall,
            val_loss=losses[-1]["val_loss"],
            reached=reached,
            speed=given / wall if given else None,
        )


def bench_optimizers(args):
    """Does Muon with 0.7 of the steps reach what tuned AdamW reaches with all? Same model, text, batch, order, for each seed."""

    def final_loss(seed, steps, *flags):
        return run_train(
            "--dim",
            96,
            "--mlp",
            192,
            "--batch",
            32,
            "--eval-every",
            10**6,
            "--save-every",
            10**6,
            "--data",
            args.data,
            "--seed",
            seed,
            "--steps",
            steps,
            *flags,
        )[1][-1]["val_loss"]

    adamw = ["--optimizer", "adamw", "--warmup", args.steps // 20]
    tried = {}
    for schedule in (
        "wsd",
        "cosine",
    ):  # AdamW gets the better schedule, and rates until the next one is worse
        for lr in (0.001, 0.002, 0.004, 0.008, 0.016):
            tried[schedule, lr] = final_loss(
                args.seeds[0], args.steps, *adamw, "--schedule", schedule, "--lr", lr
            )
            yield dict(
                adamw_schedule=schedule,
                adamw_lr=lr,
                seed=args.seeds[0],
                val_loss=tried[schedule, lr],
            )
            if lr > 0.001 and tried[schedule, lr] > tried[schedule, lr / 2]:
                break
    schedule, lr = min(tried, key=tried.get)
    for seed in args.seeds:
        yield dict(
            seed=seed,
            adamw=final_loss(seed, args.steps, *adamw, "--schedule", schedule, "--lr", lr),
            steps=args.steps,
            muon=final_loss(seed, round(args.steps * 0.7)),
            muon_steps=round(args.steps * 0.7),
        )


def bench_pretrain(args):
    """Whole training steps (forward, backward, optimizer) on random tokens: tokens/s, share of the rate of one large matrix
    product in the same dtype (the best that the device does here), peak memory."""
    runtime = resolve(args.device, args.dtype, "off")
    settings = from_preset(train.Args, train.PRESETS, dict(preset=args.preset, batch=args.rows))
    config = train.model_config(
        settings, SimpleNamespace(vocab_size=args.vocab_size, bos_id=None, eos_id=None)
    )
    n = 8192 if runtime.device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=runtime.device, dtype=runtime.dtype) for _ in range(2))
    peak = 2 * n**3 / timed(lambda: a @ b, runtime.device, repeats=20)
    yield dict(matrix_products=str(runtime.dtype).removeprefix("torch."), tflops=peak / 1e12)
    for compiled, recompute in itertools.product((False, True), repeat=2):
        memory(runtime.device, reset=True)
        model = Transformer(config).to(runtime.device)
        model.init_weights()
        model.train().recompute = recompute
        step = training_step(
            torch.compile(model, dynamic=False) if compiled else model,
            MuonAdamW(model),
            runtime,
            torch.randint(
                args.vocab_size, (args.rows, settings.context + 1), device=runtime.device
            ),
        )
        seconds = timed(step, runtime.device, args.steps)
        rate = args.rows * settings.context / seconds
        yield dict(
            name=("compiled" if compiled else "eager") + ", recomputing" * recompute,
            seconds=seconds,
            tokens_per_s=rate,
            of_matrix_rate=rate * model.flops_per_token(settings.context) / peak,
            peak_mib=memory(runtime.device)[1] / 2**20,
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


def bench_sft(args):
    """Conversations a second through whole steps of fine-tuning: packed rows beside TRL's SFTTrainer (pip install trl), which pads;
    the same model, conversations, optimizer (AdamW) and number of conversations a step; start-up is not counted."""
    import finetune

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
        run, marks = finetune.prepare(flags, None), []
        per_step = round(args.rows * len(run.batches.split.pairs) / len(run.batches.plan(0).order))
        for step in range(args.steps + 2):  # the first two warm up
            batch = run.batches.next()
            loop.forward_backward(run, batch, (batch.y != -100).sum().item())
            loop.update(run, step)
            marks.append(time.perf_counter())
        run.batches.close()
        yield dict(
            name="finetune.py, packed",
            per_step=per_step,
            conversations_per_second=per_step * args.steps / (marks[-1] - marks[1]),
        )
        for name, order in (("SFTTrainer", "random"), ("SFTTrainer, by length", "group_by_length")):
            yield dict(
                name=name,
                per_step=per_step,
                conversations_per_second=sft_trainer_speed(args, per_step, order, out),
            )


def sft_trainer_speed(args, per_step, order, out):
    """A part of an epoch at least; by length the longest come first, so that only a whole epoch is fair."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from chat import read_records
    from finetune import open_model

    tok, model = open_model(args.model, "cpu")
    tok.save(f"{out}/model")
    model.save_pretrained(f"{out}/model")
    data = Path(args.data)
    talks = [m for _, m, _ in read_records(data / "train.jsonl" if data.is_dir() else data)]
    theirs = AutoTokenizer.from_pretrained(f"{out}/model")
    theirs.chat_template = (  # ChatML that says what the assistant does
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
        "{% endfor %}"
    )
    theirs.pad_token = theirs.pad_token or "<|im_end|>"
    config = SFTConfig(
        output_dir=f"{out}/trl",
        max_steps=args.steps,
        per_device_train_batch_size=per_step,
        max_length=args.context,
        assistant_only_loss=True,
        train_sampling_strategy=order,
        optim="adamw_torch",
        report_to="none",
        bf16=False,
        save_strategy="no",
        logging_steps=10**6,
        gradient_checkpointing=False,
        use_cpu=args.device == "cpu",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(f"{out}/model", dtype=torch.float32),
        config,
        train_dataset=Dataset.from_list([{"messages": m} for m in talks]),
        processing_class=theirs,
    )
    return trainer.train().metrics["train_samples_per_second"]


def bench_dpo(args):
    """Seconds a step of 32 pairs, forward, backward and AdamW: rows that share their prompt, beside TRL's DPOTrainer on the same
    weights and ids (pip install trl). Both have the reference's log-probs already."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    import dpo
    from finetune import open_model

    tok, model = open_model(args.model, "cpu", torch.float32)
    settings, size = dpo.Args(), args.passes
    records = itertools.islice(dpo.read_preferences(args.data, "train", 400), 400)
    found = dpo.usable(tok, records, model.config.max_position_embeddings)[: 32 * args.steps]
    pairs, objective = dpo.make_pairs(settings, found, ""), dpo.Objective()
    with tempfile.TemporaryDirectory() as out:
        tok.save(out)
        model.save_pretrained(out)
        theirs, words = (
            AutoModelForCausalLM.from_pretrained(out),
            PreTrainedTokenizerFast.from_pretrained(out),
        )
        words.pad_token = words.eos_token = "<|im_end|>"
        config = DPOConfig(
            out,
            report_to=[],
            use_cpu=True,
            bf16=False,
            max_length=None,
            gradient_checkpointing=False,
        )
        trainer = DPOTrainer(
            theirs,
            AutoModelForCausalLM.from_pretrained(out),
            config,
            processing_class=words,
            train_dataset=Dataset.from_dict(
                {"prompt": ["a"] * 2, "chosen": ["b"] * 2, "rejected": ["c"] * 2}
            ),
        )
    trainer.precompute_ref_logps = True

    def ours(batch):
        batch = pairs.fill(batch, 0)
        for i in range(0, 32, size):
            objective(model, batch._make(t[i : i + size] for t in batch), settings).div(
                32
            ).backward()

    def trl(batch):
        for i in range(0, 32, size):
            rows = [
                dict(
                    prompt_ids=p,
                    chosen_ids=a[0],
                    rejected_ids=a[1],
                    ref_chosen_logps=-50.0,
                    ref_rejected_logps=-50.0,
                )
                for p, a, *_ in (found[r] for r in batch[i : i + size])
            ]
            trainer.compute_loss(theirs, trainer.data_collator(rows)).mul(size / 32).backward()

    def steps(step, optimizer):
        for at in range(0, len(found) - 31, 32):
            step(range(at, at + 32))
            optimizer.step()
            optimizer.zero_grad()

    for name, step, net in 2 * (
        ("dpo.py", ours, model.train()),
        ("DPOTrainer", trl, theirs.train()),
    ):  # the first round warms up
        seconds = seconds_of(steps, step, torch.optim.AdamW(net.parameters(), 1e-6)) / (
            len(found) // 32
        )
        yield dict(name=name, seconds=seconds)


# ---- QLoRA
SHAPES = {
    "7b": Config(
        "llama", 32000, 4096, 11008, 32, 32, 32, 128, 4096, tie_word_embeddings=False
    ),  # Llama 2 7B's
    "1b": Config(
        "llama", 32000, 2048, 5632, 22, 32, 4, 64, 2048, tie_word_embeddings=False
    ),  # TinyLlama 1.1B's
    "qwen3-0.6b": Config("qwen3", 151_936, 1024, 3072, 28, 16, 8, 128, 40_960),
    "135m": Config("llama", 49_152, 576, 1536, 30, 9, 3, 64, 8192),  # SmolLM2's
    "tiny": Config("llama", 512, 128, 384, 2, 4, 2, 32, 1024, tie_word_embeddings=False),
}


def bench_qlora(args):
    """QLoRA's memory and speed, estimated and measured, and, on a GPU, those of LoRA on a 16-bit base beside it."""
    runtime, config = resolve(args.device, args.dtype, "off"), SHAPES[args.shape]
    for quant in ("nf4", "") if runtime.device.type == "cuda" else ("nf4",):
        flags = lora.Args(
            r=args.r,
            quant=quant,
            optimizer="adamw8bit",
            recompute=True,
            context=args.context,
            batch=1,
        )
        parts, trained, total = lora.estimate(config, flags, runtime, 1)
        print_estimate(parts, 1, flags, runtime)
        row = dict(
            shape=args.shape,
            base=quant or str(runtime.dtype),
            trained=trained / total,
            estimated_gib=sum(parts.values()) / 2**30,
        )
        if not args.estimate:
            model = random_base(config, bool(quant), runtime)
            loaded = memory(runtime.device, reset=True)[0]
            lora.apply(model, args.r, 2 * args.r).train().recompute = True
            step = training_step(
                model,
                MuonAdamW(model, adam_lr=1e-4, muon=False, eight_bit=True),
                runtime,
                torch.randint(config.vocab_size, (1, args.context + 1), device=runtime.device),
            )
            seconds = timed(step, runtime.device, args.steps, warm_up=1)
            peak = memory(runtime.device)[1]
            row |= dict(
                base_gib=loaded / 2**30,
                peak_gib=peak / 2**30,
                to_train_gib=(peak - loaded) / 2**30,
                tokens_per_s=args.context / seconds,
            )
            del model, step
        yield row


def random_base(config, packed, runtime):
    """A model of random weights on the device, made one matrix at a time: in NF4 it is never there whole in 16 bits."""
    with torch.device("meta"):
        model = Transformer(config).to(runtime.dtype)
    for name, module in [
        (n, m) for n, m in model.named_modules() if list(m.parameters(recurse=False))
    ]:
        module.to_empty(device=runtime.device, recurse=False)
        for p in module.parameters(recurse=False):
            torch.nn.init.normal_(p, std=0.02) if p.ndim > 1 else torch.nn.init.ones_(p)
        if packed and isinstance(module, torch.nn.Linear) and name != "lm_head":
            model.set_submodule(name, NF4Linear.from_linear(module))
    return model.to(runtime.device)


# ------------------------------------------------------------------------------------------ kernels
def graph_seconds(function, draw, size):
    """Seconds of function(*draw()), from a CUDA graph of calls on so many drawn inputs that no cache holds them."""
    inputs = [draw() for _ in range(min(max(2, 512_000_000 // size), 64))]
    for arguments in inputs:
        function(*arguments)  # compiles and tunes
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for arguments in inputs:
            function(*arguments)
    return timed(graph.replay, torch.device("cuda"), repeats=20) / len(inputs)


def bf16(*shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def linear_cases(M, N, K):
    """{name: (bytes read and written, function, draw its arguments)}, what the others are measured against first."""

    def ints(*shape):
        return torch.randint(0, 256, shape, device="cuda", dtype=torch.uint8)

    rest, k = 2 * M * (N + K), kernels
    cases = {
        "cuBLAS bf16": (2 * N * K + rest, F.linear, lambda: (bf16(M, K), bf16(N, K))),
        "int8": (
            N * K + rest,
            k.linear,
            lambda: (bf16(M, K), k.Packed("int8", ints(N, K).view(torch.int8), bf16(N), N, K)),
        ),
        "int8 x int8": (
            N * K + rest,
            k.linear,
            lambda: (bf16(M, K), k.Packed("int8x8", ints(N, K).view(torch.int8), bf16(N), N, K)),
        ),
        "int4 g128": (
            N * K // 2 + N * K // 64 + rest,
            k.linear,
            lambda: (bf16(M, K), k.Packed("int4", ints(N, K // 2), bf16(N, K // 128), N, K, 128)),
        ),
        "nf4": (
            N * K // 2 + N * K // 16 + rest,
            k.linear,
            lambda: (
                bf16(M, K),
                k.Packed("nf4", ints(N * K // 2), torch.rand(N * K // 64, device="cuda"), N, K, 64),
            ),
        ),
        "int4 g128, torch tinygemm": (
            N * K // 2 + N * K // 32 + rest,
            torch._weight_int4pack_mm,
            lambda: (
                bf16(M, K),
                torch.ops.aten._convert_weight_to_int4pack(ints(N, K // 2), 8),
                128,
                bf16(K // 128, N, 2),
            ),
        ),
    }
    if importlib.util.find_spec("bitsandbytes"):
        import bitsandbytes as bnb

        def quantized():
            w, state = bnb.functional.quantize_4bit(bf16(N, K), quant_type="nf4")
            return bf16(M, K), w.t(), state

        cases["nf4, bitsandbytes"] = (N * K // 2 + N * K // 16 + rest, bnb.matmul_4bit, quantized)
    return cases


def row_cases(T, C):
    """As linear_cases: the kernels that pass over rows once, each after torch's own."""
    angle, ids = torch.rand(T, 64, device="cuda"), torch.randint(0, 32_000, (T,), device="cuda")
    pairs = {
        "rms_norm + residual": (8 * T * C, lambda: (bf16(T, C), bf16(C), 1e-5, bf16(T, C))),
        "rope": (4 * T * C, lambda: (bf16(T, C // 128, 128), angle.cos(), angle.sin())),
        "swiglu": (6 * T * 11_008, lambda: (bf16(T, 11_008), bf16(T, 11_008))),
        "cross_entropy": (2 * T * 32_000, lambda: (bf16(T, 32_000), ids)),
    }
    return {
        name: {
            f"{name}, torch": (size, getattr(kernels, name.split()[0] + "_twin"), draw),
            name: (size, getattr(kernels, name.split()[0]), draw),
        }
        for name, (size, draw) in pairs.items()
    }


def attention_cases(S, length, rows, KH, cache_dtype=torch.bfloat16, H=32, D=128, page=16):
    """As linear_cases: S sequences of `length` tokens with `rows` new ones each, beside torch's attention on unpaged keys."""

    def ints(values):
        return torch.tensor(values, dtype=torch.int32, device="cuda")

    def pages():
        cache = [
            torch.randint(-99, 99, (S * length // page, page, KH, D), device="cuda").to(cache_dtype)
            for _ in range(2)
        ]
        scales = [
            torch.rand(S * length // page, page, KH, device="cuda")
            for _ in range(2 * (cache_dtype.itemsize == 1))
        ]
        table = torch.randperm(S * length // page, device="cuda").int().view(S, -1)
        lengths, starts = ints([length] * S), ints(range(0, S * rows + 1, rows))
        return bf16(S * rows, H, D), *cache, table, lengths, starts, D**-0.5, None, *scales

    def torch_attention(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=rows > 1, enable_gqa=True)

    def unpaged():
        return bf16(S, H, rows, D), bf16(S, KH, length, D), bf16(S, KH, length, D)

    values = 2 * S * length * KH * D
    return {
        "torch bf16, unpaged": (2 * values, torch_attention, unpaged),
        f"paged, {str(cache_dtype)[6:]}": (
            values * cache_dtype.itemsize,
            kernels.paged_attention,
            pages,
        ),
    }


def bench_kernels(args):
    """Every kernel at Llama-7B's shapes: microseconds, GB/s, share of the copy bandwidth, speed over the first of its group."""
    if not torch.cuda.is_available() or kernels.triton is None:
        raise UserError(
            "bench.py kernels times the Triton kernels on a CUDA device, and here is none; "
            "that they compute the right thing is shown without one by: python -m pytest tests/test_kernels.py"
        )
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    copy = (
        2
        * source.numel()
        / graph_seconds(torch.empty_like(source).copy_, lambda: (source,), source.numel())
    )
    yield dict(group="copy, read + written", gb_per_s=copy / 1e9)
    groups = {
        f"linear {N} x {K}, {M} row{'s' * (M > 1)}": linear_cases(M, N, K)
        for N, K in ((4096, 4096), (12_288, 4096), (22_016, 4096), (4096, 11_008))
        for M in (1, 16)
    }
    groups |= {f"{name}, 8192 rows": cases for name, cases in row_cases(8192, 4096).items()}
    groups |= {
        f"decode, {S} x 4096 tokens, {KH} key heads": attention_cases(S, 4096, 1, KH)
        for S in (1, 16)
        for KH in (32, 8)
    }
    groups["decode, 16 x 4096 tokens, 8 key heads, int8"] = attention_cases(
        16, 4096, 1, 8, torch.int8
    )
    groups["prefill 4096 tokens, 8 key heads"] = attention_cases(1, 4096, 4096, 8)
    for group, cases in groups.items():
        first = None
        for name, (size, function, draw) in cases.items():
            with torch.inference_mode():
                seconds = graph_seconds(function, draw, size)
            first = first or seconds
            yield dict(
                group=group,
                name=name,
                us=seconds * 1e6,
                gb_per_s=size / seconds / 1e9,
                of_copy=size / seconds / copy,
                speed_up=first / seconds,
            )
        torch.cuda.empty_cache()


LINEARS, BLOCKS = (
    ((960, 576), (576, 576), (3072, 576), (576, 1536)),
    30,
)  # q+k+v, o, gate+up, down of a 135M Llama: 106M weights


def bench_linear(args):
    """Billions of weights a second through all linear layers of a 135M model, streamed from memory, by rows of activations; beside
    them llama.cpp's decode of the same shape (all 135M weights, attention included) where DIR has its GGUF files."""

    def layers(format):
        for N, K in LINEARS * BLOCKS:
            linear = torch.nn.Linear(K, N, bias=False)
            yield (
                linear
                if format == "float32"
                else linear.bfloat16()
                if format == "bfloat16"
                else pack(linear, format, 64)
            )

    def run(model, inputs):
        for layer in model:
            layer(inputs[layer.in_features])

    weights = BLOCKS * sum(N * K for N, K in LINEARS)
    with torch.inference_mode():
        for format in ("float32", "bfloat16", "int8", "int8-dynamic", "int4"):
            model, dtype = (
                list(layers(format)),
                torch.bfloat16 if format == "bfloat16" else torch.float32,
            )
            for M in args.rows:
                inputs = {K: torch.randn(M, K, dtype=dtype) for K in (576, 1536)}
                rate = (
                    weights / min(seconds_of(run, model, inputs) for _ in range(args.repeats)) / 1e9
                )
                yield dict(format=format, rows=M, gigaweights_per_s=rate, gflops=2 * M * rate)
    for name in ("f16", "q8_0", "q4_0") if args.gguf else ():
        run, weights = llama_rounds(Path(args.gguf, name + ".gguf"))
        rate = weights * max(speeds(run, 8, 26)[1] for _ in range(args.repeats)) / 1e9
        yield dict(
            format=f"llama.cpp {name}, whole model", rows=1, gigaweights_per_s=rate, gflops=2 * rate
        )


# ---------------------------------------------------------------------------------------- tokenizer
# The trainings that `bench.py tokenizer` times, each by `python -c` in an interpreter of its own: FILE VOCAB_SIZE OUT.
TRAININGS = {
    "ours": """
import sys; from tokenizer import Tokenizer
Tokenizer.train(files=[sys.argv[1]], vocab_size=int(sys.argv[2]), special_tokens=[]).save(sys.argv[3])
""",
    "HF": """
import os, sys; from bpe import PATTERNS; from tokenizers import Regex, Tokenizer, models, trainers, pre_tokenizers as p
tok = Tokenizer(models.BPE())
tok.pre_tokenizer = p.Sequence([p.Split(Regex(PATTERNS["gpt4"]), "isolated"), p.ByteLevel(False, use_regex=False)])
tok.train([sys.argv[1]], trainers.BpeTrainer(vocab_size=int(sys.argv[2]), show_progress=False,
                                             initial_alphabet=p.ByteLevel.alphabet()))
os.makedirs(sys.argv[3]); tok.save(sys.argv[3] + "/tokenizer.json")
""",
}


def bench_tokenizer(args):
    """Train and encode with ours, HF tokenizers and tiktoken, in turns on the same text: the first 5 MB as a string, and the whole
    file by ours in one process and in two."""
    if sys.platform != "linux":
        raise UserError(
            f"bench.py tokenizer reads memory from /proc, which only Linux has; this is {sys.platform}"
        )
    import tiktoken
    import tokenizers

    size, made = os.path.getsize(args.file) / 1e6, {}
    with tempfile.TemporaryDirectory() as out:
        for name, code in TRAININGS.items():
            seconds, peak = time_training(
                code, os.path.abspath(args.file), str(args.vocab_size), f"{out}/{name}"
            )
            made[name] = Tokenizer.load(f"{out}/{name}")
            yield dict(
                train=name,
                seconds=seconds,
                mb_per_second=size / seconds,
                peak_mb=peak,
                merges=len(made[name].merges),
            )
        hf = tokenizers.Tokenizer.from_file(f"{out}/HF/tokenizer.json")
    tok = made["ours"]
    if (tok.vocab, tok.merges) != (made["HF"].vocab, made["HF"].merges):
        raise UserError("ours and HF have not learned the same merges from this text")
    tik = tiktoken.Encoding(
        "same", pat_str=PATTERNS["gpt4"], mergeable_ranks=tok.vocab, special_tokens={}
    )
    text = Path(args.file).read_bytes()[:5_000_000].decode("utf-8", "ignore")
    if tok.encode(text) != tik.encode_ordinary(text):
        raise UserError("ours and tiktoken disagree on this text")
    seconds = best_seconds(
        {"ours": lambda: tok.encode(text), "tiktoken": lambda: tik.encode_ordinary(text)}, 5
    )
    seconds |= best_seconds(
        {"ours, plain Python": lambda: tok.encode_slowly(text), "HF": lambda: hf.encode(text)}, 1
    )
    for name, took in seconds.items():
        yield dict(encode=name, mb_per_second=len(text.encode()) / 1e6 / took)
    whole = best_seconds(
        {
            f"ours, file to array, processes: {n}": lambda n=n: tok.encode_corpus([args.file], n)
            for n in (1, 2)
        },
        2,
    )
    for name, took in whole.items():
        yield dict(encode=name, mb_per_second=size / took)


def time_training(code, *arguments):
    """(seconds, peak MB) of one training in a fresh interpreter, start-up included; what its processes share counts for each."""
    begin, peak = time.perf_counter(), 0.0
    child = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE, cwd=Path(__file__).parent
    )
    while child.poll() is None:
        total, family = 0.0, [child.pid]
        for p in family:
            with contextlib.suppress(OSError):  # it has just ended
                total += (
                    int(Path(f"/proc/{p}/statm").read_text().split()[1])
                    * os.sysconf("SC_PAGE_SIZE")
                    / 1e6
                )
                family += map(int, Path(f"/proc/{p}/task/{p}/children").read_text().split())
        peak = max(peak, total)
        time.sleep(0.02)
    if child.returncode:
        said = child.stderr.read().decode().strip().splitlines() or [
            f"exit status {child.returncode}"
        ]
        raise UserError(f"training failed: {said[-1]}")
    return time.perf_counter() - begin, peak


# --------------------------------------------------------------------------------------- generation
def engine_rounds(args, model, quant=None, dtype="auto"):
    """-> (a function (texts, tokens of a prompt, new tokens) -> seconds, bytes of the weights that a decode step reads)"""
    engine = quietly(Engine, model, args.device, dtype, quant, kv_tokens=16 * 1024)

    def run(texts, prompt, new):
        prompts = torch.randint(1, engine.vocab_size, (texts, prompt)).tolist()
        return seconds_of(
            engine.generate, prompts, Sampling(max_tokens=new, temperature=0, ignore_eos=True)
        )

    table, runner = (
        engine.runner.forward.embedding,
        engine.runner,
    )  # of the table one row is read, unless it is the head too
    unread = (
        4 * table.numel()
        if runner.native
        else 0
        if engine.config.tie_word_embeddings
        else table.nbytes
    )
    return run, runner.weight_bytes - unread


def llama_rounds(path):
    """As engine_rounds, for llama.cpp through its Python binding, on the same number of threads -> (..., how many weights)"""
    import llama_cpp as L
    from llama_cpp._logger import set_verbose

    set_verbose(False)
    model, contexts = (
        L.llama_load_model_from_file(str(path).encode(), L.llama_model_default_params()),
        {},
    )
    for texts in (1, 8):
        p = L.llama_context_default_params()
        p.n_ctx, p.n_batch, p.n_seq_max = 1024 * texts, 512, texts
        p.n_threads = p.n_threads_batch = torch.get_num_threads()
        contexts[texts] = L.llama_new_context_with_model(model, p)

    def step(texts, first, count):
        """`count` tokens of each text from position `first` on."""
        batch = L.llama_batch_init(texts * count, 0, 1)
        batch.n_tokens = texts * count
        for i in range(texts * count):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = (
                1 + i % 99,
                first + i % count,
                1,
                i // count,
            )
            batch.logits[i] = i % count == count - 1
        if L.llama_decode(contexts[texts], batch):
            raise UserError(f"{path}: llama.cpp failed")
        L.llama_get_logits(contexts[texts])
        L.llama_batch_free(batch)

    def run(texts, prompt, new):
        L.llama_memory_clear(L.llama_get_memory(contexts[texts]), True)
        begin = time.perf_counter()
        for first, count in [(0, prompt), *((prompt + i, 1) for i in range(new - 1))]:
            step(texts, first, count)
        return time.perf_counter() - begin

    return run, L.llama_model_n_params(model)


def transformers_rounds(args, dtype):
    """As engine_rounds, for transformers.generate, greedy, with its default cache."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=DTYPES[dtype]).to(
        quietly(resolve, args.device).device
    )

    def run(texts, prompt, new, ids=None):
        ids = (
            torch.randint(1, model.config.vocab_size, (texts, prompt)) if ids is None else ids
        ).to(model.device)
        return seconds_of(
            model.generate,
            ids,
            attention_mask=(ids > 0).long(),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )

    return run


def folder_of(args):
    """A model folder as it is; for the name of a shape one of random weights under runs/, made the first time."""
    folder = args.model
    if folder in SHAPES and not Path(folder).exists():
        folder = f"runs/random-{args.model}"
        if not Path(folder, "config.json").is_file():
            random_base(
                SHAPES[args.model], False, quietly(resolve, args.device, "bfloat16", "off")
            ).save_pretrained(folder)
    return folder


def bench_decode(args):
    """tok/s of a prompt being read and of one and eight texts being written, every program in turn, the median of the rounds. The
    roofline is the rate at which memory is read (a sum over more than any cache holds) over the bytes of the weights."""
    args.model, device = folder_of(args), quietly(resolve, args.device).device
    big = torch.ones((4 if device.type == "cuda" else 1) << 27, dtype=torch.int64, device=device)
    bandwidth = big.nbytes / timed(big.sum, device, 3)
    yield dict(memory="read", gb_per_s=bandwidth / 1e9)
    programs, size = {}, {}
    for name in args.formats:
        how = (name, "float32") if name in ("int8", "int4") else (None, name)
        programs[name], size[name] = engine_rounds(args, args.model, *how)
    for path in map(Path, args.gguf):
        programs[path.name], size[path.name] = engine_rounds(args, path)
        programs[f"llama.cpp {path.stem}"] = llama_rounds(path)[0]
    programs |= {
        f"transformers {dtype}": transformers_rounds(args, dtype) for dtype in args.transformers
    }
    rounds = [
        {name: speeds(run, args.prompt, args.new) for name, run in programs.items()}
        for _ in range(args.rounds)
    ]
    for name in programs:
        prompt, one, eight = (median(figures) for figures in zip(*(got[name] for got in rounds)))
        yield {
            "program": name,
            f"prompt of {args.prompt}": prompt,
            "1 text": one,
            "8 texts": eight,
            "roofline": bandwidth / size[name] if name in size else None,
        }


def speeds(run, prompt, new):
    """tok/s of a prompt being read, and of one and of eight texts being written: the time of many tokens less that of two."""
    return [
        prompt / run(1, prompt, 1),
        *(n * (new - 2) / (run(n, 64, new) - run(n, 64, 2)) for n in (1, 8)),
    ]


def bench_throughput(args):
    """Requests of random lengths, all there at the start: output tok/s beside transformers' static batches of the same."""
    args.model = folder_of(args)
    engine = quietly(
        Engine, args.model, args.device, args.dtype, args.quant, kv_tokens=args.kv_tokens
    )
    draw = torch.Generator().manual_seed(0)
    sizes = torch.randint(args.low, args.high + 1, (args.requests, 2), generator=draw).tolist()
    prompts = [torch.randint(1, engine.vocab_size, (n,), generator=draw).tolist() for n, _ in sizes]
    total = sum(new for _, new in sizes)
    engine.generate(prompts[0], Sampling(max_tokens=4))
    ours = seconds_of(
        engine.generate,
        prompts,
        [Sampling(max_tokens=new, temperature=0, ignore_eos=True) for _, new in sizes],
    )
    yield dict(program="engine", seconds=ours, tokens_per_s=total / ours, engine_is_faster=1.0)

    for dtype in args.transformers:
        run, seconds = transformers_rounds(args, dtype), 0.0
        for i in range(
            0, args.requests, args.batch
        ):  # a static batch runs to its longest, padded on the left
            part = range(i, min(i + args.batch, args.requests))
            longest, new = (max(sizes[k][j] for k in part) for j in (0, 1))
            seconds += run(
                len(part),
                longest,
                new,
                torch.tensor([[0] * (longest - len(prompts[k])) + prompts[k] for k in part]),
            )
        yield dict(
            program=f"transformers {dtype}, batches of {args.batch}",
            seconds=seconds,
            tokens_per_s=total / seconds,
            engine_is_faster=seconds / ours,
        )


def bench_prefix(args):
    """Requests with the same tokens in front: seconds to their first token on average and at the latest, without and with the
    prefix cache."""
    means = []
    for cached in (False, True):
        engine = quietly(
            Engine,
            folder_of(args),
            args.device,
            args.dtype,
            args.quant,
            kv_tokens=args.kv_tokens or 128 * 1024,
            max_seqs=64,
            prefix_cache=cached,
        )
        prefix, first = (
            torch.arange(args.length).remainder(engine.vocab_size - 1).add(1).tolist(),
            {},
        )
        begin = time.perf_counter()
        for i in range(args.requests):
            engine.submit(
                [*prefix, i + 1, i + 2], Sampling(max_tokens=1, temperature=0, ignore_eos=True)
            )
        while engine.has_work:
            first |= {
                d.request_id: time.perf_counter() - begin for d in engine.step() if d.token_ids
            }
        means.append(sum(first.values()) / len(first))
        yield dict(
            prefix_cache="on" if cached else "off",
            mean=means[-1],
            last=max(first.values()),
            sooner=means[0] / means[-1],
        )


# ---- The server: a load generator that speaks HTTP by itself, so that its own cost is small and no client library's.
async def call(url, body, key="", kept=None):
    """POST one completion -> (status, [(seconds since the call, bytes that came)]), to be read when nothing is measured any more.
    kept: a list for the connection, if the next call may use it too."""
    begin, host, came = time.perf_counter(), url.removeprefix("http://").split("/")[0], []
    reader, writer = (
        kept.pop() if kept else await asyncio.open_connection(*host.split(":"), limit=1 << 24)
    )
    content = json.dumps(
        {**body, "stream": True, "stream_options": {"include_usage": True}}
    ).encode()
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    writer.write(
        (
            f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nAuthorization: Bearer {key}\r\n"
            f"Content-Length: {len(content)}\r\n\r\n"
        ).encode()
        + content
    )
    with contextlib.ExitStack() as stack:
        stack.callback(writer.close)
        head = await reader.readuntil(b"\r\n\r\n")
        if (status := int(head.split()[1])) != 200:
            length = re.search(rb"content-length: (\d+)", head.lower())
            return status, [(0.0, await reader.readexactly(int(length[1]) if length else 0))]
        while size := int(await reader.readuntil(b"\n"), 16):  # chunks
            chunk = (await reader.readexactly(size + 2))[:-2]
            came.append((time.perf_counter() - begin, chunk))
        await reader.readline()
        if kept is not None:
            kept.append((reader, writer))
            stack.pop_all()
    return status, came


def answer(status, came):
    """What `call` returned -> {status, ttft, tpot, e2e in seconds, tokens, text}; status 0: no answer, or not to its end."""
    row: dict = dict(status=status, ttft=None, tpot=None, e2e=None, tokens=0, text="")
    if status != 200:
        return row | dict(text=came[0][1].decode("utf-8", "replace"))
    data = b""
    for seconds, chunk in came:
        *events, data = (data + chunk).split(b"\n\n")
        for event in (json.loads(e[6:]) for e in events if e.startswith(b"data: {")):
            for choice in event.get("choices", ()):
                text = choice["delta"].get("content") or "" if "delta" in choice else choice["text"]
                row["ttft"] = row["ttft"] or (seconds if text else None)
                row["text"] += text
            row["tokens"] = (event.get("usage") or {}).get("completion_tokens", row["tokens"])
            row["status"] = 500 if "error" in event else row["status"]
        row["e2e"] = seconds
    row["tpot"] = (
        (row["e2e"] - row["ttft"]) / (row["tokens"] - 1)
        if row["ttft"] and row["tokens"] > 1
        else None
    )
    return row


async def load(url, bodies, concurrency, rate, key):
    """All bodies as requests -> (rows in their order, seconds). Closed loop: so many at once, each followed by the next on its
    connection. Open loop: arrivals at random, `rate` a second on average (Poisson), however far behind the server is."""
    places, rng, tasks, begin = (
        asyncio.Semaphore(len(bodies) if rate else concurrency),
        random.Random(0),
        [],
        time.perf_counter(),
    )
    kept: list = []

    async def one(body):
        async with places:
            try:
                return await call(url, body, key, kept)
            except (OSError, EOFError) as error:
                return 0, [(0.0, repr(error).encode())]

    for body in bodies:
        tasks.append(asyncio.ensure_future(one(body)))
        if rate:
            await asyncio.sleep(rng.expovariate(rate))
    came, seconds = await asyncio.gather(*tasks), time.perf_counter() - begin
    for _, writer in kept:
        writer.close()
    return [answer(*one) for one in came], seconds


def load_bodies(args):
    """The batch's lines, or prompts of random words."""
    if args.batch:
        return [
            json.loads(line) for line in Path(args.batch).read_text().splitlines() if line.strip()
        ]
    rng, words = (
        random.Random(1),
        "the of and a to in is you that it he was for on are as with his they at".split(),
    )
    return [
        dict(
            prompt=" ".join(rng.choices(words, k=args.prompt)),
            max_tokens=args.new,
            ignore_eos=True,
            seed=i,
        )
        for i in range(args.requests)
    ]


@contextlib.contextmanager
def served(folder, concurrency):
    """serve.py over a folder, in a process of its own -> its URL."""
    command = [
        sys.executable,
        Path(__file__).with_name("serve.py"),
        folder,
        "--port",
        "0",
        "--concurrency",
        str(concurrency),
    ]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        line = next((line for line in child.stdout if line.startswith("ready")), None)
        if line is None:
            raise UserError(f"serve.py {folder} did not start: run it by hand to see why")
        yield line.split()[1]
    finally:
        child.terminate()
        child.wait()


def bench_serve(args):
    """Requests against a server: TTFT, TPOT, E2E, tok/s, goodput; with a folder also what the server costs over the engine: both
    do the same work in turns, and the best round of each counts."""
    bodies, local = load_bodies(args), not args.model.startswith("http://")
    seqs = args.seqs or args.concurrency
    with served(args.model, seqs) if local else contextlib.nullcontext(args.model) as url:
        compare = local and not args.batch and not args.rate
        engine, alone, best = (
            quietly(Engine, args.model, max_seqs=seqs) if compare else None,
            float("inf"),
            None,
        )
        if compare:  # the first step of each size is slower
            asyncio.run(load(url, bodies[: args.concurrency], args.concurrency, None, args.key))
        for _ in range(args.rounds if compare else 1):
            now = asyncio.run(load(url, bodies, args.concurrency, args.rate, args.key))
            best = min(best or now, now, key=lambda result: result[1])
            if compare:
                begin = time.perf_counter()
                engine.generate(
                    [b["prompt"] for b in bodies],
                    [
                        Sampling(max_tokens=args.new, ignore_eos=True, seed=b["seed"])
                        for b in bodies
                    ],
                )
                alone = min(alone, time.perf_counter() - begin)
    rows, seconds = best
    if args.out:
        Path(args.out).write_text(
            "".join(
                json.dumps({**b, "status": r["status"], "answer": r["text"]}, ensure_ascii=False)
                + "\n"
                for b, r in zip(bodies, rows)
            )
        )
    good, made = [r for r in rows if r["status"] == 200], sum(r["tokens"] for r in rows)
    print(
        f"{machine()}\n{len(good)} of {len(rows)} requests answered in {seconds:.1f} s, {args.rate or args.concurrency} "
        f"{'a second' if args.rate else 'at once'}: {made / seconds:,.1f} tok/s"
    )
    for name in ("ttft", "tpot", "e2e"):
        values = sorted(r[name] for r in good if r[name] is not None) or [float("nan")]
        print(
            f"{name.upper():5s}"
            + "".join(
                f"  p{p} {values[min(len(values) * p // 100, len(values) - 1)] * 1000:9.1f} ms"
                for p in (50, 90, 99)
            )
        )
    met = [r for r in good if (r["ttft"] or 0) <= args.ttft and (r["tpot"] or 0) <= args.tpot]
    print(
        f"goodput {len(met) / seconds:.2f} requests/s with TTFT <= {args.ttft:g} s and TPOT <= {args.tpot:g} s"
    )
    if compare:
        print(
            f"engine  {made / alone:,.1f} tok/s by itself: the server costs {1 - alone / seconds:.1%}"
        )
    return [{k: v for k, v in r.items() if k != "text"} for r in rows]


# --------------------------------------------------------------------------------- two measurements
def labelled(rows):
    """Rows of a --json file -> {their texts and how many of the same came before: {name: figure}}; rows without any text are
    many measurements of one thing, so their mean stands for them."""
    rows = [{k: v for k, v in row.items() if isinstance(v, (str, int, float))} for row in rows]
    if rows and not any(isinstance(v, str) for row in rows for v in row.values()):
        names = [k for k in rows[0] if all(k in row for row in rows)]
        return {
            (f"mean of {len(rows)}",): {k: sum(row[k] for row in rows) / len(rows) for k in names}
        }
    found, seen = {}, Counter()
    for row in rows:
        key = tuple(v for v in row.values() if isinstance(v, str))
        seen[key] += 1
        found[(*key, f"({seen[key]})") if seen[key] > 1 else key] = {
            k: v for k, v in row.items() if not isinstance(v, str)
        }
    return found


def bench_compare(args):
    """Every figure of two --json files beside its other, and their ratio; changes of over 5 % are marked."""
    files = [read_json(path) for path in (args.a, args.b)]
    if not all(
        isinstance(f, dict)
        and isinstance(rows := f.get("rows"), list)
        and {*map(type, rows)} <= {dict}
        for f in files
    ):
        raise UserError(
            "bench.py compare reads two files that another of its commands wrote with --json"
        )
    for name, file in zip("AB", files):
        at = file.get("machine", "an unnamed machine")
        print(
            f"{name}  {', '.join(f'{k} {v}' for k, v in at.items() if v != '') if isinstance(at, dict) else at}"
        )
    before, after = (labelled(file["rows"]) for file in files)
    for key in before | after:
        row = " ".join(key)
        if key not in before or key not in after:
            yield dict(row=row, figure=f"only in {'A' if key in before else 'B'}")
            continue
        for name in [
            k
            for k in before[key]
            if k in after[key] and (before[key][k] != after[key][k] or before[key][k] % 1)
        ]:
            a, b = before[key][name], after[key][name]
            ratio = b / a if a else float("nan")
            yield dict(
                row=row,
                figure=name,
                a=a,
                b=b,
                ratio=ratio,
                changed="" if 0.95 <= ratio <= 1.05 else "<",
            )


# -------------------------------------------------------------------------------------------- flags
WHAT = {
    "model": f"a model folder (sft: a base model's); decode, throughput and prefix: or a shape, {', '.join(SHAPES)}",
    "file": "a text file, best of 10 MB or more",
    "data": "what to train on: a corpus or file of texts, conversations (sft), preferences (dpo)",
    "target": "report the time to this validation loss",
    "nanogpt_seconds": "wall time of nanoGPT's CPU recipe on this machine",
    "nanogpt_loss": "its loss over the whole validation split",
    "steps": "timed steps (optimizers: AdamW's)",
    "rows": "rows a step; rows of activations (linear)",
    "context": "tokens in a row",
    "r": "rank",
    "estimate": "only the estimate",
    "passes": "pairs a forward pass, 32 a step",
    "formats": "of our weights",
    "gguf": "the model as GGUF files, for llama.cpp; a folder with f16, q8_0 and q4_0.gguf (linear)",
    "new": "tokens a text",
    "transformers": "its dtypes to measure too",
    "batch": "rows of transformers' batches",
    "low": "shortest prompt and answer",
    "high": "longest prompt and answer",
    "length": "tokens the requests share",
    "quant": "int8 or int4: pack the weights so",
    "kv_tokens": "tokens' keys and values to keep",
}
CHOICES = {"preset": train.PRESETS, "shape": SHAPES}


def measuring_commands(commands):
    """Every command but those below, with its flags' defaults, which say their types too; a type stands for no default."""

    def add(name, run, *places, **flags):
        command = commands.add_parser(name, description=run.__doc__)
        for place in places:
            command.add_argument(place, help=WHAT[place])
        for flag, default in flags.items():
            how: dict = {"action": "store_true"}
            if default is not False:
                kind = default if isinstance(default, type) else type(default)
                how = dict(
                    type=kind,
                    default=None if default is kind else default,
                    choices=CHOICES.get(flag),
                )
            if isinstance(default, list):
                how |= dict(type=type(default[0]) if default else str, nargs="*")
            command.add_argument(
                "--" + flag.replace("_", "-"),
                help=f"{WHAT.get(flag, '')} [{how.get('default')}]",
                **how,
            )
        command.set_defaults(run=run)

    where = dict(device="auto", dtype="auto")
    add(
        "train",
        bench_train,
        presets=["shakespeare-char-fast", "shakespeare-char"],
        data="shakespeare",
        target=1.886,
        nanogpt_seconds=float,
        nanogpt_loss=1.886,
    )
    add("optimizers", bench_optimizers, data="shakespeare", steps=400, seeds=[1, 2, 3])
    add("pretrain", bench_pretrain, preset="125m", rows=32, steps=20, vocab_size=32_768, **where)
    add("qlora", bench_qlora, shape="7b", context=512, r=32, steps=3, estimate=False, **where)
    add("sft", bench_sft, "model", data="data/toybox", rows=16, context=256, steps=12, device="cpu")
    add("dpo", bench_dpo, "model", data="toybox", passes=8, steps=4)
    add("tokenizer", bench_tokenizer, "file", vocab_size=10_000)
    add("kernels", bench_kernels)
    add("linear", bench_linear, rows=[1, 8], repeats=6, gguf=str)
    add(
        "decode",
        bench_decode,
        "model",
        formats=["float32", "float16", "int8", "int4"],
        gguf=[],
        transformers=[],
        prompt=512,
        new=32,
        rounds=3,
        device="auto",
    )
    add(
        "throughput",
        bench_throughput,
        "model",
        requests=64,
        low=16,
        high=128,
        transformers=[],
        batch=32,
        quant=str,
        kv_tokens=int,
        **where,
    )
    add(
        "prefix", bench_prefix, "model", requests=64, length=1000, quant=str, kv_tokens=int, **where
    )


def serving_command(commands):
    serving = commands.add_parser("serve", help="load on a server")
    serving.add_argument("model", help="a model folder, or the http:// address of a running server")
    serving.add_argument("--requests", type=int, default=64)
    serving.add_argument("--concurrency", type=int, default=16, help="requests at once [16]")
    serving.add_argument(
        "--seqs",
        type=int,
        help="of which so many in the engine, the rest in its queue [--concurrency]",
    )
    serving.add_argument(
        "--rate", type=float, help="requests a second on average instead, whatever the server does"
    )
    serving.add_argument("--prompt", type=int, default=32, help="words of a prompt [32]")
    serving.add_argument("--new", type=int, default=64, help="tokens of an answer [64]")
    serving.add_argument(
        "--ttft",
        type=float,
        default=1.0,
        help="seconds to the first token that are good enough [1.0]",
    )
    serving.add_argument(
        "--tpot", type=float, default=0.1, help="seconds a token that are good enough [0.1]"
    )
    serving.add_argument("--rounds", type=int, default=3, help="of which the best counts [3]")
    serving.add_argument("--batch", help="send this file's lines, each a request's body")
    serving.add_argument("--out", help="write the answers here")
    serving.add_argument("--key", default="", help="API key")
    serving.set_defaults(run=bench_serve)
    compare = commands.add_parser(
        "compare", help="two files written with --json: the ratio of every figure"
    )
    compare.add_argument("a", help="the earlier one")
    compare.add_argument("b", help="the later one")
    compare.set_defaults(run=bench_compare)


def main():
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring_commands(commands)
    serving_command(commands)
    for command in commands.choices.values():
        command.add_argument("--json", help="also write the rows to this file")
    args = parser.parse_args()
    try:
        rows = args.run(args)
        if inspect.isgenerator(rows):  # `serve` prints for itself
            print(machine() if args.command != "compare" else "", end="\n\n")
            rows = show(rows)
    except ImportError as error:
        raise UserError(
            f"{error}: the programs measured beside ours are in requirements-peers.txt"
        ) from None
    if args.json:
        Path(args.json).write_text(json.dumps({"machine": machine_facts(), "rows": rows}, indent=1))


if __name__ == "__main__":
    cli(main)
