"""LoRA, DoRA and QLoRA: train a small adapter beside frozen weights, in PEFT's format; merge it into a deployable folder.

python lora.py train MODEL --data chat.jsonl --out runs/adapter             # --quant nf4 is QLoRA; --fit prints the memory
python lora.py merge MODEL runs/adapter --out runs/merged
"""

import math
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import finetune
import train
from common import UserError
from formats.peft import ATTENTION, MLP, base_sha256, folder_module, read_layers
from model import Config, Transformer
from quant import TOKENIZER_FILES, QuantLinear, quantize
from runtime import DTYPES, resolve, write_tensors
from tokenizer import Tokenizer
from training import loop
from training.memory import estimate_memory, print_estimate


# --------------------------------------------------------------------------------------- the layers
@dataclass
class Settings:
    """What makes an adapter besides its tensors; `alpha` and `rslora` give its scale."""

    r: int = 8
    alpha: float = 16
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False

    def scale(self, r, alpha=None):
        """alpha / r (Hu et al. 2021, section 4.1), or alpha / sqrt(r): then high ranks learn too (rsLoRA, Kalajdzievski 2023)."""
        return (alpha or self.alpha) / (math.sqrt(r) if self.rslora else r)


class Adapter(nn.Module):
    """A low-rank change of one linear layer's W (N, K): W' = W + scale B A, with A (r, K), B (N, r) (Hu et al. 2021, eq. 3).

    DoRA (Liu et al. 2024, eq. 5) also learns each output's magnitude m (N,): W' = m (W + scale B A) / |W + scale B A|, the
    norm over a row. It is a constant to the gradient (their section 4.3), so W' x costs no product beyond LoRA's.
    B starts at zero and m at |W|: a fresh adapter changes nothing. Parameters are float32, whatever the base is."""

    def __init__(self, base, r, scale, dropout=0.0, dora=False):
        super().__init__()
        N, K, device = (
            base.out_features,
            base.in_features,
            next(iter(base.state_dict().values())).device,
        )
        self.scale, self.dropout = scale, dropout
        self.A = nn.Parameter(torch.empty(r, K, device=device).uniform_(-1, 1) / math.sqrt(K))
        self.B = nn.Parameter(torch.zeros(N, r, device=device))
        self.m = None
        if dora:
            square = dense(base).square().sum(1)  # |W|^2 by rows, (N,)
            self.register_buffer("square", square, persistent=False)
            self.m = nn.Parameter(square.sqrt())

    def gain(self, base, dtype=torch.float32):
        """DoRA's m / |W + scale B A| (N,). The norm comes from |w|^2 + 2s (W A^T).b + s^2 b (A A^T) b for each row w of W and
        b of B: with the base's own product, so that W, which may be in 4 bits, is never there whole."""
        with torch.no_grad():
            WA = (
                (base(self.A.to(dtype)) - bias_of(base, dtype)).t().float()
            )  # (r, K) -> (r, N) -> (N, r)
            norm2 = self.square + (
                (2 * self.scale * WA + self.scale**2 * self.B @ (self.A @ self.A.t())) * self.B
            ).sum(1)
            inverse = norm2.clamp(min=1e-30).rsqrt()
        return self.m * inverse

    def forward(self, x, y, base):
        """x (..., K) and y = base(x) (..., N) -> (..., N)."""
        low = F.linear(F.dropout(x, self.dropout, self.training), self.A.to(x.dtype))  # (..., r)
        change = F.linear(low, (self.B * self.scale).to(x.dtype))
        if self.m is None:
            return y + change
        bias = bias_of(base, y.dtype)
        return bias + self.gain(base, x.dtype).to(y.dtype) * (y - bias + change)

    def weight(self, base):
        """W' (N, K) in float32."""
        W = dense(base) + self.scale * self.B @ self.A
        return W if self.m is None else W * (self.m / W.detach().norm(dim=1))[:, None]


