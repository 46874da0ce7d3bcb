"""What a format costs and buys, for quant.py: text to measure on, perplexity, divergence.

This file lies below generate.py, and gets its classes Engine and Sampling as arguments.
"""

from collections import Counter
from fractions import Fraction
from pathlib import Path

import torch
import torch.nn.functional as F

from chat import examples, read_records
from common import UserError, file_rows, holds_records, write_json
from data import encode_job, ends_of, hold_out
from runtime import read_tensors
from training.corpora import documents


# --------------------------------------------------------------------------------- text to work on
def sample_rows(engine, sampling, count, length, seed):
    """Text of the model's own making, (count, length) int64, where no other is at hand.

    Each row begins as a document does, or with token 0 where nothing marks a document's beginning.
    """
    first, _ = ends_of(engine.tok)
    prompt = first or [0]
    samplings = [
        sampling(seed=seed + i, max_tokens=length - 1, ignore_eos=True) for i in range(count)
    ]
    outputs = engine.generate([prompt] * count, samplings)
    return torch.tensor([prompt + output.token_ids for output in outputs])


def read_rows(path, tok, count, length):
    """A text or a .jsonl of texts -> at most (count, length) int64.

    The rows are evenly spaced in its tokens and do not overlap.
    """
    ids = []
    first = next(file_rows(path), None) if holds_records(path) else None
    if first and not (isinstance(first.record, dict) and "text" in first.record):
        for conversation, _ in examples(tok, path, read_records(path), Counter()):
            ids += conversation
    else:
        parts = list(documents([Path(path)], ()))
        ids = encode_job((0, parts), tok).ids.tolist()
    if len(ids) < 2 * length:  # one to calibrate, one held out
        raise UserError(
            f"{path}: {len(ids):,} tokens are less than two rows of {length:,}; "
            "give more text or a smaller --length"
        )
    count = min(count, len(ids) // length)
    starts = torch.linspace(0, len(ids) - length, count, dtype=torch.float64).long().tolist()
    return torch.tensor([ids[start : start + length] for start in starts])


def calibration_and_held_out(args, model, tok, engine, sampling):
    """-> two tensors of rows (R, length), from --text, or else of the model's own making.

    One file serves both: of its rows, too few or not, the same share is held out, evenly spaced.
    """
    length = min(args.length, model.config.max_position_embeddings)
    total = args.samples + args.held_out_rows
    if not args.text:
        print(
            f"text     the model's own (--text FILE for other): {args.samples} rows of {length} "
            f"tokens to calibrate, {args.held_out_rows} held out"
        )
        whole = engine.of(model, tok, kv_tokens=max(8192, args.length))
        rows = sample_rows(whole, sampling, total, length, args.seed)
        return rows[: args.samples], rows[args.samples :]
    rows = read_rows(args.text, tok, total, length)
    share = Fraction(max(1, len(rows) * args.held_out_rows // total), len(rows))
    return tuple(map(torch.stack, hold_out(share, rows)))


# ----------------------------------------------------------------------------------------- figures
def score(model, original, rows):
    """Rows (R, T) -> (perplexity, the original's, mean KL(original || model) in nats a token)."""
    losses = torch.zeros(2, dtype=torch.float64)  # the model's and the original's
    divergence = 0.0
    # so many rows that their log-probs take 32 MiB, a few times over
    at_once = max(1, (1 << 23) // (rows.size(1) * model.config.vocab_size))
    for batch in rows.to(model.embed_tokens.weight.device).split(at_once):
        ids, targets = batch[:, :-1], batch[:, 1:]
        ours = model(ids).log_softmax(-1)  # (B, T-1, V)
        theirs = original(ids).log_softmax(-1)
        said = [log_p.gather(2, targets[:, :, None]) for log_p in (ours, theirs)]
        losses -= torch.stack(said).cpu().double().sum((1, 2, 3))
        divergence += F.kl_div(ours, theirs, reduction="sum", log_target=True).item()
    count = rows[:, 1:].numel()
    return *(losses / count).exp().tolist(), divergence / count


def stored_bytes(path):
    """Of the tensors in a model folder."""
    files = [read_tensors(file) for file in path.glob("*.safetensors")]
    return sum(tensor.nbytes for tensors in files for tensor in tensors.values())


# ---------------------------------------------------------------------------------------- reports
def compare_with_original(args, model, original, held_out):
    """Print what --out's format costs; OUT/quantization.json has the figures."""
    after, before, divergence = score(model, original, held_out)
    out = Path(args.out)
    figures = {
        "format": args.format,
        "bytes": stored_bytes(out),
        "original_bytes": stored_bytes(Path(args.model)),
        "perplexity": after,
        "original_perplexity": before,
        "kl": divergence,
    }
    write_json(out / "quantization.json", figures)
    print(
        f"{args.format}: {figures['bytes'] / 1e6:.2f} MB instead of "
        f"{figures['original_bytes'] / 1e6:.2f}, held-out perplexity {before:.4f} -> {after:.4f}, "
        f"KL {divergence:.5f}; {out}"
    )
