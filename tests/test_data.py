"""data.py: shards of tokens, rows packed from whole documents, batches with an exact position."""

import itertools
import json
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import within
from safetensors.numpy import load_file, save_file

import data
from common import UserError
from data import Batches, Plan, Split, open_shards, split_tokens
from tokenizer import Tokenizer
from training import corpora
from training.corpora import ARTICLE, documents

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


def make_shards(files, tok, out, separator=None, **options):
    """data.make_shards with the documents that its command gives it."""

    return data.make_shards(files, tok, out, documents, {"separator": separator}, **options)


def contents(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


def token_documents(split):
    starts = split.documents[0]
    return np.split(np.concatenate(split.tokens), starts[1:])


def test_shards_hold_every_document_between_bos_and_eos(corpus, tmp_path):
    files, tok = corpus
    meta = make_shards(files, tok, tmp_path / "out", val_share=0.1, processes=1)
    splits = open_shards(tmp_path / "out", tok)
    expected = {"val": TEXTS[::10], "train": [t for i, t in enumerate(TEXTS) if i % 10]}
    for name, texts in expected.items():
        stored = [ids.tolist() for ids in token_documents(splits[name])]
        assert stored == [tok.encode(t, bos=True, eos=True) for t in texts]
        counts = meta["splits"][name]
        whole = "".join(texts)
        assert counts["bytes"] == len(whole.encode())
        assert counts["documents"] == len(texts)
        assert counts["words"] == len(whole.split())
        assert counts["lines"] == len(texts)
    assert meta["splits"]["train"]["shards"] > 3
    assert splits["train"].tokens[0].dtype == np.uint16
    assert Tokenizer.load(tmp_path / "out").sha256 == tok.sha256


def test_a_single_special_id_stands_in_front_and_is_what_ends_predict(corpus, tmp_path):
    files, _ = corpus
    tok = Tokenizer.train(TEXTS, 300, special_tokens=["<|endoftext|>"])
    assert tok.bos_id == tok.eos_id == 0
    make_shards(files, tok, tmp_path / "out", processes=1)
    split = open_shards(tmp_path / "out")["val"]
    first, *_ = token_documents(split)
    assert first.tolist() == tok.encode(TEXTS[0], bos=True)
    assert split.end_id == 0


def test_any_number_of_processes_writes_the_same_bytes(corpus, tmp_path):
    files, tok = corpus
    for processes in (1, 2):
        make_shards(files, tok, tmp_path / str(processes), processes=processes)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_a_killed_run_goes_on_and_writes_the_same_bytes(corpus, tmp_path, monkeypatch, capsys):
    """kill -9 in the middle of the third training shard; its temporary file stays, and is swept by
    the next run."""
    files, tok = corpus
    make_shards(files, tok, tmp_path / "whole", processes=1)
    child = os.fork()
    if child == 0:
        put = data.write_atomic

        def die(path, write):
            if Path(path).name == "train-00002.safetensors":
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
    kept = (tmp_path / "killed" / "train-00001.safetensors").stat().st_mtime_ns
    make_shards(files, tok, tmp_path / "killed", processes=2)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert (tmp_path / "killed" / "train-00001.safetensors").stat().st_mtime_ns == kept
    capsys.readouterr()
    make_shards(files, tok, tmp_path / "killed")
    assert "all there already" in capsys.readouterr().out


def test_a_full_disk_while_sharding_keeps_what_is_finished(corpus, tmp_path, full_disk):
    files, tok = corpus
    make_shards(files, tok, tmp_path / "whole", processes=1)
    tok.save(tmp_path / "out")
    tok.save = lambda folder: None  # the tokenizer's files are larger than the shards
    limit = (tmp_path / "whole" / "train-00000.safetensors").stat().st_size - 8
    with (
        full_disk(limit),
        pytest.raises(
            UserError, match=r"train-0000\d.safetensors: File too large \(.* free there\); finished"
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


def test_the_weights_of_a_model_folder_are_no_shards(tmp_path, monkeypatch):
    """--overwrite takes shards away, and no model loses its tokenizer to them."""
    monkeypatch.chdir(tmp_path)
    Path("x.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    Tokenizer.char("ab").save("tok")
    names = ["model-00001-of-00002.safetensors", "config.json", "tokenizer.json", "meta.json"]
    Path("model").mkdir()
    for name in names:
        Path("model", name).write_text("mine")
    argv = ["data.py", "x.jsonl", "--tokenizer", "tok", "--out", "model", "--processes", "1"]
    for flags in ([], ["--overwrite"]):
        monkeypatch.setattr(sys, "argv", argv + flags)
        with pytest.raises(UserError, match="model holds a model.*choose another --out"):
            data.main()
    assert contents("model") == dict.fromkeys(names, b"mine")
    assert not data.shard_paths("model")


def with_arrays(path, **changes):
    """The shard with some of its arrays replaced."""
    save_file(load_file(path) | {name: np.array(value) for name, value in changes.items()}, path)


@pytest.mark.parametrize(
    "break_it, words",
    [
        (lambda p: p.write_bytes(b"PK\x03\x04" + p.read_bytes()[4:]), "not a readable safetensors"),
        (lambda p: p.write_bytes(b""), "not a readable safetensors"),
        (lambda p: p.write_bytes(p.read_bytes()[:-8]), "not a readable safetensors"),
        (
            lambda p: p.unlink(),
            r"of \d 'train' shards \d are there: copy the others there, or make",
        ),
        (lambda p: with_arrays(p, starts=[5, 0]), "damaged, its documents or ids"),
        (lambda p: with_arrays(p, starts=np.uint64([0, 9, 5])), "damaged, its documents or ids"),
        (lambda p: with_arrays(p, starts=[0, 10**6]), "damaged, its documents or ids"),
        (lambda p: with_arrays(p, ids=[0.5]), "damaged, its documents or ids"),
        (lambda p: with_arrays(p, starts=[[0], [1]]), "damaged, its documents or ids"),
        (lambda p: with_arrays(p, starts=[]), "damaged, its documents or ids"),
        (lambda p: save_file({"ids": np.zeros(3)}, p), "is not a train-00001.safetensors"),
    ],
)
def test_unusable_shards_are_refused(corpus, tmp_path, break_it, words):
    files, tok = corpus
    make_shards(files, tok, tmp_path, processes=1)
    break_it(tmp_path / "train-00001.safetensors")
    with pytest.raises(UserError, match=f"train-00001.*{words}|{words}"):
        open_shards(tmp_path, tok)


@pytest.mark.parametrize(
    "changes",
    [
        {"splits": {"train": {"shards": 10**9}}},
        {"splits": {"train": {"shards": "2"}}},
        {"splits": {"../train": {"shards": 1}}},
        {"splits": 5},
        {"job": 5},
        {"ends": [[[]], []]},
    ],
)
def test_an_odd_meta_json_is_one_line(corpus, tmp_path, changes):
    files, tok = corpus
    make_shards(files, tok, tmp_path, processes=1)
    meta = json.loads((tmp_path / "meta.json").read_text())
    (tmp_path / "meta.json").write_text(json.dumps(meta | changes))
    with within(0.5), pytest.raises(UserError, match="meta.json"):
        open_shards(tmp_path, tok)


def test_shards_of_another_tokenizer_are_refused(corpus, tmp_path):
    files, tok = corpus
    make_shards(files, tok, tmp_path, processes=1)
    other = Tokenizer.char("abc")
    words = f"made with tokenizer {tok.sha256[:12]}, not {other.sha256[:12]}"
    with pytest.raises(UserError, match=words):
        open_shards(tmp_path, other)
    with pytest.raises(UserError, match="no shards here"):
        open_shards(tmp_path / "nothing")
    (tmp_path / "meta.json").write_text('{"complete": true}')
    with pytest.raises(UserError, match="not that of shards of version 2"):
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


def test_a_document_that_would_fill_two_shards_is_cut_so_that_each_fits_into_memory(
    corpus, tmp_path
):
    _, tok = corpus
    text = "".join(TEXTS)
    (tmp_path / "x.txt").write_text(text)
    (tmp_path / "v.txt").write_text("short")
    files = {"train": [tmp_path / "x.txt"], "val": [tmp_path / "v.txt"]}
    make_shards(files, tok, tmp_path / "out", processes=1)
    split = open_shards(tmp_path / "out")["train"]
    stored = token_documents(split)
    assert 1 < len(stored) == len(split.tokens)
    texts = [tok.decode(ids, skip_special=True) for ids in stored]
    assert "".join(texts) == text
    assert max(map(len, texts)) < 2 * data.SHARD_BYTES + 3 * data.BLOCK


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
    """217,646 and 245,569 words, the ends of lines included (Merity et al. 2016, table 1; the same
    for both sizes)."""
    paths = {name: [data_dir / "wikitext-2" / f"{name}.txt"] for name in ("valid", "test")}
    tok = Tokenizer.load(data_dir / "gpt2-tokenizer" / "vocab.bpe")
    meta = make_shards(
        {"val": paths["valid"], "test": paths["test"]}, tok, tmp_path, separator=ARTICLE
    )
    counts = meta["splits"]
    assert [counts[s]["words"] + counts[s]["lines"] for s in ("val", "test")] == [217_646, 245_569]
    assert [counts[s]["documents"] for s in ("val", "test")] == [60, 60]
    assert open_shards(tmp_path)["val"].end_id == 50256  # one id begins and ends documents


def test_the_command_makes_shards_from_a_named_corpus(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    local = tmp_path / "local" / "wikitext-2"
    local.mkdir(parents=True)
    article = " = Title = \n \n Some words . \n \n = = Section = = \n \n The end . \n \n"
    for split, count in (("train", 20), ("valid", 2), ("test", 3)):
        (local / f"{split}.txt").write_text(" \n" + article * count)
    Tokenizer.train([article], 300).save(tmp_path / "tok")
    flags = "--tokenizer tok --processes 1 --data-dir local".split()
    monkeypatch.setattr(sys, "argv", ["data.py", "wikitext-2", *flags])
    data.main()
    flags += ["--split-on", "Section", "--out", "halves"]
    monkeypatch.setattr(sys, "argv", ["data.py", "wikitext-2", *flags])
    data.main()
    for folder, counts in (("data/wikitext-2", (20, 2, 3)), ("halves", (21, 3, 4))):
        splits = open_shards(folder)
        found = {name: split.counts["documents"] for name, split in splits.items()}
        assert found == dict(zip(("train", "val", "test"), counts))


def test_validation_files_are_not_trained_on_and_a_bad_record_is_counted_once(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    Path("mine/v.txt").write_text("abc")
    Path("mine/x.jsonl").write_text('{"text": "a"}\n{"bad": 1}\n{"text": "b"}\n')
    Tokenizer.char("abc").save("tok")
    flags = "--tokenizer tok --processes 1 --skip-bad --out".split()
    for argv in (["mine", *flags, "given", "--val", "./mine/../mine/v.txt"], ["mine", *flags, "o"]):
        monkeypatch.setattr(sys, "argv", ["data.py", *argv])
        data.main()
        assert capsys.readouterr().out.count("1 bad records left out") == 1
    found = {name: split.counts["bytes"] for name, split in open_shards("given").items()}
    assert found == {"train": 2, "val": 3}


@pytest.mark.parametrize(
    "argv, words",
    [
        ("wikitext-2 x.txt", "wikitext-2 goes alone"),
        ("x.txt", "--tokenizer T"),
        ("x.txt --tokenizer tok --out o", "x.txt: no such file"),
        ("x.txt --tokenizer tok --out o --val-share 1", "--val-share 1.0 must be between 0 and 1"),
    ],
)
def test_the_command_refuses_what_does_not_go_together(tmp_path, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    Tokenizer.char("abc").save(tmp_path / "tok")
    monkeypatch.setattr(sys, "argv", ["data.py", *argv.split()])
    with pytest.raises(UserError, match=words):
        data.main()


# --------------------------------------------------------------------------- packing and the cursor


def test_the_last_tenth_is_held_out():
    train, val = split_tokens(np.arange(1000), 16)
    assert train[-1] == 899 and val.tolist() == list(range(900, 1000))


@pytest.mark.parametrize(
    "tokens, context, words",
    [
        (2567, 4096, r"257 .* \(the last tenth\) allow a --context of 256, not 4,096: lower it"),
        (30, 8, "3 validation tokens.* --context of 2, not 8"),
        (1, 8, "1 validation tokens .* --context of 0, not 8.* give a longer text"),
    ],
)
def test_too_short_text_says_how_short_and_what_fits(tokens, context, words):
    with pytest.raises(UserError, match=words):
        split_tokens(np.zeros(tokens), context)


def numbers(count, first=0):
    """A text that is one document, of the ids first, first + 1, ..."""
    return Split([np.arange(first, first + count, dtype=np.uint16)])


def test_every_training_token_is_a_target_once_an_epoch():
    batches = Batches(numbers(1000), 4, 16, seed=3)
    rows = len(batches.plan(0).order)
    seen = []
    while batches.epoch == 0 and batches.row + 4 <= rows:
        x, y, *_ = batches.next()
        assert x.shape == y.shape == (4, 16)
        assert torch.equal(x[:, 1:], y[:, :-1])
        seen += y.flatten().tolist()
    assert len(seen) == len(set(seen))
    assert len(seen) > 1000 - 2 * 16 - 4 * 16


def same_batch(a, b):
    return all(map(torch.equal, a, b))


def test_position_is_exact_across_epochs():
    a = Batches(numbers(200), 5, 16, seed=3)
    for _ in range(7):
        a.next()
    b = Batches(numbers(200), 5, 16, seed=3)
    b.load_state(a.state())
    for _ in range(20):
        assert same_batch(a.next(), b.next())
    assert a.epoch > 2


def test_epochs_are_cut_and_ordered_differently():
    text = numbers(1000)
    first = text.plan(16, 3, 0)
    second = text.plan(16, 3, 1)
    assert sorted(first.starts) != sorted(second.starts)
    assert first.order.tolist() != second.order.tolist()
    split, _ = split_of(LENGTHS)  # here other remainders of documents meet in a row
    first = split.plan(32, 3, 0)
    second = split.plan(32, 3, 1)
    assert first.starts.tolist() != second.starts.tolist()
    assert first.order.tolist() != second.order.tolist()
    assert all(map(np.array_equal, first, split.plan(32, 3, 0)))


def test_validation_covers_the_whole_split():
    ((x, y, *_),) = numbers(50, first=10).validation(4, 16)
    assert x.shape == y.shape == (4, 16)
    assert y[y != -100].tolist() == list(range(11, 60))
    assert x.flatten()[:49].tolist() == list(range(10, 59))


def split_of(lengths, first=1, last=2, shards=3):
    """Documents of random ids in several shards -> (Split, [document])."""
    rng = np.random.default_rng(0)
    begin = [] if first is None else [first]
    end = [] if last is None else [last]
    docs = []
    for n in lengths:
        ids = rng.integers(3, 60_000, n).tolist()
        docs.append(np.array(begin + ids + end, np.uint16))
    tokens = []
    starts = []
    for i in range(shards):
        part = docs[i * len(docs) // shards : (i + 1) * len(docs) // shards]
        tokens.append(np.concatenate(part))
        starts.append(np.cumsum([0, *map(len, part)])[:-1].astype(np.uint64))
    return Split(tokens, starts, first if last is None else None), docs


def pairs_of(docs, end_id=None):
    """How often each (token, next token) is in the documents, with an end_id after each."""
    pairs = Counter()
    for doc in docs:
        ids = doc.tolist() + ([] if end_id is None else [end_id])
        pairs.update(zip(ids[:-1], ids[1:]))
    return pairs


def pairs_in(batch):
    scored = batch.y != -100
    return Counter(zip(batch.x[scored].tolist(), batch.y[scored].tolist(), strict=True))


LENGTHS = [5 + (i * 37) % 60 + 400 * (i % 11 == 0) for i in range(200)]


@pytest.mark.parametrize("first, last", [(1, 2), (1, None), (None, None)])
def test_an_epoch_trains_on_every_pair_once_and_pads_nothing(first, last):
    """Pairs (token, next token) inside documents; with one id for both ends also (last, that)."""
    split, docs = split_of(LENGTHS, first, last)
    want = pairs_of(docs, split.end_id)
    batches = Batches(split, 1, 32, seed=5, prefetch=0)
    seen = Counter()
    while batches.epoch == 0:
        batch = batches.next()
        assert (batch.y >= 0).all()
        seen += pairs_in(batch)
    assert not seen - want
    assert (want - seen).total() < 32


def test_rows_begin_with_a_document_wherever_one_begins_in_them():
    split, _ = split_of(LENGTHS)
    batches = Batches(split, 1, 32, seed=5, prefetch=0)
    begun = []
    while batches.epoch == 0:
        x, _, piece, position = batches.next()
        assert x[0, 0] == 1 or 1 not in x
        new_piece = piece.diff(prepend=torch.tensor([[-1]])) == 1
        assert torch.equal(position == 0, new_piece)
        begun.append(x[0, 0].item() == 1)
    assert np.mean(begun) > 0.4


def test_the_global_order_does_not_depend_on_ranks_or_rows():
    split, _ = split_of(LENGTHS)
    one = Batches(split, 6, 32, seed=5, prefetch=0)
    ranks = [Batches(split, 3, 32, seed=5, rank=r, world=2) for r in range(2)]

    def step():
        return torch.cat([rank.next().x for rank in ranks])

    for _ in range(90):
        assert torch.equal(one.next().x, step())
    assert one.state() == ranks[0].state() == ranks[1].state()
    assert one.epoch > 0
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
    ahead = Batches(split, 4, 32, seed=5, prefetch=8)
    plain = Batches(split, 4, 32, seed=5, prefetch=0)
    for _ in range(5):
        assert same_batch(ahead.next(), plain.next())
        assert ahead.state() == plain.state()
    for batches in (ahead, plain):
        batches.load_state({"epoch": 0, "row": 4})
    assert torch.equal(ahead.next().x, plain.next().x)
    ahead.close()
    assert torch.equal(ahead.next().x, plain.next().x)  # closing loses nothing
    (thread,) = ahead.pool._threads
    del ahead  # nor does dropping it leave a thread behind
    del batches
    thread.join(timeout=5)
    assert not thread.is_alive()


def test_an_error_in_the_thread_is_raised_by_next(monkeypatch):
    split, _ = split_of(LENGTHS)
    batches = Batches(split, 4, 32, seed=5)

    def no_disk(*_):
        raise OSError("the disk went away")

    monkeypatch.setattr(split, "read", no_disk)
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
    assert len({len(batches) for batches in ranks}) == 1
    seen = Counter()
    for batches in ranks:
        for batch in batches:
            assert batch.x.shape == (rows, context)
            seen += pairs_in(batch)
    assert seen == pairs_of(docs, split.end_id)


def test_a_split_smaller_than_a_batch_says_so():
    split, _ = split_of([50, 60], shards=2)
    with pytest.raises(
        UserError, match=r"114 tokens make 3 rows of 32, but a step takes 8: .*--batch"
    ):
        Batches(split, 4, 32, seed=1, world=2)


def plan_simply(split, context, seed, epoch):
    """What Split.plan says, in plain loops."""
    rng = np.random.default_rng([seed, epoch])
    begin, pairs = split.documents_of_epoch(rng, context)
    rows = []  # of pieces (start, size)
    for start, size in zip(begin, pairs):
        rows += [[(start + at, context)] for at in range(0, size - context + 1, context)]
    line = []  # what remains, pair by pair: (document, place in it)
    for document in rng.permutation(np.flatnonzero(pairs % context)):
        full = pairs[document] // context * context
        line += [(document, at) for at in range(full, pairs[document])]
    for left in range(0, len(line) - context + 1, context):
        row = line[left : left + context]
        groups = itertools.groupby(row, key=lambda pair: pair[0])
        pieces = [(document, next(group)[1], 1 + len(list(group))) for document, group in groups]
        pieces.sort(key=lambda piece: piece[1] > 0)  # those that begin a document go first
        rows.append([(begin[document] + at, size) for document, at, size in pieces])
    starts, sizes = np.array(list(itertools.chain(*rows)), np.int64).reshape(-1, 2).T
    first = np.cumsum([0, *map(len, rows)])
    return Plan(starts, sizes, first, rng.permutation(len(rows)))


@pytest.mark.parametrize("context", [4, 32, 500])
@pytest.mark.parametrize("last", [2, None])
def test_the_fast_plan_is_the_plain_one(context, last):
    for split in (split_of(LENGTHS, last=last)[0], split_of([7], shards=1)[0], numbers(1000)):
        for epoch in range(3):
            plain = plan_simply(split, context, 5, epoch)
            for fast, expected in zip(split.plan(context, 5, epoch), plain):
                assert np.array_equal(fast, expected)


def test_a_plan_of_a_million_documents_takes_no_time():
    starts = np.arange(0, 200_000_000, 200)
    split = Split([np.broadcast_to(np.uint16(0), 200_000_000)], [starts])
    assert len(split.documents[0]) == 1_000_000
    start = time.process_time()
    split.plan(1024, 1, 0)
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    "flags, told",
    [
        ("toybox --tokenizer T", "toybox does nothing with --tokenizer here: leave it out"),
        ("toybox --field x --skip-bad", "with --field, --skip-bad"),
        ("wikitext-2 --overwrite --split-on x", "does nothing with --overwrite, --split-on"),
        ("wikitext-2 --tokenizer T --val-share 0.01", "wikitext-2 does nothing with --val-share"),
        ("shakespeare --out o --processes 2", "shakespeare does nothing with --out, --processes"),
        ("x.txt --tokenizer T --out o --data-dir d", "x.txt does nothing with --data-dir"),
        ("x.txt --tokenizer T --out o --val v.txt --val-share 0.1", "nothing with --val-share"),
    ],
)
def test_a_flag_that_would_do_nothing_is_refused(flags, told, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["data.py", *flags.split()])
    with pytest.raises(UserError, match=told):
        data.main()
