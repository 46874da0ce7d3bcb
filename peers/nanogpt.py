"""nanoGPT's model and optimizer, from its own source, for bench.py pretrain."""

import importlib.util
import sys
from pathlib import Path

from common import UserError


def nanogpt_program(path, config, device):
    """PATH: nanoGPT's folder or its model.py; config: our shape -> (ids, targets -> summed loss, as
    our model has it; its optimizer). It has no biases and no dropout, its train.py's defaults."""
    file = Path(path)
    file = file / "model.py" if file.is_dir() else file
    if not file.is_file():
        raise UserError(f"--nanogpt {path}: no model.py there; give nanoGPT's folder")
    spec = importlib.util.spec_from_file_location("nanogpt_model", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # torch.compile looks it up
    spec.loader.exec_module(module)
    shape = module.GPTConfig(
        block_size=config.max_position_embeddings,
        vocab_size=config.vocab_size,
        n_layer=config.num_hidden_layers,
        n_head=config.num_attention_heads,
        n_embd=config.hidden_size,
        dropout=0.0,
        bias=False,
    )
    model = module.GPT(shape).to(device)
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device.type)
    return lambda ids, targets: model(ids, targets)[1] * targets.numel(), optimizer
