"""Muon for the hidden matrices, AdamW for everything else, schedules; training over ranks, and the memory that it takes.

optimizer = MuonAdamW(model, muon_lr=0.02, adam_lr=0.004)
optimizer.set_lr(schedule(step, total)); optimizer.step()
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from common import UserError
from training.ranks import gather, is_sharded, local, own_rows

# ------------------------------------------------------- over ranks: DDP, or FSDP with its DTensors


# ---------------------------------------------------------------------------------------- the rules
def orthogonalize(G, steps=5):
    """The nearest semi-orthogonal matrix to each of G (N, R, C), roughly: U V^T of its SVD with singular values in 0.7..1.2.

    A quintic Newton-Schulz iteration whose coefficients trade exactness for speed (Jordan et al. 2024, "Muon")."""
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G.to(torch.bfloat16 if G.is_cuda else torch.float32)
    X = X.mT if G.size(-2) > G.size(-1) else X  # so that X X^T is the small Gram matrix
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT  # (N, R, R)
        X = a * X + (b * A + c * A @ A) @ X
    return (X.mT if G.size(-2) > G.size(-1) else X).to(G.dtype)


def muon_step(params, grads, momentums, lr, momentum, weight_decay):
    """Muon on matrices that all have one shape (R, C), so that the iteration runs once, as batched products.

    Nesterov momentum, then each update is orthogonalized: every direction of the matrix moves by the same amount. The
    factor sqrt(max(1, R/C)) makes the step's effect on the output alike for tall and wide matrices. Under FSDP each rank
    holds some rows; the iteration needs whole matrices, so the update is gathered and each rank keeps its rows of the result."""
    torch._foreach_lerp_(momentums, grads, 1 - momentum)
    updates = torch._foreach_lerp(grads, momentums, momentum)
    whole = orthogonalize(torch.stack([gather(u, p) for u, p in zip(updates, params)]))  # (N, R, C)
    updates = [own_rows(u, p) for u, p in zip(whole.unbind(), params)]
    rows, cols = params[0].shape
    torch._foreach_mul_([local(p) for p in params], 1 - lr * weight_decay)
    torch._foreach_add_([local(p) for p in params], updates, alpha=-lr * max(1, rows / cols) ** 0.5)


def adamw_step(params, grads, means, squares, step, lr, betas, eps, weight_decay):
    """AdamW (Loshchilov & Hutter 2019, algorithm 2). `step` counts from 1."""
    torch._foreach_lerp_(means, grads, 1 - betas[0])
    torch._foreach_mul_(squares, betas[1])
    torch._foreach_addcmul_(squares, grads, grads, 1 - betas[1])
    denominators = torch._foreach_div(squares, 1 - betas[1] ** step)
    torch._foreach_sqrt_(denominators)
    torch._foreach_add_(denominators, eps)
    torch._foreach_mul_(params, 1 - lr * weight_decay)
    torch._foreach_addcdiv_(params, means, denominators, -lr / (1 - betas[0] ** step))


# -------------------------------------------------------------------------------- moments in 8 bits
PACK_BLOCK = 256  # values that share a scale
PACK_LEAST = (
    4096  # smaller parameters keep their moments in float32, as in bitsandbytes: they weigh nothing
)


@lru_cache
def levels(signed, device):
    """The 256 values a packed moment can have, and the midpoints between them."""
    from quant import dynamic_map

    values = dynamic_map(device, signed)
    return values, (values[1:] + values[:-1]) / 2


def pack(x, codes, tops, signed):
    """Write x into codes (blocks, 256) uint8 and tops (blocks, 1) float32, each block's largest magnitude (Dettmers et al. 2022,
    "8-bit Optimizers via Block-wise Quantization"). Unsigned is for squares, of which none becomes 0: the step divides by it."""
    x = torch.nn.functional.pad(x.flatten(), (0, -x.numel() % PACK_BLOCK)).view(-1, PACK_BLOCK)
    torch.amax(x.abs(), 1, keepdim=True, out=tops)
    nearest = torch.bucketize(
        x / tops.clamp(min=1e-38), levels(signed, x.device)[1], out_int32=True
    )
    codes.copy_(nearest.clamp_(min=0 if signed else 1))


def unpack(codes, tops, signed, like):
    """The inverse of `pack` -> float32 of the shape of `like`."""
    x = levels(signed, codes.device)[0][codes.int()] * tops  # (blocks, 256)
    return x.view(-1)[: like.numel()].view(like.shape)


# ------------------------------------------------------------------------------------ the optimizer
class MuonAdamW:
    """One optimizer, two rules: Muon for the layers' matrices, AdamW for embeddings, head, norms and biases.

    muon=False gives the matrices to AdamW as well, at adam_lr; eight_bit keeps AdamW's moments in 8 bits. Not a
    torch.optim.Optimizer: nothing of it is needed here, and importing its base class costs two seconds."""

    def __init__(
        self,
        model,
        muon_lr=0.02,
        adam_lr=0.004,
        weight_decay=0.0,
        momentum=0.95,
        betas=(0.9, 0.95),
        eps=1e-10,
        muon=True,
        eight_bit=False,
    ):
        self.names = {p: n for n, p in model.named_parameters() if p.requires_grad}
        self.momentum, self.betas, self.eps, self.factor, self.steps, self.state = (
            momentum,
            betas,
            eps,
            0.0,
            0,
            {},
        )
        groups = {}  # (rule, what its members share): [parameters]
        for p, name in self.names.items():
            rule = "adamw8" if eight_bit and p.numel() >= PACK_LEAST else "adamw"
            alike = (
                p.ndim == 2
            )  # matrices are pulled towards zero; norms and biases have no reason to be small
            if muon and p.ndim == 2 and name.startswith("layers."):
                rule, alike = "muon", tuple(p.shape)
            groups.setdefault((rule, alike), []).append(p)
            keys = ("momentum",) if rule == "muon" else ("mean", "square")
            self.state[p] = (
                self.packed(p)
                if rule == "adamw8"
                else {k: torch.zeros_like(local(p)) for k in keys}
            )
        self.param_groups = [
            dict(
                params=ps,
                rule=rule,
                lr=muon_lr if rule == "muon" else adam_lr,
                weight_decay=weight_decay if alike else 0.0,
            )
            for (rule, alike), ps in groups.items()
        ]

    @staticmethod
    def packed(p):
        """Moments of zero, in 8 bits."""
        if is_sharded(p):
            raise UserError(
                "moments in 8 bits are for unsharded parameters: drop --shard, or use --optimizer adamw"
            )
        blocks = -(-p.numel() // PACK_BLOCK)
        zeros = {
            "mean": torch.full((blocks, PACK_BLOCK), 127, dtype=torch.uint8),
            "mean_top": torch.zeros(blocks, 1),  # 127: 0.0
            "square": torch.ones(blocks, PACK_BLOCK, dtype=torch.uint8),
            "square_top": torch.zeros(blocks, 1),
        }
        return {k: v.to(p.device) for k, v in zeros.items()}

    def set_lr(self, factor):
        """The next steps take the groups' learning rates times this, as the schedule says."""
        self.factor = factor

    def zero_grad(self):
        """Drop all gradients."""
        for p in self.state:
            p.grad = None

    @torch.no_grad()
    def step(self):
        self.steps += 1
        for g in self.param_groups:
            params = [p for p in g["params"] if p.grad is not None]
            if not params:
                continue
            grads, states, lr = (
                [local(p.grad) for p in params],
                [self.state[p] for p in params],
                g["lr"] * self.factor,
            )
            how = self.steps, lr, self.betas, self.eps, g["weight_decay"]
            if g["rule"] == "muon":
                muon_step(
                    params,
                    grads,
                    [s["momentum"] for s in states],
                    lr,
                    self.momentum,
                    g["weight_decay"],
                )
            elif g["rule"] == "adamw":
                adamw_step(
                    [local(p) for p in params],
                    grads,
                    [s["mean"] for s in states],
                    [s["square"] for s in states],
                    *how,
                )
            else:
                for p, grad, s in zip(
                    params, grads, states
                ):  # one at a time: only one's moments are ever there in float32
                    mean, square = (
                        unpack(s["mean"], s["mean_top"], True, p),
                        unpack(s["square"], s["square_top"], False, p),
                    )
                    adamw_step([p], [grad], [mean], [square], *how)
                    pack(mean, s["mean"], s["mean_top"], True)
                    pack(square, s["square"], s["square_top"], False)

    def tensors(self):
        """The whole state, for a safetensors file: {parameter name + key: tensor}. Under FSDP every rank must call it."""
        named = {
            f"{self.names[p]}.{k}": gather(v, p)
            for p, state in self.state.items()
            for k, v in state.items()
        }
        return named | {"steps": torch.tensor(self.steps)}

    def load_tensors(self, tensors):
        """The inverse of `tensors`; names and shapes must be those of this model."""
        self.steps = int(tensors["steps"])
        for p, state in self.state.items():
            for k in state:
                state[k].copy_(own_rows(tensors[f"{self.names[p]}.{k}"].to(state[k].device), p))


