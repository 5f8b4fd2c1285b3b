import platform

import pytest

from scalelab import config, flops, records, sweep
from scalelab.errors import BadInput
from tests.helpers import small_corpus
from tests.test_records import make


def test_isoflop_keeps_its_budgets_and_never_repeats_a_run():
    found = sweep.expand("isoflop:budgets=4e11:8e11,sizes=4,span=8", {})
    assert len(found.runs) + len(found.dropped) == 8
    assert len({run.spec.id for run in found.runs}) == len(found.runs)
    for run in found.runs:
        assert min(abs(run.flops / budget - 1) for budget in (4e11, 8e11)) < 0.02
    sizes = [run.params_non_embedding for run in found.runs if run.flops < 6e11]
    assert max(sizes) / min(sizes) == pytest.approx(8, rel=0.35)
    assert found.name.startswith("isoflop-")
    assert sweep.expand("isoflop:budgets=4e11:8e11,sizes=4,span=8", {}).name == found.name


def test_overrides_come_before_what_is_derived_from_the_config():
    """A longer context costs more per token: the budget stays, the steps change."""
    short, long = (
        sweep.expand("isoflop:budgets=4e11,sizes=1", {"data.seq_len": str(length)}).runs[0] for length in (64, 256)
    )
    assert short.flops == pytest.approx(long.flops, rel=0.03)
    assert short.steps > 4 * long.steps


def test_too_small_a_budget_is_dropped_with_its_reason_and_nothing_left_is_an_error():
    found = sweep.expand("isoflop:budgets=1e8:4e11,sizes=2,span=8", {})
    assert min(run.flops for run in found.runs) > 3e11
    assert sum("budget" in drop.reason for drop in found.dropped) == 2
    with pytest.raises(BadInput, match="no run is left of 2: budget"):
        sweep.expand("isoflop:budgets=1e8,sizes=2", {})


def test_counts_of_a_plan_are_those_of_the_modules():
    run = sweep.expand("transformer:size=xs,steps=10,dtype=float32", {}).runs[0]
    conf = run.spec.config
    model = conf.model.copy_and_resolve_references()
    model.vocab_size = 257
    assert run.params == flops.counts(model).total
    assert run.tokens == 10 * conf.data.batch_size * conf.data.seq_len
    assert run.flops == flops.per_token(model, conf.data.seq_len).training * run.tokens
    assert run.disk >= 4 * run.params
    assert run.disk_peak >= 3 * 4 * run.params * (conf.checkpoint.keep_last + 1)


def test_product_writes_dots():
    assert list(sweep.product(optim__lr=(1, 2), seed=(0,))) == [{"optim.lr": 1, "seed": 0}, {"optim.lr": 2, "seed": 0}]


def test_save_leaves_specs_and_a_list_of_ids(tmp_path):
    found = sweep.expand("transformer:size=xs,steps=3", {}, command="scalelab sweep ...")
    path = found.save(tmp_path)
    assert records.run_folders(path) == [tmp_path / found.runs[0].spec.id]
    stored = (tmp_path / found.runs[0].spec.id / "spec.json").read_text()
    assert config.RunSpec.from_json(stored).id == found.runs[0].spec.id


def test_an_unfinished_run_takes_the_paths_of_the_new_command_a_finished_one_keeps_its_spec(tmp_path):
    for name in ("old", "new"):
        small_corpus(tmp_path / name)
    old, new = (sweep.expand(f"transformer:size=xs,steps=3,data={tmp_path / name}", {}) for name in ("old", "new"))
    run = new.runs[0].spec.id
    assert old.runs[0].spec.id == run, "the id knows the text, not where it lies"
    file = tmp_path / "runs" / run / "spec.json"
    old.save(tmp_path / "runs")
    new.save(tmp_path / "runs")
    assert config.RunSpec.from_json(file.read_text()).config.data.sources.text.path == str(tmp_path / "new")
    make(tmp_path / "runs", run)
    before = file.read_text()
    old.save(tmp_path / "runs")
    assert file.read_text() == before


def test_the_disk_of_checkpoints_that_stay():
    disk = lambda **changes: sweep.expand("transformer:size=xs,steps=100", {  # noqa: E731
        f"checkpoint.{name}": value for name, value in changes.items()}).runs[0]  # fmt: skip
    plain = disk()
    weights = 4 * plain.params
    assert disk(final="nothing").disk == plain.disk - weights
    assert disk(keep_at="(50,)").disk == plain.disk + 3 * weights
    assert disk(keep_at="(100,)").disk == plain.disk + 2 * weights  # all of the last one instead of its weights


def test_the_clock_goes_by_finished_runs_of_this_host(tmp_path):
    make(tmp_path, "a", host=platform.node(), params=1000, flops=1e12, flops_per_second=1e10, steps=10,
         step_seconds=10.0, seconds=103.0)  # fmt: skip
    make(tmp_path, "b", host="another", params=1000, flops_per_second=1e3)
    clock = sweep.Clock(tmp_path)
    assert clock.seconds(2000, 5e11) == pytest.approx(50 + 3)
    assert "1 finished run" in clock.source
    rough = sweep.Clock(tmp_path / "empty")
    assert "rough" in rough.source
    assert rough.seconds(1000, 1e12) > rough.START
