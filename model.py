"""One decoder-only Transformer for GPT-2, Llama 2/3, Mistral, Qwen2, Qwen3 and SmolLM shapes; loads and saves model folders.

    model = Transformer.from_pretrained("runs/shakespeare")      # or a folder from the Hugging Face hub
    logits = model(ids)                                          # (B, T) int64 -> (B, T, V) float32

Shapes: B batch, T time, C channels (hidden_size), H query heads, K key/value heads, D head dim, V vocabulary.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from common import UserError

LOGITS_AT_ONCE = 1 << 26  # the most logits that the loss holds at a time: 256 MiB of float32


# ------------------------------------------------------------------------------------------- config
@dataclass
class Config:
    """The shape of a model, in the words of Hugging Face's config.json."""

    model_type: str = "qwen3"  # gpt2 | llama (SmolLM too) | mistral | qwen2 | qwen3
    vocab_size: int = 256  # V
    hidden_size: int = 128  # C
    intermediate_size: int = 384  # width of the MLP
    num_hidden_layers: int = 4
    num_attention_heads: int = 4  # H
    num_key_value_heads: int = 4  # K: fewer than H is grouped-query attention
    head_dim: int = 32  # D: H*D need not equal C
    max_position_embeddings: int = 256  # the context length
    rope: dict = dataclasses.field(
        default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0}
    )
    sliding_window: int | None = None  # keys a query of a sliding layer sees, itself included
    sliding_layers: tuple = ()  # which layers slide
    norm_eps: float = 1e-6
    tie_word_embeddings: bool = True  # the head is the embedding matrix
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list | None = None
    dropout: float = 0.0  # a matter of training: not part of the folder

    @property
    def is_gpt2(self):
        """LayerNorm, learned positions and a GELU MLP, where the others have RMSNorm, RoPE and SwiGLU."""
        return self.model_type == "gpt2"

    @staticmethod
    def from_dict(d: dict, where="config.json") -> "Config":
        """A parsed config.json -> Config; see formats.hub."""
        from formats.hub import config_from_dict

        return config_from_dict(d, where)

    def to_dict(self):
        """-> config.json's content; see formats.hub."""
        from formats.hub import config_to_dict

        return config_to_dict(self)

    def kv_bytes_per_token(self, bytes_per_value=2):
        """Bytes that one token adds to the key/value cache."""
        return (
            2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * bytes_per_value
        )


