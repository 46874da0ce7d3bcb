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
    python bench.py decode FOLDER --gguf f16.gguf q8_0.gguf --transformers bfloat16    # one text and eight, peers in the same run
    python bench.py throughput FOLDER --requests 64 --transformers float32             # random lengths, all at once
    python bench.py prefix FOLDER                # time to the first token of 64 requests that begin alike
    python bench.py serve FOLDER                 # the server under load, and what it costs over the engine by itself
    python bench.py serve http://127.0.0.1:8000 --rate 4               # a running server, 4 requests a second whatever it does
    python bench.py serve http://127.0.0.1:8000 --batch prompts.jsonl --out answers.jsonl     # each line a request's body
    python bench.py compare before.json after.json             # any of these with --json FILE, before a change and after it
"""
import argparse
import asyncio
import contextlib
import ctypes
import importlib.util
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
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import kernels
import lora
import train
from bpe import usable_cpus
from common import Metrics, Parser, UserError, cli, read_json
from generate import Engine, Sampling
from model import Config, Transformer
from optim import MuonAdamW, print_estimate
from packed import NF4Linear
from quant import pack
from runtime import DTYPES, resolve
from tokenizer import PATTERNS, Tokenizer


def machine_facts():
    """What a figure depends on beside the program: {platform, cpu, cores, threads, gpu, torch, commit}."""
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), "") if Path("/proc/cpuinfo").exists() else platform.processor()
    commit = ""
    with contextlib.suppress(OSError):  # no git here
        commit = subprocess.run(["git", "describe", "--always", "--dirty", "--exclude", "*"], cwd=Path(__file__).parent,
                                capture_output=True, text=True).stdout.strip()
    return dict(platform=platform.platform(), cpu=cpu or platform.machine(), cores=usable_cpus(), threads=torch.get_num_threads(),
                gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else "", torch=torch.__version__, commit=commit)


def machine():
    """One line that says what the figures were measured on."""
    at = machine_facts()
    return f"{at['threads']} threads of {at['cpu']}{', ' * bool(at['gpu'])}{at['gpu']}, torch {at['torch']}"


def bench_train(args):
    """Train each preset in a process of its own; the clock starts before Python does, as it does for a user."""
    print(machine())
    print(f"{'':24s} {'parameters':>10s} {'wall s':>8s} {'val loss':>9s} {'to ' + str(args.target):>10s}")
    if args.nanogpt_seconds:
        print(f"{'nanoGPT (given)':24s} {'804,096':>10s} {args.nanogpt_seconds:8.1f} {args.nanogpt_loss:9.4f}")
    rows = []
    for preset in args.presets:
        with tempfile.TemporaryDirectory() as out:
            begin = time.time()
            done = subprocess.run([sys.executable, Path(__file__).with_name("train.py"), "--preset", preset, "--out", f"{out}/run",
                                   "--sample", "1", "--data", args.data, *args.train_flags], capture_output=True, text=True)
            wall = time.time() - begin
            if done.returncode:
                raise UserError(f"train.py --preset {preset} failed: {done.stderr.strip().splitlines()[-1]}")
            losses = [r for r in Metrics.read(f"{out}/run/metrics.jsonl") if "val_loss" in r]
            size = next(line for line in done.stdout.splitlines() if line.startswith("model")).split(":")[1].split()[0]
        reached = next((r["seconds"] + wall - losses[-1]["seconds"] for r in losses if r["val_loss"] <= args.target), None)
        row = dict(preset=preset, parameters=int(size.replace(",", "")), wall=wall, reached=reached,
                   val_loss=losses[-1]["val_loss"])
        ratio = f"  {args.nanogpt_seconds / wall:.1f}x nanoGPT's speed" if args.nanogpt_seconds else ""
        print(f"{preset:24s} {size:>10s} {wall:8.1f} {row['val_loss']:9.4f} "
              f"{f'{reached:.1f} s' if reached else 'not reached':>10s}{ratio}", flush=True)
        rows.append(row)
    return rows


def matmul_rate(runtime):
    """Floating-point operations per second of one large matrix product in the runtime's dtype: the best the device does here."""
    n = 8192 if runtime.device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=runtime.device, dtype=runtime.dtype) for _ in range(2))
    return 2 * n ** 3 / timed(lambda: a @ b, runtime, repeats=20)


def timed(function, runtime, repeats):
    """Mean seconds of a call, after three to warm up."""
    def wait():
        if runtime.device.type == "cuda":
            torch.cuda.synchronize()
    for _ in range(3):
        function()
    wait()
    begin = time.perf_counter()
    for _ in range(repeats):
        function()
    wait()
    return (time.perf_counter() - begin) / repeats


def bench_pretrain(args):
    """Whole training steps (forward, backward, optimizer) on random tokens: tokens/s, share of the matrix rate, peak memory."""
    print(machine())
    runtime = resolve(args.device, args.dtype, "off")
    settings = train.Args(**{**train.PRESETS[args.preset], "batch": args.rows})
    config = train.model_config(settings, SimpleNamespace(vocab_size=args.vocab_size, bos_id=None, eos_id=None))
    peak = matmul_rate(runtime)
    print(f"matrix products: {peak / 1e12:.2f} TFLOP/s in {str(runtime.dtype).removeprefix('torch.')}\n")
    print(f"{'':22s} {'ms/step':>9s} {'tokens/s':>10s} {'of matrix rate':>15s} {'peak MiB':>9s}")
    rows = []
    for compiled in (False, True):
        for recompute in (False, True):
            model = Transformer(config).to(runtime.device)
            model.init_weights()
            model.train().recompute = recompute
            optimizer = MuonAdamW(model)
            optimizer.set_lr(1.0)
            step_model = torch.compile(model, dynamic=False) if compiled else model
            ids = torch.randint(0, args.vocab_size, (args.rows, settings.context + 1), device=runtime.device)

            def step(step_model=step_model, ids=ids, optimizer=optimizer):
                with runtime.autocast():
                    loss = step_model(ids[:, :-1], ids[:, 1:]) / ids[:, 1:].numel()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            if runtime.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds = timed(step, runtime, args.steps)
            rate = ids[:, 1:].numel() / seconds
            memory = torch.cuda.max_memory_allocated() / 2 ** 20 if runtime.device.type == "cuda" else float("nan")
            name = ("compiled" if compiled else "eager") + (", recomputing" if recompute else "")
            share = rate * model.flops_per_token(settings.context) / peak
            rows.append(dict(name=name, seconds=seconds, tokens_per_s=rate, of_matrix_rate=share, peak_mib=memory))
            print(f"{name:22s} {seconds * 1e3:9.1f} {rate:10,.0f} {share:15.1%} {memory:9,.0f}", flush=True)
    return rows