def dense(base):
    """A linear layer's weights (N, K) in float32, also where it holds them in fewer bits."""
    return base.dequantize() if isinstance(base, QuantLinear) else base.weight.detach().float()


def bias_of(base, dtype):
    return 0 if base.bias is None else base.bias.to(dtype)


class LoRALinear(nn.Module):
    """A frozen linear layer (nn.Linear or quantized) and any number of adapters, of which one, none (`active` None) or, in a
    batch for several users, one for each row (`rows`, set by `model_adapter_rows`) is in effect."""

    def __init__(self, base):
        super().__init__()
        self.base, self.adapters, self.active, self.rows = base, nn.ModuleDict(), None, None

    def forward(self, x):
        y = self.base(x)
        if self.rows is not None:
            return self.by_row(x, y)
        return self.adapter(x, y, self.base) if self.adapter else y

    @property
    def adapter(self):
        return self.adapters[self.active] if self.active in self.adapters else None

    @property
    def weight(self):
        """The weights in effect, differentiable: what the fused loss reads of a head."""
        return (
            self.adapter.weight(self.base).to(self.base.weight.dtype)
            if self.adapter
            else self.base.weight
        )

    def by_row(self, x, y):
        """All adapters stacked along the rank, then each row's own ranks kept: two thin products, however many adapters."""
        A, B, keep, gain = self.stack  # (R, K), (N, R), (n + 1, R), (n + 1, N)
        shape = (
            *self.rows.shape,
            *[1] * (x.ndim - 1 - self.rows.ndim),
            -1,
        )  # (B,) for x (B, T, K) is (B, 1, -1)
        keep, gain = (t[self.rows].view(shape).to(y.dtype) for t in (keep, gain))
        change, bias = (
            F.linear(F.linear(x, A.to(x.dtype)) * keep, B.to(x.dtype)),
            bias_of(self.base, y.dtype),
        )
        return bias + gain * (y - bias + change)

    @torch.no_grad()
    def make_stack(self, names):
        """What `by_row` needs for these adapters; the last row of `keep` and `gain` is "no adapter"."""
        ours = [(i, self.adapters[n]) for i, n in enumerate(names) if n in self.adapters]
        A, B = torch.cat([a.A for _, a in ours]), torch.cat([a.B for _, a in ours], 1)
        keep, gain, at = A.new_zeros(len(names) + 1, len(A)), A.new_ones(len(names) + 1, len(B)), 0
        for i, adapter in ours:
            keep[i, at : at + len(adapter.A)] = adapter.scale
            gain[i] = 1.0 if adapter.m is None else adapter.gain(self.base)
            at += len(adapter.A)
        self.stack = A, B, keep, gain


# -------------------------------------------------------------------------- on a model, off a model
def linears(model):
    """{name: layer} of every linear layer of the blocks, adapted or not, and the head."""
    kinds = (nn.Linear, QuantLinear, LoRALinear)
    return {
        n: m for n, m in model.named_modules() if isinstance(m, kinds) and not n.endswith(".base")
    }


def choose(model, targets):
    """--targets -> [names of layers]: all (of the blocks), attn, mlp, or comma-separated names of which each matches the end
    of a layer's name, ours or the folder's. Raises UserError that lists the names there are."""
    layers = list(linears(model))
    blocks = [n for n in layers if n != "lm_head"]
    groups = {
        "all": blocks,
        "attn": [n for n in blocks if n.endswith(ATTENTION)],
        "mlp": [n for n in blocks if n.endswith(MLP)],
    }
    chosen = []
    for target in targets.split(",") if isinstance(targets, str) else targets:
        found = groups.get(target) or [
            n
            for n in layers
            if f".{n}".endswith(f".{target}")
            or f".{folder_module(n, model.config)}".endswith(f".{target}")
        ]
        if not found:
            there = sorted({n.rsplit(".", 1)[-1] for n in layers})
            raise UserError(
                f"--targets {target}: no linear layer is called so; there are {', '.join(there)}, and all, attn, mlp"
            )
        chosen += found
    fused = (
        {n.rsplit(".", 1)[0] for n in chosen if n.endswith(ATTENTION[:3])}
        if model.config.is_gpt2
        else ()
    )
    if any(f"{n}.{p}" not in chosen for n in fused for p in ATTENTION[:3]):
        raise UserError(
            "--targets: GPT-2's q_proj, k_proj and v_proj are one matrix, c_attn, in its folder: name all three"
        )
    return [n for n in layers if n in chosen]


