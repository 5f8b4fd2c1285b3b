import json
import pathlib

import pytest
from ml_collections import ConfigDict

from scalelab import config
from scalelab.config import RunSpec, base, override, parse_arg, validate
from scalelab.errors import BadInput

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
GOLDEN = pathlib.Path(__file__).parent / "golden"


def test_arg_strings_take_the_type_of_the_default():
    args = parse_arg("size=m,steps=2e2,flag,budgets=1e12:2e12", size="s", steps=1, flag=False, budgets=(1.0,), lr=0.5)
    assert args.to_dict() == {"size": "m", "steps": 200, "flag": True, "budgets": (1e12, 2e12), "lr": 0.5}
    assert isinstance(args.steps, int)


@pytest.mark.parametrize(
    ("arg", "says"),
    [
        ("stpes=3", "did you mean steps"),
        ("steps=three", "must be a whole number"),
        ("steps=2.5", "must be a whole number"),
        ("lr=nan", "must be a finite number"),
        ("flag=maybe", "must be true or false"),
    ],
)
def test_bad_arg_strings(arg, says):
    with pytest.raises(BadInput, match=says) as error:
        parse_arg(arg, steps=1, lr=0.5, flag=False)
    assert "\n" not in str(error.value)


def test_overrides_reach_every_field_and_keep_its_type():
    changed = override(
        base(),
        {
            "model.width": "512",
            "optim.lr": "1e-4",
            "model.tied_embeddings": "false",
            "model.blocks": "(('attention', 'mlp', {'window': 8}), ['attention', 'none'])",
            "checkpoint.keep_at": "100",
            "data.sources.mine.path": "corpus",
            "data.sources.stdlib.weight": 3,
        },
    )
    validate(changed)
    assert changed.model.width == 512
    assert changed.optim.lr == 1e-4
    assert changed.model.tied_embeddings is False
    assert changed.model.blocks == (("attention", "mlp", {"window": 8}), ("attention", "none"))
    assert changed.checkpoint.keep_at == (100,)
    assert changed.data.sources.mine.to_dict() == {"kind": "text", "path": "corpus", "weight": 1.0}
    assert changed.data.sources.stdlib.weight == 3.0
    only = override(base(), {"data.sources": "{'a': {'kind': 'synthetic', 'weight': 2}}"})
    validate(only)
    assert only.data.sources.to_dict() == {"a": {"kind": "synthetic", "path": "", "weight": 2.0}}


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("model.widht", "3", "config.model.widht = '3': no such field; did you mean width"),
        ("model.width", "wide", "config.model.width = 'wide': must be a whole number"),
        ("model.width", 2.5, "must be of type int"),
        ("model", "3", "is a section"),
        ("model.attention.heads.x", "3", "no such field"),
        ("train.steps", True, "must be of type int"),
        ("data.sources.stdlib.pth", "x", "did you mean path"),
    ],
)
def test_bad_overrides(field, value, says):
    with pytest.raises(BadInput, match=says.replace("(", r"\(")) as error:
        override(base(), {field: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("train.steps", 0, "at least 1"),
        ("train.accum_steps", 3, "must divide data.batch_size = 16"),
        ("optim.schedule", "linear", "must be one of cosine, wsd, constant"),
        ("optim.lr", 0.0, "above 0"),
        ("optim.lr", float("inf"), "must be finite and above 0"),
        ("optim.warmup", 1.5, r"must lie in \[0, 1\]"),
        ("optim.beta1", 1.0, r"must lie in \[0, 1\)"),
        ("optim.beta2", 1.0, r"must lie in \[0, 1\)"),
        ("data.sources.stdlib.weight", 0.0, "above 0"),
        ("data.sources.stdlib.kind", "csv", "must be one of text, tokens, synthetic, probe"),
        ("checkpoint.keep_at", (5000,), "must be steps from 1 to 1000"),
        ("log.wandb", "yes", "must be one of"),
        ("seed", -1, "must lie in"),
    ],
)
def test_validation_names_field_value_and_remedy(field, value, says):
    with pytest.raises(BadInput, match=says) as error:
        validate(override(base(), {field: value}))
    assert f"config.{field} = " in str(error.value)
    assert repr(value if not isinstance(value, tuple) else value[0]) in str(error.value)


def test_wsd_needs_room_for_both_ramps():
    with pytest.raises(BadInput, match="must not exceed 1"):
        validate(override(base(), {"optim.schedule": "wsd", "optim.warmup": 0.6, "optim.cooldown": 0.5}))


def test_sequences_balanced_together_divide_a_pass():
    """16 sequences in two parts: 8 in a pass."""
    moe = {"model.blocks": (("attention", "moe"),), "model.moe.lbl_scope": "micro_batch", "train.accum_steps": 2}
    validate(override(base(), {**moe, "model.moe.lbl_sequences": 4}))
    with pytest.raises(BadInput, match=r"config\.model\.moe\.lbl_sequences = 16: must divide the 8 sequences"):
        validate(override(base(), {**moe, "model.moe.lbl_sequences": 16}))


