"""Smaller models: int8, int4, NF4, GPTQ and AWQ in place of the linear layers' weights, and a report that compares them.

python quant.py runs/demo --format gptq --group-size 64 --out runs/demo-gptq
python quant.py report runs/demo
"""

import copy
import functools
import math
import shutil
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from chat import examples, read_records, render
from common import UserError, cli, parse_flags, write_atomic, write_json
from data import ends_of
from kernels import NF4
from model import Transformer
from runtime import resolve
from tokenizer import Tokenizer

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
)


# -------------------------------------------------------------------------------- a model, in place
FORMATS = {
    "int8": "8 bits, one scale a row",
    "int8-dynamic": "int8 weights and activations",
    "int4": "4 bits, symmetric groups",
    "int4-asym": "4 bits, groups with a zero point",
    "nf4": "4-bit NormalFloat, as bitsandbytes",
}


def linears(model):
    """{name: nn.Linear} of all blocks, in the order the data meets them. UserError if they are packed already."""
    for name, layer in model.layers.named_modules():
        if isinstance(layer, QuantLinear):
            raise UserError(
                f"layers.{name} is quantized already ({layer.format}); start from the original model"
            )
    return {
        f"layers.{name}": layer
        for name, layer in model.layers.named_modules()
        if isinstance(layer, nn.Linear)
    }


def quantize(model, format, group_size=128):
    """Replace the linear layers of all blocks by packed ones, in place -> the model. format: one of FORMATS.

    group_size is int4's: neighbouring inputs that share a scale, -1 for a whole row; where it does not divide a layer's
    width, that layer's last group is shorter. Embeddings, norms and the head stay. UserError: NaN in a weight,
    a model that is quantized already.
    """
    if format not in FORMATS:
        raise UserError(f"format {format!r}: choose one of {', '.join(FORMATS)}")
    check_group(group_size)
    for name, linear in linears(model).items():
        check_finite(linear.weight, name)
        model.set_submodule(name, pack(linear, format, group_size))
    model.quantization = describe(model, format, group_size)
    return model


def check_group(group_size):
    if group_size != -1 and group_size < 1:
        raise UserError(
            f"group size {group_size}: use a positive number of columns, or -1 for whole rows"
        )


def describe(model, format, group_size, **extra):
    """The folder's quantization_config. Integers use GPTQ's layout whoever rounded them, NF4 bitsandbytes'."""
    if format == "nf4":
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": "float32",
            "bnb_4bit_quant_storage": "uint8",
        }
    config = {
        "quant_method": "gptq",
        "bits": 8 if format.startswith("int8") else 4,
        "sym": format != "int4-asym",
        "group_size": -1 if format.startswith("int8") else group_size,
        "desc_act": False,
        "lm_head": False,
        **extra,
    }
    # version 1 stores zero points less one, so a zero point of 0 has no place there
    lowest = min(
        (int(m.zero_points().min()) for m in model.modules() if isinstance(m, GroupLinear)),
        default=1,
    )
    config["checkpoint_format"] = "gptq" if lowest > 0 else "gptq_v2"
    return config | ({"activations": "int8"} if format == "int8-dynamic" else {})


# --------------------------------------------------------------------------------------------- GPTQ
@dataclass
class Recipe:
    """How GPTQ rounds. Frantar et al. 2023, with act-order and static groups from the authors' code."""

    bits: int = 4  # GPTQ and AWQ: 2 to 8
    group_size: int = 128  # neighbouring inputs that share a scale; -1: a whole row
    sym: bool = True  # GPTQ and AWQ: the zero point is the middle code (vLLM's fastest kernels ask for that)
    act_order: bool = False  # GPTQ: columns with the largest activations first
    static_groups: bool = False  # GPTQ: with act-order, groups of neighbouring columns, scales of the original weights
    clip: bool = (
        True  # GPTQ: scales that cost least, where the plain ones span the group's extremes
    )
    damp: float = 0.01  # GPTQ: share of the Hessian's mean diagonal added to it; raised by itself where needed
    rounding: str = "gptq"  # or rtn: every weight to its nearest code, nothing carried over
    awq: bool = False  # GPTQ: scale channels that matter up first (Lin et al. 2023)


