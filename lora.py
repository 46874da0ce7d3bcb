"""LoRA, DoRA and QLoRA: train a small adapter beside frozen weights, in PEFT's format; merge it.

    python lora.py train MODEL --data chat.jsonl --out runs/adapter    # --quant nf4 is QLoRA
    python lora.py train MODEL --fit --quant nf4                       # only the memory it needs
    python lora.py merge MODEL runs/adapter --out runs/merged          # an ordinary model folder

Top to bottom: the adapted layer, adapters on and off a model, what is trained, merging. The loop is
`finetune` in finetune.py, whose gradient reaches only the adapter.
"""

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path

# first, since it sets how torch's threads wait
import common  # isort: skip

import torch
import torch.nn as nn
import torch.nn.functional as F

import finetune
from common import UserError
from formats.hub import config_from_dict, read_generation
from formats.peft import (
    SETTINGS,
    alpha_divisor,
    base_sha256,
    folder_module,
    linear_layers,
    read_layers,
    write_layers,
)
from formats.verify import WrongExport, verify
from formats.vocab import find_tokenizer, read_beside
from model import Transformer
from quant import QuantLinear, quantize, tiled
from runtime import DTYPES, resolve
from tokenizer import Tokenizer
from training.loop import describe, launch, start_run
from training.memory import estimate_memory, print_estimate


# --------------------------------------------------------------------------------------- the layer
class LoRALinear(nn.Module):
    """A frozen linear layer of weights W (N, K), float or packed, and a trained change of low rank.

    LoRA (Hu et al. 2021, eq. 3):     W' = W + s B A,   A (r, K), B (N, r), s = alpha / r
    DoRA (Liu et al. 2024, eq. 5):    W' = m (W + s B A) / |W + s B A|,   m (N,), norms of rows

    B starts at zero and m at |W|, so a fresh adapter changes nothing. A, B and m are float32,
    whatever the base is."""

    def __init__(self, base, settings, r, scale):
        """settings: formats.peft.SETTINGS of the whole adapter; r and scale: of this layer, since
        they may differ between the layers of an adapter that PEFT wrote."""
        super().__init__()
        N, K = base.out_features, base.in_features
        device = next(iter(base.state_dict().values())).device
        self.base = base
        self.out_features = N
        self.in_features = K
        self.settings = settings
        self.scale = scale
        self.A = nn.Parameter(torch.empty(r, K, device=device).uniform_(-1, 1) / math.sqrt(K))
        self.B = nn.Parameter(torch.zeros(N, r, device=device))
        self.m = None
        if settings["use_dora"]:
            self.m = nn.Parameter(dense_weight(base).norm(dim=1))  # (N, K) -> (N,)

    def forward(self, x):
        """x (..., K) -> W' x + bias (..., N)."""
        rows = x.reshape(-1, self.in_features)  # (..., K) -> (M, K)
        # W x. Of a base in 4 bits only the packed bytes are kept for the gradient of x, which
        # unpacks them again (quant.FrozenProduct).
        y = self.base(rows)
        rows = F.dropout(rows, self.settings["lora_dropout"], self.training)
        low = F.linear(rows, self.A.to(x.dtype)).to(y.dtype)  # (M, K) -> (M, r)
        # the product adds itself to what is there: W x + s B A x (`alpha` is addmm's word for s)
        y = y.addmm_(low, self.B.to(y.dtype).t(), alpha=self.scale)  # (M, r) -> (M, N)
        if self.m is not None:
            bias = 0 if self.base.bias is None else self.base.bias.to(y.dtype)
            gain = self.gain(self.changed_weight())
            y = bias + gain.to(y.dtype) * (y - bias)
        return y.view(*x.shape[:-1], self.out_features)

    def changed_weight(self):
        """-> W + s B A (N, K) float32."""
        return dense_weight(self.base) + self.scale * self.B @ self.A

    def gain(self, changed):
        """DoRA's m / |W + s B A| (N,): the norm is a constant to the gradient (section 4.3).

        A row of zeros stays one."""
        return self.m / changed.detach().norm(dim=1).clamp(min=1e-12)

    def merged_weight(self):
        """-> W' (N, K) float32, differentiable."""
        changed = self.changed_weight()
        return changed if self.m is None else changed * self.gain(changed)[:, None]

    @property
    def weight(self):
        """W' in the base's dtype. The model's loss multiplies by its head's `weight` itself, in
        chunks, and so calls no `forward` of an adapted head, whose dropout this leaves out."""
        return self.merged_weight().to(self.base.weight.dtype)


