"""transformers' continuous batching on the requests of `bench.py throughput SHAPE`.

python -m peers.continuous_batching SHAPE FILE    # tokens a second into FILE; without FILE the
                                                  # first 16 requests warm it up
"""

import json
import sys
import time
from pathlib import Path

import torch

import bench


def answer_all(manager, prompts, new):
    """-> tokens made."""
    left = set()
    for prompt, tokens in zip(prompts, new):
        left.add(manager.add_request(prompt, max_new_tokens=tokens, eos_token_id=-1))
    made = 0
    while left:
        output = manager.get_result(timeout=60)
        if output is None:
            raise RuntimeError(f"nothing came for 60 s, {len(left)} requests are left")
        if output.request_id in left and output.is_finished():
            left.discard(output.request_id)
            made += len(output.generated_tokens)
    return made


def main():
    from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

    shape, *file = sys.argv[1:]
    folder = bench.folder_of(shape)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to("cuda").eval()
    prompts, new = bench.random_requests(256, 100, 1024, model.config.vocab_size)
    how = GenerationConfig(max_new_tokens=1024, do_sample=False, eos_token_id=-1, pad_token_id=0)
    memory = ContinuousBatchingConfig(max_memory_percent=0.3, allow_block_sharing=False)
    # it refuses torch.inference_mode
    with model.continuous_batching_context_manager(
        generation_config=how, continuous_batching_config=memory, block=True, timeout=5
    ) as manager:
        answer_all(manager, prompts[:16], [16] * 16)
        for path in file:
            begin = time.perf_counter()
            made = answer_all(manager, prompts, new)
            rows = [dict(program="greedy", tokens_per_s=made / (time.perf_counter() - begin))]
            Path(path).write_text(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