def apply(
    model, r=8, alpha=16, targets="all", dropout=0.0, rslora=False, dora=False, name="default"
):
    """Freeze the model and put a new adapter, called `name`, beside the chosen linear layers, in place -> the model.

    Until it is trained it changes no output. Raises UserError where no layer matches or r exceeds a matrix."""
    settings, layers, chosen = (
        Settings(r, alpha, dropout, rslora, dora),
        linears(model),
        choose(model, targets),
    )
    if r < 1 or not alpha > 0 or not 0 <= dropout < 1:
        raise UserError(
            f"--r {r} must be at least 1, --alpha {alpha} above 0, --dropout {dropout} in [0, 1)"
        )
    for n in chosen:
        base = getattr(layers[n], "base", layers[n])
        if r > min(N := base.out_features, K := base.in_features):
            raise UserError(
                f"--r {r} is above the rank that {n}, {N} x {K}, can have: at most {min(N, K)}"
            )
    return attach(model, name, settings, {n: (r, settings.scale(r)) for n in chosen})


def attach(model, name, settings, layers):
    """Freeze the model and put a fresh adapter beside each of `layers`, {name: (rank, scale)}, and in effect -> the model."""
    if name in adapters(model) or not name or "." in name:
        why = (
            "the model has one so called"
            if name in adapters(model)
            else "the name is empty or has a dot"
        )
        raise UserError(f"an adapter cannot be called {name!r}: {why}")
    model.requires_grad_(False)
    for n, (r, scale) in layers.items():
        layer = model.get_submodule(n)
        if not isinstance(layer, LoRALinear):
            layer = LoRALinear(layer)
            model.set_submodule(n, layer)
        layer.adapters[name] = Adapter(layer.base, r, scale, settings.dropout, settings.dora)
    model.adapters = {**adapters(model), name: settings}
    return set_adapter(model, name)


def adapters(model):
    """{name: Settings} of the adapters loaded."""
    return getattr(model, "adapters", {})


def set_adapter(model, name):
    """Make that adapter the one in effect, or none (None) -> the model."""
    if name is not None and name not in adapters(model):
        raise UserError(f"no adapter {name!r}; loaded are {', '.join(adapters(model)) or 'none'}")
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            layer.active, layer.rows = name, None
    return model


def model_adapter_rows(model, rows):
    """A batch whose rows use different adapters: rows (B,) or (B, T) int64 counts in the order of `adapters(model)`, -1 is the
    base. Holds for every forward pass until it is set again (the shapes never depend on the choice); None ends it. After
    another adapter was loaded or trained on, None first: the adapters are stacked when rows are first given."""
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            if rows is not None and layer.rows is None:
                layer.make_stack(list(adapters(model)))
            layer.rows = rows


def merge(model):
    """Fold the adapter in effect into the weights, in float32, and leave plain linear layers: of the base's dtype, float32 where
    it was quantized -> the model. A head that was the embedding becomes a matrix of its own."""
    for n, layer in linears(model).items():
        new = base = getattr(layer, "base", layer)
        adapter, packed = getattr(layer, "adapter", None), isinstance(base, QuantLinear)
        if adapter or packed:
            new = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
            weight = (adapter.weight(base) if adapter else dense(base)).detach()
            new.weight, new.bias = (
                nn.Parameter(weight if packed else weight.to(base.weight.dtype)),
                base.bias,
            )
            if n == "lm_head" and model.config.tie_word_embeddings:
                print(
                    "merge    the head was the embedding matrix and the adapter changes it: from now on they are two"
                )
                model.config.tie_word_embeddings = False
        model.set_submodule(n, new)
    model.adapters, model.quantization = {}, None
    return model


