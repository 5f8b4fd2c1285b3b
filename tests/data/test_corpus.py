"""Batches are a pure function of (seed, step); held-out documents are never trained on, and scored once."""

import contextlib
import dataclasses
import gc
import hashlib
import json
import os
import subprocess
import sys
import threading

import absl.flags
import grain
import numpy as np
import pytest

from scalelab import data
from scalelab.data import text
from scalelab.data.corpus import Mixture
from scalelab.errors import BadInput

WORDS = ["alpha", "beta", "gamma", "delta", "é", "naïve", "漢字", "\n"]


@pytest.fixture
def folder(tmp_path):
    """200 documents of 100 to 400 words, every tenth a copy of another under another name."""
    rng = np.random.default_rng(0)
    path = tmp_path / "texts"
    path.mkdir()
    for i in range(200):
        text = " ".join(rng.choice(WORDS, rng.integers(100, 400))) + f" {i}\n"
        (path / f"{i:03}.txt").write_text(text)
        if i % 10 == 0:
            (path / f"copy{i:03}.txt").write_text(text)
    return path


def documents(folder):
    return {file.read_bytes() for file in folder.iterdir()}


def served(corpus, seed, steps, first=0):
    batches = corpus.batches(seed)
    return np.concatenate([batches[step] for step in range(first, first + steps)])


def test_a_batch_depends_on_seed_and_step_alone(folder, settings):
    corpus = data.open(settings({"a": folder}, seq_len=64, batch_size=8))
    batches = corpus.batches(seed=3)
    later, sooner = batches[17], batches[2]
    again = data.open(settings({"a": folder}, seq_len=64, batch_size=8, threads=5)).batches(seed=3)
    np.testing.assert_array_equal(again[2], sooner)
    np.testing.assert_array_equal(again[17], later)
    assert later.dtype == np.int32
    assert later.shape == (8, 65)
    assert not np.array_equal(corpus.batches(seed=4)[2], sooner)


def test_batches_never_change(tmp_path, settings):
    """Ids of runs stand on the content alone: the order of a text's batches stays what it is."""
    (tmp_path / "a.txt").write_text("".join(f"{i} {i * i % 97}\n" for i in range(5000)))
    corpus = data.open(settings({"a": tmp_path / "a.txt"}, seq_len=64, batch_size=8))
    batches = corpus.batches(seed=7)
    assert isinstance(batches, grain.MapDataset)
    digest = hashlib.sha256(b"".join(batches[step].astype("<i4").tobytes() for step in (0, 1, 500)))
    assert digest.hexdigest()[:16] == "e1f32883948d47e6"
    assert corpus.content["a"][:16] == "6d2ab8071334d1be"


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_one_global_batch(folder, hosts, settings):
    corpus = data.open(settings({"a": folder}, seq_len=64, batch_size=8))
    parts = [corpus.batches(1, host, hosts)[5] for host in range(hosts)]
    np.testing.assert_array_equal(np.concatenate(parts), corpus.batches(1)[5])
    with pytest.raises(BadInput, match=r"config.data.batch_size = 8: must be a multiple of the 3 hosts"):
        corpus.batches(1, 0, 3)


def test_each_window_comes_once_an_epoch_in_another_order(folder, settings):
    corpus = data.open(settings({"a": folder}, seq_len=128, batch_size=1))
    n = corpus.unique_tokens // 128
    first, second = served(corpus, 0, n), served(corpus, 0, n, first=n)
    assert not np.array_equal(first, second)
    order = lambda rows: rows[np.lexsort(rows.T)]  # noqa: E731
    np.testing.assert_array_equal(order(first), order(second))
    # The windows, in stream order, overlap by one token and give the stream: bos, document, bos, document ...
    windows = {tuple(row[:1]) + tuple(row) for row in first.tolist()}
    assert len(windows) >= n - 1
    # Seeds next to each other don't share an order, neither in this epoch nor in the next.
    other = served(corpus, 1, n)
    assert not np.array_equal(other, first)
    assert not np.array_equal(other, second)