# --------------------------------------------------------------------------------- rotary embedding
def rope_frequencies(config):
    """Rotation speed of each pair of channels, (D/2,) float32, and the factor on cos and sin.

    Su et al. 2021 (RoPE); "linear" is position interpolation (Chen et al. 2023); "yarn" is Peng et al. 2023, eq. 17-23;
    "llama3" is Meta's rule from the Llama 3.1 release. All equal to transformers' modeling_rope_utils.
    """
    rope, D = config.rope, config.head_dim
    theta, kind, factor = rope["rope_theta"], rope["rope_type"], rope.get("factor", 1.0)
    # an explicit device, for models are built under torch.device("meta")
    frequency = 1.0 / theta ** (torch.arange(0, D, 2, dtype=torch.int64, device="cpu").float() / D)
    if kind == "linear":
        return frequency / factor, 1.0
    if kind == "llama3":  # slow waves are stretched, fast ones kept, those between blended
        turns = (
            rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
        )  # over the original context
        low, high = rope.get("low_freq_factor", 1.0), rope.get("high_freq_factor", 4.0)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return keep * frequency + (1 - keep) * frequency / factor, 1.0
    if kind == "yarn":

        def channel(turns):  # the channel that makes so many turns over the original context
            return (
                D
                * math.log(rope["original_max_position_embeddings"] / (turns * 2 * math.pi))
                / (2 * math.log(theta))
            )

        low, high = channel(rope.get("beta_fast") or 32), channel(rope.get("beta_slow") or 1)
        if rope.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, D - 1)
        ramp = ((torch.arange(D // 2, device="cpu").float() - low) / max(high - low, 1e-3)).clamp(
            0, 1
        )
        grow = 0.1 * math.log(factor) if factor > 1 else 0.0
        m, m_all = rope.get("mscale"), rope.get("mscale_all_dim")
        scale = (1 + m * grow) / (1 + m_all * grow) if m and m_all else 1 + grow
        return frequency * (1 - ramp) + frequency / factor * ramp, rope.get(
            "attention_factor"
        ) or scale
    return frequency, 1.0


def rotate(x, cos, sin):
    """Turn each pair (x[i], x[i + D/2]) by its position's angle. x (B, T, H, D); cos, sin (T, D/2) or (B, T, D/2).

    The two halves, not neighbouring channels, form the pairs: the row order of Hugging Face's checkpoints.
    """
    cos, sin = cos[..., None, :], sin[..., None, :]  # (T, 1, D/2): the same for every head
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


# ----------------------------------------------------------------------------------------- the loss
def cross_entropy_sum(hidden, weight, targets, rows_at_once=None):
    """Summed cross-entropy of the logits hidden @ weight.T against targets, -100 ignored -> scalar float32, nats.

    hidden (N, C), weight (V, C), targets (N,) int64. Above LOGITS_AT_ONCE the work is done in chunks of rows, so that N*V logits
    never exist whole. Rows without a target, most of them in instruction tuning, are left out first where that costs nothing: on
    a GPU it would have to wait for their number.
    """
    if (
        hidden.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not (kept := targets != -100).all()
    ):
        hidden, targets = hidden[kept], targets[kept]
    rows = rows_at_once or max(1, LOGITS_AT_ONCE // weight.size(0))
    if hidden.size(0) > rows and torch.is_grad_enabled():
        return ChunkedCrossEntropy.apply(hidden, weight, targets, rows)
    return sum(
        F.cross_entropy(F.linear(h, weight).float(), t, ignore_index=-100, reduction="sum")
        for h, t in zip(hidden.split(rows), targets.split(rows))
    )


class ChunkedCrossEntropy(torch.autograd.Function):
    """The loss and, in the same pass, its gradients: d loss / d logits = softmax - one_hot is at hand while a chunk's logits
    are, so nothing is computed twice and backward only scales (the idea of Apple's and Liger's fused linear losses)."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, rows):
        device = hidden.device.type
        dtype = (
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        )
        exact = (
            torch.float32 if dtype == torch.float16 else dtype
        )  # the loss is scaled only later: here fp16 would underflow
        w, total, grad_hidden = (
            weight.to(dtype),
            hidden.new_zeros((), dtype=torch.float32),
            torch.empty_like(hidden),
        )
        # a frozen head (LoRA) needs none, and V*C float32 would be half a gigabyte of a 7B model
        grad_weight = (
            torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        )
        for i in range(0, hidden.size(0), rows):
            h, t = (
                hidden[i : i + rows].to(dtype),
                targets[i : i + rows, None],
            )  # (rows, C), (rows, 1)
            logits = (h @ w.t()).float()  # (rows, V)
            lse, counts, t = logits.logsumexp(-1, keepdim=True), t != -100, t.clamp(min=0)
            total += ((lse - logits.gather(1, t)) * counts).sum()
            d = logits.sub_(lse).exp_()  # softmax
            d = d.scatter_add_(1, t, torch.full_like(lse, -1.0)).mul_(counts).to(exact)
            grad_hidden[i : i + rows] = d @ w.to(exact)
            if grad_weight is not None:
                grad_weight += d.t() @ h.to(exact)
        ctx.save_for_backward(
            grad_hidden, grad_weight if grad_weight is None else grad_weight.to(weight.dtype)
        )
        return total

    @staticmethod
    def backward(ctx, grad):
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            grad_hidden * grad,
            grad_weight if grad_weight is None else grad_weight * grad,
            None,
            None,
        )


@torch.compiler.disable  # how many targets there are differs from batch to batch, and so would the compiled shapes
def token_losses(hidden, head, targets):
    """hidden (B, T, C), head: C -> V, targets (B, T) -> cross-entropy of each target in nats (B, T) float32, 0 where -100.

    Only positions with a target meet the head, in parts whose logits are computed again in backward and never exist whole.
    """

    def losses(h, t):  # (n, C), (n,) -> (n,)
        return F.cross_entropy(head(h).float(), t, reduction="none")

    at = targets != -100
    wanted, rows = hidden[at], max(1, LOGITS_AT_ONCE // head.out_features)  # (B, T, C) -> (N, C)
    parts = list(zip(wanted.split(rows), targets[at].split(rows)))
    each = (
        [losses(*parts[0])]
        if len(parts) == 1
        else [checkpoint(losses, h, t, use_reentrant=False) for h, t in parts]
    )
    return hidden.new_zeros(targets.shape, dtype=torch.float32).masked_scatter(at, torch.cat(each))


# -------------------------------------------------------------------------------------- the network
def visible(gap, window=None, q_doc=None, k_doc=None):
    """Whether a query sees a key that is `gap` positions before it: both in one document, or the key in one numbered below 0,
    which all after it may look at (a prompt that several answers share); no further back than the window."""
    seen = gap >= 0
    if window is not None:
        seen = seen & (gap < window)
    return seen if q_doc is None else seen & ((q_doc == k_doc) | (k_doc < 0))


def attention_mask(q_pos, k_pos, window=None, docs=None):
    """Which keys each query may see: (Tq, Tk) bool, or with docs (B, T), where queries are keys, (B, 1, T, T).

    q_pos (Tq,), k_pos (Tk,): positions, with docs also (B, T)."""
    gap = q_pos[..., :, None] - k_pos[..., None, :]  # (Tq, Tk) or (B, Tq, Tk)
    gap = gap if gap.ndim == 2 else gap[:, None]
    return visible(
        gap, window, *(() if docs is None else (docs[:, None, :, None], docs[:, None, None, :]))
    )


def block_mask(positions, window, docs):
    """The same for FlexAttention on a GPU, where dense masks cost T*T and keep the fast kernels away: whole blocks that nothing
    may see are never computed."""
    from torch.nn.attention.flex_attention import create_block_mask

    positions = positions.expand(docs.shape)  # (T,) or (B, T) -> (B, T)

    def rule(b, h, q, k):
        gap = (
            q - k if window is None else positions[b, q] - positions[b, k]
        )  # of causality rows say the same, in less memory
        return visible(gap, window, docs[b, q], docs[b, k])

    return create_block_mask(
        rule, docs.size(0), None, docs.size(1), docs.size(1), device=docs.device
    )


def flex(q, k, v, mask):
    """FlexAttention, which is only fast compiled."""
    from torch.nn.attention.flex_attention import flex_attention

    attend = torch.compile(flex_attention, dynamic=False) if q.is_cuda else flex_attention
    return attend(q, k, v, block_mask=mask, enable_gqa=q.size(1) != k.size(1))


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, H, K, D = (
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.H, self.K, self.D, self.dropout = H, K, D, config.dropout
        self.q_proj = nn.Linear(C, H * D, bias=config.qkv_bias)
        self.k_proj = nn.Linear(C, K * D, bias=config.qkv_bias)
        self.v_proj = nn.Linear(C, K * D, bias=config.qkv_bias)
        self.o_proj = nn.Linear(H * D, C, bias=config.out_bias)
        if (
            config.model_type == "qwen3"
        ):  # QK-norm keeps the attention logits in range, so higher learning rates hold
            self.q_norm = nn.RMSNorm(D, eps=config.norm_eps)
            self.k_norm = nn.RMSNorm(D, eps=config.norm_eps)

    def forward(self, x, rope, mask, cache=None):
        """x (B, T, C) -> (B, T, C). rope: (cos, sin) or None; mask: None means causal; cache.append -> all keys, values."""
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.H, self.D)  # (B, T, H*D) -> (B, T, H, D)
        k = self.k_proj(x).view(B, T, self.K, self.D)
        v = self.v_proj(x).view(B, T, self.K, self.D)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
        if cache is not None:
            k, v = cache.append(k, v)
        if mask is not None and not isinstance(mask, torch.Tensor):
            return self.o_proj(flex(q, k, v, mask).transpose(1, 2).reshape(B, T, self.H * self.D))
        # one query row sees everything before it, so causality needs a mask only from two rows on
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None and T > 1,
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=self.K != self.H,
        )
        return self.o_proj(
            y.transpose(1, 2).reshape(B, T, self.H * self.D)
        )  # (B, H, T, D) -> (B, T, H*D) -> (B, T, C)


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020), or GPT-2's GELU MLP, which has no gate."""

    def __init__(self, config):
        super().__init__()
        C, M, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        if not config.is_gpt2:
            self.gate_proj = nn.Linear(C, M, bias=bias)
        self.up_proj = nn.Linear(C, M, bias=bias)
        self.down_proj = nn.Linear(M, C, bias=bias)

    def forward(self, x):
        if hasattr(self, "gate_proj"):
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))


def make_norm(config):
    norm = nn.LayerNorm if config.is_gpt2 else nn.RMSNorm
    return norm(config.hidden_size, eps=config.norm_eps)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = make_norm(config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = make_norm(config)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def products(self):
        """The linear layers in the order of their work, those over the same input together: q, k, v; o; gate and up; down."""
        a, m = self.self_attn, self.mlp
        up = [m.gate_proj, m.up_proj] if hasattr(m, "gate_proj") else [m.up_proj]
        return [a.q_proj, a.k_proj, a.v_proj], [a.o_proj], up, [m.down_proj]

    def forward(self, x, rope, mask, cache=None):
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), rope, mask, cache))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.quantization = (
            None  # the folder's quantization_config, where linear layers are packed (quant.py)
        )
        self.source = None  # the folder that the weights came from
        self.recompute = False  # activation checkpointing: keep only each layer's input, compute the rest again in backward
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.is_gpt2:
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        else:
            frequency, self.rope_scale = rope_frequencies(config)
            self.register_buffer("rope_frequency", frequency, persistent=False)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = make_norm(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()

    def tie(self):
        """With tied embeddings the head's weight *is* the embedding's: one Parameter, two places."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def init_weights(self):
        """Fresh weights. Matrices that write into the residual stream start at zero, so every block begins as the identity
        and the gradients at step 0 are those of a shallow network; GPT-2 keeps its own published rule. An embedding that is
        not also the head starts large, or the first blocks' outputs would drown it; one that is starts so small that a
        token's logit for itself, C * std after the norm, does not outweigh a large vocabulary: the first loss is ln V."""
        std, tied = 0.02, self.config.tie_word_embeddings
        embedding_std = min(std, 5 / self.config.hidden_size) if tied else 0.5
        for name, p in self.named_parameters():
            if p.ndim < 2:
                nn.init.constant_(p, 1.0 if "norm" in name and name.endswith("weight") else 0.0)
            elif self.config.is_gpt2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(
                    p, std=std / math.sqrt(2 * self.config.num_hidden_layers) if residual else std
                )
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(p)
            elif name.startswith(("embed_tokens", "lm_head")):
                nn.init.normal_(p, std=embedding_std if name.startswith("embed") else std)
            else:
                nn.init.normal_(p, std=p.size(1) ** -0.5)

    def start(self, ids, positions=None, docs=None, past=0):
        """What the first block reads: x (B, T, C), the rotations (cos, sin) or None, and the two masks of `masks`."""
        T = ids.size(1)
        if positions is None and past + T > self.config.max_position_embeddings:
            raise UserError(
                f"{past + T:,} tokens, but this model's context is {self.config.max_position_embeddings:,}"
            )
        if positions is None:
            positions = torch.arange(past, past + T, device=ids.device)
        x = self.embed_tokens(ids)  # (B, T) -> (B, T, C)
        rope = None
        if self.config.is_gpt2:
            x = x + self.embed_positions(positions)
        else:
            angle = positions[..., None].float() * self.rope_frequency  # (T, D/2)
            rope = (
                (angle.cos() * self.rope_scale).to(x.dtype),
                (angle.sin() * self.rope_scale).to(x.dtype),
            )
        return self.dropout(x), rope, self.masks(T, past, docs, positions)

    def hidden(self, ids, positions=None, docs=None, caches=None):
        """(B, T) token ids -> (B, T, C), what the head reads.

        positions (T,) default to 0..T-1; docs (B, T) keeps packed documents apart; caches is a list, one per layer, of
        objects with `.append(k, v) -> (all k, all v)` and `.length`, the tokens already in it.
        """
        x, rope, (full, sliding) = self.start(
            ids, positions, docs, caches[0].length if caches else 0
        )
        for i, layer in enumerate(self.layers):
            mask = sliding if i in self.config.sliding_layers else full
            if self.recompute and self.training:
                x = checkpoint(layer, x, rope, mask, use_reentrant=False)
            else:
                x = layer(x, rope, mask, caches[i] if caches else None)
        return self.norm(x)

    def masks(self, T, past, docs, positions):
        """(mask of full layers, mask of sliding layers); None wherever plain causal attention says the same."""
        window = self.config.sliding_window if self.config.sliding_layers else None
        slides = window is not None and past + T > window
        if docs is None and not slides and (past == 0 or T == 1):
            return None, None
        if docs is not None and docs.is_cuda and past == 0:
            full, sliding = (
                block_mask(positions, None, docs),
                block_mask(positions, window, docs) if slides else None,
            )
        else:
            k_pos = torch.arange(past + T, device=positions.device) if docs is None else positions
            full = attention_mask(k_pos[past:], k_pos, None, docs)
            sliding = attention_mask(k_pos[past:], k_pos, window, docs) if slides else None
        return full, sliding if slides else full

    def forward(self, ids, targets=None, per_token=False, **kw):
        """(B, T) int64 token ids -> (B, T, V) float32 logits; keywords as in `hidden`.

        With targets (B, T) -> the sum of the cross-entropy in nats, float32, over all targets that are not -100; or, with
        per_token, each of them: (B, T) float32, 0 where the target is -100.
        """
        hidden = self.hidden(ids, **kw)
        if targets is None:
            return self.lm_head(hidden).float()
        if per_token:
            return token_losses(hidden, self.lm_head, targets)
        return cross_entropy_sum(hidden.flatten(0, 1), self.lm_head.weight, targets.flatten())

    @torch.inference_mode()
    def generate(
        self, ids, max_tokens, temperature=0.8, top_k=0, top_p=1.0, seed=0, vocab_size=None
    ):
        """Continue one list of token ids -> iterator of new ids; ends at the model's end-of-text or after max_tokens.

        vocab_size: the tokenizer's, where the model has rows for more ids (padding) that mean nothing. When the context is full, its
        older half is forgotten and the rest read again.
        """
        model = self
        config, weight = model.config, model.embed_tokens.weight
        if not ids:
            raise UserError("the prompt has no tokens; give at least one character")
        generator = torch.Generator(weight.device).manual_seed(seed)
        ends = (
            config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        )
        ids, context, caches, new = list(ids), config.max_position_embeddings, None, []
        for _ in range(max_tokens):
            if caches is None or caches[0].length + len(new) > context:
                new = ids[-context:] if caches is None else ids[-(context // 2) :]
                room = min(context, len(ids) + max_tokens)
                caches = [
                    KVCache(config, 1, weight.device, weight.dtype, room) for _ in model.layers
                ]
            hidden = model.hidden(
                torch.tensor([new], device=weight.device), caches=caches
            )  # (1, T, C)
            logits = model.lm_head(
                hidden[:, -1]
            ).float()  # (1, V): only the last position is asked for
            token = sample(logits[:, :vocab_size], temperature, top_k, top_p, generator).item()
            if token in ends:
                return
            yield token
            ids.append(token)
            new = [token]

    # ----------------------------------------------------------------------------------- accounting
    def num_params(self) -> int:
        """Parameters, tied ones counted once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, T, training=True):
        """Floating-point operations per token at context T: 2 per weight of every matrix product and 4*H*D*T for
        attention's two products, three times that with the backward pass (PaLM, appendix B: causality not discounted)."""
        c = self.config
        matmul = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        attention = 4 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * T
        return (3 if training else 1) * (2 * matmul + attention)

    # -------------------------------------------------------------------------------- model folders
    def save_pretrained(self, folder: str | Path, state=None) -> None:
        """Write a model folder; state: the state dict, where it is not simply this module's."""
        from formats.hub import save_model

        save_model(self, folder, state)

    @staticmethod
    def from_pretrained(
        folder: str | Path, device="cpu", dtype=None, dropout: float = 0.0
    ) -> "Transformer":
        """Load a model folder: config.json and one or many safetensors files; dtype None keeps theirs."""
        from formats.hub import load_model

        return load_model(folder, device, dtype, dropout)


# --------------------------------------------------------------------- names: ours <-> the folder's


class KVCache:
    """The keys and values of one layer for all tokens so far, in room reserved at the start."""

    def __init__(self, config, batch, device, dtype, room=None):
        """room: tokens it can hold [the model's context]"""
        shape = (
            2,
            batch,
            config.num_key_value_heads,
            room or config.max_position_embeddings,
            config.head_dim,
        )
        self.kv, self.length = (
            torch.empty(shape, device=device, dtype=dtype),
            0,
        )  # (2, B, K, room, D)

    def append(self, k, v):
        """k, v (B, K, T, D) of new tokens -> those of all tokens, (B, K, length, D)."""
        end = self.length + k.size(2)
        self.kv[0, :, :, self.length : end], self.kv[1, :, :, self.length : end] = k, v
        self.length = end
        return self.kv[0, :, :, :end], self.kv[1, :, :, :end]


def sample(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Draw one token id per row of logits (B, V) float32 -> (B,) int64. Temperature 0 takes the likeliest."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if 0 < top_k < logits.size(-1):
        kth = logits.topk(top_k).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1:  # nucleus sampling (Holtzman et al. 2020)
        ranked, order = logits.softmax(-1).sort(descending=True)
        before = (
            ranked.cumsum(-1) - ranked
        )  # probability of everything likelier; the first is always kept
        logits = logits.masked_fill(
            (before >= top_p).scatter(-1, order, before >= top_p), -torch.inf
        )
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