def dense_weight(layer):
    """A linear layer's weights (N, K) in float32, also where they are packed or adapted."""
    if isinstance(layer, LoRALinear):
        return layer.merged_weight()
    if isinstance(layer, QuantLinear):
        return layer.dequantize()
    return layer.weight.detach().float()


def adapted_layers(model):
    """{name: LoRALinear}"""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


# ------------------------------------------------------------------------- on a model, off a model
TARGETS = {
    "attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
TARGETS["all"] = TARGETS["attn"] + TARGETS["mlp"]


def choose_layers(model, targets):
    """--targets -> [names of layers], in the model's order; UserError lists the names there are.

    targets: all (layers of the blocks), attn, mlp, or names apart by commas, each of which matches
    the end of the name that a layer has in a model folder."""
    names = linear_layers(model)
    chosen = set()
    for target in targets.split(","):
        ends = tuple("." + end for end in TARGETS.get(target, [target]))
        found = [name for name in names if f".{folder_module(name)}".endswith(ends)]
        if not found:
            there = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names}))
            raise UserError(
                f"--targets {target}: no linear layer is called so; there are {there}, and "
                f"{', '.join(TARGETS)}"
            )
        chosen.update(found)
    return [name for name in names if name in chosen]


def apply(model, r=8, alpha=16, targets="all", dropout=0.0, rslora=False, dora=False):
    """Freeze the model and put a new adapter beside the chosen layers, in place -> the model.

    Until it is trained it changes no output. Raises UserError where no layer is called so, r is
    above what a matrix can have, or the model has an adapter already."""
    if r < 1 or not alpha > 0 or not 0 <= dropout < 1:
        raise UserError(
            f"--r {r} must be at least 1, --alpha {alpha} above 0, "
            f"--lora-dropout {dropout} in [0, 1)"
        )
    chosen = choose_layers(model, targets)
    freeze_base(model)
    settings = dict(zip(SETTINGS, (r, alpha, dropout, rslora, dora)))
    for name in chosen:
        layer = adapt_layer(model, name, settings, r, alpha / alpha_divisor(r, rslora))
        N, K = layer.out_features, layer.in_features
        if r > min(N, K):
            raise UserError(
                f"--r {r} is above the rank that {name}, {N} x {K}, can have: at most {min(N, K)}"
            )
    return model


def freeze_base(model):
    if adapted_layers(model):
        raise UserError("the model has an adapter already: merge it first, or load the base again")
    model.requires_grad_(False)


def adapt_layer(model, name, settings, r, scale):
    """Put a fresh LoRALinear in the place of a layer -> it."""
    base = model.get_submodule(name)
    layer = LoRALinear(base, settings, r, scale).train(base.training)
    model.set_submodule(name, layer)
    return layer


@torch.no_grad()
def load_adapter(model, folder, trainable=False):
    """Put the adapter in a folder that we or PEFT wrote beside the model's layers -> the model.

    Raises UserError where it belongs to other base weights (by hash, which PEFT's own do not have)
    or does not fit."""
    settings, found = read_layers(folder, model)
    freeze_base(model)
    for name, own in found.items():
        layer = adapt_layer(model, name, settings, len(own.A), own.scale)
        layer.A.copy_(own.A)
        layer.B.copy_(own.B)
        if own.magnitude is not None:
            layer.m.copy_(own.magnitude)
    if not trainable:
        model.requires_grad_(False)
    return model


def save_adapter(model, folder, base_hash=None):
    """Write adapter_config.json and adapter_model.safetensors as PEFT does, and the base's hash
    (base_hash: base_sha256(model), where it is known already)."""
    layers = adapted_layers(model)
    settings = next(iter(layers.values())).settings
    write_layers(folder, model, settings, layers, base_hash)


def adapter_writer(base_hash):
    """What a training's checkpoint writes (loop.Run.write) where an adapter is trained."""
    return lambda run, folder, weights: save_adapter(run.model, folder, base_hash)


@contextlib.contextmanager
def adapter_off(model):
    """Context: the model is its frozen base, whose layers are back in their places."""
    layers = adapted_layers(model).items()
    for name, layer in layers:
        model.set_submodule(name, layer.base)
    try:
        yield
    finally:
        for name, layer in layers:
            model.set_submodule(name, layer)


@torch.no_grad()
def merge(model):
    """Fold the adapter into the weights, in float32, and leave plain linear layers -> the model.

    They are put in place and have the base's dtype, float32 where it was quantized. A head that was
    the embedding becomes a matrix of its own."""
    for name, layer in linear_layers(model).items():
        if isinstance(layer, nn.Linear):
            continue
        base = getattr(layer, "base", layer)
        dtype = torch.float32 if isinstance(base, QuantLinear) else base.weight.dtype
        merged = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
        merged.weight = nn.Parameter(dense_weight(layer).to(dtype))
        merged.bias = base.bias
        model.set_submodule(name, merged)
        if name == "lm_head" and model.config.tie_word_embeddings:
            print("merge    the head was the embedding matrix, and is a matrix of its own now")
            model.config.tie_word_embeddings = False
    model.quantization = None
    model.source = None  # these are no longer the weights of a folder
    return model


