"""`data build`: what it reads, what it writes, that it survives being killed, and shards as a source."""

import argparse
import contextlib
import gzip
import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import zstandard

from scalelab import data
from scalelab.data import builder, command, text, tokenizers
from scalelab.errors import BadInput, FeatureMissing


def corpus(n=300, seed=0):
    """Documents, some equal, with more than ASCII in them."""
    rng = np.random.default_rng(seed)
    words = ["naïve", "the", "scaling", "of", "laws", "漢字", "α\n", "token"]
    found = [" ".join(rng.choice(words, rng.integers(20, 200))) + f" {i}" for i in range(n)]
    return found + found[: n // 10]


def write_jsonl(path, documents, opener=open):
    with opener(path, "wb") as file:
        for document in documents:
            file.write(json.dumps({"text": document, "id": 1}).encode() + b"\n")
    return path


def tree(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def build(inputs, out, **options):
    return data.build([str(name) for name in inputs], out, **({"progress": False} | options))


def source(path):
    return {"kind": "tokens", "path": str(path), "weight": 1.0}


def documents_of(folder, split):
    """The documents of a split's shards, as text."""
    manifest = json.loads((folder / "manifest.json").read_text())
    stream = np.concatenate([np.fromfile(folder / entry["file"], manifest["dtype"]) for entry in manifest[split]])
    starts = np.flatnonzero(stream == manifest["bos"])
    assert starts[0] == 0
    name = "bytes" if manifest["tokenizer_file"] is None else str(folder / "tokenizer.json")
    tokenizer = tokenizers.load(name)
    return [tokenizer.decode(part[1:]) for part in np.split(stream, starts[1:])]


# ------------------------------------------------------------------------------------------------ what it writes


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:400"])
def test_every_document_is_written_once_split_by_hash(tmp_path, tokenizer):
    documents = corpus()
    manifest = build([write_jsonl(tmp_path / "a.jsonl", documents)], tmp_path / "out", tokenizer=tokenizer)
    train, held = (documents_of(tmp_path / "out", split) for split in ("train", "held_out"))
    expected = {document for document in documents if text.held_out(hashlib.sha256(document.encode()).digest())}
    assert set(held) == expected
    assert len(held) == len(expected) > 0
    assert sorted(train) == sorted(document for document in documents if document not in expected)
    assert train != [document for document in documents if document not in expected]  # shuffled
    assert manifest["documents"] == len(documents)
    assert manifest["bytes"] == sum(len(document.encode()) for document in documents)
    assert manifest["vocab_size"] == (257 if tokenizer == "bytes" else 400)
    assert manifest["dtype"] == "<u2"
    digests = [hashlib.sha256(document.encode()).digest() for document in held]
    assert digests == sorted(digests)
    assert not (tmp_path / "out" / ".build").exists()


def test_the_output_depends_on_documents_and_seed_alone(tmp_path):
    one = write_jsonl(tmp_path / "one.jsonl", corpus())
    build([one], tmp_path / "a", shard_tokens=10000, tokenizer="bpe:300")
    build([one], tmp_path / "b", shard_tokens=10000, tokenizer="bpe:300", part_bytes=1000)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert len([name for name in tree(tmp_path / "a") if name.startswith("train")]) > 3
    build([one], tmp_path / "c", shard_tokens=10000, tokenizer="bpe:300", seed=1)
    assert documents_of(tmp_path / "a", "held_out") == documents_of(tmp_path / "c", "held_out")
    assert documents_of(tmp_path / "a", "train") != documents_of(tmp_path / "c", "train")


def test_shards_hold_whole_documents_up_to_their_size(tmp_path):
    manifest = build([write_jsonl(tmp_path / "a.jsonl", corpus())], tmp_path / "out", shard_tokens=5000)
    assert all(entry["tokens"] <= 5000 for entry in manifest["train"])
    for entry in manifest["train"]:
        assert np.fromfile(tmp_path / "out" / entry["file"], "<u2", count=1) == manifest["bos"]


def test_a_large_vocabulary_takes_four_bytes():
    assert tokenizers.dtype_for(2**16) is np.uint16
    assert tokenizers.dtype_for(2**16 + 1) is np.uint32


# ------------------------------------------------------------------------------------------------ what it reads


def test_all_kinds_of_file_give_the_same_documents(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    documents = corpus()
    write_jsonl(tmp_path / "a.jsonl", documents)
    write_jsonl(tmp_path / "b.jsonl.gz", documents, gzip.open)
    write_jsonl(tmp_path / "c.jsonl.zst", documents, zstandard.open)
    raw = (tmp_path / "a.jsonl").read_bytes()
    frames = [zstandard.compress(raw[:5000]), zstandard.compress(raw[5000:])]
    (tmp_path / "frames.jsonl.zst").write_bytes(b"".join(frames))
    pq.write_table(pa.table({"text": documents, "n": list(range(len(documents)))}), tmp_path / "d.parquet")
    (tmp_path / "texts").mkdir()
    for i, document in enumerate(documents):
        (tmp_path / "texts" / f"{i:04}.txt").write_bytes(document.encode())
    (tmp_path / "texts" / "README.md").write_text("not read")
    contents = set()
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "frames.jsonl.zst", "d.parquet", "texts"):
        contents.add(build([tmp_path / name], tmp_path / f"out-{name}", shard_tokens=10000)["content"])
    assert len(contents) == 1


def test_a_data_set_saved_on_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    documents = corpus()
    dataset = datasets.Dataset.from_dict({"body": documents, "n": list(range(len(documents)))})
    dataset.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": dataset, "test": dataset}).save_to_disk(str(tmp_path / "splits"))
    whole = build([write_jsonl(tmp_path / "a.jsonl", documents)], tmp_path / "a")["content"]
    assert build([tmp_path / "saved"], tmp_path / "b", text_field="body")["content"] == whole
    assert build([tmp_path / "splits"], tmp_path / "c", text_field="body")["content"] == whole
    with pytest.raises(BadInput, match=r"--text-field = 'text': .*saved has no such field; its columns: body, n"):
        build([tmp_path / "saved"], tmp_path / "d")


def test_a_data_set_of_the_hub(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_dict({"text": corpus()})
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **named: asked.append((args, named)) or dataset)
    manifest = build(["hf:owner/name", "hf:owner/name:validation"], tmp_path / "out")
    assert manifest["documents"] == 2 * 330
    assert {(args[0], named["split"]) for args, named in asked} == {
        ("owner/name", "train"),
        ("owner/name", "validation"),
    }
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **named: {}["offline"])
    with pytest.raises(BadInput, match=r"INPUT = 'hf:owner/name': can't be loaded \(KeyError"):
        build(["hf:owner/name"], tmp_path / "out2")


def test_the_tokenizer_is_trained_on_training_documents_only(tmp_path, monkeypatch):
    seen = []
    train = tokenizers.train_bpe
    monkeypatch.setattr(tokenizers, "train_bpe", lambda texts, size: seen.extend(texts) or train(texts, size))
    build([write_jsonl(tmp_path / "a.jsonl", corpus())], tmp_path / "out", tokenizer="bpe:300")
    assert sorted(seen) == sorted(documents_of(tmp_path / "out", "train"))
    seen.clear()
    monkeypatch.setattr(builder, "SAMPLE_BYTES", 20000)
    build([write_jsonl(tmp_path / "a.jsonl", corpus())], tmp_path / "less", tokenizer="bpe:300")
    assert 15000 < sum(len(document.encode()) for document in seen) <= 20000


def test_missing_packages_say_which_extra_brings_them(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(FeatureMissing, match=r"pyarrow: pip install 'scalelab\[parquet\]'"):
        build([tmp_path / "a.parquet"], tmp_path / "out")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(FeatureMissing, match=r"datasets: pip install 'scalelab\[hf\]'"):
        build(["hf:some/name"], tmp_path / "out2")


def test_one_text_file_is_cut_into_documents(tmp_path):
    content = "".join(f"line {i} of a book\n" for i in range(20000))
    (tmp_path / "book.txt").write_text(content)
    manifest = build([tmp_path / "book.txt"], tmp_path / "out")
    assert manifest["documents"] > 50
    assert sorted("".join(documents_of(tmp_path / "out", split)) for split in ("train", "held_out")) != []
    pieces = [piece for split in ("train", "held_out") for piece in documents_of(tmp_path / "out", split)]
    assert sorted("".join(pieces).splitlines()) == sorted(content.splitlines())


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("a.csv", lambda p: p.write_text("x"), r"INPUT = .*must end in one of .txt, .jsonl"),
        ("none.jsonl", lambda p: None, r"INPUT = .*no such file or folder"),
        ("folder", lambda p: p.mkdir(), r"INPUT = .*holds no file of a kind"),
        ("a.txt", lambda p: p.write_bytes(b"abc \xff"), r"INPUT = .*a.txt.*must be UTF-8 text; it is not, at byte 4"),
        ("a.txt", lambda p: p.write_bytes(b""), r"INPUT = .*holds no text"),
        ("a.txt", lambda p: p.write_bytes(b"one document"), r"INPUT = .*too little text"),
        ("a.jsonl", lambda p: p.write_text('{"text": "a"}\n\n{"text":'), r"INPUT = .*line 3 is not JSON"),
        ("a.jsonl", lambda p: p.write_bytes(b'{"text": "\xff"}'), r"INPUT = .*line 1 is not JSON in UTF-8"),
        ("a.jsonl", lambda p: p.write_text('{"body": "a"}'), r"--text-field = 'text': .*the fields of line 1: body"),
        ("a.jsonl", lambda p: p.write_text('["a"]'), r"--text-field = 'text': .*the fields of line 1: none"),
        ("a.jsonl", lambda p: p.write_text('{"text": 5}'), r"line 1: field text must be a string, not int"),
        ("a.jsonl", lambda p: p.write_text('{"text": "\\ud800"}'), r"line 1: field text is not text"),
        ("a.jsonl.gz", lambda p: (write_jsonl(p, corpus(), gzip.open), cut(p)), r"is cut or damaged after line"),
        ("a.jsonl.zst", lambda p: (write_jsonl(p, corpus(), zstandard.open), cut(p)), r"is cut or damaged after line"),
        ("a.jsonl.gz", lambda p: p.write_bytes(b"not gzip"), r"is cut or damaged after line 0"),
        ("a.jsonl.zst", lambda p: p.write_bytes(b"not zstd"), r"is cut or damaged after line 0"),
        ("a.parquet", lambda p: p.write_bytes(b"not parquet"), r"can't be read as Parquet"),
    ],
)
def test_bad_inputs_get_one_line(tmp_path, name, make, message):
    make(tmp_path / name)
    with pytest.raises(BadInput, match=message) as caught:
        build([tmp_path / name], tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer": "bpe:many"}, r"--tokenizer = 'bpe:many': bpe:VOCAB needs 257 to 2\^24 ids"),
        ({"tokenizer": "bpe:256"}, r"--tokenizer = 'bpe:256'"),
        ({"tokenizer": "words"}, r"--tokenizer = 'words': must be bytes, bpe:VOCAB or the path"),
        ({"held_out": 0.0}, r"--held-out = 0.0: must lie between 0 and 1"),
        ({"shard_tokens": 0}, r"--shard-tokens = 0: must be at least 1"),
    ],
)
def test_bad_options_get_one_line(tmp_path, options, message):
    with pytest.raises(BadInput, match=message):
        build([write_jsonl(tmp_path / "a.jsonl", corpus(50))], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_another_build_or_a_folder_in_use_is_not_touched(tmp_path):
    one = write_jsonl(tmp_path / "a.jsonl", corpus())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(BadInput, match=r"--out = .*mine': must be a new or empty folder"):
        build([one], tmp_path / "mine")
    build([one], tmp_path / "out")
    before = tree(tmp_path / "out")
    with pytest.raises(BadInput, match=r"--out = .*holds another finished build"):
        build([one], tmp_path / "out", seed=3)
    assert tree(tmp_path / "out") == before


# ------------------------------------------------------------------------------------------------ interruptions


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch):
    inputs = [write_jsonl(tmp_path / f"{name}.jsonl", corpus(200, seed)) for seed, name in enumerate("ab")]
    options = {"part_bytes": 10000, "shard_tokens": 10000}
    build(inputs, tmp_path / "whole", **options)
    encoded, written = [], []

    class StopError(Exception):
        pass

    encode, write = tokenizers.Bytes.encode_documents, builder._write

    def counting(self, documents):
        encoded.extend(documents)
        return encode(self, documents)

    def failing(work, file, content):
        written.append(file.name)
        if len(written) == stop:
            raise StopError
        write(work, file, content)

    monkeypatch.setattr(tokenizers.Bytes, "encode_documents", counting)
    monkeypatch.setattr(builder, "_write", failing)
    for extra in range(1, 200, 7):  # stopped before ever later files
        written.clear()
        stop = extra
        with contextlib.suppress(StopError):
            build(inputs, tmp_path / "out", **options)
            break
    else:
        pytest.fail("never finished")
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    total = 440
    assert total <= len(encoded) < 1.4 * total  # of every attempt, at most the part that was cut short
    encoded.clear()
    written.clear()
    build(inputs, tmp_path / "out", **options)
    assert not encoded
    assert not written


