"""A decoder-only Transformer: GPT-2, Llama 2 and 3, Mistral, Qwen2, Qwen3, SmolLM are its settings.

    model = Transformer.from_pretrained("runs/shakespeare")   # or a folder from Hugging Face's hub
    logits = model(ids)                                       # (B, T) int64 -> (B, T, V) float32
    new = list(model.generate([1, 2, 3], max_tokens=100))

Shapes: B batch, T time, C channels (hidden_size), M width of the MLP, H query heads, K key/value
heads, D head dim, V vocabulary.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from common import UserError, first_words
from runtime import onednn_is_faster

LOGITS_AT_ONCE = 1 << 26  # the most logits that the loss holds at a time: 256 MiB of float32


@dataclass
class Config:
    """The shape of a model, in the words of Hugging Face's config.json."""

    model_type: str = "qwen3"  # gpt2 | llama (SmolLM too) | mistral | qwen2 | qwen3
    vocab_size: int = 256  # V
    hidden_size: int = 128  # C
    intermediate_size: int = 384  # M
    num_hidden_layers: int = 4
    num_attention_heads: int = 4  # H
    num_key_value_heads: int = 4  # K: fewer than H is grouped-query attention
    head_dim: int = 32  # D: H*D need not equal C
    max_position_embeddings: int = 256  # the context length
    # the rule for rotary angles; GPT-2 has none
    rope: dict = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})
    sliding_window: int | None = None  # keys that a query of a sliding layer sees, itself included
    sliding_layers: tuple = ()  # which layers slide
    norm_eps: float = 1e-6
    tie_word_embeddings: bool = True  # the head is the embedding matrix
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list | None = None
    generation: dict = field(default_factory=dict)  # generation_config.json, without these two
    # The folder does not have the last two.
    dropout: float = 0.0  # in training only
    flex: bool = field(default=True, compare=False)  # documents on a GPU take it, until it fails

    @property
    def end_ids(self):
        """The ids that end a text, as a list whatever eos_token_id is."""
        ends = self.eos_token_id
        if ends is None:
            return []
        return ends if isinstance(ends, list) else [ends]

    @property
    def is_gpt2(self):
        """LayerNorm, learned positions and a GELU MLP; the others have RMSNorm, RoPE and SwiGLU."""
        return self.model_type == "gpt2"


# -------------------------------------------------------------------------------- rotary positions
def rope_frequencies(config):
    """Radians by which each pair of channels turns from a position to the next, (D/2,), and a
    factor on cos and sin.

    The plain rule is RoPE's (Su et al. 2021): pair i turns by theta^(-2i/D). The others divide the
    frequencies, or a share of each, by a factor to reach a longer context: "linear" is position
    interpolation (Chen et al. 2023), "llama3" Meta's rule from the Llama 3.1 release, "yarn" Peng
    et al. 2023. All are as in transformers' modeling_rope_utils.
    """
    rope = config.rope
    kind = rope["rope_type"]
    # The device is named because models are built under torch.device("meta").
    channel = torch.arange(0, config.head_dim, 2, device="cpu").float()
    frequency = 1.0 / rope["rope_theta"] ** (channel / config.head_dim)
    if kind == "default":
        return frequency, 1.0
    share = scale = 1.0  # which is all of "linear"; formats.hub refuses any other rule
    if kind == "llama3":
        share = llama3_share(rope, frequency)
    if kind == "yarn":
        share = yarn_share(rope, len(frequency))
        scale = yarn_scale(rope)
    return frequency * (1 - share) + frequency / rope["factor"] * share, scale


def llama3_share(rope, frequency):
    """Slow waves are stretched by the factor, fast ones kept, those between blended."""
    low = rope.get("low_freq_factor", 1.0)
    high = rope.get("high_freq_factor", 4.0)
    original = rope["original_max_position_embeddings"]
    turns = original * frequency / (2 * math.pi)  # of each pair, over the original context
    return ((high - turns) / (high - low)).clamp(0, 1)


