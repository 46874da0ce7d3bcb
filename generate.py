"""Text from a model folder, token by token as it is made.

    python generate.py runs/shakespeare-char "ROMEO:" --temperature 0.8 --seed 1
"""
import sys
import time
from dataclasses import dataclass

import torch

from common import UserError, cli, parse_flags
from engine import Delta, Engine, Output  # noqa: F401  the names that other programs import from here
from model import Transformer
from runtime import resolve
from sampler import Sampling  # noqa: F401
from tokenizer import Tokenizer


@dataclass
class Args:
    model: str = ""               # the model folder
    prompt: str = "\n"            # the text to continue
    max_tokens: int = 500         # how many tokens to make at most
    temperature: float = 0.8      # 0 is greedy: always the likeliest token
    top_k: int = 0                # sample among the k likeliest only; 0 is all
    top_p: float = 1.0            # sample among the likeliest that together have this probability
    seed: int = 0                 # same seed, same text
    device: str = "auto"          # auto, cpu, cuda, mps
    dtype: str = "auto"           # auto, float32, bfloat16, float16


class KVCache:
    """The keys and values of one layer for all tokens so far, in room reserved at the start."""

    def __init__(self, config, batch, device, dtype, room=None):
        """room: tokens it can hold [the model's context]"""
        shape = (2, batch, config.num_key_value_heads, room or config.max_position_embeddings, config.head_dim)
        self.kv, self.length = torch.empty(shape, device=device, dtype=dtype), 0  # (2, B, K, room, D)

    def append(self, k, v):
        """k, v (B, K, T, D) of new tokens -> those of all tokens, (B, K, length, D)."""
        end = self.length + k.size(2)
        self.kv[0, :, :, self.length:end], self.kv[1, :, :, self.length:end] = k, v
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
        before = ranked.cumsum(-1) - ranked  # probability of everything likelier; the first is always kept
        logits = logits.masked_fill((before >= top_p).scatter(-1, order, before >= top_p), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


@torch.inference_mode()
def generate(model, ids, max_tokens, temperature=0.8, top_k=0, top_p=1.0, seed=0, vocab_size=None):
    """Continue one list of token ids -> iterator of new ids; ends at the model's end-of-text or after max_tokens.

    vocab_size: the tokenizer's, where the model has rows for more ids (padding) that mean nothing. When the context is full, its
    older half is forgotten and the rest read again.
    """
    config, weight = model.config, model.embed_tokens.weight
    if not ids:
        raise UserError("the prompt has no tokens; give at least one character")
    generator = torch.Generator(weight.device).manual_seed(seed)
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ids, context, caches, new = list(ids), config.max_position_embeddings, None, []
    for _ in range(max_tokens):
        if caches is None or caches[0].length + len(new) > context:
            new = ids[-context:] if caches is None else ids[-(context // 2):]
            room = min(context, len(ids) + max_tokens)
            caches = [KVCache(config, 1, weight.device, weight.dtype, room) for _ in model.layers]
        hidden = model.hidden(torch.tensor([new], device=weight.device), caches=caches)  # (1, T, C)
        logits = model.lm_head(hidden[:, -1]).float()  # (1, V): only the last position is asked for
        token = sample(logits[:, :vocab_size], temperature, top_k, top_p, generator).item()
        if token in ends:
            return
        yield token
        ids.append(token)
        new = [token]


def check(args):
    if not 0 <= args.temperature < float("inf") or not 0 < args.top_p <= 1 or args.top_k < 0 or args.max_tokens < 1:
        raise UserError(f"temperature {args.temperature} must be >= 0, top-p {args.top_p} in (0, 1], top-k {args.top_k} >= 0, "
                        f"max-tokens {args.max_tokens} >= 1")


def main():
    args = Args(**parse_flags(Args, __doc__, positional=("model", "prompt")))
    check(args)
    runtime = resolve(args.device, args.dtype, "off")
    tok = Tokenizer.load(args.model)
    model = Transformer.from_pretrained(args.model, runtime.device, runtime.dtype)
    if tok.vocab_size > model.config.vocab_size:
        raise UserError(f"{args.model}: the tokenizer has {tok.vocab_size:,} ids, the model only {model.config.vocab_size:,}")
    ids, stream = tok.encode(args.prompt, bos=tok.bos_id is not None), tok.stream()
    print(args.prompt, end="", flush=True)
    start, count = time.time(), 0
    for token in generate(model, ids, args.max_tokens, args.temperature, args.top_k, args.top_p, args.seed,
                          tok.vocab_size):
        print(stream.push(token), end="", flush=True)
        count += 1
    print(stream.flush())
    print(f"[{count} tokens, {count / (time.time() - start):.0f} tok/s]", file=sys.stderr)


if __name__ == "__main__":
    cli(main)
