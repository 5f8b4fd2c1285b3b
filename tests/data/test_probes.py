"""The probe tasks: labels against a plain reading of the row, and what every source owes."""

import collections

import numpy as np
import pytest

from scalelab import data
from scalelab.data import probes
from scalelab.data.stream import labelled, split_rows
from scalelab.errors import BadInput

SPECS = [
    ("parity", 13),
    ("modular,m=5,symbols=3", 13),
    ("recall,pairs=4,least=1,keys=9,values=5", 20),
    ("recall,pairs=6,keys=8,values=8,power=1", 19),
    ("copy,symbols=5,least=2", 14),
    ("copy,symbols=5,delay=3,selective=True,least=1", 16),
]


def drawn(spec, T, n=300, seed=0):
    source = probes.Probe(spec, T, "field")
    return source, *split_rows(source.rows(seed, np.arange(n)))


def test_labels_apart_come_back():
    tokens = np.array([[3, 0, 2**15 - 2, 1]])
    labels = np.array([[-1, 0, 2**15 - 2]])
    read, targets = split_rows(labelled(tokens, labels))
    assert read.tolist() == [[3, 0, 2**15 - 2]]
    assert targets.tolist() == [[-1, 0, 2**15 - 2]]
    plain = np.array([[5, 6, 7]], np.int32)
    assert [part.tolist() for part in split_rows(plain)] == [[[5, 6]], [[6, 7]]]


@pytest.mark.parametrize("spec", ["parity", "modular,m=5,symbols=3"])
def test_running_sums(spec):
    source, tokens, labels = drawn(spec, 13)
    for row, asked in zip(tokens.tolist(), labels.tolist(), strict=True):
        assert row[0] == source.tokenizer.bos
        total, expected = 0, [-1]
        for x in row[1:]:
            total += x
            expected.append(total % source.task.m)
        assert asked == expected
    assert set(tokens[:, 1:].ravel()) == set(range(source.task.symbols))


@pytest.mark.parametrize("spec", ["recall,pairs=4,least=1,keys=9,values=5", "mqar,pairs=6,keys=8,values=8,power=1"])
def test_recall(spec):
    source, tokens, labels = drawn(spec, 20, n=600)
    task, counts = source.task, collections.Counter()
    for row, asked in zip(tokens.tolist(), labels.tolist(), strict=True):
        n = next(i for i, x in enumerate(asked) if x >= 0)  # the first query comes after the pairs
        memory, at = {}, 1
        while at + 1 < 20 and row[at] < task.keys and task.keys <= row[at + 1] < task.keys + task.values:
            assert row[at] not in memory
            memory[row[at]] = row[at + 1]
            at += 2
        assert n >= at
        queries = {row[i]: asked[i] for i in range(20) if asked[i] >= 0}
        assert queries == memory
        assert all(row[i] == task.vocab - 1 for i in range(at, 20) if asked[i] < 0)
        counts[len(memory)] += 1
    low = task.least or task.pairs
    assert set(counts) == set(range(low, task.pairs + 1))


def test_gaps_follow_the_power_law():
    """With one pair the gap is g with probability ~ g^(power - 1), exactly; with power = 1 all are alike."""
    for power in (0.01, 1.0):
        _, _, labels = drawn(f"recall,pairs=1,keys=9,values=9,power={power}", 12, n=8000)
        gaps = np.argmax(labels >= 0, axis=1) - 2
        seen = np.bincount(gaps, minlength=10)[1:10] / len(gaps)
        expected = np.arange(1, 10) ** (power - 1.0)
        expected /= expected.sum()
        assert np.abs(seen - expected).max() < 4 * np.sqrt(0.25 / len(gaps))