def yarn_share(rope, pairs):
    """YaRN's "NTK by parts" (eq. 17, 18): the blend goes along the pairs, not their turns."""
    original = rope["original_max_position_embeddings"]

    def pair_that_turns(turns):  # so many times over the original context
        return pairs * math.log(original / (turns * 2 * math.pi)) / math.log(rope["rope_theta"])

    low = pair_that_turns(rope.get("beta_fast") or 32)
    high = pair_that_turns(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low = math.floor(low)
        high = math.ceil(high)
    low = max(low, 0)
    high = min(high, 2 * pairs - 1)
    pair = torch.arange(pairs, device="cpu")
    return ((pair - low) / max(high - low, 1e-3)).clamp(0, 1)


def yarn_scale(rope):
    """YaRN's factor on queries and keys: a longer context needs a sharper softmax (eq. 22).

    mscale and mscale_all_dim are DeepSeek's variant of it; as in transformers, one of them without
    the other says nothing."""
    growth = 0.1 * math.log(max(rope["factor"], 1))
    scale = 1 + growth
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        scale = (1 + rope["mscale"] * growth) / (1 + rope["mscale_all_dim"] * growth)
    return rope.get("attention_factor") or scale


def rotate(x, cos, sin):
    """Turn each pair (x[i], x[i + D/2]) by its position's angle. x (B, T, H, D) -> the same shape.

    cos, sin: (T, 1, D) or (B, T, 1, D) of `cos_and_sin`, the same for every head. The two halves,
    not neighbouring channels, form the pairs: that is the row order of Hugging Face's checkpoints.

        x[i]       -> x[i] cos - x[i + D/2] sin
        x[i + D/2] -> x[i + D/2] cos + x[i] sin

    The minus is in `sin` already: its first half is negative, so the code below only adds.
    """
    swapped = x.roll(x.size(-1) // 2, -1)  # the other one of each pair
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype)


# ------------------------------------------------------------------------------------ who sees whom
def visible(gap, window=None, query_doc=None, key_doc=None):
    """Whether a query sees a key that is `gap` positions before it.

    It sees the past, itself included, no further back than the window, in its own document only.
    A document numbered below 0 is seen from all after it: a prompt that several answers share.
    """
    seen = gap >= 0
    if window is not None:
        seen = seen & (gap < window)
    if query_doc is not None:
        seen = seen & ((query_doc == key_doc) | (key_doc < 0))
    return seen


def attention_mask(positions, window=None, docs=None, past=0):
    """Which keys each query may see, True where it may: (T, past + T), or (B, 1, T, T) with docs.

    positions (past + T,) are those of the keys, of which the last T are queries, too; with docs
    (B, T) they may be (B, T).
    """
    gap = positions[..., past:, None] - positions[..., None, :]  # (T, past + T) or (B, T, T)
    if docs is None:
        return visible(gap, window)
    gap = gap.unsqueeze(-3)  # (1, T, T) or (B, 1, T, T): one mask for all heads
    return visible(gap, window, docs[:, None, :, None], docs[:, None, None, :])


def block_mask(positions, window, docs):
    """The same mask as a rule for FlexAttention: blocks that nothing may see are never computed.

    On a GPU a dense mask costs T*T bytes and keeps the fast kernels away. positions (T,) or (B, T).
    """
    from torch.nn.attention.flex_attention import create_block_mask

    B, T = docs.shape
    positions = positions.expand(B, T)

    def rule(b, head, q, k):
        gap = q - k  # without a window its sign is enough: rows have the order of positions
        if window is not None:
            gap = positions[b, q] - positions[b, k]
        return visible(gap, window, docs[b, q], docs[b, k])

    return create_block_mask(rule, B, None, T, T, device=docs.device)


def flex(q, k, v, mask):
    """Attention under a block mask. q (B, H, T, D), k and v (B, K, T, D) -> (B, H, T, D)."""
    from torch.nn.attention.flex_attention import flex_attention

    if q.is_cuda:  # uncompiled it is as slow as a dense mask
        flex_attention = torch.compile(flex_attention, dynamic=False)
    return flex_attention(q, k, v, block_mask=mask, enable_gqa=q.size(1) != k.size(1))


def dense(mask):
    """A block mask as the dense one that it stands for, (B, 1, T, T)."""
    from torch.nn.attention.flex_attention import create_mask

    B, _, T, _ = mask.shape
    return create_mask(mask.mask_mod, B, 1, T, T, mask.kv_indices.device)


def give_up_flex(config, why):
    """The model's attention takes dense masks from now on; this is said once."""
    print(f"mask     packed documents take dense masks instead of FlexAttention: {why}")
    config.flex = False


# -------------------------------------------------------------------------------------- the network
class Attention(nn.Module):
    """Causal self-attention whose query heads share the key/value heads in groups of H/K."""

    def __init__(self, config):
        super().__init__()
        C = config.hidden_size
        D = config.head_dim
        queries = config.num_attention_heads * D
        keys = config.num_key_value_heads * D
        self.config = config
        self.heads = -1, D  # what a row of H*D or K*D channels is cut into
        self.q_proj = FloatLinear(C, queries, config.qkv_bias)
        self.k_proj = FloatLinear(C, keys, config.qkv_bias)
        self.v_proj = FloatLinear(C, keys, config.qkv_bias)
        self.o_proj = FloatLinear(queries, C, config.out_bias)
        self.q_norm = self.k_norm = None
        if config.model_type == "qwen3":  # bounds the attention logits: higher learning rates hold
            self.q_norm = RMSNorm(D, config.norm_eps)
            self.k_norm = RMSNorm(D, config.norm_eps)

    def forward(self, x, rope, mask, cache=None):
        """x (B, T, C) -> (B, T, C).

        rope: (cos, sin) or None. mask: dense, a block mask, or None for plain causal attention.
        cache: this layer's KVCache, if x only continues what is in there.
        """
        rows = outputs(x, (self.q_proj, self.k_proj, self.v_proj))
        # (B, T, H*D) -> (B, T, H, D); of k and v (B, T, K*D) -> (B, T, K, D)
        q, k, v = [row.unflatten(2, self.heads) for row in rows]
        if self.q_norm is not None:
            q = self.q_norm(q)
            k = self.k_norm(k)
        if rope is not None:
            q = rotate(q, *rope)
            k = rotate(k, *rope)
        q, k, v = [heads.transpose(1, 2) for heads in (q, k, v)]  # (B, T, H, D) -> (B, H, T, D)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, K, T, D) -> (B, K, T so far, D)
        y = self.attend(q, k, v, mask)
        return self.o_proj(y.transpose(1, 2).flatten(2))  # (B, H, T, D) -> (B, T, H*D)

    def attend(self, q, k, v, mask):
        """q (B, H, Tq, D), k and v (B, K, Tk, D) -> (B, H, Tq, D)."""
        if mask is not None and not isinstance(mask, torch.Tensor):  # a block mask
            if torch.compiler.is_compiling():
                return flex(q, k, v, mask)
            if self.config.flex:
                try:
                    return flex(q, k, v, mask)
                except torch.OutOfMemoryError:
                    raise  # it says nothing about FlexAttention
                except Exception as error:  # whatever a compiler can trip over
                    give_up_flex(self.config, first_words(error))
            mask = dense(mask)
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            mask,
            self.config.dropout if self.training else 0.0,
            is_causal=mask is None and q.size(2) > 1,  # a single query sees all keys there are
            enable_gqa=q.size(1) != k.size(1),
        )


