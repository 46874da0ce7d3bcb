"""gpt-fast's sources: its own decode of one text, compiled, Llama-2-7B's shape, random weights.

python -m peers.gpt_fast FOLDER bfloat16|int8|int4 FILE   # tokens a second into FILE; without
                                                          # FILE it compiles
"""

import importlib
import json
import sys
import time
from pathlib import Path

import torch
import torch._inductor.config as inductor
from torch.nn.attention import SDPBackend, sdpa_kernel


def make_model(source, kind):
    """Its 7B with random weights, packed as its quantize.py does -> (model, its generate.py)."""
    sys.path.insert(0, source)
    model_file = importlib.import_module("model")
    quantize = importlib.import_module("quantize")
    with torch.device("meta"):
        model = model_file.Transformer(model_file.ModelArgs.from_name("7B")).to(torch.bfloat16)
        if kind == "int8":
            model = quantize.WeightOnlyInt8QuantHandler(model).convert_for_runtime()
        if kind == "int4":
            model = quantize.WeightOnlyInt4QuantHandler(model, 128).convert_for_runtime()
    model = model.to_empty(device="cuda").eval()
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.data.normal_(std=0.02)
        else:
            tensor.data.random_(-100, 100)
    with torch.device("cuda"):
        model.setup_caches(1, 1024)
    return model, importlib.import_module("generate")


def seconds_of_writing(model, decode, tokens):
    """Seconds of writing so many tokens."""
    token = torch.ones(1, 1, dtype=torch.int, device="cuda")
    position = torch.tensor([100], dtype=torch.int, device="cuda")
    torch.cuda.synchronize()
    begin = time.perf_counter()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        for _ in range(tokens):
            token, _ = decode(model, token, position, temperature=0.8, top_k=200)
            token = token.clone()
            position += 1
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def main():
    source, kind, *file = sys.argv[1:]
    inductor.coordinate_descent_tuning = True
    model, generate = make_model(source, kind)
    decode = torch.compile(generate.decode_one_token, mode="reduce-overhead", fullgraph=True)
    seconds_of_writing(model, decode, 20)
    for path in file:
        speed = 200 / seconds_of_writing(model, decode, 200)
        rows = [{"program": kind, "1 text": speed}]
        Path(path).write_text(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
