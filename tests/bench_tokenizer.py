"""Our tokenizer beside HF tokenizers and tiktoken, on the same text, one after the other on the same machine.

    python tests/bench_tokenizer.py corpus.txt --vocab-size 32000
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tokenizer import PATTERNS, Tokenizer


def train_ours(file, vocab_size, out):
    Tokenizer.train(files=[file], vocab_size=vocab_size, special_tokens=[]).save(out)


def train_hf(file, vocab_size, out):
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers
    tok = tokenizers.Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(PATTERNS["gpt4"]), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.train([str(file)], trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False,
                                               initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    Path(out).mkdir(exist_ok=True)
    tok.save(f"{out}/tokenizer.json")


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


def in_a_process(task, file, vocab_size, out):
    """(seconds, peak MB of all its processes) of one training in a fresh interpreter, start-up included."""
    start, peak = time.perf_counter(), 0
    child = subprocess.Popen([sys.executable, __file__, str(file), "--vocab-size", str(vocab_size), "--task", task,
                              "--out", out], stderr=subprocess.DEVNULL)
    while child.poll() is None:
        peak = max(peak, tree_memory(child.pid))
        time.sleep(0.02)
    if child.returncode:
        raise RuntimeError(f"training with {task} failed")
    return time.perf_counter() - start, peak


def best_seconds(functions, repeats):
    """{name: function} -> {name: best seconds}, taking turns so that a busy machine is busy for all of them."""
    best = dict.fromkeys(functions, float("inf"))
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def bench_training(file, vocab_size, folder):
    size = os.path.getsize(file) / 1e6
    print(f"{file}, {size:.1f} MB, {vocab_size:,} ids, {len(os.sched_getaffinity(0))} CPUs\n")
    print("| train | s | MB/s | peak MB, all processes |\n|---|---|---|---|")
    figures = {}
    for task in ("ours", "hf"):
        seconds, peak = figures[task] = in_a_process(task, file, vocab_size, f"{folder}/{task}")
        print(f"| {task} | {seconds:.2f} | {size / seconds:.1f} | {peak:.0f} |", flush=True)
    learned = [json.loads(Path(f"{folder}/{task}/tokenizer.json").read_bytes())["model"]["merges"] for task in figures]
    merges = [[m if isinstance(m, str) else " ".join(m) for m in listed] for listed in learned]
    print(f"\n{figures['hf'][0] / figures['ours'][0]:.2f} times as fast as HF tokenizers in "
          f"{figures['ours'][1] / figures['hf'][1]:.2f} of its memory; {len(merges[0]):,} merges, "
          f"{'the same' if merges[0] == merges[1] else 'NOT THE SAME'}\n")


def bench_encoding(file, folder):
    import tiktoken
    import tokenizers
    tok = Tokenizer.load(f"{folder}/ours")
    reference = tiktoken.Encoding("same", pat_str=PATTERNS["gpt4"], mergeable_ranks=tok.vocab, special_tokens={})
    hf = tokenizers.Tokenizer.from_file(f"{folder}/hf/tokenizer.json")
    text = Path(file).read_bytes()[:5_000_000].decode("utf-8", "ignore")
    size, whole = len(text.encode()) / 1e6, os.path.getsize(file) / 1e6
    assert tok.encode(text) == reference.encode_ordinary(text)
    text_seconds = best_seconds({"tiktoken": lambda: reference.encode_ordinary(text),
                                 "ours": lambda: tok.encode(text)}, 5)
    text_seconds |= best_seconds({"ours, plain Python": lambda: tok.encode_slowly(text),
                                  "HF tokenizers": lambda: hf.encode(text)}, 1)
    file_seconds = best_seconds({"ours, file to array, 1 process": lambda: tok.encode_corpus([file], 1),
                                 "ours, file to array, 2 processes": lambda: tok.encode_corpus([file], 2)}, 2)
    print("| encode | MB/s |\n|---|---|")
    for name, seconds in text_seconds.items():
        print(f"| {name} | {size / seconds:.2f} |")
    for name, seconds in file_seconds.items():
        print(f"| {name} | {whole / seconds:.2f} |")
    one, two = file_seconds.values()
    print(f"\nours / tiktoken {text_seconds['tiktoken'] / text_seconds['ours']:.2f}, "
          f"two processes / one {one / two:.2f}")


def bench_tokenizer(file, vocab_size):
    """Print training and encoding speed of ours, HF tokenizers and tiktoken on one text file."""
    with tempfile.TemporaryDirectory() as folder:
        bench_training(file, vocab_size, folder)
        bench_encoding(file, folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--vocab-size", type=int, default=10_000)
    parser.add_argument("--task", choices=("ours", "hf"), help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        {"ours": train_ours, "hf": train_hf}[args.task](args.file, args.vocab_size, args.out)
    else:
        bench_tokenizer(args.file, args.vocab_size)
