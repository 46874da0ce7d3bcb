"""Muon for the hidden matrices, AdamW for everything else; loss scale, guard and schedule.

optimizer = MuonAdamW(model, muon_lr=0.02, adam_lr=0.004)
optimizer.step(schedule(step, total))
"""

import contextlib
import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from common import UserError
from training.ranks import gather, is_sharded, local, own_rows


# ---------------------------------------------------------------------------------------- the rules
def orthogonalize(G):
    """The nearest semi-orthogonal matrix to each of G (N, R, C), roughly.

    U V^T of its singular value decomposition, with singular values in 0.7..1.2 in place of 1: a
    quintic Newton-Schulz iteration with coefficients that trade exactness for speed (Jordan et al.
    2024, "Muon: An optimizer for hidden layers in neural networks")."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = G.size(-2) > G.size(-1)
    X = G.to(torch.bfloat16 if G.is_cuda else torch.float32)
    X = X.mT if tall else X  # so that X X^T is the small Gram matrix
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        A = X @ X.mT  # (N, R, R)
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)  # b A + c A A
        X = torch.baddbmm(X, B, X, beta=a)  # a X + B X
    X = X.mT if tall else X
    return X.to(G.dtype)


def muon_step(params, grads, momentums, lr, momentum, weight_decay):
    """Muon on matrices that all have one shape (R, C), so that its iteration runs once, as batched
    products.

    Nesterov momentum M, then each update is orthogonalized, so every direction of the matrix moves
    alike:

        M <- momentum M + (1 - momentum) G
        U  = orthogonalize(momentum M + (1 - momentum) G)
        W <- (1 - lr weight_decay) W - lr sqrt(max(1, R / C)) U

    The square root makes the effect on the output alike for tall and wide matrices. Under FSDP each
    rank holds some rows, but the iteration needs whole matrices: the update is gathered, and each
    rank keeps its own rows of the result."""
    torch._foreach_lerp_(momentums, grads, 1 - momentum)
    updates = torch._foreach_lerp(grads, momentums, momentum)
    whole = torch.stack([gather(u, p) for u, p in zip(updates, params)])  # (N, R, C)
    whole = orthogonalize(whole)
    updates = [own_rows(u, p) for u, p in zip(whole.unbind(), params)]
    rows, cols = params[0].shape
    weights = [local(p) for p in params]
    torch._foreach_mul_(weights, 1 - lr * weight_decay)
    torch._foreach_add_(weights, updates, alpha=-lr * max(1, rows / cols) ** 0.5)


# AdamW's betas, as is usual for language models, and its epsilon.
BETA1, BETA2 = 0.9, 0.95
EPS = 1e-10


def adamw_step(params, grads, means, squares, step, lr, weight_decay):
    """AdamW (Loshchilov & Hutter 2019, algorithm 2); `step` t counts from 1.

    m <- b1 m + (1 - b1) g
    v <- b2 v + (1 - b2) g^2
    w <- (1 - lr weight_decay) w - lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

    On a GPU this is one kernel of torch's over all tensors."""
    if params[0].is_cuda:
        return fused_adamw_step(params, grads, means, squares, step, lr, weight_decay)
    torch._foreach_lerp_(means, grads, 1 - BETA1)
    torch._foreach_mul_(squares, BETA2)
    torch._foreach_addcmul_(squares, grads, grads, 1 - BETA2)
    denominators = torch._foreach_div(squares, 1 - BETA2**step)
    torch._foreach_sqrt_(denominators)
    torch._foreach_add_(denominators, EPS)
    torch._foreach_mul_(params, 1 - lr * weight_decay)
    torch._foreach_addcdiv_(params, means, denominators, -lr / (1 - BETA1**step))


