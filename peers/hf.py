"""transformers (pip install transformers): models as it opens our folders, and its generate."""

import torch

from common import UserError
from runtime import DTYPES


def open_transformers(folder, dtype="float32"):
    """A model folder -> transformers' own model of it, in eval mode."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype]).eval()


def transformers_writer(folder, dtype, device):
    """-> a function (texts, tokens of a prompt, new tokens) that writes so much, greedily, with
    transformers' default cache; ids (texts, prompt) instead of random ones, 0 is padding."""
    if dtype not in DTYPES:
        raise UserError(f"--transformers {dtype}: use {', '.join(DTYPES)}")
    model = open_transformers(folder, dtype).to(device)

    def write(texts, prompt, new, ids=None):
        if ids is None:
            ids = torch.randint(1, model.config.vocab_size, (texts, prompt))
        ids = ids.to(device)
        model.generate(
            ids,
            attention_mask=(ids > 0).long(),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )

    return write


def write_in_static_batches(write, prompts, new_tokens, batch):
    """Every prompt's answer. A batch runs until its longest answer ends, padded on the left."""
    for at in range(0, len(prompts), batch):
        part = prompts[at : at + batch]
        longest = max(map(len, part))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in part])
        write(len(part), longest, max(new_tokens[at : at + batch]), ids)