@dataclass
class KVCache:
    """The keys and values of one layer for all tokens so far, in room reserved at the start."""

    room: torch.Tensor  # (2, B, K, most tokens, D): keys, values
    length: int = 0  # the tokens that are in there

    def append(self, k, v):
        """k, v (B, K, T, D) of new tokens -> the keys and the values of all, (B, K, length, D)."""
        end = self.length + k.size(2)
        self.room[..., self.length : end, :] = torch.stack((k, v))
        self.length = end
        return self.room[..., :end, :]


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020), or GPT-2's GELU MLP, which has no gate."""

    def __init__(self, config):
        super().__init__()
        C = config.hidden_size
        M = config.intermediate_size
        bias = config.mlp_bias
        self.gate_proj = None if config.is_gpt2 else FloatLinear(C, M, bias)
        self.up_proj = FloatLinear(C, M, bias)
        self.down_proj = FloatLinear(M, C, bias)

    def forward(self, x):
        if self.gate_proj is None:
            return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))
        gate, up = outputs(x, (self.gate_proj, self.up_proj))
        return self.down_proj(F.silu(gate) * up)


def outputs(x, layers):
    """What linear layers make of the same x (..., in): [(..., out) of each].

    Where a GPU trains them they are one product of joined weights. To join them costs nothing more,
    as autocast copies them for every pass in any case, and the gradients of x need not be added up.
    """
    trained = all(isinstance(m, nn.Linear) and m.weight.requires_grad for m in layers)
    if x.is_cuda and trained and torch.is_grad_enabled():
        return one_product(x, layers)
    return [layer(x) for layer in layers]