def test_other_options_or_inputs_do_not_continue_a_build(tmp_path, monkeypatch):
    one = write_jsonl(tmp_path / "a.jsonl", corpus())
    monkeypatch.setattr(builder, "_shards", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        build([one], tmp_path / "out")
    monkeypatch.undo()
    with pytest.raises(BadInput, match=r"holds an unfinished build with other seed;"):
        build([one], tmp_path / "out", seed=1)
    with pytest.raises(BadInput, match=r"path = .*holds a build that is not finished"):
        data.shards.manifest(str(tmp_path / "out"), "config.data.sources.a.path")
    write_jsonl(one, corpus(301))
    with pytest.raises(BadInput, match=r"holds an unfinished build with other INPUT;"):
        build([one], tmp_path / "out")


@pytest.mark.parametrize("kills", [pytest.param(4, id="few"), pytest.param(25, id="many", marks=pytest.mark.slow)])
def test_kill_9_at_any_moment_then_the_same_command(tmp_path, kills):
    inputs = [write_jsonl(tmp_path / f"{name}.jsonl", corpus(1500, seed)) for seed, name in enumerate("ab")]
    options = {"tokenizer": "bpe:300", "part_bytes": 30000, "shard_tokens": 20000}
    build(inputs, tmp_path / "whole", **options)
    names, out = [str(name) for name in inputs], tmp_path / "out"
    script = f"from scalelab import data\ndata.build({names!r}, {str(out)!r}, progress=False, **{options!r})\n"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    rng = np.random.default_rng(kills)
    killed = 0
    for _ in range(kills):
        process = subprocess.Popen([sys.executable, "-c", script], env=environment)
        while not out.exists() and process.poll() is None:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.35))
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        assert not (out / "manifest.json").exists() or tree(out).items() >= tree(tmp_path / "whole").items()
    assert killed > 0
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
    assert tree(out) == tree(tmp_path / "whole")


