"""Reading text: the embedded corpus, the user's files, and what is wrong with them."""

import os
import pathlib
import sysconfig

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from scalelab import config, data
from scalelab.data import text, tokenizers
from scalelab.errors import BadInput

FIELD = "config.data.sources.a.path"


def test_the_embedded_corpus_is_the_standard_library():
    documents = text.read("", FIELD)
    assert 400 < documents.files < 2000
    assert 5e6 < documents.bytes < 40e6
    with open(os.path.join(sysconfig.get_path("stdlib"), "argparse.py"), "rb") as file:
        content = file.read()
    held = [piece for piece in documents.texts if piece in content and len(piece) > 200]
    assert sum(map(len, held)) == len(content)  # cut in pieces, none lost
    assert max(map(len, held)) <= text.piece_size(documents.bytes) + 3
    for outside in ("test/test_argparse.py", "idlelib/run.py", "lib2to3/pytree.py"):
        path = os.path.join(sysconfig.get_path("stdlib"), outside)
        if os.path.exists(path):
            with open(path, "rb") as file:
                assert file.read()[:1000] not in b"".join(documents.texts)
    again = text.read("", FIELD)
    assert again.content == documents.content
    assert again.texts == documents.texts


def test_embedded_files_that_are_not_utf8_are_skipped_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    (tmp_path / "good.py").write_bytes(b"x = 1\n" * 1000)
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n")
    (tmp_path / "notes.txt").write_bytes(b"not source")
    for outside in ("test", "site-packages", "__pycache__"):
        (tmp_path / outside).mkdir()
        (tmp_path / outside / "inner.py").write_bytes(b"out")
    documents = text.read("", FIELD)
    assert (documents.files, documents.skipped) == (1, 1)
    assert b"".join(sorted(documents.texts, key=len)).replace(b"x = 1\n", b"") == b""
    assert data.open(config.base().data).description["sources"]["stdlib"]["skipped_files"] == 1


def test_order_and_hash_are_of_content_not_of_names(tmp_path):
    for folder, names in (("one", "abc"), ("two", "cab")):
        (tmp_path / folder).mkdir()
        for name, content in zip(names, ("first\n", "second\n", "third\n"), strict=True):
            (tmp_path / folder / name).write_text(content * 50)
    one, two = (text.read(str(tmp_path / folder), FIELD) for folder in ("one", "two"))
    assert one.texts == two.texts
    assert one.content == two.content


def test_hidden_and_empty_files_are_no_documents(tmp_path):
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_bytes(b"\xff\xff")
    (tmp_path / ".hidden").write_bytes(b"\xff")
    (tmp_path / "empty.md").write_bytes(b"")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.rst").write_bytes(b"text\n")
    assert text.read(str(tmp_path), FIELD).texts == [b"text\n"]


@pytest.mark.parametrize(
    "content", ["line of words\n" * 20000, "漢字" * 50000, "\n" * 70000, "a" * 3000 + "\n" + "b" * 200000]
)
def test_few_files_are_cut_in_pieces_that_lose_nothing(content):
    pieces = list(text.pieces(content.encode(), 16384))
    assert b"".join(pieces) == content.encode()
    assert all(piece.decode() for piece in pieces)
    assert max(map(len, pieces)) <= 16384 + 3
    if content.startswith("line"):
        assert all(piece.endswith(b"\n") for piece in pieces)


def test_one_small_file_has_a_held_out_part(tmp_path, settings, held_texts):
    file = tmp_path / "one.txt"
    file.write_text("".join(f"line {i} of a small file\n" for i in range(400)))
    corpus = data.open(settings({"a": file}, seq_len=32, batch_size=2))
    held = held_texts(corpus)["a"]
    assert 0 < sum(map(len, held)) < 0.2 * file.stat().st_size
    for piece in held:
        assert piece in file.read_bytes()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such file or folder"),
        (lambda path: path.mkdir(), "holds no text; no file that is not hidden"),
        (lambda path: path.write_bytes(b""), "holds no text"),
        (lambda path: path.write_bytes(b"fine so far \xff"), r"must be UTF-8 text; .*corpus is not, at byte 12"),
    ],
)
def test_bad_text_is_one_line_that_names_the_field(tmp_path, make, message, settings):
    path = tmp_path / "corpus"
    make(path)
    for read in (data.open, data.fingerprint):
        with pytest.raises(BadInput, match=rf"config\.data\.sources\.a\.path = .*corpus.*: .*{message}") as caught:
            read(settings({"a": path}))
        assert "\n" not in str(caught.value)


