"""What an exporter wrote, read back and held against what it was made from.

`verify` is the end of formats.gguf, quant.py and lora.py merge: one line that says how near the two
are, or the cause why the file is wrong and exit status 1."""

import copy
import re

import torch
import torch.nn.functional as F

from common import UserError
from quant import QuantLinear

MOST_TOKENS = 128
HELD_OUT = """The ferry left at ten past six, twenty minutes late, and nobody on the pier minded.
Mrs Okafor counted her change twice: 3 coins of 50, one note, and a button. "You'll want the other
boat," said the boy, who couldn't have been older than nine. Behind him the harbour lights went on,
first the red ones, then the green.

def area(width, height=2.5):
    return width * height  # in square metres

Why do leaves change their colour in autumn? The days grow shorter, the tree stops making
chlorophyll, and the yellow that was there all summer can be seen."""


class WrongExport(UserError):
    """What was written is not what it was made from."""

    status = 1


def held_out_ids(tok, config):
    """(T,) ids of HELD_OUT, or any ids where the tokenizer cannot spell it."""
    try:
        return torch.tensor(tok.encode_prompt(HELD_OUT))
    except (UserError, AttributeError):  # of a few characters, or none
        return torch.arange(MOST_TOKENS) % config.vocab_size


@torch.inference_mode()
def token_log_probs(model, ids):
    """(T,) ids -> (T, V) float32. Each block is computed in float32, whatever the model is in, and
    only one is there in float32 at a time."""
    x, rope, (full, sliding) = model.start(ids[None].to(model.embed_tokens.weight.device))
    x = x.float()
    for i, block in enumerate(model.layers):
        mask = sliding if i in model.config.sliding_layers else full
        x = copy.deepcopy(block).float()(x, rope, mask)
    for module in (model.norm, model.lm_head):
        x = copy.deepcopy(module).float()(x)
    return x[0].log_softmax(-1)


def weights(module):
    """A module's own weights -> {name: float32 tensor}, packed ones unpacked."""
    found = {name: p.detach().float() for name, p in module.named_parameters(recurse=False)}
    if isinstance(module, QuantLinear):
        found["weight"] = module.dequantize()
    return found


def compare_weights(source, written, bits):
    """-> a line for each tensor that rounding to so many bits does not explain.

    Rounding moves weights at random, by a few percent: it hardly changes how much of the source's
    direction they have, which a wrong scale does, nor most of it, which another order does."""
    faults = []
    for name, module in source.named_modules():
        twins = weights(written.get_submodule(name))
        for leaf, expected in weights(module).items():
            got = twins.get(leaf, expected.new_zeros(0)).to(expected.device)
            if got.shape != expected.shape:
                faults.append(f"{name}.{leaf} is {tuple(got.shape)}, not {tuple(expected.shape)}")
                continue
            square = expected.square().sum().clamp(min=1e-30)
            gain = ((got * expected).sum() / square).item() if expected.any() else 1.0
            error = ((got - expected).square().sum() / square).sqrt().item()
            if not (abs(gain - 1) <= 2 ** -(bits + 1) and error <= 8 * 2**-bits):
                faults.append(f"{name}.{leaf} is {gain:.3f} of the source's, off by {error:.1%}")
    return faults


def compare_words(source, written):
    """-> a line for each thing besides weights that an export must not change, and did."""
    (model, tok), (again, tok_again) = source, written
    faults = []
    spelled = [held_out_ids(t, again.config) for t in (tok, tok_again)]
    if not torch.equal(*spelled):
        faults.append("held-out text gets other ids")
    lost = {*model.config.end_ids} - {*again.config.end_ids}
    if lost:
        faults.append(f"end ids {sorted(lost)} are lost")
    if tok and tok_again:
        special = tok.special.items() - tok_again.special.items()
        if special:
            faults.append(f"special tokens {sorted(special)[:4]} are lost")
        if tok.chat_template != tok_again.chat_template:
            faults.append("the chat template is another, or lost")
    return faults


def verify(path, format, source, written, bits=None):
    """Print how near they are. WrongExport: they are farther apart than the format explains.

    source, written: (Transformer, Tokenizer or None); format: int4, q8_0, bfloat16, ...; bits: of a
    weight, where the format's name does not say it."""
    (model, tok), (again, _) = source, written
    bits = bits or int(re.search(r"\d+", format)[0])
    bits = {32: 20, 16: 7}.get(bits, bits)  # of their significand, at least
    faults = compare_words(source, written) + compare_weights(model, again, bits)
    if not faults:  # so both have the same shapes
        most = min(MOST_TOKENS, again.config.max_position_embeddings)
        ids = held_out_ids(tok, again.config)[:most]
        before, after = token_log_probs(model, ids), token_log_probs(again, ids)
        divergence = F.kl_div(after, before, reduction="batchmean", log_target=True).item()
        same = (after.argmax(-1) == before.argmax(-1)).float().mean().item()
        if not divergence <= 2.0 ** (4 - bits):
            faults.append(f"KL {divergence:.4f} on held-out text")
    if faults:
        raise WrongExport(
            f"{path} differs from its source by more than {format} explains: "
            f"{'; '.join(faults[:4])} ({len(faults)} faults)"
        )
    print(
        f"verified {path}: KL {divergence:.2g} and {same:.1%} of the likeliest tokens the same on "
        f"{len(ids)} of held-out text; vocabulary, special tokens, chat template and end ids kept"
    )
