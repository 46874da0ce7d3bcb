"""What quant.py's report measures, and on which text."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common import UserError
from tokenizer import Tokenizer
from training import quality


def test_calibration_text_shorter_than_a_row_is_refused_and_rows_do_not_overlap(tmp_path, data_dir):
    tok = Tokenizer.load(data_dir / "stories260K")
    text, records = tmp_path / "a.txt", tmp_path / "a.jsonl"
    text.write_text("Once upon a time there was a girl. " * 40)
    with pytest.raises(UserError, match="less than two rows of 5,000"):
        quality.read_rows(text, tok, 4, 5000)
    rows = quality.read_rows(text, tok, 100, 64)
    assert rows.size(1) == 64
    assert 2 < len(rows) <= (len(tok.encode(text.read_text())) + 2) // 64
    records.write_text('{"text": "Lily ran to the big tree and saw a bird."}\n' * 30)
    assert quality.read_rows(records, tok, 4, 32).shape == (4, 32)


@pytest.mark.parametrize("length, sizes", [(32, (5, 2)), (110, (3, 1)), (160, (1, 1))])
def test_one_text_gives_as_many_rows_as_are_asked_for_or_as_it_has(
    length, sizes, tmp_path, data_dir
):
    """It has 442 tokens."""
    tok = Tokenizer.load(data_dir / "stories260K")
    model = Constant([0.0])
    model.config.max_position_embeddings = 512
    text = tmp_path / "a.txt"
    text.write_text("Once upon a time there was a girl. " * 40)
    args = SimpleNamespace(text=text, samples=5, held_out_rows=2, length=length)
    found = quality.calibration_and_held_out(args, model, tok, None, None)
    assert [len(rows) for rows in found] == list(sizes)


def test_rows_are_whole_however_long_the_text_is(tmp_path, monkeypatch):
    """float32 cannot tell 2^24 + 1 from 2^24."""
    ids = range(2**24 + 39)
    monkeypatch.setattr(quality, "encode_job", lambda job, tok: SimpleNamespace(ids=np.array(ids)))
    (tmp_path / "a.txt").write_text("a")
    rows = quality.read_rows(tmp_path / "a.txt", None, 3, 20)
    assert rows[-1].tolist() == list(ids[-20:])


class Constant:
    """A model with the same logits everywhere."""

    def __init__(self, logits):
        self.logits = torch.tensor(logits)
        self.config = type("Config", (), {"vocab_size": len(logits)})
        self.embed_tokens = torch.nn.Embedding(1, 1)

    def __call__(self, ids):
        return self.logits.expand(*ids.shape, -1)


def test_score_is_perplexity_and_divergence_from_the_original():
    even = Constant([0.0, 0.0])
    skewed = Constant([1.0986123, 0.0])  # probabilities 3/4 and 1/4
    rows = torch.tensor([[0, 0, 1, 0, 1]])
    perplexity, original, divergence = quality.score(skewed, even, rows)
    assert original == pytest.approx(2)
    assert perplexity == pytest.approx((4 / 3 * 4) ** 0.5)
    assert divergence == pytest.approx(0.143841, abs=1e-6)  # ln(2/3) / 2 + ln(2) / 2


def test_the_models_own_text_is_whole_rows_with_a_seed_each(data_dir):
    from generate import Engine, Sampling
    from model import Transformer

    folder = data_dir / "stories260K"
    tok = Tokenizer.load(folder)
    engine = Engine.of(Transformer.from_pretrained(folder), tok, kv_tokens=2048)
    rows = quality.sample_rows(engine, Sampling, 3, 24, 0)
    assert rows.shape == (3, 24)
    assert set(rows[:, 0].tolist()) == {tok.bos_id}
    assert len({tuple(row) for row in rows.tolist()}) == 3
    again = quality.sample_rows(engine, Sampling, 1, 24, 1)
    assert torch.equal(again[0], rows[1])