# --------------------------------------------------------------------------------- PEFT's two files


def save_adapter(model, folder, name="default"):
    """Write adapter_config.json and adapter_model.safetensors as PEFT does, and one key more: the base's hash."""
    folder, config, settings = Path(folder), model.config, adapters(model)[name]
    folder.mkdir(parents=True, exist_ok=True)
    modules = {}  # a folder's module: the adapters of the layers that it holds
    for n, layer in linears(model).items():
        if name in getattr(layer, "adapters", ()):
            modules.setdefault(folder_module(n, config), []).append(layer.adapters[name])
    tensors, ranks, alphas = {}, {}, {}
    for (
        module,
        parts,
    ) in (
        modules.items()
    ):  # GPT-2's c_attn is q over k over v: their A stacked, their B along the diagonal, rank 3r
        A, B = torch.cat([p.A for p in parts]), torch.block_diag(*[p.B for p in parts])
        key, r, scale = f"base_model.model.{module}.lora_", len(A), parts[0].scale
        tensors |= {key + "A.weight": A, key + "B.weight": B}
        if settings.dora:
            tensors[key + "magnitude_vector"] = torch.cat([p.m for p in parts])
        if r != settings.r or not math.isclose(scale, settings.scale(r)):
            ranks[module], alphas[module] = r, scale * (math.sqrt(r) if settings.rslora else r)
    every = {folder_module(n, config) for n in linears(model)}
    leaves = {m: m.rsplit(".", 1)[-1] for m in every}
    partial = {
        leaves[m] for m in every - set(modules)
    }  # names that also layers without an adapter have
    write_tensors(folder / "adapter_model.safetensors", tensors)
    common.write_json(
        folder / "adapter_config.json",
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": str(getattr(model, "source", "") or ""),
            "r": settings.r,
            "lora_alpha": settings.alpha,
            "lora_dropout": settings.dropout,
            "use_rslora": settings.rslora,
            "use_dora": settings.dora,
            "target_modules": sorted({m if leaves[m] in partial else leaves[m] for m in modules}),
            "rank_pattern": ranks,
            "alpha_pattern": alphas,
            "bias": "none",
            "fan_in_fan_out": config.is_gpt2,
            "modules_to_save": None,
            "init_lora_weights": True,
            "inference_mode": True,
            "base_sha256": base_sha256(model),
        },
    )


def load_adapter(model, folder, name="default", trainable=False):
    """Put the adapter in a folder that we or PEFT wrote beside the model's layers, and in effect -> the model.

    Raises UserError where it belongs to other base weights (by hash, which PEFT's own do not have) or does not fit."""
    config, found = read_layers(folder, model)
    settings = Settings(
        config["r"],
        config["lora_alpha"],
        config["lora_dropout"],
        bool(config.get("use_rslora")),
        bool(config.get("use_dora")),
    )
    attach(model, name, settings, {n: (len(own.A), own.scale) for n, own in found.items()})
    for n, own in found.items():
        adapter = model.get_submodule(n).adapters[name].requires_grad_(trainable)
        tensors = {"A": own.A, "B": own.B} | ({} if own.magnitude is None else {"m": own.magnitude})
        adapter.load_state_dict(tensors)
    return model


# ----------------------------------------------------------------------------------------- training
@dataclass
class Args(finetune.Args):
    out: str = "runs/adapter"  # the adapter's folder to write
    r: int = 8  # rank: the adapter's size grows with it
    alpha: float = 16  # strength: the change is scaled by alpha / r
    targets: str = "all"  # layers: all (linear layers of the blocks), attn, mlp, or names such as q_proj,lm_head
    lora_dropout: float = 0.0  # of what the adapter reads
    rslora: bool = False  # scale by alpha / sqrt(r): high ranks learn as fast as low ones
    dora: bool = False  # learn each output's magnitude apart from its direction
    quant: str = ""  # nf4: hold the base in 4 bits (QLoRA)
    optimizer: str = "adamw"  # adamw, adamw8bit (its moments in 8 bits), or muon
    lr: float = 1e-3  # learning rate; large models like 2e-4


