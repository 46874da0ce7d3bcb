"""Smaller models: int8, int4, NF4, GPTQ and AWQ in place of the linear layers' weights, and a report that compares them.

python quant.py runs/demo --format gptq --group-size 64 --out runs/demo-gptq
python quant.py report runs/demo
"""

import copy
import math
import shutil
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from chat import examples, read_records, render
from common import UserError, cli, parse_flags, write_atomic, write_json
from data import ends_of
from formats.packed import (
    GroupLinear,
    QuantLinear,
    check_finite,
    grid,
    pack,
    packed_state,
    round_to_nearest,
    to_codes,
)
from model import Transformer, to_folder_names
from runtime import resolve
from tokenizer import Tokenizer
from training.corpora import documents

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


# ---------------------------------------------------------------------------------------------------------- a model, in place
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


# -------------------------------------------------------------------------------------------------------------------- GPTQ
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


# --------------------------------------------------------------------------------------------------------- text and figures
def continuation(model, ids, steps, choose):
    """Yields what follows ids (B, T), one token (B, 1) after another, each as `choose` takes it from logits (B, V) float32."""
    from generate import KVCache

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
    """Bytes of the model's tensors as its folder holds them."""
    state = (
        packed_state(model)
        if model.quantization
        else to_folder_names(model.state_dict(), model.config)
    )
    return sum(t.numel() * t.element_size() for t in state.values())


# ------------------------------------------------------------------------------------------------------------- the commands
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
    table = []
    for format in formats:
        model, size = make(args.folder, format, calibration, args, log=lambda line: None)
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


if __name__ == "__main__":
    cli(main)