@pytest.mark.parametrize("spec", ["copy,symbols=5,least=2", "copy,symbols=5,delay=3,selective=True,least=1"])
def test_copy(spec):
    source, tokens, labels = drawn(spec, 16, n=600)
    task, lengths, places = source.task, set(), set()
    blank, separator = task.symbols, task.symbols + 1
    for row, asked in zip(tokens.tolist(), labels.tolist(), strict=True):
        cut = row.index(separator)
        text = [x for x in row[1:cut] if x != blank]
        n = len(text)
        assert cut == 1 + n + task.delay
        assert asked == [-1] * cut + text + [-1] * (16 - cut - n)
        assert row[cut + 1 :] == (text + [blank] * 16)[: 15 - cut]
        lengths.add(n)
        places.add(tuple(i for i, x in enumerate(row[1:cut]) if x != blank))
    assert lengths == set(range(task.least, task.longest(16) + 1))
    assert (len(places) > len(lengths)) == task.selective


@pytest.mark.parametrize(("spec", "T"), SPECS)
def test_rows_are_pure_and_held_out_rows_never_trained_on(spec, T):
    source = probes.Probe(spec, T, "field")
    rows = source.rows(3, np.arange(400))
    some = np.array([7, 399, 7, 0])
    assert np.array_equal(source.rows(3, some), rows[some])
    assert not np.array_equal(source.rows(4, np.arange(400)), rows)
    read, targets = split_rows(rows)
    held = source.held_out(300 * T)
    read_there, targets_there = split_rows(held.tokens)
    trained = {tuple(row) for seed in range(5) for row in split_rows(source.rows(seed, np.arange(2000)))[0].tolist()}
    tested = [tuple(row) for row in read_there.tolist()]
    assert len(set(tested)) == len(tested)
    assert not trained & set(tested)
    assert np.array_equal(held.doc >= 0, targets_there >= 0)
    assert np.array_equal(held.bytes, (targets_there >= 0).sum(axis=1))
    assert (targets >= 0).any(axis=1).all()
    assert max(read.max(), targets.max()) < source.tokenizer.vocab_size
    assert probes.parse(probes.spec(source.task), "field") == source.task


def test_a_corpus_of_probes_is_a_corpus():
    from scalelab.config import base, finish

    section = {"probe": {"kind": "probe", "path": "parity"}}
    conf = finish(base(), {"data.sources": section, "data.seq_len": 12, "data.batch_size": 6})
    corpus = data.open(conf.data)
    assert corpus.content == data.fingerprint(conf.data)
    assert corpus.vocab_size == data.open_tokenizer(conf.data).vocab_size == 3
    assert (corpus.entropy, corpus.unique_tokens) == (0.0, None)
    batches = corpus.batches(seed=5)
    halves = [corpus.batches(seed=5, host=host, hosts=2)[4] for host in (0, 1)]
    assert np.array_equal(batches[4], np.concatenate(halves))


@pytest.mark.parametrize(
    ("spec", "T", "says"),
    [
        ("partiy", 8, "must begin with one of parity"),
        ("", 8, "must begin with one of"),
        ("parity,m=3", 8, "no such field"),
        ("modular,m=1", 8, "must be at least 2"),
        ("modular,m=two", 8, "must be a whole number"),
        ("modular,m=40000", 8, "symbols; at most"),
        ("parity", 1, "sequence length of at least 2"),
        ("parity", 2, "too few different rows"),
        ("recall,pairs=8", 24, "sequence length of at least 25"),
        ("recall,pairs=8,keys=7", 40, "keys must be at least pairs"),
        ("recall,pairs=0", 40, "pairs must be at least 1"),
        ("recall,pairs=4,least=5", 40, "least from 0 to pairs"),
        ("recall,power=2", 40, "power must lie in"),
        ("copy,delay=8", 10, "sequence length of at least 11"),
        ("copy,least=4", 8, "sequence length of at least 9"),
        ("copy,least=-1", 8, "least must be at least 0"),
        ("copy,symbols=1", 8, "must be at least 2"),
    ],
)
def test_what_is_no_task(spec, T, says):
    with pytest.raises(BadInput, match=says):
        probes.Probe(spec, T, "field").held_out(4 * T)