def estimate(config, args, runtime, rows):
    """Bytes by part of training with `rows` rows a pass, without building the model -> ({part: bytes}, trained, all parameters)."""
    with torch.device("meta"):
        model = apply(
            Transformer(config).to(runtime.dtype), args.r, args.alpha, args.targets, dora=args.dora
        )
    parts, (trained, total) = estimate_memory(model, args, runtime, rows), count_params(model)
    left = parts.pop("weights") - 4 * trained
    packed = [
        m.weight.numel()
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear) and n.startswith("layers.")
    ]
    if args.quant:
        left -= sum(packed) * runtime.dtype.itemsize
        blocks = sum(packed) // 64  # a byte of scale each, and four bytes for 256 of those
        parts = {
            "NF4": sum(packed) // 2,
            "scales": blocks + blocks // 64,
            "one matrix unpacked": 12 * max(packed),
            **parts,
        }
    return (
        {
            "embedding, head, norms" if args.quant else "weights": left,
            "adapters": 4 * trained,
            **parts,
        },
        trained,
        total,
    )


def count_params(model):
    """-> (parameters that are trained, all of them, quantized ones counted as what they stand for)."""
    packed = sum(
        m.in_features * m.out_features for m in model.modules() if isinstance(m, QuantLinear)
    )
    return sum(
        p.numel() for p in model.parameters() if p.requires_grad
    ), model.num_params() + packed


def prepare(args, checkpoint):
    """Everything from the flags and the checkpoint -> Run, or None after `--fit`, for which MODEL needs only its config.json."""
    if not args.model or not (args.data or args.fit):
        raise UserError(
            "give a model folder and conversations: python lora.py train MODEL --data chat.jsonl --out D"
        )
    if args.quant not in ("", "nf4"):
        raise UserError(f"--quant {args.quant}: use nf4, or leave it out")
    if args.shard:
        raise UserError(
            "--shard is for whole models; here each rank holds the frozen base (--quant nf4 makes it small)"
        )
    runtime = resolve(args.device, args.dtype, args.compile)
    config = Config.from_dict(
        common.read_json(Path(args.model) / "config.json"), f"{args.model}/config.json"
    )
    args.context = min(args.context, config.max_position_embeddings)
    if args.fit:
        rows = args.micro_batch or args.batch // runtime.world
        parts, trained, total = estimate(config, args, runtime, rows)
        print(f"adapter  {trained:,} of {total:,} parameters are trained: {trained / total:.2%}")
        return print_estimate(parts, rows, args, runtime)
    tok = Tokenizer.load(args.model)
    if not tok.chat_template:
        raise UserError(
            f"{args.model} has no chat template, and an adapter trains no new tokens: first run finetune.py on it"
        )
    data, val = finetune.load_data(args, tok)
    model = Transformer.from_pretrained(
        args.model, "cpu" if args.quant else runtime.device, runtime.dtype
    )
    if args.quant:  # on the CPU: the device never holds the model in 16 bits
        quantize(model, args.quant).to(runtime.device)
    torch.manual_seed(args.seed)
    if checkpoint:
        load_adapter(model, checkpoint, trainable=True)
    else:
        apply(model, args.r, args.alpha, args.targets, args.lora_dropout, args.rslora, args.dora)
    train.describe(args, model, tok, data, val)
    trained, total = count_params(model)
    print(
        f"adapter  {'DoRA' if args.dora else 'LoRA'} of rank {args.r} on {args.targets}: {trained:,} of {total:,} parameters are "
        f"trained: {trained / total:.2%}; the base, {base_sha256(model)[:12]}, is frozen{' in 4 bits' if args.quant else ''}"
    )
    return train.start_run(
        args,
        checkpoint,
        runtime,
        tok,
        model,
        data,
        val,
        loss=finetune.packed_loss,
        write=lambda run, folder, weights: save_adapter(run.model, folder),
    )