def bench_sft(args):
    """Conversations a second through whole steps of fine-tuning: packed rows beside TRL's SFTTrainer (pip install trl), which pads;
    the same model, conversations, optimizer (AdamW) and number of conversations a step; start-up is not counted."""
    import finetune
    from chat import read_records
    print(machine())
    with tempfile.TemporaryDirectory() as out:
        flags = finetune.Args(model=args.model, data=(args.data,), out=out, context=args.context, batch=args.rows,
                              device=args.device, optimizer="adamw", steps=args.steps + 2)
        run, marks = finetune.prepare(flags, None), []
        per_step = round(args.rows * len(run.batches.split.pairs) / len(run.batches.plan(0).order))
        for step in range(args.steps + 2):  # the first two warm up
            batch = run.batches.next()
            train.forward_backward(run, batch, (batch.y != -100).sum().item())
            train.update(run, step)
            marks.append(time.perf_counter())
        run.batches.close()
        speeds = {"finetune.py, packed": per_step * args.steps / (marks[-1] - marks[1])}
        if not args.alone:
            folder = Path(args.data)
            talks = [m for _, m, _ in read_records(folder / "train.jsonl" if folder.is_dir() else folder)]
            for name, order in (("SFTTrainer", "random"), ("SFTTrainer, by length", "group_by_length")):
                speeds[name] = sft_trainer_speed(args, talks, per_step, order, out)
    for name, speed in speeds.items():
        print(f"{name:24s} {speed:8.1f} conversations/s, {per_step} a step")
    return [dict(name=name, conversations_per_second=speed) for name, speed in speeds.items()]