def one_product(x, layers):
    weight = torch.cat([layer.weight for layer in layers])  # (sum of out, in)
    bias = None
    if layers[0].bias is not None:
        bias = torch.cat([layer.bias for layer in layers])
    return F.linear(x, weight, bias).split([layer.out_features for layer in layers], -1)


class FloatLinear(nn.Linear):
    """torch's; but training on some CPUs takes oneDNN's products, at half the time."""

    def forward(self, x):
        return float_product(x, self.weight, self.bias)


def float_product(x, weight, bias=None):
    """x (..., in), weight (out, in), bias (out,) -> x W^T + b (..., out)."""
    if takes_onednn(x, weight):
        return OneDNNLinear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


def takes_onednn(x, weight):
    """Whether x W^T is a float32 product in training, on a CPU where oneDNN's is the faster one.

    Inference keeps torch's, as the engine has products of its own; and below 256 rows the call of
    oneDNN takes longer than it saves."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    if torch.is_inference_mode_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    single = x.dtype == weight.dtype == torch.float32
    return single and x.shape[:-1].numel() >= 256 and onednn_is_faster()


class OneDNNLinear(torch.autograd.Function):
    """`float_product` by oneDNN: dx = g W, dW = g^T x, db the sum of g over all rows."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return onednn_product(x, weight, bias)

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = g.flatten(0, -2)  # (..., out) -> (rows, out)
        columns = x.flatten(0, -2).t()  # (..., in) -> (in, rows)
        dx = dweight = None
        if needs_x:
            dx = onednn_product(g, weight.t())
        # oneDNN copies a transposed first factor: of g and x the smaller one is to be it.
        if needs_weight and len(weight) < len(columns):
            dweight = onednn_product(rows.t(), columns)
        elif needs_weight:
            dweight = onednn_product(columns, rows.t()).t()
        return dx, dweight, rows.sum(0) if needs_bias else None


def onednn_product(x, weight, bias=None):
    """`float_product`, called as torch's own compiler calls it; autograd does not know it."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class RMSNorm(nn.RMSNorm):
    """torch's, in the dtype of x: with weights of another it would not be one kernel."""

    def forward(self, x):
        if x.dtype == self.weight.dtype:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):  # which would make x float32 first
            return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def make_norm(config):
    norm = nn.LayerNorm if config.is_gpt2 else RMSNorm
    return norm(config.hidden_size, config.norm_eps)


class Block(nn.Module):
    """Attention, then the MLP; each reads the normed residual stream and adds to it."""

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = make_norm(config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = make_norm(config)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def products(self):
        """The linear layers in the order of their work, those that read the same input together."""
        attn = self.self_attn
        mlp = self.mlp
        up = [mlp.up_proj] if mlp.gate_proj is None else [mlp.gate_proj, mlp.up_proj]
        return [attn.q_proj, attn.k_proj, attn.v_proj], [attn.o_proj], up, [mlp.down_proj]

    def forward(self, x, rope, mask, cache=None):
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), rope, mask, cache))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


def embedding(rows, width):
    """nn.Embedding; where there is no memory behind it, it draws no values: on the meta device that
    would load torch's compiler, 150 MB."""
    weight = torch.empty(rows, width)
    return nn.Embedding(rows, width, _weight=weight if weight.is_meta else None)