def test_training_windows_are_whole_documents_and_none_that_is_held_out(folder, settings, held_texts, monkeypatch):
    monkeypatch.setattr(text, "FEW_FILES", 64)  # whole files are documents
    corpus = data.open(settings({"a": folder}, seq_len=50, batch_size=1, held_out_tokens=10**9))
    n = corpus.unique_tokens // 50
    rows = {tuple(row[:50].tolist()): row for row in served(corpus, 0, n)}
    # Put the windows back in line: each begins with the token that ended the one before.
    source = corpus.sources["a"]
    line = source._windows.rows(np.arange(n))
    assert {tuple(row[:50].tolist()) for row in line} == set(rows)
    stream = np.append(line[:, :-1].ravel(), line[-1, -1])
    starts = np.flatnonzero(stream == corpus.bos)
    assert starts[0] == 0
    trained = [bytes(part[1:].astype(np.uint8)) for part in np.split(stream, starts[1:])]
    *whole, last = trained  # the last may be cut
    held = held_texts(corpus)["a"]
    assert set(whole) <= documents(folder)
    assert not set(trained) & set(held)
    missing = documents(folder) - set(whole) - set(held)
    assert all(text.startswith(last) for text in missing)
    assert len(missing) <= 1
    assert len(whole) > len(set(whole))  # copies are trained on twice, or not at all
    assert len(held) == len(set(held))
    assert 0.005 < len(held) / 200 < 0.08


def test_held_out_windows_score_each_token_once(folder, settings):
    corpus = data.open(settings({"a": folder}, seq_len=37, batch_size=2, held_out_tokens=5000))
    held = corpus.held_out()["a"]
    assert held.tokens.shape[1:] == (38,)
    assert held.doc.shape[1:] == (37,)
    np.testing.assert_array_equal(held.tokens[1:, 0], held.tokens[:-1, -1])
    assert held.tokens[0, 0] == corpus.bos
    used = held.doc >= 0
    assert used.sum() == held.bytes.sum() + len(held.bytes)  # bytes, and the bos after each
    assert used.sum() <= 5000
    assert used[:-1].all()
    assert (np.diff(held.doc[used]) >= 0).all()


def test_held_out_documents_are_the_same_for_every_run(folder, settings, held_texts):
    texts = [
        held_texts(data.open(settings({"a": folder}, held_out_tokens=5000, **fields)))["a"]
        for fields in ({"seq_len": 32, "batch_size": 2}, {"seq_len": 100, "batch_size": 16}, {"seq_len": 7})
    ]
    assert texts[0] == texts[1] == texts[2]
    more = held_texts(data.open(settings({"a": folder}, held_out_tokens=9000, seq_len=32)))["a"]
    assert more[: len(texts[0])] == texts[0]
    one = held_texts(data.open(settings({"a": folder}, held_out_tokens=1, seq_len=32)))["a"]
    assert one == texts[0][:1]


def test_stream_reads_ahead_in_order_and_leaves_no_thread(folder, settings):
    before = threading.active_count()
    corpus = data.open(settings({"a": folder}, seq_len=64, batch_size=4, threads=3))
    batches = corpus.batches(9)
    with contextlib.closing(corpus.stream(9, start=11)) as stream:
        for step in range(11, 40):
            np.testing.assert_array_equal(next(stream), batches[step])
    assert threading.active_count() == before


def test_mixture_follows_weights_and_serves_every_source_in_order(folder, tmp_path, settings):
    other = tmp_path / "other.txt"
    other.write_text("something else entirely\n" * 3000)
    third = tmp_path / "third.txt"
    third.write_text("a third thing\n" * 3000)
    source = lambda path, weight: {"kind": "text", "path": str(path), "weight": weight}  # noqa: E731
    sources = {"a": source(folder, 3.0), "b": source(other, 1.0), "c": source(third, 2.0)}
    corpus = data.open(settings(sources, seq_len=32, batch_size=12))
    assert [s["weight"] for s in corpus.description["sources"].values()] == pytest.approx([1 / 2, 1 / 6, 1 / 3])
    number, index = corpus.mixture.locate(np.arange(6000))
    for i, share in enumerate([1 / 2, 1 / 6, 1 / 3]):
        np.testing.assert_array_equal(index[number == i], np.arange((number == i).sum()))
        assert (number == i).sum() == pytest.approx(6000 * share, abs=2)
    batch = corpus.batches(0)[3]
    at = np.arange(36, 48)
    number, index = corpus.mixture.locate(at)
    for i, one in enumerate(corpus.sources.values()):
        np.testing.assert_array_equal(batch[number == i], one.rows(0, index[number == i]))
    assert set(corpus.held_out()) == set(corpus.content) == {"a", "b", "c"}


def test_mixture_is_exact_far_out_and_in_any_order():
    mixture = Mixture.of([0.2, 0.5, 1e-9])
    far = np.arange(10**10, 10**10 + 1000)
    number, index = mixture.locate(far)
    for i in range(1000):
        one, at = mixture.locate(far[i : i + 1])
        assert (one[0], at[0]) == (number[i], index[i])
    assert index[number == 0][-1] == pytest.approx(10**10 * 2 / 7, rel=1e-6)
    number, _ = mixture.locate(np.arange(1000))
    assert set(number) == {0, 1, 2}  # the least weight is served too