def inverse_factor(H, damp):
    """Upper Cholesky factor U of (H + damp * mean(diag) * I)^-1 = U.T @ U, and the damping that it took.

    A Hessian of too few or too similar rows is not positive definite in float32: the damping grows tenfold until it is.
    """
    mean = (
        H.diagonal().mean().clamp(min=1e-6)
    )  # inputs that are all zero have nothing to say, but must not stop the rest
    while True:
        damped = H + torch.eye(len(H), device=H.device) * (damp * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and torch.isfinite(factor).all():
                return factor, damp
        damp = max(damp * 10, 1e-6)
        if damp > 1e6 or not torch.isfinite(mean):
            raise UserError(
                "GPTQ: the activations' second moments hold NaN or infinity; the model or its calibration is broken"
            )


def gptq_round(weight, H, recipe, block=128):
    """Round a matrix so that weight @ X changes least -> (codes uint8 (N, K), scales, zeros (N, G), order or None, damp).

    weight (N, K) float32; H (K, K) = X @ X.T over calibration inputs. Column by column, each column's rounding error is
    made good by those not yet rounded (algorithm 1): W[:, j:] -= err * U[i, j:] with err = (w_i - q_i) / U[i, i]. Updates
    reach later blocks once per block. A group's scale is taken when its first column comes up, from weights that already
    carry the errors of those before it. Inputs that never fired have no say and are rounded as they are.
    """
    (N, K), bits = weight.shape, recipe.bits
    group = K if recipe.group_size < 0 else min(recipe.group_size, K)
    dead = H.diagonal() == 0
    H = H + torch.diag(dead.to(H.dtype) * H.diagonal().mean().clamp(min=1e-6))
    order = H.diagonal().argsort(descending=True, stable=True) if recipe.act_order else None
    static = None
    if recipe.act_order and recipe.static_groups:
        static = grid(
            F.pad(weight, (0, -K % group)).view(N, -1, group), bits, recipe.sym
        )  # 2 x (N, G)
    if order is not None:
        weight, H = weight[:, order], H[order][:, order]
    U, damp = inverse_factor(H, recipe.damp)
    if (
        group < K
    ):  # a block holds whole groups, so that a group's weights are all up to date when it begins
        block = group * max(1, block // group)
    W, codes = (
        weight.t().contiguous(),
        torch.empty(K, N, dtype=torch.uint8, device=weight.device),
    )  # a column lies together
    scales, zeros, pivots, cost = [], [], U.diagonal().tolist(), U.diagonal() ** -2
    for start in range(0, K, block):
        end = min(start + block, K)
        now, factor, errors = (
            W[start:end],
            U[start:end, start:end].contiguous(),
            torch.empty_like(W[start:end]),
        )
        for i in range(end - start):
            if static:
                which = (order[start + i] // group).item()
                scale, zero = static[0][:, which], static[1][:, which]
            elif (start + i) % group == 0:
                columns = slice(start + i, start + i + group)
                scale, zero = grid(
                    W[columns].t(), bits, recipe.sym, cost[columns] if recipe.clip else None
                )  # (N,)
                scales.append(scale)
                zeros.append(zero)
            code = to_codes(now[i], scale, zero, bits)
            codes[start + i] = code
            errors[i] = (now[i] - (code - zero) * scale) / pivots[start + i]
            now[i + 1 :].addr_(factor[i, i + 1 :], errors[i], alpha=-1)
        W[end:].addmm_(U[start:end, end:].t(), errors, alpha=-1)
    codes = codes.t().contiguous()  # (K, N) -> (N, K)
    if static:
        return codes[:, order.argsort()], *static, None, damp
    return codes, torch.stack(scales, 1), torch.stack(zeros, 1), order, damp


def squared(matrix, H):
    """|matrix @ X|^2 of the inputs X with H = X @ X.T"""
    return ((matrix @ H) * matrix).sum().item()


def round_together(named, H, cross, recipe):
    """Round linears that read the same input as one matrix -> ({name: GroupLinear}, (what rounding changes in their outputs,
    squared; the same to nearest; the outputs' square; damping)). Their weights become the rounded ones.

    H = X @ X.T of the inputs X that they get now that the layers before are rounded; cross = X0 @ X.T with the original model's
    X0. First the weights are moved to where they make the original outputs of the new inputs: the least squares solution of
    V @ X = W @ X0, V = W + W @ (cross - H) @ H^-1.
    """
    weight = torch.cat([linear.weight.detach().float() for linear in named.values()])
    check_finite(weight, ", ".join(named))
    nearest = round_to_nearest(weight, recipe.bits, recipe.group_size, recipe.sym)
    rounded, order, damp, moved = nearest, None, 0.0, weight
    if recipe.rounding == "gptq":
        factor, _ = inverse_factor(H, recipe.damp)
        moved = weight + weight @ (cross - H) @ factor.T @ factor
        *rounded, order, damp = gptq_round(moved, H, recipe)

    def layer(rounded, order=None, rows=slice(None), bias=None):
        codes, scales, zeros = (t[rows] for t in rounded)
        return GroupLinear(codes, scales, zeros, recipe.bits, recipe.group_size, order, bias)

    figures = (
        squared(layer(rounded, order).dequantize() - moved, H),
        squared(layer(nearest).dequantize() - weight, H),
        squared(weight, H),
        damp,
    )
    out, row = {}, 0
    for name, linear in named.items():
        out[name] = layer(rounded, order, slice(row, row + linear.out_features), linear.bias)
        linear.weight.data = out[name].dequantize(linear.weight.dtype)
        row += linear.out_features
    return out, figures


class Calibration:
    """Hidden states of all calibration batches in front of one block, kept on `rest` while blocks are computed on `device`."""

    def __init__(self, model, batches, device):
        self.device, self.rest = torch.device(device), model.embed_tokens.weight.device
        self.states, self.extras = [], []
        for ids in batches:
            x, rope, masks = model.start(ids.to(self.rest))
            self.states.append(x)
            rope = rope and tuple(part.to(self.device) for part in rope)
            self.extras.append(
                (rope, *(mask if mask is None else mask.to(self.device) for mask in masks))
            )

    def each(self, function, states=None):
        """[function(state, rope, full mask, sliding mask) on the device, back at rest] over all batches."""
        return [
            function(state.to(self.device), *extra).to(self.rest)
            for state, extra in zip(states or self.states, self.extras)
        ]

    def second_moments(self, inputs, others=None):
        """Sum of y.T @ x over all batches' rows, x of `inputs` and y of `others` [inputs] -> (K, K) float32.

        With one list it is GPTQ's Hessian, up to a factor."""
        H = torch.zeros(inputs[0].size(-1), inputs[0].size(-1), device=self.device)
        for x, y in zip(inputs, others or inputs):
            x, y = (
                t.to(self.device).flatten(0, -2).float() for t in (x, y)
            )  # (B, T, K) -> (B*T, K)
            H.addmm_(y.t(), x)
        return H


def stages(block, calibration, sliding):
    """Walk a block's four products in order, yielding (names, their common input for all batches); the caller may change their
    weights before it asks for the next. A module's last projection stands aside while what it would read is computed, so
    every product runs once, on the outputs of those rounded before it ("true sequential")."""
    for path, last, norm in (
        ("self_attn", "o_proj", block.input_layernorm),
        ("mlp", "down_proj", block.post_attention_layernorm),
    ):
        module = block.get_submodule(path)
        projection, attends = module.get_submodule(last), module is block.self_attn
        first = [
            f"{path}.{n}"
            for n in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
            if hasattr(module, n)
        ]
        yield first, calibration.each(lambda x, *_: norm(x))
        setattr(module, last, nn.Identity())
        inputs = calibration.each(
            lambda x, rope, full, near: (
                module(norm(x), rope, near if sliding else full) if attends else module(norm(x))
            )
        )
        setattr(module, last, projection)
        yield [f"{path}.{last}"], inputs
        outputs = calibration.each(lambda a, *_: projection(a), inputs)
        calibration.states = [x + y for x, y in zip(calibration.states, outputs)]


def scale_channels(block, calibration, sliding, recipe):
    """AWQ (Lin et al. 2023): inputs with large activations get larger weights, so that rounding hurts them less, and what
    produces them is divided by the same factors; the block still computes the same function.

    The factors are rms(x)^share, share from 0 to 0.95 chosen by the change in the products' outputs (section 3.2).
    """
    before, gated = calibration.states, hasattr(block.mlp, "gate_proj")
    sources = {
        "self_attn.q_proj": block.input_layernorm,
        "mlp.gate_proj" if gated else "mlp.up_proj": block.post_attention_layernorm,
    }
    if gated:  # GPT-2 has a GELU in front of down_proj, and nothing can be folded through it
        sources["mlp.down_proj"] = block.mlp.up_proj
    for names, inputs in stages(block, calibration, sliding):
        if names[0] not in sources:
            continue  # o_proj: with grouped heads several of its inputs share one row of v_proj
        H, rows = calibration.second_moments(inputs), sum(x.numel() // x.size(-1) for x in inputs)
        rms = (H.diagonal() / rows).sqrt().clamp(min=1e-6)
        weight = torch.cat([block.get_submodule(name).weight.detach().float() for name in names])
        best, least = torch.ones_like(rms), torch.inf
        for share in range(20):
            factor = rms ** (share / 20)
            factor = factor / (factor.max() * factor.min()).sqrt()
            codes, scales, zeros = round_to_nearest(
                weight * factor, recipe.bits, recipe.group_size, recipe.sym
            )
            change = (
                GroupLinear(codes, scales, zeros, recipe.bits, recipe.group_size).dequantize()
                / factor
                - weight
            )
            if (error := squared(change, H)) < least:
                best, least = factor, error
        for name in names:
            linear = block.get_submodule(name)
            linear.weight.data = (linear.weight * best).to(linear.weight.dtype)
        for parameter in sources[names[0]].parameters():
            parameter.data = (parameter / best.view(-1, *[1] * (parameter.ndim - 1))).to(
                parameter.dtype
            )  # by rows
    calibration.states = before


@torch.no_grad()
def gptq(model, batches, bits=4, group_size=128, act_order=False, device=None, log=print, **recipe):
    """Quantize a model's linear layers by GPTQ, in place -> the model. batches: a list of (B, T) int64 token ids.

    Block after block: beside the model only one block's Hessians and the hidden states in front of it (with and without the
    rounding so far) are alive, and those and the rest of the model can stay on the CPU while `device` computes. Further keywords:
    fields of Recipe. `log` gets a line per block: the squared change of its products relative to their size.
    """
    recipe = Recipe(bits, group_size, act_order=act_order, **recipe)
    check_group(group_size)
    if not 2 <= bits <= 8 or recipe.rounding not in ("gptq", "rtn"):
        raise UserError(f"GPTQ to {bits} bits, rounding {recipe.rounding}: use 2 to 8, gptq or rtn")
    linears(model)  # refuses what is packed already
    now, then = (
        Calibration(model, batches, device or model.embed_tokens.weight.device) for _ in range(2)
    )
    for i, block in enumerate(model.layers):
        begin, figures, packed_layers, sliding = (
            time.time(),
            [],
            {},
            i in model.config.sliding_layers,
        )
        block.to(now.device)
        if recipe.awq:
            scale_channels(block, now, sliding, recipe)
        original = copy.deepcopy(block)
        # strict: the shorter of two generators would stop the other before its last step
        for (names, inputs), (_, originals) in zip(
            stages(block, now, sliding), stages(original, then, sliding), strict=True
        ):
            layers, figure = round_together(
                {name: block.get_submodule(name) for name in names},
                now.second_moments(inputs),
                now.second_moments(inputs, originals),
                recipe,
            )
            packed_layers |= layers
            figures.append(figure)
        for name, layer in packed_layers.items():
            block.set_submodule(name, layer)
        block.to(now.rest)
        ours, nearest, size, damps = zip(*figures)
        log(
            f"block {i:2d}: outputs change by {sum(ours) / sum(size):.2e}, to nearest {sum(nearest) / sum(size):.2e}"
            f"{f', damping raised to {max(damps):g}' if max(damps) > recipe.damp else ''}, {time.time() - begin:.1f} s"
        )
    model.quantization = describe(model, "gptq", group_size, sym=recipe.sym) | {
        "bits": bits,
        "desc_act": act_order and not recipe.static_groups,
        "static_groups": recipe.static_groups,
        "true_sequential": True,
        "damp_percent": recipe.damp,
    }
    return model


# --------------------------------------------------------------------------------- text and figures
def continuation(model, ids, steps, choose):
    """Yields what follows ids (B, T), one token (B, 1) after another, each as `choose` takes it from logits (B, V) float32."""
    from model import KVCache

    weight, room = model.embed_tokens.weight, ids.size(1) + steps
    caches = [
        KVCache(model.config, len(ids), weight.device, weight.dtype, room) for _ in model.layers
    ]
    for _ in range(steps):
        ids = choose(model.lm_head(model.hidden(ids, caches=caches)[:, -1]).float())
        yield ids


def sample_rows(model, count, length, seed):
    """Text of the model's own making, (count, length) int64: what to calibrate on and to score where no other is at hand."""
    config, device, generator = (
        model.config,
        model.embed_tokens.weight.device,
        torch.Generator().manual_seed(seed),
    )
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    first = next((i for i in (config.bos_token_id, *ends) if i is not None), None)
    begin = (
        torch.randint(config.vocab_size, (count, 1), generator=generator)
        if first is None
        else torch.full((count, 1), first)
    ).to(device)

    def choose(logits):
        return torch.multinomial(logits.softmax(-1).cpu(), 1, generator=generator).to(device)

    return torch.cat(
        [
            torch.cat((rows, *continuation(model, rows, length - 1, choose)), 1)
            for rows in begin.split(32)
        ]
    ).cpu()


def read_rows(path, tok, count, length):
    """A text, a .jsonl of texts or .json(l) of conversations -> at most (count, length) int64, evenly spaced rows of its tokens."""
    path, ids, (first, last) = Path(path), [], ends_of(tok)
    with open(path, "rb") as file:
        head = file.readline()
    if path.suffix in (".json", ".jsonl") and b'"text"' not in head:
        for one, _ in examples(tok, read_records(path), Counter()):
            ids += one
    else:
        from training.corpora import documents

        for document, _, _ in documents([path], ()):
            ids += [i for i in (first, *tok.encode(document.decode()), last) if i is not None]
    if len(ids) < length:
        raise UserError(
            f"{path}: {len(ids):,} tokens are less than one row of {length:,}; give more text or a smaller --length"
        )
    count = min(count, len(ids) // length)
    starts = torch.linspace(0, len(ids) - length, count).long()  # rows do not overlap
    return torch.stack([torch.tensor(ids[i : i + length]) for i in starts.tolist()])


def calibration_and_held_out(model, tok, args):
    """-> two tensors of rows (R, length). One file serves both: its even rows calibrate, its odd rows are held out."""
    length = min(args.length, model.config.max_position_embeddings)
    if not args.text:
        print(
            f"text     the model's own (--text FILE for other): {args.samples} rows of {length} tokens to calibrate, "
            f"{args.held_out_rows} held out"
        )
        return sample_rows(model, args.samples, length, args.seed), sample_rows(
            model, args.held_out_rows, length, args.seed + 1
        )
    if args.held_out:
        return read_rows(args.text, tok, args.samples, length), read_rows(
            args.held_out, tok, args.held_out_rows, length
        )
    rows = read_rows(args.text, tok, args.samples + args.held_out_rows, length)
    if len(rows) < 2:
        raise UserError(
            f"{args.text}: one row of {length} tokens cannot both calibrate and be held out; add --held-out FILE"
        )
    return rows[::2][: args.samples], rows[1::2][: args.held_out_rows]


def score(model, original, rows):
    """-> (perplexity on the rows, mean KL(original || model) in nats a token)."""
    loss = divergence = 0.0
    at_once = max(
        1, (1 << 23) // (rows.size(1) * model.config.vocab_size)
    )  # rows whose log-probs take 32 MiB, a few times over
    for batch in rows.to(model.embed_tokens.weight.device).split(at_once):
        ours = model(batch[:, :-1]).log_softmax(-1)  # (B, T, V)
        theirs = ours if original is model else original(batch[:, :-1]).log_softmax(-1)
        loss -= ours.gather(2, batch[:, 1:, None]).double().sum().item()
        divergence += F.kl_div(ours, theirs, reduction="sum", log_target=True).item()
    return math.exp(loss / rows[:, 1:].numel()), divergence / rows[:, 1:].numel()


def speed(model, prompt=256, new=32):
    """-> (prefill, decode) tokens per second of one sequence."""
    prompt = min(prompt, model.config.max_position_embeddings - new)
    for timed in (False, True):  # the first run converts layouts and warms up
        ids = torch.randint(
            model.config.vocab_size, (1, prompt), device=model.embed_tokens.weight.device
        )
        times = [time.perf_counter()]
        for token in continuation(
            model, ids, new + 1, lambda logits: logits.argmax(-1, keepdim=True)
        ):
            token.item()  # waits for a GPU
            times.append(time.perf_counter())
    return prompt / (times[1] - times[0]), new / (times[-1] - times[1])


def toybox_accuracy(model, tok, count):
    """Share of toybox's test questions that the model answers right; nan for a model without a chat template."""
    if not tok.chat_template or not count:
        return math.nan
    import finetune

    questions = finetune.read_questions(finetune.EvalArgs(examples=count))
    given = finetune.answers(
        model, tok, [render(tok, q.messages, True)[0] for q in questions], max_tokens=128
    )
    return sum(bool(finetune.is_right(q, text)) for q, (text, _) in zip(questions, given)) / len(
        questions
    )


def stored_bytes(model):
    from formats.hub import to_folder_names
    from formats.packed import packed_state

    """Bytes of the model's tensors as its folder holds them."""
    state = (
        packed_state(model)
        if model.quantization
        else to_folder_names(model.state_dict(), model.config)
    )
    return sum(t.numel() * t.element_size() for t in state.values())


# ------------------------------------------------------------------------------------- the commands
@dataclass
class Args(Recipe):
    model: str = ""  # the model folder, or "report" to compare formats
    folder: str = "-"  # report: the model folder
    format: str = (
        "gptq"  # int8, int8-dynamic, int4, int4-asym, nf4, gptq, awq, gguf-q8_0, gguf-q4_k_m, ...
    )
    out: str = ""  # where to write; report: [MODEL/quantization.md and .png]
    text: str = ""  # text, .jsonl or conversations to calibrate on [the model's own samples]
    held_out: str = ""  # the same to score on [every other row of --text]
    samples: int = 64  # rows to calibrate on
    held_out_rows: int = 32  # rows to score on
    length: int = 512  # tokens in a row, at most the model's context
    seed: int = 0  # of the samples
    questions: int = 280  # report: toybox questions put to a model that has a chat template
    formats: str = ""  # report: a comma-separated choice [all]
    device: str = "auto"  # auto, cpu, cuda, mps


def load(folder, device):
    """-> (a folder's model, in float32 on a CPU, where 16-bit products are slow; the type that the folder has)."""
    model = Transformer.from_pretrained(folder, device)
    if model.quantization:
        raise UserError(
            f"{folder} is quantized already ({model.quantization['quant_method']}); start from the original model"
        )
    dtype = model.embed_tokens.weight.dtype
    return cast(model, torch.float32 if device.type == "cpu" else dtype), dtype


def cast(model, dtype):
    """Embeddings, norms and biases to dtype, in place; packed weights and their scales stay -> the model."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def make(folder, format, rows, args, log=print):
    """A model folder's model in a format -> (model, bytes that it takes on disk). rows: calibration for GPTQ and AWQ."""
    if format.startswith("gguf-"):
        from formats import gguf

        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary) / "model.gguf"
            gguf.write(folder, path, format.removeprefix("gguf-"))
            return gguf.load(path, args.device)[0], path.stat().st_size
    model, dtype = load(folder, args.device)
    working = model.embed_tokens.weight.dtype
    if format in ("gptq", "awq"):
        recipe = {field.name: getattr(args, field.name) for field in fields(Recipe)}
        gptq(
            model,
            rows.split(8),
            log=log,
            **recipe | ({"awq": True, "rounding": "rtn"} if format == "awq" else {}),
        )
    elif format != "original":
        quantize(model, format, args.group_size)
    size = stored_bytes(cast(model, dtype))
    return cast(model, working), size


REPORT = ("original", *FORMATS, "gptq", "awq", "gguf-q8_0", "gguf-q4_0", "gguf-q4_k_m")
COLUMNS = (
    ("format", "{}"),
    ("bytes", "{:,}"),
    ("bits/weight", "{:.2f}"),
    ("perplexity", "{:.4f}"),
    ("KL to original", "{:.5f}"),
    ("toybox right", "{:.1%}"),
    ("prefill tok/s", "{:,.0f}"),
    ("decode tok/s", "{:,.1f}"),
)


@torch.inference_mode()
def report(args):
    """Every format on the same held-out text: a markdown table and a plot, written beside the model or to --out."""
    formats = args.formats.split(",") if args.formats else REPORT
    if unknown := [f for f in formats if f not in REPORT and not f.startswith("gguf-")]:
        raise UserError(f"--formats {','.join(unknown)}: choose from {', '.join(REPORT)}")
    (original, _), tok = load(args.folder, args.device), Tokenizer.load(args.folder)
    calibration, held_out = calibration_and_held_out(original, tok, args)
    from engine.native import install_products

    table = []
    for format in formats:
        model, size = make(args.folder, format, calibration, args, log=lambda line: None)
        install_products(model)
        perplexity, divergence = score(model, original, held_out)
        rates = (
            speed(model) if not format.startswith("gguf-") else (math.nan, math.nan)
        )  # those run in llama.cpp
        right = toybox_accuracy(model, tok, args.questions)
        table.append(
            (format, size, 8 * size / original.num_params(), perplexity, divergence, right, *rates)
        )
        print(
            "  ".join(
                f"{name} {pattern.format(v)}"
                for (name, pattern), v in zip(COLUMNS, table[-1])
                if v == v
            ),
            flush=True,
        )
    out = Path(args.out or args.folder)
    write_report(
        out,
        table,
        f"{args.folder}: {original.num_params():,} weights, groups of {args.group_size}, "
        f"{held_out.numel():,} held-out tokens",
    )
    divergences = {format: divergence for format, _, _, _, divergence, *_ in table}
    ours, nearest = (
        divergences.get("gptq", 0),
        divergences.get("int4" if args.sym else "int4-asym", math.inf),
    )
    if args.bits == 4 and ours > nearest:
        raise UserError(
            f"GPTQ's KL {ours:.5f} is worse than round-to-nearest's {nearest:.5f}: calibrate on more text "
            "(--samples, --text) or raise --damp"
        )


def write_report(out, table, title):
    from matplotlib.figure import Figure

    out.mkdir(parents=True, exist_ok=True)
    cells = [[name for name, _ in COLUMNS], ["---", *["---:"] * (len(COLUMNS) - 1)]]
    cells += [
        ["–" if v != v else pattern.format(v) for (_, pattern), v in zip(COLUMNS, row)]
        for row in table
    ]
    lines = [f"# Quantized: {title}", "", *[f"| {' | '.join(row)} |" for row in cells]]
    write_atomic(
        out / "quantization.md", lambda p: p.write_text("\n".join(lines) + "\n", encoding="utf-8")
    )
    figure = Figure(figsize=(8, 5), dpi=120)
    ax = figure.subplots()
    for format, size, _, _, divergence, *_ in table:
        if divergence > 0:
            ax.scatter(size / 1e6, divergence)
            ax.annotate(
                format,
                (size / 1e6, divergence),
                textcoords="offset points",
                xytext=(5, 4),
                fontsize=8,
            )
    ax.set(
        xlabel="size, MB", ylabel="KL to the original, nats per token", yscale="log", title=title
    )
    ax.grid(alpha=0.3, which="both")
    figure.tight_layout()
    write_atomic(out / "quantization.png", lambda p: figure.savefig(p, format="png"))
    print(f"wrote    {out / 'quantization.md'} and .png")


def read_args(argv=None):
    args = Args(**parse_flags(Args, __doc__, argv, positional=("model", "folder")))
    if args.model != "report":
        if args.format not in REPORT[1:] and not args.format.startswith("gguf-"):
            raise UserError(f"--format {args.format}: choose one of {', '.join(REPORT[1:])}, ...")
        if not args.out:
            raise UserError("--out: say where to write the quantized model")
    elif args.folder == "-":
        raise UserError("report: say which model folder")
    if args.samples < 1 or args.held_out_rows < 1 or args.length < 2:
        raise UserError(
            f"samples {args.samples} and held-out-rows {args.held_out_rows} must be >= 1, length {args.length} >= 2"
        )
    args.device = resolve(args.device, "float32", "off").device
    return args


@torch.inference_mode()
def main():
    args = read_args()
    if args.model == "report":
        return report(args)
    out = Path(args.out)
    if args.format.startswith("gguf-"):
        from formats import gguf

        out = out if out.suffix == ".gguf" else out.with_suffix(".gguf")
        kinds = gguf.write(args.model, out, args.format.removeprefix("gguf-"))
        return print(
            f"wrote    {out}: {out.stat().st_size / 1e6:.2f} MB,",
            ", ".join(f"{k} {n:,} bytes" for k, n in kinds.items()),
        )
    if out.resolve() == Path(args.model).resolve():
        raise UserError(f"--out {out} is the model itself; choose another folder")
    (original, dtype), tok = load(args.model, args.device), Tokenizer.load(args.model)
    calibration, held_out = calibration_and_held_out(original, tok, args)
    model, size = make(args.model, args.format, calibration, args)
    cast(model, dtype).save_pretrained(out)
    for file in filter(Path.is_file, (Path(args.model) / name for name in TOKENIZER_FILES)):
        shutil.copyfile(file, out / file.name)
    cast(model, original.embed_tokens.weight.dtype)
    before, (after, divergence) = (
        score(original, original, held_out)[0],
        score(model, original, held_out),
    )
    was = stored_bytes(cast(original, dtype))
    write_json(
        out / "quantization.json",
        {
            "format": args.format,
            "bytes": size,
            "original_bytes": was,
            "perplexity": after,
            "original_perplexity": before,
            "kl": divergence,
        },
    )
    print(
        f"{args.format}: {size / 1e6:.2f} MB instead of {was / 1e6:.2f}, held-out perplexity {before:.4f} -> {after:.4f}, "
        f"KL {divergence:.5f}; {out}"
    )


FEW_ROWS = (
    16  # on a CPU more rows than these are quicker unpacked and multiplied in float32 (NOTES.md)
)


CLIPS = [
    1 - i / 20 for i in range(11)
]  # ranges that GPTQ tries for a group's scale, as shares of the group's extent


NESTED_BLOCK = 256  # scales that share one scale under double quantization


@functools.lru_cache
@torch.inference_mode(False)  # made once, and then of use in training too
def nf4_pairs(device):
    """(256,) the two float32 values of every byte, the high half's first, taken for one float64: one look-up finds both."""
    value = torch.tensor(NF4, device=device)
    return (
        torch.stack((value.repeat_interleave(16), value.repeat(16)), 1)
        .view(torch.float64)[:, 0]
        .contiguous()
    )


@functools.lru_cache
@torch.inference_mode(False)
def dynamic_map(device="cpu", signed=True):
    """The 256 values of bitsandbytes' 8-bit "dynamic" type, sorted, float32 (Dettmers 2015, arXiv:1511.04561).

    Seven decades 10^-6..10^0; each has twice the fraction steps of the one below it, so small values keep their relative
    precision. The values are the midpoints between the steps; 0 and 1 are added. Unsigned: twice the steps in place of the sign.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        steps = torch.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1)
        middle = 10.0 ** (decade - 6) * (steps[:-1] + steps[1:]) / 2
        values += [*middle.tolist(), *(-middle).tolist()] if signed else middle.tolist()
    return torch.tensor(sorted(values), device=device)


def scaled_blocks(flat, block):
    """(n,) floats -> (each divided by its block's largest magnitude (n,) in [-1, 1], those magnitudes (blocks,))."""
    blocks = F.pad(flat, (0, -flat.numel() % block)).view(-1, block)  # (blocks, block)
    absmax = blocks.abs().amax(1)
    scaled = (
        blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]
    )  # times the reciprocal, as bitsandbytes: the bits differ
    return scaled.clamp(-1, 1).view(-1)[: flat.numel()], absmax


def nearest(x, values):
    """Index of the nearest of the sorted `values` for each x -> uint8; of two equally near the lower one."""
    return torch.bucketize(x, (values[1:] + values[:-1]) / 2, out_int32=True).to(torch.uint8)


def dynamic_quantize(flat, block=NESTED_BLOCK):
    """(n,) float32 -> (uint8 indices into `dynamic_map` (n,), float32 scale of each block): bitsandbytes' blockwise 8 bits.

    Its CPU code looks values up in a table of 65,536 steps over [-1, 1] and gives a block of zeros the code 0.
    """
    scaled, absmax = scaled_blocks(flat, block)
    step = (
        ((scaled + 1).double() * 0.5 * 65535 + 0.5).float().int()
    )  # rounded once, as a fused multiply-add does
    codes = nearest(-1 + 2.0 * step / 65535, dynamic_map(flat.device))
    return codes * (absmax > 0).repeat_interleave(block)[: flat.numel()], absmax


def nf4_quantize(weight, block=64, double=True):
    """(N, K) floats -> dict of tensors as bitsandbytes makes them on the CPU, bit for bit.

    "packed" uint8 (N*K/2,), two codes a byte, the earlier one in the high half; "absmax": each block's largest magnitude,
    float32 (blocks,), or with `double` quantized again: uint8, with "nested_absmax" float32 (blocks/256,) and "offset".
    """
    check_finite(weight)
    if weight.numel() % 2:
        raise UserError(
            f"NF4 holds two weights a byte; {tuple(weight.shape)} is an odd number of them"
        )
    flat = weight.detach().reshape(-1).float()
    scaled, absmax = scaled_blocks(flat, block)
    codes = nearest(scaled, torch.tensor(NF4, device=flat.device))
    out = {"packed": codes[::2] << 4 | codes[1::2], "absmax": absmax}
    if double:  # QLoRA section 3: the scales are all positive, so their mean is taken off before they become signed 8 bits
        out["offset"] = absmax.mean()
        out["absmax"], out["nested_absmax"] = dynamic_quantize(absmax - out["offset"])
    return out


def nf4_absmax(state):
    """The blocks' scales in float32, double quantization undone."""
    if "nested_absmax" not in state:
        return state["absmax"]
    values = dynamic_map(state["absmax"].device)[state["absmax"].int()]
    scale = state["nested_absmax"].repeat_interleave(NESTED_BLOCK)[: values.numel()]
    return values * scale + state["offset"]


def nf4_dequantize(state, shape, block=64, dtype=torch.float32):
    """The inverse of `nf4_quantize` -> (N, K) of dtype."""
    flat = (
        nf4_pairs(state["packed"].device).index_select(0, state["packed"].int()).view(torch.float32)
    )
    blocks = (
        F.pad(flat, (0, -flat.numel() % block)).view(-1, block).mul_(nf4_absmax(state)[:, None])
    )
    return blocks.view(-1)[: flat.numel()].view(shape).to(dtype)


def grid(groups, bits, sym, cost=None):
    """(..., g) floats -> (scale, zero) (...) float32 of the integers 0..2^bits-1 that span each group's values and 0.

    w = scale * (code - zero). Symmetric: zero is the middle code. The scale is one that float16, the folder's type, holds.
    With `cost` (g,), what a squared error in each column costs, narrower ranges that cut the group's extremes are tried too.
    """
    if cost is not None:
        best, least = (torch.ones_like(groups[..., 0]),) * 2, torch.inf
        for share in CLIPS:
            scale, zero = grid(groups * share, bits, sym)
            rounded = (
                to_codes(groups, scale[..., None], zero[..., None], bits) - zero[..., None]
            ) * scale[..., None]
            error = (rounded - groups) ** 2 @ cost
            best = [torch.where(error < least, new, old) for new, old in zip((scale, zero), best)]
            least = error.clamp(max=least)
        return best
    top = 2**bits - 1
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if sym:  # 8 bits use -127..127, so that the largest magnitude is a code; fewer bits cannot spare that code
        high = torch.maximum(-low, high)
        scale = high / (127 if bits == 8 else top / 2)
    else:
        scale = (high - low) / top
    scale = scale.half().float()
    if torch.isinf(scale).any():
        raise UserError(
            f"weights up to {groups.abs().max():.3g} need a scale beyond float16's 65,504: rescale the model first"
        )
    scale = torch.where(scale == 0, 1, scale)  # a group of zeros
    middle = torch.full_like(scale, 2 ** (bits - 1))
    return scale, middle if sym else torch.where(
        low == high, middle, (-low / scale).round().clamp(0, top)
    )


def to_codes(weight, scale, zero, bits):
    """The nearest codes, as floats."""
    return (weight / scale + zero).round_().clamp_(0, 2**bits - 1)


def round_to_nearest(weight, bits, group, sym):
    """(N, K) -> codes uint8 (N, K), scales and zeros float32 (N, G). group -1: the whole row; K need not be a multiple."""
    check_finite(weight)
    N, K = weight.shape
    group = K if group < 0 else group
    groups = F.pad(weight.detach().float(), (0, -K % group)).view(N, -1, group)  # (N, G, group)
    scale, zero = grid(groups, bits, sym)
    return (
        to_codes(groups, scale[..., None], zero[..., None], bits)
        .to(torch.uint8)
        .view(N, -1)[:, :K],
        scale,
        zero,
    )


def check_finite(weight, name="a weight"):
    """Raises UserError where there is NaN or infinity: its block's scale, and with it the whole block, would be too."""
    if not torch.isfinite(weight).all():
        bad = (~torch.isfinite(weight)).sum().item()
        raise UserError(
            f"{name}: {bad:,} of {weight.numel():,} values are NaN or infinite; the model is damaged"
        )


class FrozenProduct(torch.autograd.Function):
    """x @ W.T with a gradient for x alone. Only the packed weight stays alive for backward, which unpacks it again (QLoRA)."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return layer.product(x)

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.layer.dequantize(grad.dtype), None


class QuantLinear(nn.Module):
    """A linear layer with packed weights: x (..., K) -> (..., N). `dequantize` and `plain` define it; `product` is the quickest way
    that the device has to nearly the same numbers. Buffers named in `by_row` have the output rows first, so layers can be fused."""

    by_row: tuple = ()
    # (M, K) float32 -> (M, N) float32 without the bias, where engine.native.install_products set it
    fast_product: Any = None

    def __init__(self, shape, bias=None):
        super().__init__()
        self.out_features, self.in_features = shape
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def dequantize(self, dtype=torch.float32):
        """-> (N, K) of dtype, the weights that this layer stands for."""
        raise NotImplementedError

    def plain(self, rows):
        """The twin: unpack, then multiply. (M, K) -> (M, N)."""
        return F.linear(
            rows,
            self.dequantize(rows.dtype),
            None if self.bias is None else self.bias.to(rows.dtype),
        )

    def on_gpu(self, rows):
        """The same by a kernel, or None."""

    def on_cpu(self, rows):
        """The same of float32 by forward.cpp, without the bias, or None."""

    def product(self, x):
        """x (..., K) -> (..., N) with the bias, in x's dtype."""
        rows, y = x.reshape(-1, self.in_features), None
        if x.is_cuda:
            y = self.on_gpu(rows)
        elif (
            not torch.compiler.is_compiling()
            and (y := self.on_cpu(rows.float())) is not None
            and self.bias is not None
        ):
            y += self.bias
        y = self.plain(rows) if y is None else y
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def forward(self, x):
        return FrozenProduct.apply(x, self) if x.requires_grad else self.product(x)

    def in_cpp(self, rows):
        """(M, K) float32, each group rounded to 8 bits -> (M, N), or None without a fast product."""
        return self.fast_product(rows) if self.fast_product else None


def fuse(layers):
    """Layers of one class that read the same input (q, k, v; gate and up) -> one layer whose rows are theirs, in order."""
    first, N, bias = layers[0], sum(layer.out_features for layer in layers), None
    orders = [
        torch.arange(first.in_features)
        if getattr(layer, "order", None) is None
        else layer.order.cpu()
        for layer in layers
    ]
    if any(
        (type(layer), layer.format) != (type(first), first.format)
        or not torch.equal(order, orders[0])
        for layer, order in zip(layers, orders)
    ):
        raise UserError("layers of different formats or column orders cannot be one")
    if any(layer.bias is not None for layer in layers):
        device = next(first.buffers()).device
        bias = torch.cat(
            [
                torch.zeros(layer.out_features, device=device) if layer.bias is None else layer.bias
                for layer in layers
            ]
        )
    if isinstance(first, NF4Linear):  # their shared scales need not end where a layer does
        state = {
            "packed": torch.cat([layer.packed for layer in layers]),
            "absmax": torch.cat([nf4_absmax(layer._buffers) for layer in layers]),
        }
        return NF4Linear(state, (N, first.in_features), bias, first.block)
    fused = copy.copy(first)
    fused._buffers, fused._parameters = (
        dict(first._buffers),
        {"bias": None if bias is None else nn.Parameter(bias, False)},
    )
    fused.out_features, fused.fast_product = N, None
    for name in first.by_row:
        parts = [getattr(layer, name) for layer in layers]
        if name == "zeros" and any(part is not None for part in parts):
            parts = [layer.zero_points() for layer in layers]
        fused._buffers[name] = None if parts[0] is None else torch.cat(parts)
    return fused


def int8_rows(x):
    """(M, K) floats -> (the rows rounded to integers of 8 bits, scale (M, 1)): each by its own scale, so that none depends on its
    neighbours."""
    scale = (
        torch.linalg.vector_norm(x, torch.inf, -1, keepdim=True).clamp(min=1e-30) / 127
    )  # the largest magnitude is 127
    return (x / scale).round(), scale


class Int8Linear(QuantLinear):
    """int8 weights with one float scale an output row: w = scale * code, code in -127..127 [format "int8"].

    With `dynamic` the activations are rounded to int8 too, each row of x by its own largest magnitude ["int8-dynamic"].
    """

    by_row = ("codes", "scale")

    def __init__(self, codes, scales, bias=None, dynamic=False):
        """codes uint8 (N, K) whose zero point is 128, scales (N, 1)"""
        super().__init__(codes.shape, bias)
        self.dynamic, self.format = dynamic, "int8-dynamic" if dynamic else "int8"
        self.register_buffer("codes", (codes ^ 128).view(torch.int8))  # 0..255 -> -128..127
        self.register_buffer("scale", scales[:, 0].float())

    @classmethod
    def from_linear(cls, linear, dynamic=False):
        codes, scales, _ = round_to_nearest(linear.weight, 8, -1, sym=True)
        return cls(codes, scales, linear.bias, dynamic)

    def dequantize(self, dtype=torch.float32):
        return (self.codes * self.scale[:, None]).to(dtype)

    def groups(self):
        """As forward.cpp wants it: codes uint8 (N, K), scale and zero (N, G), inputs a group, their order or None, bits."""
        scale = self.scale[:, None]
        return (
            self.codes.view(torch.uint8) ^ 128,
            scale,
            torch.full_like(scale, 128),
            self.in_features,
            None,
            8,
        )

    def plain(self, rows):
        if self.dynamic:
            codes, scale = int8_rows(rows.float())
            rows = (codes * scale).to(rows.dtype)
        return super().plain(rows)

    def on_gpu(self, rows):
        from kernels import Packed, linear

        return linear(
            rows,
            Packed("int8x8" if self.dynamic else "int8", self.codes, self.scale, *self.codes.shape),
            self.bias,
        )

    def on_cpu(self, rows):
        if self.dynamic:
            return self.in_cpp(rows)
        if len(rows) > FEW_ROWS:
            return None
        codes, scale = int8_rows(
            rows
        )  # what 8 bits lose of a row is a second one: two products with 8 bits make one with 16
        y = self.in_cpp(torch.cat((codes * scale, rows - codes * scale)))
        return y if y is None else torch.add(*y.chunk(2))


class GroupLinear(QuantLinear):
    """2 to 8 bits, one scale and zero point for each `group` neighbouring inputs of a row: w = scale * (code - zero).

    packed  uint8 (N, ceil(K/2)), two codes a byte, the earlier in the low half, for 2 to 4 bits; else (N, K)
    scales  float16 (N, G), G = ceil(K/group): the last group may be shorter
    zeros   uint8 (N, G), or None where all are 8 (symmetric int4)
    order   int64 (K,) or None: packed column j is input order[j] (GPTQ's act-order keeps a group's columns together)
    """

    by_row = ("packed", "scales", "zeros")

    def __init__(self, codes, scales, zeros, bits, group, order=None, bias=None):
        """codes uint8 (N, K) in the order of `order`."""
        super().__init__(codes.shape, bias)
        self.bits, self.group, self.format = (
            bits,
            group if group > 0 else self.in_features,
            f"int{bits}",
        )
        if bits <= 4:
            codes = F.pad(codes, (0, codes.size(1) % 2))
            codes = codes[:, ::2] | codes[:, 1::2] << 4
        self.register_buffer("packed", codes)
        self.register_buffer("scales", scales.half())
        self.register_buffer(
            "zeros", None if bits == 4 and (zeros == 8).all() else zeros.to(torch.uint8)
        )
        self.register_buffer("order", order)

    @classmethod
    def from_linear(cls, linear, bits=4, group=128, sym=True):
        codes, scales, zeros = round_to_nearest(linear.weight, bits, group, sym)
        return cls(codes, scales, zeros, bits, group, None, linear.bias)

    def codes(self):
        """-> uint8 (N, K), columns still in `order`."""
        if self.bits > 4:
            return self.packed
        return torch.stack((self.packed & 15, self.packed >> 4), -1).flatten(1)[
            :, : self.in_features
        ]  # (N, K/2, 2) -> (N, K)

    def groups(self):
        return self.codes(), self.scales, self.zero_points(), self.group, self.order, self.bits

    def zero_points(self):
        return (
            torch.full_like(self.scales, 8, dtype=torch.uint8) if self.zeros is None else self.zeros
        )

    def dequantize(self, dtype=torch.float32):
        codes, (N, K) = self.codes(), (self.out_features, self.in_features)
        groups = F.pad(codes, (0, -K % self.group)).view(N, -1, self.group).float()  # (N, G, group)
        zero = 8 if self.zeros is None else self.zeros[:, :, None].float()
        weight = groups.sub_(zero).mul_(self.scales[:, :, None]).view(N, -1)[:, :K]
        return (weight if self.order is None else weight[:, self.order.argsort()]).to(dtype)

    def on_gpu(self, rows):
        if self.bits > 4:
            return None
        from kernels import Packed, linear

        rows, shape = (
            rows if self.order is None else rows[:, self.order],
            (self.out_features, self.in_features),
        )
        return linear(
            rows,
            Packed("int4", self.packed, self.scales, *shape, self.group, self.zeros),
            self.bias,
        )

    def on_cpu(self, rows):
        return self.in_cpp(rows) if len(rows) <= FEW_ROWS else None


class NF4Linear(QuantLinear):
    """4-bit NormalFloat weights in bitsandbytes' layout; the tensors of `nf4_quantize` are buffers of the same names."""

    format = "nf4"

    def __init__(self, state, shape, bias=None, block=64):
        """state: what `nf4_quantize` makes of weights of that shape"""
        super().__init__(shape, bias)
        self.block = block
        for name, tensor in state.items():
            self.register_buffer(name, tensor)

    @classmethod
    def from_linear(cls, linear, block=64, double=True):
        return cls(
            nf4_quantize(linear.weight, block, double), linear.weight.shape, linear.bias, block
        )

    def for_gpu(self):
        from kernels import Packed

        return Packed(
            "nf4",
            self.packed,
            nf4_absmax(self._buffers),
            self.out_features,
            self.in_features,
            self.block,
        )

    def dequantize(self, dtype=torch.float32):
        if self.packed.is_cuda:
            import kernels

            return kernels.dequantize(self.for_gpu(), dtype)
        return nf4_dequantize(
            self._buffers, (self.out_features, self.in_features), self.block, dtype
        )

    def on_gpu(self, rows):
        from kernels import linear

        return linear(rows, self.for_gpu(), self.bias)


def pack(linear, format, group_size):
    """nn.Linear -> one of quant.FORMATS."""
    if format in ("int8", "int8-dynamic"):
        return Int8Linear.from_linear(linear, dynamic=format == "int8-dynamic")
    if format == "nf4":
        return NF4Linear.from_linear(linear)
    return GroupLinear.from_linear(linear, 4, group_size, sym=format == "int4")


def in_kind(linear, kind):
    """A layer still in floats -> the format that --quant names, "int8" or "int4"; any other layer as it is."""
    if type(linear) is not nn.Linear or kind not in ("int8", "int4"):
        return linear
    kind = "int8-dynamic" if kind == "int8" and linear.weight.device.type == "cpu" else kind
    return pack(linear, kind, next((g for g in (64, 32) if linear.in_features % g == 0), 64))


if __name__ == "__main__":
    cli(main)