class Transformer(nn.Module):
    """Token ids -> logits, a loss, or more token ids."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.source = None  # the folder that the weights came from, if they did
        self.quantization = None  # the folder's quantization_config, if layers are packed
        self.recompute = False  # whether backward computes a layer again, from its input alone
        C = config.hidden_size
        self.embed_tokens = embedding(config.vocab_size, C)
        if config.is_gpt2:
            self.embed_positions = embedding(config.max_position_embeddings, C)
        else:
            self.rope_frequency, self.rope_scale = rope_frequencies(config)  # (D/2,), a number
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = make_norm(config)
        self.lm_head = FloatLinear(C, config.vocab_size, bias=False)
        self.tie()

    def tie(self):
        """Tied embeddings: the head's weight *is* the embedding's, one Parameter in two places."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def init_weights(self):
        """Fresh weights, such that the first loss is ln V.

        Matrices that write into the residual stream start at zero: every block begins as the
        identity, and the first gradients are those of a shallow network. GPT-2 keeps its published
        rule. An embedding that is not also the head starts large, or the first blocks' outputs
        would drown it; one that is starts small, or a token's logit for itself, C * std after the
        norm, would outweigh a large vocabulary.
        """
        c = self.config
        embedding_std = min(0.02, 5 / c.hidden_size) if c.tie_word_embeddings else 0.5
        stds = {"embed_tokens.weight": embedding_std, "lm_head.weight": 0.02}
        for name, p in self.named_parameters():
            into_the_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = stds.get(name, p.size(-1) ** -0.5)
            if c.is_gpt2:
                std = 0.02 / math.sqrt(2 * c.num_hidden_layers) if into_the_stream else 0.02
            if p.ndim == 1:  # a norm's gain, or a bias
                nn.init.constant_(p, 1.0 if name.endswith("norm.weight") else 0.0)
            elif into_the_stream and not c.is_gpt2:
                nn.init.zeros_(p)
            else:
                nn.init.normal_(p, std=std)

    # -------------------------------------------------------------------------------------- forward
    def _apply(self, fn, recurse=True):
        """What moves a module or changes its dtype; the rotary frequencies move, and stay float32.
        As a buffer model.bfloat16() would round them, and turn position 5,000 by another angle."""
        super()._apply(fn, recurse)
        if not self.config.is_gpt2:
            frequency, _ = rope_frequencies(self.config)
            self.rope_frequency = frequency.to(self.embed_tokens.weight.device)
        return self

    def start(self, ids, positions=None, docs=None, past=0):
        """What the first block reads: x (B, T, C), (cos, sin) or None, and the masks of `masks`."""
        c = self.config
        T = ids.size(1)
        if positions is None:
            if past + T > c.max_position_embeddings:
                raise UserError(
                    f"{past + T:,} tokens, but this model's context is "
                    f"{c.max_position_embeddings:,}"
                )
            positions = torch.arange(past, past + T, device=ids.device)
        x = self.embed_tokens(ids)  # (B, T) -> (B, T, C)
        rope = None
        if c.is_gpt2:
            x = x + self.embed_positions(positions)  # (T, C) or (B, T, C)
        else:  # (T,) -> (T, 1, D) or (B, T) -> (B, T, 1, D)
            cos, sin = self.cos_and_sin(positions[..., None])
            rope = cos.to(x.dtype), sin.to(x.dtype)
        return self.dropout(x), rope, self.masks(T, past, docs, positions)

    def cos_and_sin(self, positions):
        """Positions (...) -> (..., D) each, of the angles by which pairs of channels turn; the sine
        is negative for a pair's first channel, as `rotate` needs it."""
        angle = positions[..., None].float() * self.rope_frequency  # (..., D/2)
        cos = angle.cos() * self.rope_scale
        sin = angle.sin() * self.rope_scale
        return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)

    def masks(self, T, past, docs, positions):
        """(mask of full layers, of sliding ones); None where plain causal attention is the same.

        Dense ones are (T, past + T), or (B, 1, T, T) with docs; on a GPU docs make block masks.
        """
        c = self.config
        slides = c.sliding_layers and past + T > c.sliding_window
        plain = docs is None and (past == 0 or T == 1)
        blocks = docs is not None and docs.is_cuda and c.flex
        if blocks and (c.dropout or c.head_dim < 16):
            give_up_flex(c, f"it has no dropout ({c.dropout:g}), no heads below 16 ({c.head_dim})")
            blocks = False

        def mask(window):
            if blocks:
                return block_mask(positions, window, docs)
            at = positions
            if docs is None:  # wherever a text begins, its keys are as far apart as their rows
                at = torch.arange(past + T, device=positions.device)
            return attention_mask(at, window, docs, past)

        full = None if plain else mask(None)
        sliding = mask(c.sliding_window) if slides else full
        return full, sliding

    def hidden(self, ids, positions=None, docs=None, caches=None):
        """(B, T) token ids -> (B, T, C), what the head reads.

        caches has a KVCache for each layer, and the ids then follow what is in there. positions
        (T,) or (B, T) default to 0..T-1, and behind a cache to the next T. docs (B, T) keeps packed
        documents apart; one numbered below 0 is seen from all after it in its row (`visible`).
        """
        past = caches[0].length if caches else 0
        x, rope, (full, sliding) = self.start(ids, positions, docs, past)
        for i, layer in enumerate(self.layers):
            mask = sliding if i in self.config.sliding_layers else full
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, rope, mask, use_reentrant=False)
            else:
                x = layer(x, rope, mask, caches[i] if caches else None)
        return self.norm(x)

    def forward(self, ids, targets=None, per_token=False, **where):
        """(B, T) int64 token ids -> logits (B, T, V) float32; keywords as in `hidden`.

        With targets (B, T) -> the sum of the cross-entropy in nats, float32, over all targets that
        are not -100; whoever wants a mean divides it by their number (training.loop.backward does).
        With per_token -> each of them, (B, T) float32, 0 where the target is -100.
        """
        hidden = self.hidden(ids, **where)  # (B, T, C)
        if targets is None:
            return self.lm_head(hidden).float()
        if per_token:
            return token_losses(hidden, self.lm_head, targets)
        # (B, T, C) -> (B*T, C). An adapted head has the `weight` that it stands for, too.
        return cross_entropy_sum(hidden.flatten(0, 1), self.lm_head.weight, targets.flatten())

    @torch.inference_mode()
    def generate(self, ids, max_tokens, temperature=0.8, top_k=0, seed=0):
        """Continue one list of token ids -> iterator of new ids, to the end of text or max_tokens.

        This plain loop defines what the batched engine computes. temperature 0 takes the likeliest
        token; top_k > 0 draws among the k likeliest only. When the context is full, its older half
        is forgotten and the rest read again. In train mode dropout is at work.
        """
        if not ids:
            raise UserError("the prompt has no tokens; give at least one character")
        c = self.config
        context = c.max_position_embeddings
        device = self.embed_tokens.weight.device
        generator = torch.Generator(device).manual_seed(seed)
        ids = list(ids)
        unread = ids[-context:]
        most = min(context, len(ids) + max_tokens)
        caches = self.empty_caches(most)
        for _ in range(max_tokens):
            if caches[0].length + len(unread) > context:
                unread = ids[-max(context // 2, 1) :]
                caches = self.empty_caches(most)
            hidden = self.hidden(torch.tensor([unread], device=device), caches=caches)  # (1, T, C)
            logits = self.lm_head(hidden[0, -1]).float()  # (V,): of the last position only
            token = draw(logits, temperature, top_k, generator)
            if token in c.end_ids:
                return
            yield token
            ids.append(token)
            unread = [token]

    def empty_caches(self, most):
        """A KVCache for each layer, for a text of up to `most` tokens."""
        c = self.config
        shape = 2, 1, c.num_key_value_heads, most, c.head_dim
        return [KVCache(self.embed_tokens.weight.new_empty(shape)) for _ in self.layers]

    # ----------------------------------------------------------------------------------- accounting
    def num_params(self):
        """Parameters, tied ones counted once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, T):
        """Floating-point operations that training spends on a token at context T.

        2 for each weight of a matrix product and 4*H*D*T for attention's two products, and twice
        that again in the backward pass (PaLM, appendix B: causality is not discounted).
        """
        c = self.config
        weights = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        attention = 4 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * T
        return 3 * (2 * weights + attention)

    # -------------------------------------------------------------------------------- model folders
    def save_pretrained(self, folder, state=None):
        """Write a model folder; state: the state dict, where it is not simply this module's."""
        from formats.hub import save_model

        save_model(self, folder, state)

    @staticmethod
    def from_pretrained(folder, device="cpu", dtype=None, dropout=0.0):
        """Load a model folder -> Transformer in eval mode; dtype None keeps the file's."""
        from formats.hub import load_model

        return load_model(folder, device, dtype, dropout)


def draw(logits, temperature, top_k, generator):
    """One token id from logits (V,) float32; the plain twin of the engine's sampler."""
    if temperature < 1e-30:  # the division below would overflow
        return logits.argmax().item()
    logits = logits / temperature
    if 0 < top_k < len(logits):
        least = logits.topk(top_k).values[-1]  # of the k likeliest
        logits = logits.masked_fill(logits < least, -torch.inf)
    return torch.multinomial(logits.softmax(0), 1, generator=generator).item()


# ----------------------------------------------------------------------------------------- the loss
def cross_entropy_sum(hidden, weight, targets):
    """Summed cross-entropy of the logits hidden @ weight.T -> scalar float32, in nats.

    hidden (N, C), weight (V, C), targets (N,) int64. It goes in chunks of rows where N*V logits
    would be more than LOGITS_AT_ONCE. In instruction tuning most rows have no target (-100). On a
    CPU these are left out first; a GPU would have to wait until their number is known.
    """
    if hidden.device.type == "cpu" and not torch.compiler.is_compiling():
        wanted = targets != -100
        if not wanted.all():
            hidden = hidden[wanted]
            targets = targets[wanted]
    rows = max(1, logits_at_once(hidden.device) // len(weight))
    if len(hidden) <= rows:
        return F.cross_entropy(float_product(hidden, weight).float(), targets, reduction="sum")
    return ChunkedCrossEntropy.apply(hidden, weight, targets, rows, torch.is_grad_enabled())


def logits_at_once(device):
    """The most logits that the loss holds at a time.

    Many small chunks would keep a GPU waiting: there they take, with their copies and gradients,
    about a twentieth of its memory."""
    if device.type != "cuda":
        return LOGITS_AT_ONCE
    return torch.cuda.get_device_properties(device).total_memory // 256


class ChunkedCrossEntropy(torch.autograd.Function):
    """The loss and its gradients in one pass over chunks of rows; backward only scales them.

    d loss / d logits = softmax - one_hot is at hand while a chunk's logits are, so nothing is
    computed twice and only one chunk's logits ever exist (as in Apple's and Liger's fused losses).
    learning: whether gradients are wanted; in here torch.is_grad_enabled() is False in any case.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, rows, learning):
        device = hidden.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else weight.dtype
        # The loss is scaled only after this: in float16 its gradients would underflow here.
        grad_dtype = torch.float32 if dtype == torch.float16 else dtype
        w = weight.to(dtype)
        total = 0.0
        grad_hidden = torch.empty_like(hidden)
        grad_weight = None  # (V, C) float32, half a GB of a 7B model; a frozen head has none
        for i in range(0, len(hidden), rows):
            h = hidden[i : i + rows].to(dtype)  # (rows, C)
            t = targets[i : i + rows, None]  # (rows, 1)
            counts = t != -100
            t = t.masked_fill(~counts, 0)
            logits = (h @ w.t()).float()  # (rows, V)
            lse = logits.logsumexp(-1, keepdim=True)  # (rows, 1)
            # torch 2.11's compiler gives gradients of 0 to an output that += has changed.
            total = total + ((lse - logits.gather(1, t)) * counts).sum()
            if not learning:
                continue
            if torch.compiler.is_compiling():  # all of it becomes one pass over the logits
                softmax = (logits - lse).exp()
                is_target = torch.arange(len(w), device=t.device) == t  # (rows, V)
                d = torch.where(is_target, softmax - 1, softmax) * counts
            else:
                d = logits.sub_(lse).exp_()  # softmax
                d = d.scatter_add_(1, t, torch.full_like(lse, -1.0))  # - one_hot
                d = d.mul_(counts)
            d = d.to(grad_dtype)
            grad_hidden[i : i + rows] = d @ w.to(grad_dtype)
            if ctx.needs_input_grad[1]:
                grad = d.t() @ h.to(grad_dtype)  # (V, C)
                grad_weight = grad.float() if grad_weight is None else grad_weight.add_(grad)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx, grad):
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_weight is not None:
            grad_weight = grad_weight * grad
        return grad_hidden * grad, grad_weight, None, None, None


# The number of targets, and with it every shape, differs between batches. torch.compiler.disable
# would do the same, but load the compiler right here, which takes as long as loading torch.
@torch._disable_dynamo
def token_losses(hidden, head, targets):
    """Cross-entropy of each target in nats: hidden (B, T, C), targets (B, T) -> (B, T) float32.

    It is 0 where the target is -100. Only positions with a target meet the head (C -> V), and those
    in parts whose logits are computed again in backward, so that they never exist whole.
    """

    def losses(h, t):  # (n, C), (n,) -> (n,)
        return F.cross_entropy(head(h).float(), t, reduction="none")

    at = targets != -100
    wanted = hidden[at]  # (B, T, C) -> (N, C)
    rows = max(1, logits_at_once(hidden.device) // head.out_features)
    parts = zip(wanted.split(rows), targets[at].split(rows))
    if len(wanted) <= rows:
        each = [losses(h, t) for h, t in parts]
    else:
        each = [checkpoint(losses, h, t, use_reentrant=False) for h, t in parts]
    zeros = torch.zeros_like(targets, dtype=torch.float32)
    return zeros.masked_scatter(at, torch.cat(each))
