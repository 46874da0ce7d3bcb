"""Belongs into bench.py: `python bench.py linear [--gguf DIR]`, what one linear layer costs on this CPU in each format."""
import ctypes
import os
import time

import torch
import torch.nn as nn

import packed
import quant

SHAPES, BLOCKS = ((960, 576), (576, 576), (3072, 576), (576, 1536)), 30  # q+k+v, o, gate+up, down of a 135M Llama: 106M weights


def bench_linear(args):
    """Billions of weights a second through all linear layers of a 135M model, streamed from memory, by rows of activations; beside
    them llama.cpp's decode of the same shape (all 135M weights, attention included) where DIR has its GGUF files."""
    def layers(format):
        for N, K in SHAPES * BLOCKS:
            linear = nn.Linear(K, N, bias=False)
            yield linear if format == "float32" else linear.bfloat16() if format == "bfloat16" else quant.pack(linear, format, 64)

    rows = []
    with torch.inference_mode():
        for format in ("float32", "bfloat16", "int8", "int8-dynamic", "int4"):
            model, dtype = list(layers(format)), torch.bfloat16 if format in ("bfloat16", "int4") else torch.float32
            for M in args.rows:
                inputs, best = {K: torch.randn(M, K, dtype=dtype) for K in (576, 1536)}, float("inf")
                for _ in range(args.repeats):
                    start = time.perf_counter()
                    for layer in model:
                        layer(inputs[layer.in_features])
                    best = min(best, time.perf_counter() - start)
                rate = BLOCKS * sum(N * K for N, K in SHAPES) / best / 1e9
                rows.append({"format": format, "rows": M, "gigaweights_per_s": rate})
                print(f"{format:20s} {M:4d} rows {rate:8.1f} Gw/s {M * rate * 2:8.0f} GFLOP/s", flush=True)
    for name in ("f16", "q8_0", "q4_0") if args.gguf else ():
        rate = llama_decode(os.path.join(args.gguf, name + ".gguf"), torch.get_num_threads())
        rows.append({"format": f"llama.cpp {name}", "rows": 1, "gigaweights_per_s": rate})
        print(f"{'llama.cpp ' + name:20s}    1 rows {rate:8.1f} Gw/s (whole model)", flush=True)
    return rows


def llama_decode(path, threads, steps=24, repeats=4):
    """Billions of weights a second in llama.cpp's one-token decoding: the model's weights over the seconds of a token."""
    import llama_cpp as api
    quiet = api.llama_log_callback(lambda *_: None)
    api.llama_log_set(quiet, ctypes.c_void_p(0))
    model = api.llama_load_model_from_file(str(path).encode(), api.llama_model_default_params())
    settings = api.llama_context_default_params()
    settings.n_ctx, settings.n_threads, settings.n_threads_batch = 1024, threads, threads
    context, best = api.llama_new_context_with_model(model, settings), float("inf")
    for run in range(repeats):
        start = time.perf_counter()
        for step in range(steps):
            token = (api.llama_token * 1)(7 + step)
            if api.llama_decode(context, api.llama_batch_get_one(token, 1)):
                raise RuntimeError(f"llama.cpp could not decode {path}")
            api.llama_get_logits(context)
        best = min(best, (time.perf_counter() - start) / steps)
    weights = api.llama_model_n_params(model)
    api.llama_free(context)
    return weights / best / 1e9
