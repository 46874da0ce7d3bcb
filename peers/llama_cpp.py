"""llama.cpp through its Python binding (pip install llama-cpp-python)."""

import llama_cpp as C
import torch
from llama_cpp._logger import set_verbose

from common import UserError


def llama_writer(path):
    """A GGUF file -> a function (texts, tokens of a prompt, new tokens) that writes so much, on
    torch's number of threads."""
    set_verbose(False)
    model = C.llama_load_model_from_file(str(path).encode(), C.llama_model_default_params())
    contexts = {texts: new_context(model, texts) for texts in (1, 8)}

    def step(texts, first, count):
        """`count` tokens of each text from position `first` on."""
        batch = C.llama_batch_init(texts * count, 0, 1)
        batch.n_tokens = texts * count
        for i in range(texts * count):
            batch.token[i] = 1 + i % 99
            batch.pos[i] = first + i % count
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = i // count
            batch.logits[i] = i % count == count - 1
        if C.llama_decode(contexts[texts], batch):
            raise UserError(f"{path}: llama.cpp failed")
        C.llama_get_logits(contexts[texts])
        C.llama_batch_free(batch)

    def write(texts, prompt, new):
        C.llama_memory_clear(C.llama_get_memory(contexts[texts]), True)
        step(texts, 0, prompt)
        for i in range(new - 1):
            step(texts, prompt + i, 1)

    return write


def new_context(model, texts):
    params = C.llama_context_default_params()
    params.n_ctx = 1024 * texts
    params.n_batch = 512
    params.n_seq_max = texts
    params.n_threads = torch.get_num_threads()
    params.n_threads_batch = torch.get_num_threads()
    return C.llama_new_context_with_model(model, params)