def fused_adamw_step(params, grads, means, squares, step, lr, weight_decay):
    """The same; adamw_step is its plain twin."""
    steps = [torch.full((), float(step), device=params[0].device)] * len(params)
    settings = dict(lr=lr, beta1=BETA1, beta2=BETA2, eps=EPS, weight_decay=weight_decay)
    never = dict(amsgrad=False, maximize=False)
    torch._fused_adamw_(params, grads, means, squares, [], steps, **settings, **never)


# -------------------------------------------------------------------------------- moments in 8 bits
MOMENT_BLOCK = 256  # values that share a scale
LEAST_8_BIT = 4096  # smaller parameters keep float32 moments, as in bitsandbytes
# The most values whose moments are there in float32 at a time: what a CPU's cache holds, or enough
# for a GPU that an adapter of rank 8 in a 7B model takes one pass.
UNPACKED_AT_ONCE = {"cpu": 1 << 18, "cuda": 1 << 25}


@lru_cache
def moment_values(device):
    """The values that packed moments can have (quant.dynamic_map), 256 signed ones of a mean and
    256 of a square, one behind the other; and the midpoints of each."""
    from quant import dynamic_map

    maps = [dynamic_map(device, signed) for signed in (True, False)]
    return torch.cat(maps), [(values[1:] + values[:-1]) / 2 for values in maps]


def pack_moments(moments, codes, tops):
    """Write moments (2, blocks, 256) into codes, uint8 of that shape, and tops (2, blocks, 1), each
    block's largest magnitude; the moments are no longer good for anything.

    Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization". No square may become 0:
    the step divides by their roots."""
    torch.linalg.vector_norm(moments, torch.inf, -1, keepdim=True, out=tops)
    moments /= tops.clamp(min=1e-38)  # a block may be all zeros
    _, midpoints = moment_values(moments.device)
    for i in range(2):
        codes[i] = torch.bucketize(moments[i], midpoints[i], out_int32=True)
    codes[1].clamp_(min=1)


def unpack_moments(codes, tops):
    """The inverse of `pack_moments` -> (2, blocks, 256) float32."""
    values, _ = moment_values(codes.device)
    index = codes.int()
    index[1] += 256
    return values[index].mul_(tops)