def check_moved(run):
    """After the first step every lora_B must have left zero; one that has not is not being trained, whatever the loss says."""
    still = [
        n
        for n, p in run.model.named_parameters()
        if p.requires_grad and n.endswith(".B") and not p.any()
    ]
    if still and not run.guard.skipped:
        names = ", ".join(n.split(".adapters")[0] for n in still[:4])
        raise UserError(
            f"the first step moved nothing in {len(still)} adapters ({names}, ...): no gradient reaches them; is the "
            "base trained, and --lr above 0?"
        )


def learn(run):
    """The loop."""
    for step, batch in loop.steps(run):
        loop.learn(run, step, batch)
        if step == 0:
            check_moved(run)
    finetune.try_out(run)


# ------------------------------------------------------------------------------------------ merging
@dataclass
class MergeArgs:
    base: str = ""  # the model folder that the adapter was trained on
    adapter: str = ""  # the adapter's folder
    out: str = "runs/merged"  # the model folder to write
    dtype: str = "auto"  # float32, bfloat16, float16; auto is the base's
    overwrite: bool = False  # replace the model in --out


def merge_command(argv):
    """A base and an adapter -> a model folder like any other. What merging and rounding change is measured, and bounded."""
    args = MergeArgs(**common.parse_flags(MergeArgs, __doc__, argv, ("base", "adapter")))
    out, stored = Path(args.out), common.read_json(Path(args.base) / "config.json")
    name = (
        (stored.get("dtype") or stored.get("torch_dtype") or "float32")
        if args.dtype == "auto"
        else args.dtype
    )
    if name not in DTYPES:
        raise UserError(f"--dtype {name}: use auto, {', '.join(DTYPES)}")
    if (out / "config.json").exists() and (not args.overwrite or out.samefile(args.base)):
        raise UserError(
            f"{out} already holds a model: choose another --out"
            + ("" if args.overwrite else ", or --overwrite")
        )
    model = load_adapter(Transformer.from_pretrained(args.base, dtype=torch.float32), args.adapter)
    ids = torch.randint(
        model.config.vocab_size,
        (4, min(64, model.config.max_position_embeddings)),
        generator=torch.Generator().manual_seed(0),
    )
    with torch.no_grad():
        before = model(ids)
        merged = merge(model).to(DTYPES[name]).float()
        difference, largest = (merged(ids) - before).abs().max().item(), before.abs().max().item()
    bound = (
        max(1e-5, 8 * torch.finfo(DTYPES[name]).eps) * largest
    )  # float32: sums in another order; 16 bits: rounded weights
    print(
        f"merge    largest logit difference {difference:.2e}, of logits up to {largest:.1f}; bound in {name} {bound:.1e}"
    )
    if not difference <= bound:
        raise UserError(
            f"merged and unmerged logits differ by {difference:.2e}, above {bound:.1e}: nothing was written; "
            "try --dtype float32"
        )
    merged.to(DTYPES[name]).save_pretrained(out)
    for file in filter(Path.is_file, (Path(args.base) / name for name in TOKENIZER_FILES)):
        shutil.copyfile(file, out / file.name)
    print(f"wrote    {out}/ (model folder, {name})")


def main():
    command, argv = "".join(sys.argv[1:2]), sys.argv[2:]
    if command == "merge":
        return merge_command(argv)
    if command != "train":
        print(__doc__)
        raise UserError("use one of: lora.py train, lora.py merge (each has --help)")
    train.launch(*train.read_args(Args, __doc__, positional=("model",), argv=argv), prepare, learn)


if __name__ == "__main__":
    common.cli(main)
