"""`scalelab eval`: likelihoods against direct passes, contexts beyond the training's, records that hold each once."""

import dataclasses
import itertools
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.nn import log_softmax

from scalelab import choices, cli, data, models, records, restore, sample, scoring, train
from scalelab.errors import BadInput
from tests.helpers import read_json, small_corpus, tiny_spec

QUESTIONS = [
    {"context": "the loss", "choices": ["falls", "does not", "xyz"], "answer": 0},
    {"question": "a power of ", "choices": ["compute", "the"], "answer": 0},
    {"context": "", "choices": ["Zürich", "the loss falls as a power"], "answer": 1},
]


def write(path, questions):
    path.write_text("\n".join(json.dumps(question) for question in questions) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(corpus, a run)"""
    corpus = small_corpus(tmp_path_factory.mktemp("corpus"))
    root = tmp_path_factory.mktemp("runs")
    spec = tiny_spec(corpus, train__steps=60)
    train.run(spec, root)
    return corpus, root / spec.id


@pytest.fixture
def run(trained, tmp_path):
    """(corpus, a copy of the run whose record may be written to)"""
    return trained[0], shutil.copytree(trained[1], tmp_path / trained[1].name)


PASSES = {}


def log_p(opened, ids):
    """log p of ids[1:], token by token, from one direct pass; what fills it up comes after them."""
    direct = PASSES.setdefault(id(opened.model), jax.jit(lambda p, ids: models.logits(opened.model, p, ids)))
    logits = direct(opened.params, jnp.asarray([[*ids[:-1], *[0] * (129 - len(ids))]]))[0, : len(ids) - 1]
    return np.asarray(log_softmax(logits))[np.arange(len(ids) - 1), ids[1:]]


@pytest.fixture(scope="module")
def opened(trained):
    return restore.load(trained[1])


def test_choices_have_the_likelihood_of_a_direct_pass(opened, tmp_path):
    questions, _ = choices.read(write(tmp_path / "t.jsonl", QUESTIONS))
    asked, cut = choices.ask(questions, opened.tokenizer, "t.jsonl")
    assert cut == 0
    nats = scoring.Scorer(opened).nats(asked)
    expected, sizes = [], []
    for question in QUESTIONS:
        context = question.get("context", question.get("question")).encode()
        space = b" " if context and not context.endswith(b" ") else b""
        for choice in question["choices"]:
            text = context + space + choice.encode()
            p = log_p(opened, [256, *text])
            expected.append(-p[len(context) :].sum())
            sizes.append(len(choice.encode()))
    assert nats == pytest.approx(np.array(expected), rel=1e-5)
    found = choices.results(asked, nats)
    parts = np.split(np.array(expected), [3, 5])
    right = [np.argmin(part) == q["answer"] for part, q in zip(parts, QUESTIONS, strict=True)]
    assert found["accuracy"] == pytest.approx(np.mean(right))
    per_byte = np.split(np.array(expected) / sizes, [3, 5])
    assert found["accuracy_per_byte"] == pytest.approx(
        np.mean([np.argmin(part) == q["answer"] for part, q in zip(per_byte, QUESTIONS, strict=True)])
    )
    assert found["chance"] == pytest.approx((1 / 3 + 1 / 2 + 1 / 2) / 3)


def test_every_length_of_choice_is_scored_alike_whatever_the_batch(opened):
    scorer = scoring.Scorer(opened)
    text = "the loss falls as a power of compute until it does not"
    for length in (1, 2, 15, 16, 17, 40):
        question = choices.Question(1, "x", ("a" + text[:length], "b" + text[:length]), 0)
        (asked,), _ = choices.ask([question], opened.tokenizer, "t")
        alone = scorer.nats([asked])
        assert alone[0] == pytest.approx(-log_p(opened, asked.tokens[0])[1:].sum(), rel=1e-5)
        other = choices.Asked(((256, *b"filling up"), (256, *b"filling it")), 1, (10, 10), 0)
        assert scorer.nats([other, asked, other])[2:4] == pytest.approx(alone, rel=1e-6)


class Merges:
    """A tokenizer that merges across the border of context and choice: `x y` is one token, as are `x `, ` y`."""

    bos, vocab_size, fingerprint, lossless = 300, 301, "merges", False

    def encode(self, text):
        ids = []
        while text:
            piece = next((p for p in ("x y", "x ", " y") if text.startswith(p)), text[0])
            ids.append({"x y": 290, "x ": 291, " y": 292}.get(piece) or ord(piece))
            text = text[len(piece) :]
        return ids


def test_what_is_given_is_what_all_choices_share():
    question = choices.Question(1, "ax", ("y", "z"), 0)  # a|x y and a|x |z; the context alone is a|x
    (asked,), _ = choices.ask([question], Merges(), "t")
    assert asked.tokens == ((300, 97, 290), (300, 97, 291, 122))
    assert asked.given == 2
    with pytest.raises(BadInput, match=r"t:1 = .*without a token of its own"):
        choices.ask([choices.Question(1, "a", ("b", "c"), 0)], _Forgetful(), "t")


class _Forgetful(Merges):
    def encode(self, text):
        return super().encode(text)[:1]


def test_long_contexts_are_cut_from_the_left_and_choices_never(opened):
    tokenizer = opened.tokenizer
    question = choices.Question(1, "abcdefgh ", ("xy", "z"), 0)
    (asked,), cut = choices.ask([question], tokenizer, "t", most=6)
    assert cut == 1
    assert asked.tokens == ((256, *b"fgh xy"), (256, *b"fgh z"))
    assert asked.given == 5
    (whole,), cut = choices.ask([question], tokenizer, "t", most=11)
    assert (cut, whole.given) == (0, 10)
    with pytest.raises(BadInput, match="beyond the 1 tokens"):
        choices.ask([question], tokenizer, "t", most=1)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "is not JSON"),
        ("[1]", "must be an object"),
        ('{"choices": ["a", "b"], "answer": 0}', "one of context and question"),
        ('{"context": "c", "question": "q", "choices": ["a", "b"], "answer": 0}', "one of context and question"),
        ('{"context": 3, "choices": ["a", "b"], "answer": 0}', "must be text"),
        ('{"context": "\\ud800", "choices": ["a", "b"], "answer": 0}', "must be text"),
        ('{"context": "c", "choices": ["a"], "answer": 0}', "at least two"),
        ('{"context": "c", "choices": "ab", "answer": 0}', "at least two"),
        ('{"context": "c", "choices": ["a", ""], "answer": 0}', "not empty"),
        ('{"context": "c", "choices": ["a", 3], "answer": 0}', "texts"),
        ('{"context": "c", "choices": ["a", "a"], "answer": 0}', "different"),
        ('{"context": "c", "choices": ["a", "b"], "answer": 2}', "index of a choice"),
        ('{"context": "c", "choices": ["a", "b"], "answer": true}', "index of a choice"),
        ('{"context": "c", "choices": ["a", "b"], "answer": "a"}', "index of a choice"),
        ('{"context": "c", "choices": ["a", "b"]}', "index of a choice"),
    ],
)
def test_bad_lines_are_named_by_number(tmp_path, line, says):
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(QUESTIONS[0]) + "\n\n" + line + "\n")
    with pytest.raises(BadInput, match=says) as error:
        choices.read(str(path))
    assert f"{path}:3" in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(QUESTIONS[0]) + "\n", encoding="utf-8-sig")
    assert choices.read(str(path))[0][0].context == QUESTIONS[0]["context"]


@pytest.mark.parametrize("context", [16, 50, 128])
def test_a_context_is_one_pass_over_windows_of_its_length(opened, context):
    """Against documents taken apart by hand: each window from an empty state, documents apart; 50 and 128 are beyond
    the 16 of training."""
    scorer = scoring.Scorer(opened)
    ((name, held, _),) = scorer.held_out({}, context)
    assert name == "text"
    found = scorer.loss(held)
    section = opened.spec.config.data.copy_and_resolve_references()
    section.seq_len = context
    documents = data.open(section).held_out()["text"]
    nats, seen = [], []
    for row, doc in zip(documents.tokens, documents.doc, strict=True):
        starts = [0, *(i for i in range(1, context) if row[i] == 256), context]
        for first, end in itertools.pairwise(starts):
            p = -log_p(opened, row[first : end + 1])
            kept = doc[first:end] >= 0
            nats += p[kept].tolist()
            seen += (np.arange(end - first) + 1)[kept].tolist()
    assert found["tokens"] == len(nats)
    assert found["loss"] == pytest.approx(np.mean(nats), rel=1e-5)
    assert found["bpb"] == pytest.approx(sum(nats) / math.log(2) / documents.bytes.sum(), rel=1e-5)
    nats, seen = np.array(nats), np.array(seen)
    assert sum(count for *_, count in found["curve"]) == len(nats)
    for low, high, loss, _, count in found["curve"]:
        some = (seen >= low) & (seen <= high)
        assert count == some.sum()
        assert loss == pytest.approx(nats[some].mean(), rel=1e-5)
    assert found["curve"][-1][1] == context


def test_at_the_context_of_training_it_is_the_loss_of_the_record(run):
    _, folder = run
    before = records.read(folder)
    found = scoring.score(folder, scoring.plan([], [], []))
    assert found["text@16"]["loss"] == pytest.approx(before.loss, rel=1e-5)
    assert found["text@16"]["loss_se"] == pytest.approx(before.loss_se, rel=1e-5)
    assert found["text@16"]["bpb"] == pytest.approx(before.bpb, rel=1e-5)


def test_the_record_holds_each_evaluation_once(run, tmp_path):
    corpus, folder = run
    before = records.read(folder)
    tasks = write(tmp_path / "small.jsonl", QUESTIONS)
    plan = scoring.plan([f"mine={corpus}"], [16, 64], [tasks])
    scoring.score(folder, plan)
    once = (folder / "record.json").read_text()
    scoring.score(folder, plan)
    assert (folder / "record.json").read_text() == once
    scoring.score(folder, scoring.plan([f"other={corpus}"], [16], []))
    record = records.read(folder)
    assert set(record.evaluations) == {"mine@16", "mine@64", "small", "other@16"}
    assert record.results() == before.results()
    assert dataclasses.replace(record, evaluations=None) == before
    table = records.load(folder)
    assert table["eval.mine@64.loss"].item() == record.evaluations["mine@64"]["loss"]
    assert table["eval.small.accuracy_se"].item() == record.evaluations["small"]["accuracy_se"]
    assert not [name for name in table.columns if "curve" in name or "content" in name]
    assert [p.name for p in folder.iterdir() if p.name.startswith(".record")] == []


def test_records_without_evaluations_stand_beside_those_with(run, tmp_path):
    _, folder = run
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    (other / "record.json").write_text((other / "record.json").read_text().replace(folder.name, "other"))
    records.add_evaluations(folder, {"a": {"loss": 1.5, "se": float("nan"), "curve": [[1, float("nan")]]}})
    assert read_json(folder / "record.json")["evaluations"]["a"] == {"loss": 1.5, "se": None, "curve": [[1, None]]}
    table = records.load(tmp_path).set_index("id")
    assert table.loc[folder.name, "eval.a.loss"] == 1.5
    assert math.isnan(table.loc["other", "eval.a.loss"])
    with pytest.raises(BadInput, match="not finished yet"):
        records.add_evaluations(tmp_path / "nowhere", {})


def change_tokenizer(folder, **changes):
    document = read_json(folder / "record.json")
    document["data"] |= changes
    (folder / "record.json").write_text(json.dumps(document))


def test_another_tokenizer_is_refused(run):
    corpus, folder = run
    with pytest.raises(BadInput, match=r"'synthetic': its tokenizer \(symbols-27\) is not the run's \(bytes\)"):
        scoring.score(folder, scoring.plan(["synthetic"], [], []))
    change_tokenizer(folder, tokenizer="f" * 64)
    for use in (lambda: list(sample.text(folder)), lambda: restore.load(folder)):
        with pytest.raises(BadInput, match=r"'bytes': is not the tokenizer .* trained with \(ffffffffffff\)"):
            use()
    (folder / "record.json").unlink()  # unfinished: its weights may still be sampled while the data are the same
    assert "".join(sample.text(folder, "a", tokens=2)).startswith("a")
    extra = corpus / "extra.txt"
    extra.write_text("more")
    with pytest.raises(BadInput, match="have changed since it was planned"):
        list(sample.text(folder))
    extra.unlink()


def test_a_run_whose_data_have_gone_can_still_be_used(run, tmp_path):
    _, folder = run
    spec = read_json(folder / "spec.json")
    spec["config"]["data"]["sources"]["text"]["path"] = str(tmp_path / "gone")
    (folder / "spec.json").write_text(json.dumps(spec))
    assert "".join(sample.text(folder, "a", tokens=2)).startswith("a")
    found = scoring.score(folder, scoring.plan([], [], [write(tmp_path / "t.jsonl", QUESTIONS)]))
    assert list(found) == ["t"]


def test_on_the_command_line(run, tmp_path, capsys):
    corpus, folder = run
    tasks = write(tmp_path / "t.jsonl", QUESTIONS)
    assert (
        cli.main(["eval", str(folder), "--data", f"a={corpus},b={corpus}", "--context", "16,32", "--tasks", tasks]) == 0
    )
    out = capsys.readouterr().out
    assert all(f"{name}@{context}" in out for name in "ab" for context in (16, 32))
    assert "per byte" in out


def test_bad_input_of_eval_is_one_line_and_status_2(run, tmp_path, capsys):
    corpus, folder = run
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{}\n")
    (tmp_path / "empty.jsonl").write_text("\n")
    diverged = shutil.copytree(folder, tmp_path / "diverged")
    document = read_json(diverged / "record.json") | {"status": "diverged", "reason": "loss nan"}
    (diverged / "record.json").write_text(json.dumps(document))
    unfinished = shutil.copytree(folder, tmp_path / "unfinished")
    (unfinished / "record.json").unlink()
    before = (folder / "record.json").read_text()
    good = write(tmp_path / "t.jsonl", QUESTIONS)
    cases = {
        ("nowhere",): "holds no runs",
        (str(diverged),): "it diverged (loss nan)",
        (str(unfinished),): "has no finished run",
        (str(folder), "--context=many"): "--context = 'many': must be whole numbers",
        (str(folder), "--context=0"): "must be at least 1",
        (str(folder), "--context=1000000"): "--context = 1000000: is longer than the training text of text",
        (str(folder), "--data=/nowhere"): "no such file",
        (str(folder), f"--data={corpus},{corpus}"): "is the second of the name",
        (str(folder), "--data=synthetic:vocb=3"): "did you mean vocab",
        (str(folder), "--data=probe:parity"): "is not the run's",
        (str(folder), f"--tasks={tmp_path}"): "cannot be read",
        (str(folder), f"--tasks={bad}"): "bad.jsonl:1",
        (str(folder), f"--tasks={tmp_path}/empty.jsonl"): "holds no question",
        (str(folder), f"--data=t={corpus}", f"--tasks={good}"): "is also a set's name",
        (str(folder), "--config.model.width=3"): "needs --config",
    }
    for case, says in cases.items():
        assert cli.main(["eval", *case]) == 2, case
        err = capsys.readouterr().err
        assert says in err, (case, err)
        assert len(err.strip().splitlines()) == 1
    assert (folder / "record.json").read_text() == before