# ---------------------------------------------------------------------------------------- training
@dataclass
class Args(finetune.Args):
    out: str = "runs/adapter"  # the adapter's folder to write
    r: int = 8  # rank: the adapter's size grows with it
    alpha: float = 16  # strength: the change is scaled by alpha / r
    targets: str = "all"  # layers: all (of the blocks), attn, mlp, or names such as q_proj,lm_head
    lora_dropout: float = 0.0  # share dropped of what the adapter reads, except the head's
    rslora: bool = False  # scale by alpha / sqrt(r): high ranks learn as fast as low ones
    dora: bool = False  # learn each output's magnitude apart from its direction
    quant: str = ""  # nf4: hold the base in 4 bits (QLoRA)
    optimizer: str = "adamw"  # adamw, adamw8bit (its moments in 8 bits), or muon
    lr: float = 1e-3  # learning rate; large models like 2e-4


def count_params(model):
    """-> (parameters that are trained, all of them, packed ones counted as what they stand for)."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    packed = [layer for layer in model.modules() if isinstance(layer, QuantLinear)]
    return trained, model.num_params() + sum(m.in_features * m.out_features for m in packed)


def print_adapter(model, args):
    trained, total = count_params(model)
    print(
        f"adapter  {'DoRA' if args.dora else 'LoRA'} of rank {args.r} on {args.targets}: "
        f"{trained:,} of {total:,} parameters are trained: {trained / total:.2%}; "
        f"the base is frozen{' in 4 bits' if args.quant else ''}"
    )


def adapt(model, args):
    """`apply` as the flags say."""
    return apply(model, args.r, args.alpha, args.targets, args.lora_dropout, args.rslora, args.dora)


def print_fit(model, args, runtime):
    """What --fit says of an adapted model on "meta": its size, and the memory that training takes
    -> {part: bytes}."""
    rows = args.micro_batch or args.batch // runtime.world
    parts = estimate_memory(model, args, runtime, rows)
    if args.quant:
        layers = linear_layers(model).items()
        sizes = [m.in_features * m.out_features for name, m in layers if name != "lm_head"]
        # NF4 has half a byte a weight, a byte of scale for 64, and four bytes for 256 of those
        saved = runtime.dtype.itemsize - (1 / 2 + 1 / 64 + 1 / 64 / 64)
        parts["weights"] -= saved * sum(sizes)
        # in float32 as looked up, as multiplied by its scales, and in the product's dtype
        parts["one matrix unpacked"] = 12 * max(sizes)
    print_adapter(model, args)
    print_estimate(parts, rows, args, runtime)
    return parts


def prepare_adapter(args, checkpoint):
    """Flags and checkpoint -> Run; None after --fit, for which MODEL needs only its config.json."""
    check_adapter_args(args)
    runtime = resolve(args.device, args.dtype, args.compile)
    path = Path(args.model) / "config.json"
    config = config_from_dict(common.read_json(path), str(path))
    finetune.limit_context(args, config)
    with torch.device("meta"):  # what cannot be is refused before anything is loaded
        sketch = adapt(Transformer(config).to(runtime.dtype), args)
    if args.fit:
        print_fit(sketch, args, runtime)
        return None
    tok = finetune.tuned_tokenizer(args.model)  # an adapter trains no new tokens
    data, val = finetune.load_data(args, tok)
    # QLoRA packs on the CPU (Dettmers et al. 2023): the device never holds the model in 16 bits
    place = "cpu" if args.quant else runtime.device
    model = Transformer.from_pretrained(args.model, place, runtime.dtype)
    finetune.end_turns(tok, model.config)  # so that `try_out` stops there, as `merge` has it later
    if args.quant:
        quantize(model, args.quant).to(runtime.device)
        for name, layer in linear_layers(model).items():
            model.set_submodule(name, tiled(layer))  # on a GPU, where it is packed; others stay
    torch.manual_seed(args.seed)
    if checkpoint:
        load_adapter(model, checkpoint, trainable=True)
    else:
        adapt(model, args)
    base_hash = base_sha256(model)  # of the folder's tensors, whatever became of them here
    describe(args, model, tok, data, val)
    print_adapter(model, args)
    return start_run(
        args,
        checkpoint,
        runtime,
        tok,
        model,
        data,
        val,
        loss=finetune.packed_loss,
        write=adapter_writer(base_hash),
    )


def check_adapter_args(args):
    if not args.model or not (args.data or args.fit):
        raise UserError(
            "give a model folder and conversations: "
            "python lora.py train MODEL --data chat.jsonl --out D"
        )
    if args.quant not in ("", "nf4"):
        raise UserError(f"--quant {args.quant}: use nf4, or leave it out")
    if args.shard:
        raise UserError(
            "--shard is for whole models; here each rank holds the frozen base "
            "(--quant nf4 makes it small)"
        )


# ----------------------------------------------------------------------------------------- merging
@dataclass
class MergeArgs:
    base: str = ""  # the model folder that the adapter was trained on
    adapter: str = ""  # the adapter's folder
    out: str = "runs/merged"  # the model folder to write
    dtype: str = "auto"  # float32, bfloat16, float16; auto is the base's
    overwrite: bool = False  # replace the model in --out


def merge_command(argv):
    """A base and an adapter -> a model folder like any other.

    The adapter goes into the folder's own weights, also where it was trained beside 4 bits of them.
    What merging and rounding change is measured, and bounded."""
    args = MergeArgs(**common.parse_flags(MergeArgs, __doc__, argv, ("base", "adapter")))
    base, out = Path(args.base), Path(args.out)
    if args.dtype not in ("auto", *DTYPES):
        raise UserError(f"--dtype {args.dtype}: use auto, {', '.join(DTYPES)}")
    if (out / "config.json").exists():
        if out.samefile(base):
            raise UserError(f"{out} is the base itself: choose another --out")
        if not args.overwrite:
            raise UserError(f"{out} already holds a model: choose another --out, or --overwrite")
    model = Transformer.from_pretrained(base)
    if args.dtype == "auto":
        args.dtype = str(model.embed_tokens.weight.dtype).removeprefix("torch.")
    model = merge_checked(load_adapter(model.float(), args.adapter), args.dtype)
    tok = choose_words(model, base, Path(args.adapter))
    if tok:
        tok.save(out)
    model.save_pretrained(out)
    print(f"wrote    {out}/ (model folder, {args.dtype})")
    written = Transformer.from_pretrained(out), Tokenizer.load(out) if tok else None
    verify(out, args.dtype, (model, tok), written)


def choose_words(model, base, adapter):
    """The adapter's tokenizer, chat template and generation_config.json where it has its own, else
    the base's -> Tokenizer or None; the model's config gets end ids and defaults of sampling."""
    own = {
        "tokenizer": find_tokenizer(adapter),
        "chat template": read_beside(adapter).config.get("chat_template"),
        "generation_config.json": (adapter / "generation_config.json").is_file(),
    }
    whose = {what: adapter if has else base for what, has in own.items()}
    print("keep     " + ", ".join(f"{what} of {folder}" for what, folder in whose.items()))
    read_generation(whose["generation_config.json"] / "generation_config.json", model.config)
    if not find_tokenizer(whose["tokenizer"]):
        return None
    tok = Tokenizer.load(whose["tokenizer"])
    tok.chat_template = read_beside(whose["chat template"]).config.get("chat_template")
    if tok.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{whose['tokenizer']}: {tok.vocab_size:,} ids, "
            f"the base has {model.config.vocab_size:,}"
        )
    if tok.chat_template:
        finetune.end_turns(tok, model.config)
    return tok


@torch.no_grad()
def merge_checked(model, dtype):
    """Merge and round to the dtype of that name -> the model, unless its logits change too much."""
    length = min(64, model.config.max_position_embeddings)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (4, length), generator=generator)
    before = model(ids)  # (4, T, V)
    merged = merge(model).to(DTYPES[dtype])
    # rounded to dtype, and computed in float32, which `float` makes of it in place
    difference = (merged.float()(ids) - before).abs().max().item()
    largest = before.abs().max().item()
    # in float32 only the order of the sums differs, in 16 bits also the rounded weights
    bound = max(1e-5, 8 * torch.finfo(DTYPES[dtype]).eps) * largest
    print(
        f"merge    largest logit difference {difference:.2e}, of logits up to {largest:.1f}; "
        f"bound in {dtype} {bound:.1e}"
    )
    if not difference <= bound:
        raise WrongExport(
            f"merged and unmerged logits differ by {difference:.2e}, above {bound:.1e}: "
            "nothing was written; try --dtype float32"
        )
    return merged.to(DTYPES[dtype])


def train_adapter(argv):
    launch(Args, __doc__, prepare_adapter, finetune.finetune, argv=argv)


def main():
    common.run_command(__doc__, {"train": train_adapter, "merge": merge_command})


if __name__ == "__main__":
    common.cli(main)