def test_a_full_disk_is_one_line_and_the_build_continues(tmp_path, monkeypatch):
    one = write_jsonl(tmp_path / "a.jsonl", corpus())
    build([one], tmp_path / "whole")

    def full(source, target):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        replace = os.replace
        patch.setattr(os, "replace", lambda a, b: (full if pathlib.Path(b).suffix == ".bin" else replace)(a, b))
        with pytest.raises(BadInput, match=r"--out = .*can't be written \(No space left on device\)"):
            build([one], tmp_path / "out")
    build([one], tmp_path / "out")
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


# ------------------------------------------------------------------------------------------------ as a source


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_shards_are_a_source(tmp_path, settings, held_texts, tokenizer):
    manifest = build(
        [write_jsonl(tmp_path / "a.jsonl", corpus())], tmp_path / "out", tokenizer=tokenizer, shard_tokens=3000
    )
    wanted = settings({"a": source(tmp_path / "out")}, seq_len=64, batch_size=4, held_out_tokens=10**9)
    opened = data.open(wanted)
    assert data.fingerprint(wanted) == opened.content == {"a": manifest["content"]}
    assert opened.vocab_size == manifest["vocab_size"]
    held = held_texts(opened)["a"]
    assert [document.decode() for document in held] == documents_of(tmp_path / "out", "held_out")
    # Windows straddle shards: put together they are the shards, end to end.
    n = opened.unique_tokens // 64
    rows = opened.sources["a"]._windows.rows(np.arange(n))
    stream = np.concatenate([np.fromfile(tmp_path / "out" / entry["file"], "<u2") for entry in manifest["train"]])
    np.testing.assert_array_equal(np.append(rows[:, :-1].ravel(), rows[-1, -1]), stream[: n * 64 + 1])
    batches = opened.batches(0)
    served = {row.tobytes() for step in range(n // 4) for row in batches[step]}
    assert served <= {row.tobytes() for row in rows}
    trained = set(documents_of(tmp_path / "out", "train"))
    assert not trained & {document.decode() for document in held}


def test_text_and_shards_of_the_same_tokenizer_mix(tmp_path, settings):
    build([write_jsonl(tmp_path / "a.jsonl", corpus())], tmp_path / "bytes")
    build([write_jsonl(tmp_path / "a.jsonl", corpus())], tmp_path / "bpe", tokenizer="bpe:300")
    (tmp_path / "b.txt").write_text("some other text\n" * 2000)
    other = {"kind": "text", "path": str(tmp_path / "b.txt"), "weight": 1.0}
    mixed = data.open(settings({"a": source(tmp_path / "bytes"), "b": other}, seq_len=32, batch_size=4))
    assert mixed.batches(0)[0].shape == (4, 33)
    with pytest.raises(BadInput, match=r"config.data.sources.b = 'bytes': has another tokenizer than a"):
        data.open(settings({"a": source(tmp_path / "bpe"), "b": other}))


def test_damage_is_noticed(tmp_path, settings):
    out = tmp_path / "out"
    build([write_jsonl(tmp_path / "a.jsonl", corpus())], out, tokenizer="bpe:300", shard_tokens=5000)
    data.verify(str(out))
    wanted = settings({"a": source(out)}, seq_len=64)
    shard = out / "train-00001.bin"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-2])
    field = r"config\.data\.sources\.a\.path = "
    with pytest.raises(BadInput, match=field + r".*train-00001.bin has \d+ bytes, not \d+ as built"):
        data.open(wanted)
    shard.unlink()
    with pytest.raises(BadInput, match=field + r".*train-00001.bin can't be read"):
        data.open(wanted)
    shard.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    data.open(wanted)
    with pytest.raises(BadInput, match=r"train-00001.bin is not what was built"):
        data.verify(str(out))
    shard.write_bytes(whole)
    (out / "tokenizer.json").write_bytes((out / "tokenizer.json").read_bytes().replace(b"a", b"b", 1))
    with pytest.raises(BadInput, match=field + r".*tokenizer.json was altered"):
        data.open(wanted)
    (out / "manifest.json").write_text("{")
    for read in (data.open, data.fingerprint):
        with pytest.raises(BadInput, match=field + r".*manifest.json that can't be read"):
            read(wanted)
    (out / "manifest.json").write_text(json.dumps({"schema": 99}))
    with pytest.raises(BadInput, match=r"manifest schema 99; .*reads up to 1: upgrade"):
        data.open(wanted)
    with pytest.raises(BadInput, match=r"must be a folder made by `scalelab data build`"):
        data.open(settings({"a": source(tmp_path / "none")}))


def test_command_line(tmp_path, capsys):
    one = write_jsonl(tmp_path / "a.jsonl", corpus())
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    out = tmp_path / "out"
    args = parser.parse_args([str(one), "--out", str(out), "--tokenizer", "bpe:300", "--shard-tokens", "5000"])
    assert command.main(args) == 0
    printed = capsys.readouterr()
    assert "330 documents" in printed.out
    assert "vocabulary 300" in printed.out
    assert pathlib.Path(out, "manifest.json").is_file()
    assert "100%" in printed.err
