"""nanoGPT's sources: its GPT-2 124M through whole training steps, compiled, in bf16.

python -m peers.nanogpt FOLDER FILE      # tokens a second into FILE; without FILE it compiles
"""

import importlib
import json
import sys
import time
from pathlib import Path

import torch

ROWS, CONTEXT, VOCABULARY = 32, 1024, 50_304


def gpt_step(source):
    """-> a function that takes one step on random tokens."""
    sys.path.insert(0, source)
    nanogpt = importlib.import_module("model")
    torch.set_float32_matmul_precision("high")
    shape = dict(n_layer=12, n_head=12, n_embd=768, dropout=0.0, bias=False)
    config = nanogpt.GPTConfig(block_size=CONTEXT, vocab_size=VOCABULARY, **shape)
    model = nanogpt.GPT(config).to("cuda")
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), "cuda")
    compiled = torch.compile(model)
    ids = torch.randint(VOCABULARY, (ROWS, CONTEXT + 1), device="cuda")
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            _, loss = compiled(inputs, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main():
    source, *file = sys.argv[1:]
    step = gpt_step(source)
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(20 if file else 0):
        step()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    for path in file:
        rows = [dict(name="compiled", tokens_per_s=20 * ROWS * CONTEXT / seconds)]
        Path(path).write_text(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