def sft_trainer_speed(args, talks, per_step, order, out):
    """A part of an epoch at least; by length the longest come first, so that only a whole epoch is fair."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from finetune import open_model
    tok, model = open_model(args.model, "cpu")
    tok.save(f"{out}/model")
    model.save_pretrained(f"{out}/model")
    theirs = AutoTokenizer.from_pretrained(f"{out}/model")
    theirs.chat_template = (  # ChatML that says what the assistant does
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
        "{% endfor %}")
    theirs.pad_token = theirs.pad_token or "<|im_end|>"
    config = SFTConfig(output_dir=f"{out}/trl", max_steps=args.steps, per_device_train_batch_size=per_step, max_length=args.context,
                       assistant_only_loss=True, train_sampling_strategy=order, optim="adamw_torch", report_to="none", bf16=False,
                       save_strategy="no", logging_steps=10**6, gradient_checkpointing=False, use_cpu=args.device == "cpu",
                       disable_tqdm=True)
    trainer = SFTTrainer(AutoModelForCausalLM.from_pretrained(f"{out}/model", dtype=torch.float32), config,
                         train_dataset=Dataset.from_list([{"messages": m} for m in talks]), processing_class=theirs)
    return trainer.train().metrics["train_samples_per_second"]


def bench_dpo(args):
    """Seconds a step of 32 pairs, forward, backward and AdamW: rows that share their prompt, beside TRL's DPOTrainer on the same
    weights and ids (pip install trl). Both have the reference's log-probs already."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    import dpo
    from finetune import open_model
    print(machine())
    tok, model = open_model(args.model, "cpu", torch.float32)
    settings, size = dpo.Args(), args.passes
    records = itertools.islice(dpo.read_preferences(args.data, "train", 400), 400)
    found = dpo.usable(tok, records, model.config.max_position_embeddings)[:32 * args.steps]
    pairs, objective = dpo.make_pairs(settings, found, ""), dpo.Objective()
    with tempfile.TemporaryDirectory() as out:
        tok.save(out)
        model.save_pretrained(out)
        theirs, words = AutoModelForCausalLM.from_pretrained(out), PreTrainedTokenizerFast.from_pretrained(out)
        words.pad_token = words.eos_token = "<|im_end|>"
        config = DPOConfig(out, report_to=[], use_cpu=True, bf16=False, max_length=None, gradient_checkpointing=False)
        trainer = DPOTrainer(theirs, AutoModelForCausalLM.from_pretrained(out), config, processing_class=words,
                             train_dataset=Dataset.from_dict({"prompt": ["a"] * 2, "chosen": ["b"] * 2, "rejected": ["c"] * 2}))
    trainer.precompute_ref_logps = True

    def ours(batch):
        batch = pairs.fill(batch, 0)
        for i in range(0, 32, size):
            objective(model, batch._make(t[i:i + size] for t in batch), settings).div(32).backward()

    def trl(batch):
        for i in range(0, 32, size):
            rows = [dict(prompt_ids=p, chosen_ids=a[0], rejected_ids=a[1], ref_chosen_logps=-50.0, ref_rejected_logps=-50.0)
                    for p, a, *_ in (found[r] for r in batch[i:i + size])]
            trainer.compute_loss(theirs, trainer.data_collator(rows)).mul(size / 32).backward()
    seconds = {}
    for name, step, net in 2 * (("dpo.py", ours, model.train()), ("DPOTrainer", trl, theirs.train())):  # the first round warms up
        optimizer, begin = torch.optim.AdamW(net.parameters(), 1e-6), time.perf_counter()
        for at in range(0, len(found) - 31, 32):
            step(range(at, at + 32))
            optimizer.step()
            optimizer.zero_grad()
        seconds[name] = (time.perf_counter() - begin) / (len(found) // 32)
    for name, took in seconds.items():
        print(f"{name:12s} {took:7.3f} s a step of 32 pairs")
    return [dict(name=name, seconds=took) for name, took in seconds.items()]


def bench_optimizers(args):
    """Does Muon with 0.7 of the steps reach what tuned AdamW reaches with all? Same model, text, batch, order, for each seed."""
    def final_loss(seed, steps, *flags):
        with tempfile.TemporaryDirectory() as out:
            shape = ["--dim", 96, "--mlp", 192, "--batch", 32, "--eval-every", 10 ** 6, "--save-every", 10 ** 6, "--sample", 1]
            command = [sys.executable, Path(__file__).with_name("train.py"), "--out", f"{out}/run", "--data", args.data, *shape,
                       "--seed", seed, "--steps", steps, *flags]
            done = subprocess.run([str(x) for x in command], capture_output=True, text=True)
            if done.returncode:
                raise UserError(f"train.py failed: {done.stderr.strip().splitlines()[-1]}")
            return next(r["val_loss"] for r in reversed(Metrics.read(f"{out}/run/metrics.jsonl")) if "val_loss" in r)

    print(machine())
    adamw = ["--optimizer", "adamw", "--warmup", args.steps // 20]
    tried = {}
    for schedule in ("wsd", "cosine"):  # AdamW gets the better schedule, and rates until the next one is worse
        for lr in (0.001, 0.002, 0.004, 0.008, 0.016):
            tried[schedule, lr] = final_loss(args.seeds[0], args.steps, *adamw, "--schedule", schedule, "--lr", lr)
            print(f"AdamW {schedule:6s} lr {lr:<6} seed {args.seeds[0]}: {tried[schedule, lr]:.4f}", flush=True)
            if lr > 0.001 and tried[schedule, lr] > tried[schedule, lr / 2]:
                break
    schedule, lr = min(tried, key=tried.get)
    rows = []
    for seed in args.seeds:
        first = final_loss(seed, args.steps, *adamw, "--schedule", schedule, "--lr", lr)
        second = final_loss(seed, round(args.steps * 0.7))
        rows.append(dict(seed=seed, adamw=first, muon=second))
        print(f"seed {seed}: AdamW ({schedule}, lr {lr}) {args.steps} steps {first:.4f}; Muon {round(args.steps * 0.7)} steps "
              f"{second:.4f}  {'reached' if second <= first else 'NOT reached'}", flush=True)
    return rows


def graph_seconds(function, draw, size):
    """Median seconds of function(*draw()), as one CUDA graph of calls on so many drawn inputs that no cache holds them."""
    inputs = [draw() for _ in range(min(max(2, 512_000_000 // size), 64))]
    for arguments in inputs:
        function(*arguments)  # compiles and tunes
    torch.cuda.synchronize()
    graph, times = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        for arguments in inputs:
            function(*arguments)
    for _ in range(25):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / len(inputs))
    return sorted(times[5:])[10]


def bf16(*shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def linear_cases(M, N, K):
    """{name: (bytes read and written, function, draw its arguments)}, what the others are measured against first."""
    def ints(*shape):
        return torch.randint(0, 256, shape, device="cuda", dtype=torch.uint8)
    rest, k = 2 * M * (N + K), kernels
    cases = {
        "cuBLAS bf16": (2 * N * K + rest, F.linear, lambda: (bf16(M, K), bf16(N, K))),
        "int8": (N * K + rest, k.linear, lambda: (bf16(M, K), k.Packed("int8", ints(N, K).view(torch.int8), bf16(N), N, K))),
        "int8 x int8": (N * K + rest, k.linear,
                        lambda: (bf16(M, K), k.Packed("int8x8", ints(N, K).view(torch.int8), bf16(N), N, K))),
        "int4 g128": (N * K // 2 + N * K // 64 + rest, k.linear,
                      lambda: (bf16(M, K), k.Packed("int4", ints(N, K // 2), bf16(N, K // 128), N, K, 128))),
        "nf4": (N * K // 2 + N * K // 16 + rest, k.linear,
                lambda: (bf16(M, K), k.Packed("nf4", ints(N * K // 2), torch.rand(N * K // 64, device="cuda"), N, K, 64))),
        "int4 g128, torch tinygemm": (N * K // 2 + N * K // 32 + rest, torch._weight_int4pack_mm, lambda: (
            bf16(M, K), torch.ops.aten._convert_weight_to_int4pack(ints(N, K // 2), 8), 128, bf16(K // 128, N, 2)))}
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
    pairs = {"rms_norm + residual": (8 * T * C, lambda: (bf16(T, C), bf16(C), 1e-5, bf16(T, C))),
             "rope": (4 * T * C, lambda: (bf16(T, C // 128, 128), angle.cos(), angle.sin())),
             "swiglu": (6 * T * 11_008, lambda: (bf16(T, 11_008), bf16(T, 11_008))),
             "cross_entropy": (2 * T * 32_000, lambda: (bf16(T, 32_000), ids))}
    return {name: {f"{name}, torch": (size, getattr(kernels, name.split()[0] + "_twin"), draw),
                   name: (size, getattr(kernels, name.split()[0]), draw)} for name, (size, draw) in pairs.items()}


def attention_cases(S, length, rows, KH, cache_dtype=torch.bfloat16, H=32, D=128, page=16):
    """As linear_cases: S sequences of `length` tokens with `rows` new ones each, beside torch's attention on unpaged keys."""
    def ints(values):
        return torch.tensor(values, dtype=torch.int32, device="cuda")

    def pages():
        cache = [torch.randint(-99, 99, (S * length // page, page, KH, D), device="cuda").to(cache_dtype) for _ in range(2)]
        scales = [torch.rand(S * length // page, page, KH, device="cuda") for _ in range(2 * (cache_dtype.itemsize == 1))]
        table = torch.randperm(S * length // page, device="cuda").int().view(S, -1)
        lengths, starts = ints([length] * S), ints(range(0, S * rows + 1, rows))
        return bf16(S * rows, H, D), *cache, table, lengths, starts, D ** -0.5, None, *scales

    def torch_attention(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=rows > 1, enable_gqa=True)

    def unpaged():
        return bf16(S, H, rows, D), bf16(S, KH, length, D), bf16(S, KH, length, D)
    values = 2 * S * length * KH * D
    return {"torch bf16, unpaged": (2 * values, torch_attention, unpaged),
            f"paged, {str(cache_dtype)[6:]}": (values * cache_dtype.itemsize, kernels.paged_attention, pages)}


def bench_kernels(args):
    """Every kernel at Llama-7B's shapes: microseconds, GB/s, share of the copy bandwidth, speed over the first of its group."""
    if not torch.cuda.is_available() or kernels.triton is None:
        raise UserError("bench.py kernels times the Triton kernels on a CUDA device, and here is none; "
                        "that they compute the right thing is shown without one by: python -m pytest tests/test_kernels.py")
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    copy = 2 * source.numel() / graph_seconds(torch.empty_like(source).copy_, lambda: (source,), source.numel())
    print(f"{machine()}\ncopy bandwidth {copy / 1e9:,.0f} GB/s (read + written)\n")
    groups = {f"linear {N} x {K}, {M} row{'s' * (M > 1)}": linear_cases(M, N, K)
              for N, K in ((4096, 4096), (12_288, 4096), (22_016, 4096), (4096, 11_008)) for M in (1, 16)}
    groups |= {f"{name}, 8192 rows": cases for name, cases in row_cases(8192, 4096).items()}
    groups |= {f"decode, {S} x 4096 tokens, {KH} key heads": attention_cases(S, 4096, 1, KH) for S in (1, 16) for KH in (32, 8)}
    groups["decode, 16 x 4096 tokens, 8 key heads, int8"] = attention_cases(16, 4096, 1, 8, torch.int8)
    groups["prefill 4096 tokens, 8 key heads"] = attention_cases(1, 4096, 4096, 8)
    rows = []
    for group, cases in groups.items():
        print(f"{group:48s} {'us':>9s} {'GB/s':>7s} {'of copy':>8s} {'speed-up':>9s}")
        first = None
        for name, (size, function, draw) in cases.items():
            with torch.inference_mode():
                seconds = graph_seconds(function, draw, size)
            first = first or seconds
            rows.append(dict(group=group, name=name, seconds=seconds, of_copy=size / seconds / copy, speed_up=first / seconds))
            print(f"    {name:44s} {seconds * 1e6:9.2f} {size / seconds / 1e9:7,.0f} {size / seconds / copy:8.1%} "
                  f"{first / seconds:8.2f}x", flush=True)
        torch.cuda.empty_cache()
    return rows


# The trainings that `bench.py tokenizer` times, each by `python -c` in an interpreter of its own: FILE VOCAB_SIZE OUT.
TRAIN_OURS = """
import sys; from tokenizer import Tokenizer
Tokenizer.train(files=[sys.argv[1]], vocab_size=int(sys.argv[2]), special_tokens=[]).save(sys.argv[3])
"""
TRAIN_HF = """
import os, sys; from bpe import PATTERNS; from tokenizers import Regex, Tokenizer, models, trainers, pre_tokenizers as p
tok = Tokenizer(models.BPE())
tok.pre_tokenizer = p.Sequence([p.Split(Regex(PATTERNS["gpt4"]), "isolated"), p.ByteLevel(False, use_regex=False)])
tok.train([sys.argv[1]], trainers.BpeTrainer(vocab_size=int(sys.argv[2]), show_progress=False,
                                             initial_alphabet=p.ByteLevel.alphabet()))
os.makedirs(sys.argv[3]); tok.save(sys.argv[3] + "/tokenizer.json")
"""


SHAPES = {"7b": Config("llama", 32000, 4096, 11008, 32, 32, 32, 128, 4096, tie_word_embeddings=False),     # Llama 2 7B's
          "1b": Config("llama", 32000, 2048, 5632, 22, 32, 4, 64, 2048, tie_word_embeddings=False),        # TinyLlama 1.1B's
          "tiny": Config("llama", 512, 128, 384, 2, 4, 2, 32, 128, tie_word_embeddings=False)}


def random_base(config, packed, runtime):
    """A model of random weights on the device, made one matrix at a time: in NF4 it is never there whole in 16 bits."""
    with torch.device("meta"):
        model = Transformer(config).to(runtime.dtype)
    for name, layer in lora.linears(model).items():
        if name != "lm_head":
            plain = torch.nn.Linear(layer.in_features, layer.out_features, False, runtime.device, runtime.dtype)
            model.set_submodule(name, NF4Linear.from_linear(plain) if packed else plain)
    for module in list(model.modules()):
        for name, p in list(module.named_parameters(recurse=False)):
            if p.is_meta:
                fresh = torch.empty(p.shape, dtype=p.dtype, device=runtime.device)
                setattr(module, name, torch.nn.Parameter(fresh.normal_(std=0.02) if p.ndim > 1 else fresh.fill_(1.0)))
    return model.to(runtime.device)


def memory(device, reset=False):
    """(bytes held now, most since the reset), of the GPU or of this process."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    if reset:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark falls to what is held now
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(status[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))


def train_adapter(config, packed, args, runtime):
    """Whole training steps of an adapter on a random base -> (bytes the base takes, most bytes held while training, tokens/s)."""
    model = random_base(config, packed, runtime)
    loaded = memory(runtime.device, reset=True)[0]
    lora.apply(model, args.r, 2 * args.r).train().recompute = True
    optimizer = MuonAdamW(model, adam_lr=1e-4, muon=False, eight_bit=True)
    optimizer.set_lr(1.0)
    ids, begin = torch.randint(config.vocab_size, (1, args.context), device=runtime.device), 0.0
    for step in range(args.steps + 1):
        optimizer.zero_grad()
        with runtime.autocast():
            loss = model(ids, targets=ids) / ids.numel()
        loss.backward()
        optimizer.step()
        loss.item()  # waits for the device
        begin = time.perf_counter() if step == 0 else begin  # the first step is to warm up
    return loaded, memory(runtime.device)[1], args.steps * args.context / max(time.perf_counter() - begin, 1e-9)


def bench_qlora(args):
    """QLoRA's memory and speed, estimated and measured, and, on a GPU, those of LoRA on a 16-bit base beside it."""
    print(machine())
    runtime, config, rows = resolve(args.device, args.dtype, "off"), SHAPES[args.shape], []
    for quant in ("nf4", "") if runtime.device.type == "cuda" or args.plain else ("nf4",):
        flags = lora.Args(r=args.r, quant=quant, optimizer="adamw8bit", recompute=True, context=args.context, batch=1)
        parts, trained, total = lora.estimate(config, flags, runtime, 1)
        print(f"adapter  {trained:,} of {total:,} parameters are trained: {trained / total:.2%}")
        print_estimate(parts, 1, flags, runtime)
        if args.estimate:
            continue
        loaded, peak, rate = train_adapter(config, bool(quant), args, runtime)
        rows.append(dict(shape=args.shape, base=quant or str(runtime.dtype), loaded=loaded, peak=peak, trained=trained / total,
                         estimated=sum(parts.values()), tokens_per_s=rate))
        print(f"measured {'QLoRA' if quant else 'LoRA'} {args.shape}: base {loaded / 2**30:.2f} GiB, peak {peak / 2**30:.2f}, so "
              f"{(peak - loaded) / 2**30:.2f} to train; {rate:,.0f} tokens/s", flush=True)
    return rows


def tree_memory(pid):
    """MB resident in a process and its descendants, from /proc; shared pages count once for each process."""
    total, family = 0, [pid]
    for p in family:
        try:
            total += int(Path(f"/proc/{p}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
            family += map(int, Path(f"/proc/{p}/task/{p}/children").read_text().split())
        except (FileNotFoundError, ProcessLookupError):
            pass
    return total


def time_training(code, *arguments):
    """(seconds, peak MB of all its processes) of one training in a fresh interpreter, start-up included."""
    begin, peak = time.perf_counter(), 0
    child = subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE,
                             cwd=Path(__file__).parent)
    while child.poll() is None:
        peak = max(peak, tree_memory(child.pid))
        time.sleep(0.02)
    if child.returncode:
        said = child.stderr.read().decode().strip().splitlines() or [f"exit status {child.returncode}"]
        raise UserError(f"training failed: {said[-1]}")
    return time.perf_counter() - begin, peak


def best_seconds(functions, repeats):
    """{name: function} -> {name: best seconds}, taking turns so that a busy machine is busy for all of them."""
    best = dict.fromkeys(functions, float("inf"))
    for _ in range(repeats):
        for name, function in functions.items():
            begin = time.perf_counter()
            function()
            best[name] = min(best[name], time.perf_counter() - begin)
    return best


def bench_encoding(file, tok, hf_json):
    """{encoder: MB/s}: the first 5 MB of a text as a string, and the whole file by ours in one process and in two."""
    import tiktoken
    import tokenizers
    tik = tiktoken.Encoding("same", pat_str=PATTERNS["gpt4"], mergeable_ranks=tok.vocab, special_tokens={})
    hf = tokenizers.Tokenizer.from_file(hf_json)
    text = Path(file).read_bytes()[:5_000_000].decode("utf-8", "ignore")
    if tok.encode(text) != tik.encode_ordinary(text):
        raise UserError("ours and tiktoken disagree on this text")
    seconds = best_seconds({"ours": lambda: tok.encode(text), "tiktoken": lambda: tik.encode_ordinary(text)}, 5)
    seconds |= best_seconds({"ours, plain Python": lambda: tok.encode_slowly(text), "HF": lambda: hf.encode(text)}, 1)
    whole = best_seconds({f"ours, file to array, {n} process{'es' * (n > 1)}": lambda n=n: tok.encode_corpus([file], n)
                          for n in (1, 2)}, 2)
    return ({name: len(text.encode()) / 1e6 / s for name, s in seconds.items()} |
            {name: os.path.getsize(file) / 1e6 / s for name, s in whole.items()})


def bench_tokenizer(args):
    """Train and encode with ours, HF tokenizers and tiktoken, one after the other on the same text."""
    if sys.platform != "linux":
        raise UserError(f"bench.py tokenizer reads memory from /proc, which only Linux has; this is {sys.platform}")
    size, rows = os.path.getsize(args.file) / 1e6, []
    print(f"{machine()}\n{args.file}, {size:.1f} MB, {args.vocab_size:,} ids, {len(os.sched_getaffinity(0))} CPUs\n")
    print("| train | s | MB/s | peak MB, all processes |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as out:
        for name, code in (("ours", TRAIN_OURS), ("HF", TRAIN_HF)):
            seconds, peak = time_training(code, os.path.abspath(args.file), str(args.vocab_size), f"{out}/{name}")
            rows.append(dict(train=name, seconds=seconds, peak_mb=peak))
            print(f"| {name} | {seconds:.2f} | {size / seconds:.1f} | {peak:.0f} |", flush=True)
        tok, theirs = Tokenizer.load(f"{out}/ours"), Tokenizer.load(f"{out}/HF")
        same = "the same" if (tok.vocab, tok.merges) == (theirs.vocab, theirs.merges) else "NOT THE SAME"
        print(f"\n{rows[1]['seconds'] / rows[0]['seconds']:.2f} times as fast as HF in "
              f"{rows[0]['peak_mb'] / rows[1]['peak_mb']:.2f} of its memory; {len(tok.merges):,} merges, {same}\n")
        speeds = bench_encoding(args.file, tok, f"{out}/HF/tokenizer.json")
    print("| encode | MB/s |\n|---|---|", *(f"| {name} | {speed:.2f} |" for name, speed in speeds.items()), sep="\n")
    one, two = list(speeds.values())[-2:]
    print(f"\nours / tiktoken {speeds['ours'] / speeds['tiktoken']:.2f}, two processes / one {two / one:.2f}")
    return rows + [dict(encode=name, mb_per_second=speed) for name, speed in speeds.items()]


LINEARS, BLOCKS = ((960, 576), (576, 576), (3072, 576), (576, 1536)), 30  # q+k+v, o, gate+up, down of a 135M Llama: 106M weights


def bench_linear(args):
    """Billions of weights a second through all linear layers of a 135M model, streamed from memory, by rows of activations; beside
    them llama.cpp's decode of the same shape (all 135M weights, attention included) where DIR has its GGUF files."""
    def layers(format):
        for N, K in LINEARS * BLOCKS:
            linear = torch.nn.Linear(K, N, bias=False)
            yield linear if format == "float32" else linear.bfloat16() if format == "bfloat16" else pack(linear, format, 64)

    rows = []
    with torch.inference_mode():
        for format in ("float32", "bfloat16", "int8", "int8-dynamic", "int4"):
            model, dtype = list(layers(format)), torch.bfloat16 if format == "bfloat16" else torch.float32
            for M in args.rows:
                inputs, best = {K: torch.randn(M, K, dtype=dtype) for K in (576, 1536)}, float("inf")
                for _ in range(args.repeats):
                    start = time.perf_counter()
                    for layer in model:
                        layer(inputs[layer.in_features])
                    best = min(best, time.perf_counter() - start)
                rate = BLOCKS * sum(N * K for N, K in LINEARS) / best / 1e9
                rows.append({"format": format, "rows": M, "gigaweights_per_s": rate})
                print(f"{format:20s} {M:4d} rows {rate:8.1f} Gw/s {M * rate * 2:8.0f} GFLOP/s", flush=True)
    for name in ("f16", "q8_0", "q4_0") if args.gguf else ():
        rate = llama_decode(Path(args.gguf, name + ".gguf"), torch.get_num_threads())
        rows.append({"format": f"llama.cpp {name}", "rows": 1, "gigaweights_per_s": rate})
        print(f"{'llama.cpp ' + name:20s}    1 rows {rate:8.1f} Gw/s (whole model)", flush=True)
    return rows


def llama_decode(path, threads, steps=24, repeats=4):
    """Billions of weights a second in llama.cpp's one-token decoding: the model's weights over the seconds of a token."""
    import llama_cpp as api
    quiet = api.llama_log_callback(lambda *_: None)
    api.llama_log_set(quiet, ctypes.c_void_p(0))
    model = api.llama_load_model_from_file(str(path).encode(), api.llama_model_default_params())
    settings = api.llama_context_default_params()
    settings.n_ctx, settings.n_threads, settings.n_threads_batch = 1024, threads, threads
    context, best = api.llama_new_context_with_model(model, settings), float("inf")
    for run in range(repeats):
        start = time.perf_counter()
        for step in range(steps):
            token = (api.llama_token * 1)(7 + step)
            if api.llama_decode(context, api.llama_batch_get_one(token, 1)):
                raise RuntimeError(f"llama.cpp could not decode {path}")
            api.llama_get_logits(context)
        best = min(best, (time.perf_counter() - start) / steps)
    weights = api.llama_model_n_params(model)
    api.llama_free(context)
    return weights / best / 1e9


# ------------------------------------------------------------------------------------------------------------- generation
def read_bandwidth(device):
    """Bytes per second at which the device reads memory: a sum over 1 GiB (CPU) or 4 GiB, more than any cache holds."""
    big = torch.ones((4 if device.type == "cuda" else 1) << 27, dtype=torch.int64, device=device)
    return big.numel() * 8 / timed(big.sum, SimpleNamespace(device=device), 3)


def quietly(function, *args, **options):
    """Call without what it prints."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        return function(*args, **options)


def engine_speed(args, model, quant=None, dtype="auto"):
    """-> (a round that measures {prefill, 1, 8: tok/s}, bytes that a decode step reads)"""
    engine = quietly(Engine, model, args.device, dtype, quant, kv_tokens=16 * 1024)

    def steps(batch, prompt, new):
        for _ in range(batch):
            ids = torch.randint(1, engine.vocab_size, (prompt,)).tolist()
            engine.submit(ids, Sampling(max_tokens=new + 1, temperature=0, ignore_eos=True))
        begin, times = time.perf_counter(), []
        while len(engine.scheduler.running) < batch or any(s.remaining > 1 for s in engine.scheduler.running):
            engine.step()
        prefill = batch * prompt / (time.perf_counter() - begin)
        while engine.has_work:
            begin = time.perf_counter()
            engine.step()
            times.append(time.perf_counter() - begin)
        return prefill, batch / sorted(times)[len(times) // 2]

    def measure():
        return {"prefill": steps(1, args.prompt, 2)[0], **{n: steps(n, 64, args.new)[1] for n in (1, 8)}}
    table, run = engine.model.embed_tokens.weight, engine.runner  # of the table one row is read, unless it is the head too
    unread = 4 * table.numel() if run.native else 0 if engine.config.tie_word_embeddings else table.nbytes
    return measure, run.weight_bytes - unread


def llama_speed(path, args):
    """llama.cpp through its Python binding, on the same number of threads."""
    import llama_cpp as L
    model = L.llama_load_model_from_file(str(path).encode(), L.llama_model_default_params())
    contexts = {}
    for count in (1, 8):
        p = L.llama_context_default_params()
        p.n_ctx, p.n_batch, p.n_seq_max = 1024 * count, 512, count
        p.n_threads = p.n_threads_batch = torch.get_num_threads()
        contexts[count] = L.llama_new_context_with_model(model, p)

    def run(context, ids, positions, sequences):
        batch = L.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, (token, position, sequence) in enumerate(zip(ids, positions, sequences)):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, position, 1, sequence
            batch.logits[i] = position == max(positions)
        begin = time.perf_counter()
        if L.llama_decode(context, batch):
            raise UserError(f"{path}: llama.cpp failed")
        L.llama_get_logits(context)
        L.llama_batch_free(batch)
        return time.perf_counter() - begin

    def measure():
        for context in contexts.values():
            L.llama_memory_clear(L.llama_get_memory(context), True)
        out: dict = {"prefill": args.prompt / run(contexts[1], range(1, args.prompt + 1), range(args.prompt), [0] * args.prompt)}
        L.llama_memory_clear(L.llama_get_memory(contexts[1]), True)
        for n, context in contexts.items():
            for s in range(n):
                run(context, range(1, 65), range(64), [s] * 64)
            times = sorted(run(context, [9 + i] * n, [64 + i] * n, range(n)) for i in range(args.new))
            out[n] = n / times[len(times) // 2]
        return out
    return measure


def transformers_speed(args, dtype):
    """transformers.generate, greedy, with its default cache: the time of many new tokens less that of one."""
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=DTYPES[dtype]).to(quietly(resolve, args.device).device)

    def seconds(rows, new):
        ids = torch.randint(1, model.config.vocab_size, (rows, args.prompt if rows == 1 and new == 1 else 64), device=model.device)
        begin = time.perf_counter()
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False,
                       pad_token_id=0)
        return time.perf_counter() - begin

    def measure():
        new = max(args.new // 2, 2)
        short = {n: min(seconds(n, 2) for _ in range(2)) for n in (1, 8)}
        return {"prefill": args.prompt / seconds(1, 1), **{n: n * (new - 2) / (seconds(n, new) - short[n]) for n in (1, 8)}}
    return measure


def bench_decode(args):
    """tok/s of a prompt being read and of one and eight texts being written, every program in turn, the median of the rounds."""
    print(machine())
    bandwidth = read_bandwidth(torch.device("cuda" if torch.cuda.is_available() and args.device in ("auto", "cuda") else "cpu"))
    print(f"memory reads {bandwidth / 1e9:.1f} GB/s; the roofline is that over the bytes of the weights\n")
    programs, size = {}, {}
    for name in args.formats:
        how = (name, "float32") if name in ("int8", "int4") else (None, name)
        programs[name], size[name] = engine_speed(args, args.model, *how)
    for path in args.gguf:
        name = Path(path).name
        programs[name], size[name] = engine_speed(args, path)
    programs |= {f"llama.cpp {Path(path).stem}": llama_speed(path, args) for path in args.gguf}
    programs |= {f"transformers {dtype}": transformers_speed(args, dtype) for dtype in args.transformers}
    rounds = {name: [] for name in programs}
    for _ in range(args.rounds):
        for name, measure in programs.items():
            rounds[name].append(measure())
    rows = []
    print(f"{'tok/s':26s} {f'prompt of {args.prompt}':>14s} {'1 text':>9s} {'8 texts':>9s} {'roofline':>9s}")
    for name, got in rounds.items():
        row = {k: sorted(g[k] for g in got)[len(got) // 2] for k in got[0]}
        row["roofline"] = bandwidth / size[name] if name in size else None
        rows.append({"program": name, **row, "best": {k: max(g[k] for g in got) for k in got[0]}})
        limit = f"{row['roofline']:9.0f}" if row["roofline"] else ""
        print(f"{name:26s} {row['prefill']:14.0f} {row[1]:9.1f} {row[8]:9.1f} {limit}", flush=True)
    return rows


def bench_throughput(args):
    """Requests of random lengths, all there at the start: output tok/s beside transformers' static batches of the same."""
    print(machine())
    engine = quietly(Engine, args.model, args.device, args.dtype, args.quant, kv_tokens=args.kv_tokens)
    draw = torch.Generator().manual_seed(0)
    sizes = torch.randint(args.low, args.high + 1, (args.requests, 2), generator=draw).tolist()
    prompts = [torch.randint(1, engine.vocab_size, (n,), generator=draw).tolist() for n, _ in sizes]
    total, rows = sum(new for _, new in sizes), []
    engine.generate(prompts[0], Sampling(max_tokens=4))
    begin = time.perf_counter()
    engine.generate(prompts, [Sampling(max_tokens=new, temperature=0, ignore_eos=True) for _, new in sizes])
    rows.append(("engine", time.perf_counter() - begin))
    for dtype in args.transformers:
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=DTYPES[dtype]).to(engine.runner.device)
        begin = time.perf_counter()
        for i in range(0, args.requests, args.batch):  # a static batch runs to its longest, padded on the left
            part = range(i, min(i + args.batch, args.requests))
            longest, new = (max(sizes[k][j] for k in part) for j in (0, 1))
            ids = torch.tensor([[0] * (longest - len(prompts[k])) + prompts[k] for k in part], device=model.device)
            model.generate(ids, attention_mask=(ids > 0).long(), max_new_tokens=new, min_new_tokens=new, do_sample=False,
                           pad_token_id=0)
        rows.append((f"transformers {dtype}, batches of {args.batch}", time.perf_counter() - begin))
    for name, seconds in rows:
        print(f"{name:44s} {total / seconds:10,.0f} output tok/s  {seconds:8.1f} s  {rows[-1][1] / seconds:6.2f}x the last")
    return [dict(program=name, seconds=seconds, tokens_per_s=total / seconds) for name, seconds in rows]


def bench_prefix(args):
    """64 requests with the same 1,000 tokens in front: the mean time to their first token, with and without the prefix cache."""
    print(machine())
    rows = []
    for cached in (False, True):
        engine = quietly(Engine, args.model, args.device, args.dtype, args.quant, kv_tokens=args.kv_tokens or 128 * 1024,
                         max_seqs=64, prefix_cache=cached)
        prefix, first = torch.arange(args.length).remainder(engine.vocab_size - 1).add(1).tolist(), {}
        begin = time.perf_counter()
        for i in range(args.requests):
            engine.submit([*prefix, i + 1, i + 2], Sampling(max_tokens=1, temperature=0, ignore_eos=True))
        while engine.has_work:
            first |= {d.request_id: time.perf_counter() - begin for d in engine.step() if d.token_ids}
        rows.append(dict(cached=cached, mean=sum(first.values()) / len(first), last=max(first.values())))
        print(f"prefix cache {'on ' if cached else 'off'}: first token after {rows[-1]['mean']:.2f} s on average, "
              f"{rows[-1]['last']:.2f} s at the latest", flush=True)
    print(f"{rows[0]['mean'] / rows[1]['mean']:.1f}x sooner on average")
    return rows


# ---- The server: a load generator that speaks HTTP by itself, so that its own cost is small and no client library's.
async def call(url, body, key="", kept=None):
    """POST one completion and read its stream -> {status, ttft, tpot, e2e in seconds, tokens, text}. kept: a list for the
    connection, if the next call may use it too."""
    begin, host, data = time.perf_counter(), url.removeprefix("http://").split("/")[0], b""
    reader, writer = kept.pop() if kept else await asyncio.open_connection(*host.split(":"), limit=1 << 24)
    content = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    writer.write((f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nAuthorization: Bearer {key}\r\n"
                  f"Content-Length: {len(content)}\r\n\r\n").encode() + content)
    row: dict = dict(status=0, ttft=None, tpot=None, e2e=None, tokens=0, text="")
    with contextlib.ExitStack() as stack:
        stack.callback(writer.close)
        head = await reader.readuntil(b"\r\n\r\n")
        row["status"] = int(head.split()[1])
        if row["status"] != 200:
            length = int(re.search(rb"content-length: (\d+)", head.lower())[1])
            return row | dict(text=(await reader.readexactly(length)).decode("utf-8", "replace"))
        while size := int(await reader.readline(), 16):  # chunks, and in them events
            data += (await reader.readexactly(size + 2))[:-2]
            *events, data = data.split(b"\n\n")
            for event in (json.loads(e[6:]) for e in events if e.startswith(b"data: {")):
                for choice in event.get("choices", ()):
                    text = choice["delta"].get("content", "") if "delta" in choice else choice["text"]
                    row["ttft"] = row["ttft"] or (time.perf_counter() - begin if text else None)
                    row["text"] += text
                row["tokens"] = event.get("usage", {}).get("completion_tokens", row["tokens"])
                row["status"] = 500 if "error" in event else row["status"]
        await reader.readline()
        if kept is not None:
            kept.append((reader, writer))
            stack.pop_all()
    row["e2e"] = time.perf_counter() - begin
    row["tpot"] = (row["e2e"] - row["ttft"]) / (row["tokens"] - 1) if row["ttft"] and row["tokens"] > 1 else None
    return row


async def load(url, bodies, concurrency, rate, key):
    """All bodies as requests -> (rows in their order, seconds). Closed loop: so many at once, each followed by the next on its
    connection. Open loop: arrivals at random, `rate` a second on average (Poisson), however far behind the server is."""
    places, rng, tasks, begin = asyncio.Semaphore(len(bodies) if rate else concurrency), random.Random(0), [], time.perf_counter()
    kept: list = []

    async def one(body):
        async with places:
            try:
                return await call(url, body, key, kept)
            except (OSError, asyncio.IncompleteReadError) as error:
                return dict(status=0, ttft=None, tpot=None, e2e=None, tokens=0, text=repr(error))
    for body in bodies:
        tasks.append(asyncio.ensure_future(one(body)))
        if rate:
            await asyncio.sleep(rng.expovariate(rate))
    rows, seconds = await asyncio.gather(*tasks), time.perf_counter() - begin
    for _, writer in kept:
        writer.close()
    return rows, seconds


def load_bodies(args):
    """The batch's lines, or prompts of random words."""
    if args.batch:
        return [json.loads(line) for line in Path(args.batch).read_text().splitlines() if line.strip()]
    rng, words = random.Random(1), "the of and a to in is you that it he was for on are as with his they at".split()
    return [dict(prompt=" ".join(rng.choices(words, k=args.prompt)), max_tokens=args.new, ignore_eos=True, seed=i)
            for i in range(args.requests)]


@contextlib.contextmanager
def served(folder, concurrency):
    """serve.py over a folder, in a process of its own -> its URL."""
    command = [sys.executable, Path(__file__).with_name("serve.py"), folder, "--port", "0", "--concurrency", str(concurrency)]
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
        engine, alone, best = quietly(Engine, args.model, max_seqs=seqs) if compare else None, float("inf"), None
        if compare:  # the first step of each size is slower
            asyncio.run(load(url, bodies[:args.concurrency], args.concurrency, None, args.key))
        for _ in range(args.rounds if compare else 1):
            now = asyncio.run(load(url, bodies, args.concurrency, args.rate, args.key))
            best = min(best or now, now, key=lambda result: result[1])
            if compare:
                begin = time.perf_counter()
                engine.generate([b["prompt"] for b in bodies],
                                [Sampling(max_tokens=args.new, ignore_eos=True, seed=b["seed"]) for b in bodies])
                alone = min(alone, time.perf_counter() - begin)
    rows, seconds = best
    if args.out:
        Path(args.out).write_text("".join(json.dumps({**b, "status": r["status"], "answer": r["text"]}, ensure_ascii=False) + "\n"
                                          for b, r in zip(bodies, rows)))
    good, made = [r for r in rows if r["status"] == 200], sum(r["tokens"] for r in rows)
    print(f"{machine()}\n{len(good)} of {len(rows)} requests answered in {seconds:.1f} s, {args.rate or args.concurrency} "
          f"{'a second' if args.rate else 'at once'}: {made / seconds:,.1f} tok/s")
    for name in ("ttft", "tpot", "e2e"):
        values = sorted(r[name] for r in good if r[name] is not None) or [float("nan")]
        print(f"{name.upper():5s}" + "".join(f"  p{p} {values[min(len(values) * p // 100, len(values) - 1)] * 1000:9.1f} ms"
                                             for p in (50, 90, 99)))
    met = [r for r in good if (r["ttft"] or 0) <= args.ttft and (r["tpot"] or 0) <= args.tpot]
    print(f"goodput {len(met) / seconds:.2f} requests/s with TTFT <= {args.ttft:g} s and TPOT <= {args.tpot:g} s")
    if compare:
        print(f"engine  {made / alone:,.1f} tok/s by itself: the server costs {1 - alone / seconds:.1%}")
    return [{k: v for k, v in r.items() if k != "text"} for r in rows]


# ------------------------------------------------------------------------------------------------------------ two measurements
def labelled(rows):
    """Rows of a --json file -> {their texts and how many of the same came before: {name: figure}}; rows without any text are
    many measurements of one thing, so their mean stands for them."""
    rows = [{k: v for k, v in row.items() if isinstance(v, (str, int, float))} for row in rows]
    if rows and not any(isinstance(v, str) for row in rows for v in row.values()):
        names = [k for k in rows[0] if all(k in row for row in rows)]
        return {(f"mean of {len(rows)}",): {k: sum(row[k] for row in rows) / len(rows) for k in names}}
    found, seen = {}, Counter()
    for row in rows:
        key = tuple(v for v in row.values() if isinstance(v, str))
        seen[key] += 1
        found[(*key, f"({seen[key]})") if seen[key] > 1 else key] = {k: v for k, v in row.items() if not isinstance(v, str)}
    return found


def bench_compare(args):
    """Every figure of two --json files beside its other, and their ratio; changes of over 5 % are marked."""
    files = [read_json(path) for path in (args.a, args.b)]
    if not all(isinstance(f, dict) and isinstance(rows := f.get("rows"), list) and {*map(type, rows)} <= {dict} for f in files):
        raise UserError("bench.py compare reads two files that another of its commands wrote with --json")
    for name, file in zip("AB", files):
        at = file.get("machine", "an unnamed machine")
        print(f"{name}  {', '.join(f'{k} {v}' for k, v in at.items() if v != '') if isinstance(at, dict) else at}")
    print(f"\n{'':56s} {'A':>12s} {'B':>12s} {'B/A':>7s}")
    before, after = (labelled(file["rows"]) for file in files)
    rows = []
    for key in before | after:
        if key not in before or key not in after:
            print(f"{' '.join(key):56s} only in {'A' if key in before else 'B'}")
            continue
        for name in [k for k in before[key] if k in after[key] and (before[key][k] != after[key][k] or before[key][k] % 1)]:
            a, b = before[key][name], after[key][name]
            ratio = b / a if a else float("nan")
            print(f"{' '.join(key) + ' ' + name:56s} {a:12,.4g} {b:12,.4g} {ratio:7.3f}{'  <' * (not 0.95 <= ratio <= 1.05)}")
            rows.append(dict(row=" ".join(key), figure=name, ratio=ratio))
    return rows


def training_commands(commands):
    times = commands.add_parser("train", help="time the training presets")
    times.add_argument("--presets", nargs="+", default=["shakespeare-char-fast", "shakespeare-char"])
    times.add_argument("--data", default="shakespeare")
    times.add_argument("--target", type=float, default=1.886, help="report the time to this validation loss [1.886]")
    times.add_argument("--nanogpt-seconds", type=float, help="wall time of nanoGPT's CPU recipe on this machine")
    times.add_argument("--nanogpt-loss", type=float, default=1.886, help="its loss over the whole validation split [1.886]")
    times.add_argument("--train-flags", nargs=argparse.REMAINDER, default=[], help="the rest goes to train.py")
    times.set_defaults(run=bench_train)
    optimizers = commands.add_parser("optimizers", help="sample efficiency of Muon against AdamW")
    optimizers.add_argument("--data", default="shakespeare")
    optimizers.add_argument("--steps", type=int, default=400, help="AdamW's steps [400]")
    optimizers.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    optimizers.set_defaults(run=bench_optimizers)
    pretrain = commands.add_parser("pretrain", help="throughput of whole training steps")
    pretrain.add_argument("--preset", default="125m", choices=train.PRESETS)
    pretrain.add_argument("--rows", type=int, default=32, help="rows a step [32]")
    pretrain.add_argument("--steps", type=int, default=20, help="timed steps [20]")
    pretrain.add_argument("--vocab-size", type=int, default=32_768)
    pretrain.add_argument("--device", default="auto")
    pretrain.add_argument("--dtype", default="auto")
    pretrain.set_defaults(run=bench_pretrain)
    qlora = commands.add_parser("qlora", help="memory and speed of training an adapter")
    qlora.add_argument("--shape", default="7b", choices=SHAPES)
    qlora.add_argument("--context", type=int, default=512, help="tokens in the one row of a step [512]")
    qlora.add_argument("--r", type=int, default=32, help="rank [32]")
    qlora.add_argument("--steps", type=int, default=3, help="timed steps after one to warm up [3]")
    qlora.add_argument("--plain", action="store_true", help="LoRA on the unquantized base too, on a CPU as well")
    qlora.add_argument("--estimate", action="store_true", help="only the estimate")
    qlora.add_argument("--device", default="auto")
    qlora.add_argument("--dtype", default="auto")
    qlora.set_defaults(run=bench_qlora)
    sft = commands.add_parser("sft", help="fine-tuning beside TRL")
    sft.add_argument("model", help="a base model's folder")
    sft.add_argument("--data", required=True, help="conversations: a file, or a folder with train.jsonl")
    sft.add_argument("--rows", type=int, default=16, help="packed rows a step [16]")
    sft.add_argument("--context", type=int, default=256)
    sft.add_argument("--steps", type=int, default=12, help="timed steps [12]")
    sft.add_argument("--alone", action="store_true", help="without TRL")
    sft.add_argument("--device", default="cpu")
    sft.set_defaults(run=bench_sft)
    dpo = commands.add_parser("dpo", help="preference tuning beside TRL")
    dpo.add_argument("model", help="a model folder")
    dpo.add_argument("--data", default="toybox", help="toybox, or a file of preferences [toybox]")
    dpo.add_argument("--passes", type=int, default=8, help="pairs a forward pass, 32 a step [8]")
    dpo.add_argument("--steps", type=int, default=4, help="timed steps at most [4]")
    dpo.set_defaults(run=bench_dpo)
    tokenizer = commands.add_parser("tokenizer", help="time our tokenizer beside HF's and tiktoken")
    tokenizer.add_argument("file", help="a text file, best of 10 MB or more")
    tokenizer.add_argument("--vocab-size", type=int, default=10_000)
    tokenizer.set_defaults(run=bench_tokenizer)


def running_commands(commands):
    gpu = commands.add_parser("kernels", help="time the Triton kernels on a GPU")
    gpu.set_defaults(run=bench_kernels)
    linear = commands.add_parser("linear", help="time one linear layer on the CPU in each quantized format")
    linear.add_argument("--rows", type=int, nargs="+", default=[1, 8], help="rows of activations [1 8]")
    linear.add_argument("--repeats", type=int, default=6)
    linear.add_argument("--gguf", help="a folder with f16, q8_0 and q4_0.gguf of the same shape, to time llama.cpp beside it")
    linear.set_defaults(run=bench_linear)
    decode = commands.add_parser("decode", help="tok/s of one text and of eight, beside llama.cpp and transformers")
    decode.add_argument("--formats", nargs="+", default=["float32", "float16", "int8", "int4"], help="of our weights")
    decode.add_argument("--gguf", nargs="*", default=[], help="the same model as GGUF files, for llama.cpp")
    decode.add_argument("--prompt", type=int, default=512)
    decode.add_argument("--new", type=int, default=32, help="tokens a text [32]")
    decode.add_argument("--rounds", type=int, default=3)
    decode.set_defaults(run=bench_decode)
    throughput = commands.add_parser("throughput", help="many requests of random lengths")
    throughput.add_argument("--batch", type=int, default=32, help="rows of transformers' batches [32]")
    throughput.add_argument("--low", type=int, default=16, help="shortest prompt and answer [16]")
    throughput.add_argument("--high", type=int, default=128, help="longest prompt and answer [128]")
    throughput.set_defaults(run=bench_throughput)
    prefix = commands.add_parser("prefix", help="time to the first token of requests that begin alike")
    prefix.add_argument("--length", type=int, default=1000, help="tokens they share [1000]")
    prefix.set_defaults(run=bench_prefix)
    for command in (decode, throughput, prefix):
        command.add_argument("model", help="a model folder")
        command.add_argument("--device", default="auto")
        command.add_argument("--transformers", nargs="*", default=[], help="its dtypes to measure too")
    for command in (throughput, prefix):
        command.add_argument("--requests", type=int, default=64)
        command.add_argument("--dtype", default="auto")
        command.add_argument("--quant", help="int8 or int4")
        command.add_argument("--kv-tokens", type=int)


def serving_command(commands):
    serving = commands.add_parser("serve", help="load on a server")
    serving.add_argument("model", help="a model folder, or the http:// address of a running server")
    serving.add_argument("--requests", type=int, default=64)
    serving.add_argument("--concurrency", type=int, default=16, help="requests at once [16]")
    serving.add_argument("--seqs", type=int, help="of which so many in the engine, the rest in its queue [--concurrency]")
    serving.add_argument("--rate", type=float, help="requests a second on average instead, whatever the server does")
    serving.add_argument("--prompt", type=int, default=32, help="words of a prompt [32]")
    serving.add_argument("--new", type=int, default=64, help="tokens of an answer [64]")
    serving.add_argument("--ttft", type=float, default=1.0, help="seconds to the first token that are good enough [1.0]")
    serving.add_argument("--tpot", type=float, default=0.1, help="seconds a token that are good enough [0.1]")
    serving.add_argument("--rounds", type=int, default=3, help="of which the best counts [3]")
    serving.add_argument("--batch", help="send this file's lines, each a request's body")
    serving.add_argument("--out", help="write the answers here")
    serving.add_argument("--key", default="", help="API key")
    serving.set_defaults(run=bench_serve)
    compare = commands.add_parser("compare", help="two files written with --json: the ratio of every figure")
    compare.add_argument("a", help="the earlier one")
    compare.add_argument("b", help="the later one")
    compare.set_defaults(run=bench_compare)


def main():
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for add in (training_commands, running_commands, serving_command):
        add(commands)
    for command in commands.choices.values():
        command.add_argument("--json", help="also write the rows to this file")
    args = parser.parse_args()
    rows = args.run(args)
    if args.json:
        Path(args.json).write_text(json.dumps({"machine": machine_facts(), "rows": rows}, indent=1))


if __name__ == "__main__":
    cli(main)