# ------------------------------------------------------------ around a step: scale, guard, schedule
class LossScale:
    """Dynamic loss scaling for fp16, whose gradients underflow below 6e-8 (Micikevicius et al. 2018, section 3.2).

    The loss is multiplied by `scale`, the gradients divided by it; a step whose gradients overflowed is skipped and halves
    the scale, `patience` good steps in a row double it. torch's GradScaler does the same, but decides per rank; here the
    decision is the norm of all gradients, which all ranks share. Off (scale 1) for other dtypes."""

    def __init__(self, dtype, scale=2.0**16, patience=1000):
        self.on, self.patience, self.good = dtype == torch.float16, patience, 0
        self.scale = scale if self.on else 1.0

    def update(self, finite):
        if self.on:
            self.good = self.good + 1 if finite else 0
            if not finite:
                self.scale /= 2
            elif self.good % self.patience == 0:
                self.scale *= 2


@dataclass
class Guard:
    """Which steps to skip: gradients that are not finite or far above their running mean; stops after several in a row."""

    factor: float
    mean: float = 0.0
    seen: int = 0
    skipped: int = 0
    in_a_row: int = 0
    limit: int = 10

    def accepts(self, norm):
        spike = self.factor and self.seen > 50 and norm > self.factor * self.mean
        good = math.isfinite(norm) and not spike
        if math.isfinite(
            norm
        ):  # a spike counts as the most that is believed, so that a lasting change is accepted in time
            believed = min(norm, self.factor * self.mean) if spike else norm
            self.mean, self.seen = (
                (self.mean * 0.98 + believed * 0.02 if self.seen else believed),
                self.seen + 1,
            )
        self.in_a_row = 0 if good else self.in_a_row + 1
        self.skipped += not good
        return good


def schedule(step, total, warmup=0, kind="wsd", cooldown=0.6, floor=0.0):
    """Learning-rate factor at `step` of `total`: linear warm-up to 1, then

    cosine: half a cosine down to `floor` (Loshchilov & Hutter 2017);
    wsd: stable at 1, then linear down to `floor` over the last `cooldown` share of the steps (Hägele et al. 2024)."""
    if step < warmup:
        return (step + 1) / warmup
    if kind == "cosine":
        done = (step - warmup) / max(1, total - warmup)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))
    left = (total - step) / max(1, cooldown * total)
    return floor + (1 - floor) * min(1.0, left)


# ---------------------------------------------------------------------------------- memory estimate
