"""Every speed figure of the README, from one command each.

    python bench.py train                        # seconds and validation loss of the CPU presets, beside nanoGPT's recipe
    python bench.py train --presets shakespeare-char-10m --target 1.4697        # on a GPU
    python bench.py optimizers                   # Muon at 0.7 of the steps against AdamW with its best learning rate
    python bench.py pretrain --rows 32           # tokens/s and memory of the 125m preset: eager, compiled, recomputing
    python bench.py kernels                      # on a GPU: GB/s of each Triton kernel beside the card's copy and torch's own
    python bench.py tokenizer corpus.txt --vocab-size 32000     # ours beside HF tokenizers and tiktoken (on Linux)
"""
import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import kernels
import train
from common import Metrics, UserError, cli
from model import Transformer
from optim import MuonAdamW
from runtime import resolve
from tokenizer import PATTERNS, Tokenizer


def machine():
    """One line that says what the figures were measured on."""
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), "") if Path("/proc/cpuinfo").exists() else platform.processor()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{torch.get_num_threads()} threads of {cpu or platform.machine()}{gpu}, torch {torch.__version__}"


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
        "int8": (N * K + rest, k.int8_linear, lambda: (bf16(M, K), ints(N, K).view(torch.int8), bf16(N))),
        "int8 x int8": (N * K + rest, k.int8_dynamic_linear, lambda: (bf16(M, K), ints(N, K).view(torch.int8), bf16(N))),
        "int4 g128": (N * K // 2 + N * K // 64 + rest, k.int4_linear,
                      lambda: (bf16(M, K), ints(N, K // 2), bf16(N, K // 128), None, 128)),
        "nf4": (N * K // 2 + N * K // 16 + rest, k.nf4_linear,
                lambda: (bf16(M, K), ints(N * K // 2), torch.rand(N * K // 64, device="cuda"), 64, N, K)),
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
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
    tokenizer = commands.add_parser("tokenizer", help="time our tokenizer beside HF's and tiktoken")
    tokenizer.add_argument("file", help="a text file, best of 10 MB or more")
    tokenizer.add_argument("--vocab-size", type=int, default=10_000)
    tokenizer.set_defaults(run=bench_tokenizer)
    gpu = commands.add_parser("kernels", help="time the Triton kernels on a GPU")
    gpu.set_defaults(run=bench_kernels)
    for command in (times, optimizers, pretrain, tokenizer, gpu):
        command.add_argument("--json", help="also write the rows to this file")
    args = parser.parse_args()
    rows = args.run(args)
    if args.json:
        Path(args.json).write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1))


if __name__ == "__main__":
    cli(main)