class PackedMoments:
    """Parameters with AdamW's moments in 8 bits. They lie end to end, each from the start of a
    block, so that all of them move at once; the parameters' own memory is moved there, too."""

    def __init__(self, params):
        blocks = [-(-p.numel() // MOMENT_BLOCK) for p in params]
        device = params[0].device
        self.params = params
        self.weights = params[0].new_zeros(sum(blocks), MOMENT_BLOCK)
        self.codes = torch.ones(2, *self.weights.shape, dtype=torch.uint8, device=device)
        self.codes[0] = 127  # the code of 0.0
        self.tops = torch.zeros(2, sum(blocks), 1, device=device)
        self.padding = torch.zeros(MOMENT_BLOCK, device=device)
        self.state = {}  # {parameter: its part, as `MuonAdamW.state` has it}
        parts = self.weights, *self.codes, *self.tops
        for p, *mine in zip(params, *(part.split(blocks) for part in parts)):
            home, mean, square, mean_top, square_top = mine
            home = home.view(-1)[: p.numel()].view_as(p)
            p.data = home.copy_(p.detach())
            state = dict(mean=mean, mean_top=mean_top, square=square, square_top=square_top)
            self.state[p] = state

    def step(self, *settings):
        """adamw_step, whose last arguments are given; a parameter without gradient has one of 0."""
        grads = []
        for p in self.params:
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            grads.append(grad.flatten())
            if p.numel() % MOMENT_BLOCK:
                grads.append(self.padding[: -p.numel() % MOMENT_BLOCK])
        grads = torch.cat(grads).view_as(self.weights)
        moments = unpack_moments(self.codes, self.tops)
        adamw_step([self.weights], [grads], [moments[0]], [moments[1]], *settings)
        pack_moments(moments, self.codes, self.tops)


def packed_together(params):
    """Parameters -> [PackedMoments] of as many as may be unpacked at once."""
    most = UNPACKED_AT_ONCE.get(params[0].device.type, 1 << 18)
    parts = []
    size = most  # so that the first one begins a part
    for p in params:
        if is_sharded(p):
            raise UserError(
                "moments in 8 bits are for unsharded parameters: drop --shard, or use "
                "--optimizer adamw"
            )
        if size + p.numel() > most:
            parts.append([])
            size = 0
        parts[-1].append(p)
        size += p.numel()
    return [PackedMoments(part) for part in parts]


# ------------------------------------------------------------------------------------ the optimizer
class MuonAdamW:
    """One optimizer, two rules: Muon for the layers' matrices, AdamW for all other parameters.

    Of kind "adamw" it gives the matrices to AdamW as well, at adam_lr; "adamw8bit" also keeps
    AdamW's moments in 8 bits. Not a torch.optim.Optimizer: it has nothing that we need, and its
    import takes long."""

    def __init__(
        self,
        model,
        muon_lr=0.02,
        adam_lr=0.004,
        weight_decay=0.0,
        momentum=0.95,
        kind="muon",
        embed_lr=0.0,
        average=0.0,
    ):
        self.momentum = momentum
        self.steps = 0
        self.names = {p: name for name, p in model.named_parameters() if p.requires_grad}
        self.state = {}  # {parameter: {name: tensor}}
        groups = {}
        for p, name in self.names.items():
            matrix = p.ndim == 2
            if kind == "muon" and matrix and name.startswith("layers."):
                rule = "muon", p.shape  # one batched product for those of one shape
                self.state[p] = {"momentum": torch.zeros_like(local(p))}
            elif kind == "adamw8bit" and p.numel() >= LEAST_8_BIT:
                rule = "adamw8bit", matrix
            else:
                rule = "adamw", matrix
                zeros = torch.zeros_like(local(p))
                self.state[p] = {"mean": zeros, "square": zeros.clone()}
            # Matrices are pulled towards zero; norms and biases have no reason to be small.
            decay = weight_decay if matrix else 0.0
            lr = muon_lr if rule[0] == "muon" else adam_lr
            if embed_lr and (not matrix or name.startswith("embed")):
                lr = embed_lr
            new = dict(rule=rule[0], lr=lr, weight_decay=decay, params=[])
            groups.setdefault((rule, lr), new)["params"].append(p)
        self.param_groups = list(groups.values())
        for group in self.param_groups:
            if group["rule"] == "adamw8bit":
                group["packed"] = packed_together(group["params"])
                for packed in group["packed"]:
                    self.state |= packed.state
        self.average = average
        self.means = {p: local(p).detach().clone() for p in self.names if average}

    def zero_grad(self):
        """Drop all gradients."""
        for p in self.state:
            p.grad = None

    @torch.no_grad()
    def step(self, factor=1.0):
        """Move all parameters that have a gradient, at the learning rates times `factor`."""
        self.steps += 1
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = [local(p.grad) for p in params]
            states = [self.state[p] for p in params]
            lr = group["lr"] * factor
            decay = group["weight_decay"]
            settings = self.steps, lr, decay
            if group["rule"] == "muon":
                momentums = [state["momentum"] for state in states]
                muon_step(params, grads, momentums, lr, self.momentum, decay)
            elif group["rule"] == "adamw":
                means = [state["mean"] for state in states]
                squares = [state["square"] for state in states]
                adamw_step([local(p) for p in params], grads, means, squares, *settings)
            else:
                for packed in group["packed"]:
                    packed.step(*settings)
        if self.average:
            # of the first steps a plain mean, so that where it began does not stay in it
            weight = max(1 - self.average, 1 / self.steps)
            weights = [local(p) for p in self.means]
            torch._foreach_lerp_([*self.means.values()], weights, weight)

    @contextlib.contextmanager
    @torch.no_grad()
    def averaged(self):
        """Context: the parameters are their running means (Polyak and Juditsky 1992), where
        --average keeps them."""
        weights = {p: local(p).clone() for p in self.means}
        for p, mean in self.means.items():
            local(p).copy_(mean)
        try:
            yield
        finally:
            for p, weight in weights.items():
                local(p).copy_(weight)

    def tensors(self):
        """The state for a file, {parameter.name: tensor}. Under FSDP all ranks must call it."""
        tensors = {"steps": torch.tensor(self.steps)}
        for p, state in self.state.items():
            for name, tensor in state.items():
                tensors[f"{self.names[p]}.{name}"] = gather(tensor, p)
        for p in self.means:  # the model folder holds these, so the last weights are kept here
            tensors[f"{self.names[p]}.weight"] = gather(local(p.detach()), p)
        return tensors

    @torch.no_grad()
    def load_tensors(self, tensors):
        """The inverse of `tensors`; names and shapes must be those of this model."""
        self.steps = int(tensors["steps"])
        for p, state in self.state.items():
            for name, tensor in state.items():
                stored = tensors[f"{self.names[p]}.{name}"].to(tensor.device)
                tensor.copy_(own_rows(stored, p))
        for p, mean in self.means.items():
            mean.copy_(local(p))
            local(p).copy_(own_rows(tensors[f"{self.names[p]}.weight"].to(mean.device), p))


# ------------------------------------------------------------ around a step: scale, guard, schedule
class LossScale:
    """Dynamic loss scaling for fp16, whose gradients underflow below 6e-8.

    Micikevicius et al. 2018, section 3.2: the loss is multiplied by `scale`, the gradients divided
    by it; a step whose gradients overflowed is skipped and halves the scale, `patience` good steps
    in a row double it. torch's GradScaler does the same, but decides per rank; here the decision is
    the norm of all gradients, which all ranks share. Off (scale 1) for other dtypes."""

    patience = 1000

    def __init__(self, dtype):
        self.on = dtype == torch.float16
        self.scale = 2.0**16 if self.on else 1.0
        self.good = 0

    def update(self, finite):
        if not self.on:
            return
        self.good = self.good + 1 if finite else 0
        if not finite:
            self.scale /= 2
        elif self.good % self.patience == 0:
            self.scale *= 2


@dataclass
class Guard:
    """Which gradients to skip: those that are not finite, or far above their running mean.

    A skipped gradient counts as 0: momentum still moves the weights."""

    factor: float  # how far; 0 never
    mean: float = 0.0  # of the gradients' norms
    seen: int = 0  # norms in the mean
    skipped: int = 0
    in_a_row: int = 0
    limit: int = 10  # skipped steps in a row after which the loop stops the run

    @property
    def most(self):
        """The largest norm of a gradient that is taken."""
        most = self.factor * self.mean  # 0: spikes are not asked for, or nothing was learned so far
        return most if most and self.seen > 50 else torch.finfo(torch.float32).max

    def count(self, norm, good):
        """Take note of a gradient's norm, and whether the step took it."""
        if math.isfinite(norm):
            # Of a spike counts what is believed, so that a lasting change is accepted in time.
            believed = min(norm, self.most)
            self.mean = self.mean * 0.98 + believed * 0.02 if self.seen else believed
            self.seen += 1
        self.in_a_row = 0 if good else self.in_a_row + 1
        self.skipped += not good


def schedule(step, total, warmup=0, kind="wsd", cooldown=0.6):
    """Learning-rate factor at `step` of `total`: linear warm-up to 1, then

    cosine: half a cosine down to 0 (Loshchilov & Hutter 2017); wsd: stable at 1, then linear down
    to 0 over the last `cooldown` share of the steps (Hägele et al. 2024)."""
    rise = (step + 1) / max(1, warmup)
    if kind == "wsd":
        return min(1.0, rise, (total - step) / max(1, cooldown * total))
    if step < warmup:
        return rise
    done = (step - warmup) / max(1, total - warmup)
    return 0.5 * (1 + math.cos(math.pi * done))
