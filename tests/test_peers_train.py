"""Training's outputs as the programs they are for see them."""

import pytest
from test_train import run, text  # noqa: F401 - a fixture

pytestmark = pytest.mark.peers


def test_what_was_trained_opens_in_transformers_with_its_tokenizer(text, tmp_path):  # noqa: F811
    import torch
    import transformers

    from model import Transformer

    assert run(text, tmp_path / "run", "--steps", 12)[0] == 0
    tok = transformers.AutoTokenizer.from_pretrained(tmp_path / "run")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    ids = tok("ROMEO:\nLine 1", return_tensors="pt").input_ids
    assert tok.decode(ids[0]) == "ROMEO:\nLine 1" and ids.size(1) == 13
    with torch.no_grad():
        ours = Transformer.from_pretrained(tmp_path / "run")(ids)
        assert torch.allclose(model(ids).logits, ours, atol=1e-5)