def test_unreadable_file(tmp_path, settings, monkeypatch):
    path = tmp_path / "secret.txt"
    path.write_text("text")

    def refuse(self):  # root reads whatever the mode says
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(pathlib.Path, "read_bytes", refuse)
    with pytest.raises(BadInput, match=r"sources.a.path = .*can't read .*secret.txt: Permission denied"):
        data.open(settings({"a": path}))


@pytest.mark.parametrize("tokenizer", ["no-such", "gpt2", ""])
def test_unknown_tokenizer(tmp_path, tokenizer, settings):
    with pytest.raises(BadInput, match=r"config.data.tokenizer = .*must be bytes or the path of a tokenizer.json"):
        data.open(settings(tokenizer=tokenizer))


def test_a_file_that_is_no_tokenizer(tmp_path, settings):
    path = tmp_path / "tokenizer.json"
    for content in (b"{}", b"\xff", b"not json"):
        path.write_bytes(content)
        with pytest.raises(BadInput, match=r"config.data.tokenizer = .*is not a tokenizer.json"):
            data.fingerprint(settings(tokenizer=str(path)))


# ------------------------------------------------------------------------------------------------ tokenizer.json


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "corpus.txt"
    rng = np.random.default_rng(1)
    words = ["naïve", "the", "Theory", "of", "scaling", "laws", "漢字", "α"]
    path.write_text("".join(" ".join(rng.choice(words, 12)) + f" {i}\n" for i in range(3000)))
    return path


def train(path, lowercase=False):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train([str(path)], trainer)
    return tokenizer


def test_bits_per_byte_count_the_bytes_of_the_text_under_any_tokenizer(
    lines, tmp_path, monkeypatch, settings, held_texts
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    train(lines).save(str(tmp_path / "tokenizer.json"))
    bpe = data.open(settings({"a": lines}, tokenizer=str(tmp_path / "tokenizer.json"), held_out_tokens=10**9))
    raw = data.open(settings({"a": lines}, held_out_tokens=10**9))
    assert bpe.vocab_size == bpe.bos + 1 == 301
    assert held_texts(bpe) == held_texts(raw)  # the same documents, byte for byte
    np.testing.assert_array_equal(bpe.held_out()["a"].bytes, raw.held_out()["a"].bytes)
    assert bpe.held_out()["a"].tokens.size < raw.held_out()["a"].tokens.size
    assert bpe.content != raw.content
    # A uniform model over the vocabulary has log2(V) bits a token: per byte that is tokens / bytes times as much.
    held = bpe.held_out()["a"]
    bits = (held.doc >= 0).sum() * np.log2(301) / held.bytes.sum()
    words = [bpe.tokenizer.encode(document.decode()) for document in held_texts(bpe)["a"]]
    assert bits == pytest.approx(sum(len(w) + 1 for w in words) * np.log2(301) / held.bytes.sum())


def test_encoding_is_cached_and_a_damaged_cache_is_made_anew(lines, tmp_path, monkeypatch, settings, held_texts):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "tokenizer.json"
    train(lines).save(str(path))
    wanted = settings({"a": lines}, tokenizer=str(path))
    first = data.open(wanted)
    (cached,) = (tmp_path / "cache").rglob("*.npz")
    with monkeypatch.context() as patch:
        patch.setattr(tokenizers.HuggingFace, "encode_documents", lambda *_: pytest.fail("encoded twice"))
        second = data.open(wanted)
    np.testing.assert_array_equal(second.batches(0)[3], first.batches(0)[3])
    assert held_texts(second) == held_texts(first)
    damaged = bytearray(cached.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    cached.write_bytes(damaged)
    third = data.open(wanted)
    np.testing.assert_array_equal(third.batches(0)[3], first.batches(0)[3])


def test_documents_that_a_tokenizer_loses_are_not_scored(lines, tmp_path, monkeypatch, settings):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "lower.json"
    train(lines, lowercase=True).save(str(path))
    with pytest.raises(BadInput, match=r"config.data.tokenizer = .*loses text"):
        data.open(settings({"a": lines}, tokenizer=str(path)))


def test_bytes_round_trip():
    tokenizer = tokenizers.Bytes()
    assert tokenizer.decode([256, *tokenizer.encode("héllo 漢"), 256]) == "héllo 漢"
    assert tokenizer.vocab_size == 257