def test_a_copy_in_another_source_is_held_out_there_too(folder, tmp_path, settings, held_texts):
    corpus = data.open(settings({"a": folder}, seq_len=32, batch_size=1, held_out_tokens=10**9))
    held = held_texts(corpus)["a"]
    copies = tmp_path / "copies"
    copies.mkdir()
    for i, content in enumerate([*held, *sorted(documents(folder))[:100]]):
        (copies / f"{i}.txt").write_bytes(content)
    both = data.open(settings({"a": folder, "b": copies}, seq_len=32, batch_size=1, held_out_tokens=10**9))
    assert set(held) <= set(held_texts(both)["b"])
    for source in both.sources.values():
        stream = source._windows._parts[0]
        trained = bytes(np.where(stream == 256, 0, stream).astype(np.uint8))
        assert not [text for text in held if text in trained]


def test_fingerprint_is_the_content_and_knows_no_path(folder, tmp_path, settings):
    one = data.fingerprint(settings({"a": folder}))
    assert one == data.open(settings({"a": folder})).content
    moved = tmp_path / "elsewhere"
    folder.rename(moved)
    assert data.fingerprint(settings({"a": moved})) == one
    (moved / "003.txt").write_text("changed")
    assert data.fingerprint(settings({"a": moved})) != one


def test_seq_len_longer_than_the_text_is_refused(tmp_path, settings):
    short = tmp_path / "short.txt"
    short.write_text("few words\n" * 300)
    with pytest.raises(BadInput, match=r"config.data.seq_len = 4096: .*short"):
        data.open(settings({"short": short}, seq_len=4096))
    short.write_text("x")
    with pytest.raises(BadInput, match=r"config.data.sources.short.path = 1: is too small for a held-out document"):
        data.open(settings({"short": short}, seq_len=4))


def test_reads_where_absl_flags_are_not_parsed(folder, settings):
    assert not absl.flags.FLAGS.is_parsed()  # as in a notebook
    corpus = data.open(settings({"a": folder}, seq_len=64, batch_size=4))
    with contextlib.closing(corpus.stream(0, start=0)) as stream:
        assert next(stream).shape == (4, 65)


def test_a_stream_that_is_dropped_or_fails_leaves_no_thread(folder, settings):
    before = threading.active_count()
    corpus = data.open(settings({"a": folder}, seq_len=64, batch_size=4))
    stream = corpus.stream(0, start=0)
    next(stream)
    del stream
    gc.collect()
    assert threading.active_count() == before
    broken = dataclasses.replace(corpus, sources={"a": None})
    with pytest.raises(AttributeError):
        next(broken.stream(0, start=0))
    assert threading.active_count() == before


def test_the_description_is_json(folder, settings, monkeypatch):
    monkeypatch.setattr(text, "FEW_FILES", 64)
    sources = {"a": {"kind": "text", "path": str(folder), "weight": 2.0}}
    description = data.open(settings(sources)).description
    assert json.loads(json.dumps(description, allow_nan=False)) == description
    a = description["sources"]["a"]
    assert (a["kind"], a["weight"], a["documents"], a["files"], a["skipped_files"]) == ("text", 1.0, 220, 220, 0)
    assert a["bytes"] == sum(file.stat().st_size for file in folder.iterdir())
    assert a["content"] == data.fingerprint(settings(sources))["a"]


def test_fingerprint_imports_neither_jax_nor_grain():
    script = """if True:
        import sys
        from scalelab import config, data
        corpus = data.open(config.base().data)
        assert data.fingerprint(config.base().data) == corpus.content
        corpus.held_out()
        heavy = {"jax", "grain", "pandas", "scipy", "tokenizers", "pyarrow", "datasets"} & set(sys.modules)
        assert not heavy, heavy
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"sources": {"a": {"kind": "web", "path": "", "weight": 1.0}}},
            r"sources.a.kind = 'web': must be one of text",
        ),
        ({"sources": {"a": {"kind": "text", "path": "", "weight": 0.0}}}, r"sources.a.weight = 0.0: must be above 0"),
        ({"sources": {}}, r"sources = {}: needs at least one source"),
        ({"threads": 0}, r"threads = 0: must be at least 1"),
        ({"held_out_tokens": 0}, r"held_out_tokens = 0: must be at least 1"),
    ],
)
def test_bad_settings_are_one_line(settings, fields, message):
    with pytest.raises(BadInput, match=rf"config\.data\.{message}"):
        data.open(settings(**fields))