def test_users_file_with_a_field_of_its_own_or_one_missing(tmp_path):
    path = tmp_path / "mine.py"
    body = "from scalelab.config import base\ndef get_config(arg=''):\n    c = base().unlock()\n    {}\n    return c\n"
    path.write_text(body.format("c.model.deep = 3"))
    with pytest.raises(BadInput, match=r"config\.model\.deep = 3: no such field"):
        config.load(str(path))
    path.write_text(body.format("del c.optim.lr"))
    with pytest.raises(BadInput, match=r"config\.optim\.lr = None: is missing"):
        config.load(str(path))
    path.write_text(body.format("1 / 0"))
    with pytest.raises(BadInput, match="line 4: ZeroDivisionError"):
        config.load(str(path))
    path.write_text("def get_config(:")
    with pytest.raises(BadInput, match="does not run: line 1: SyntaxError"):
        config.load(str(path))
    path.write_text("x = 1")
    with pytest.raises(BadInput, match="must define get_config"):
        config.load(str(path))


def test_builtin_configs_are_found_by_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loaded = config.load("transformer:size=xs,steps=7", {"model.layers": "3"})
    assert (loaded.model.width, loaded.model.layers, loaded.train.steps) == (64, 3, 7)
    assert loaded.is_locked
    with pytest.raises(BadInput, match="no built-in config of that name"):
        config.load("transfromer")
    with pytest.raises(BadInput, match="no such file"):
        config.load("nowhere/mine.py:steps=3")


# ------------------------------------------------------------------------------------------------ RunSpec


def spec(**changes) -> RunSpec:
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    return RunSpec(override(base(), changes), {"stdlib": "0" * 64})


def test_the_id_knows_what_a_run_is_and_not_where_or_how_visibly_it_runs():
    same = spec(
        checkpoint__every_s=3.0, checkpoint__keep_at=(10,), log__tensorboard=True, mesh__data=2, runs="elsewhere",
        data__threads=7, data__sources__stdlib__path="moved",
    )  # fmt: skip
    assert same.id == spec().id
    ids = {spec().id, spec(seed=1).id, spec(data_seed=1).id, spec(optim__lr=1e-3).id, spec(model__layers=8).id}
    ids.add(RunSpec(base(), {"stdlib": "1" * 64}).id)
    assert len(ids) == 6


def test_a_field_added_later_enters_the_id_only_where_it_differs(monkeypatch):
    before = spec().id

    def extended() -> ConfigDict:
        new = ORIGINAL().unlock()
        new.model.novelty = "off"
        return new

    ORIGINAL = base
    monkeypatch.setattr(config, "base", extended)
    monkeypatch.setitem(config.ADDED_LATER, "model.novelty", "off")
    new = extended()
    assert RunSpec(new, {"stdlib": "0" * 64}).id == before
    assert RunSpec(override(new, {"model.novelty": "on"}), {"stdlib": "0" * 64}).id != before


def test_a_default_that_changed_speed_alone_keeps_the_id():
    assert spec(model__loss_chunk=1024).id == spec().id == spec(model__loss_chunk=2048).id
    assert spec(model__loss_chunk=512).id != spec().id


def test_ids_of_built_in_configs_are_golden():
    """Ids name runs for good: if this fails, undo the change, or give a new field an entry in ADDED_LATER and a default
    that is one of speed alone an entry in CHANGED_LATER."""
    golden = json.loads((GOLDEN / "ids.json").read_text())
    found = {ref: RunSpec(config.load(ref), {"stdlib": "0" * 64}).id for ref in golden}
    assert found == golden


def test_spec_round_trip(tmp_path):
    original = spec(model__blocks=(("attention", "mlp", {"window": 8}),), data__sources__stdlib__weight=2.0)
    again = RunSpec.from_json(original.to_json())
    assert again.id == original.id
    assert again.config == original.config
    assert dict(again.content) == dict(original.content)


def test_specs_of_schema_1_still_load():
    stored = (FIXTURES / "spec_schema1.json").read_text()
    assert RunSpec.from_json(stored).id == json.loads(stored)["id"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 1}'])
def test_a_damaged_spec_is_bad_input(text):
    with pytest.raises(BadInput, match="is not a run's spec"):
        RunSpec.from_json(text, "runs/x/spec.json")


def test_a_spec_from_the_future_asks_for_an_upgrade():
    newer = json.loads(spec().to_json()) | {"schema": 99}
    with pytest.raises(BadInput, match="upgrade"):
        RunSpec.from_json(json.dumps(newer))
