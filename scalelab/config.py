"""Configs: argument strings and overrides -> a validated ConfigDict -> a frozen, hashed RunSpec.

A config file defines `get_config(arg="")` and returns a locked `ml_collections.ConfigDict` that starts from
`base()`; every field is reachable from the command line as `--config.section.field=value`. What can be wrong with
a config is said before anything is compiled, as `errors.BadInput`.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import hashlib
import importlib.util
import json
import math
import pathlib
import runpy
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from scalelab.errors import BadInput

SCHEMA = 1

# ------------------------------------------------------------------------------------------------ the schema


def base() -> ConfigDict:
    """Every field that a run has, with its default. Types are those of the defaults; all fields are required."""
    config = ConfigDict()
    config.family = "transformer"  # what the record calls the architecture
    config.seed = 0  # initialisation
    config.data_seed = 0  # order of the training data; runs that share it are paired

    config.model = ConfigDict(
        {
            "vocab_size": 0,  # 0: that of the tokenizer
            "width": 256,
            "layers": 4,  # prefix + whole repeats of `blocks` + suffix
            # Each entry: (sequence mixer, channel mixer or "none"[, {option: value} over the mixer's section]).
            "prefix": (),
            "blocks": (("attention", "mlp"),),
            "suffix": (),
            "norm": "rmsnorm",  # rmsnorm | layernorm
            "norm_eps": 1e-6,
            "placement": "pre",  # pre | post | peri | out
            "embed_norm": False,
            "tied_embeddings": True,
            "logit_cap": 0.0,  # 0: none
            "init": "normal",  # normal | small | fan_in
            "init_std": 0.02,  # for `normal`
            "compute_dtype": "bfloat16",  # parameters are float32 always
            "remat": "none",  # none | dots | full
            "loss_chunk": 1024,  # tokens whose logits exist at one time
            "attention": {
                "heads": 4,
                "kv_heads": 4,
                "head_dim": 64,
                "rope_theta": 10000.0,  # 0: no rotation
                "qk_norm": False,
                "window": 0,  # 0: none; counts the token itself
                "soft_cap": 0.0,  # 0: none
                "bias": False,
            },
            "mlp": {"kind": "swiglu", "hidden": 704, "bias": False},  # swiglu | gelu
        }
    )
    config.data = ConfigDict(
        {
            # name -> kind (text | tokens | synthetic), path ("": the embedded corpus), weight in the mixture
            "sources": {"stdlib": {"kind": "text", "path": "", "weight": 1.0}},
            "tokenizer": "bytes",  # for `text`; token shards bring their own
            "seq_len": 256,
            "batch_size": 16,  # sequences in a global batch
            "document_mask": True,  # attention stays inside documents
            "held_out_tokens": 131072,  # at most, per source; whole documents
            "threads": 2,  # that read ahead
        }
    )
    config.optim = ConfigDict(
        {
            "name": "adamw",
            "lr": 3e-3,
            "schedule": "cosine",  # cosine | wsd | constant
            "warmup": 0.05,  # share of the steps
            "cooldown": 0.2,  # share of the steps, for wsd
            "final_lr": 0.1,  # share of the peak
            "beta1": 0.9,
            "beta2": 0.95,
            "eps": 1e-8,
            "weight_decay": 0.1,  # times the learning rate, as in optax and torch
            "decay_embeddings": False,
            "clip": 1.0,  # global gradient norm; 0: none
        }
    )
    config.train = ConfigDict(
        {
            "steps": 1000,
            "accum_steps": 1,  # parts that a global batch is cut into, one after the other
            "z_loss": 0.0,
            "eval_every": 0.1,  # share of the steps between held-out evaluations; the last step always has one
            "diverge_above": 2.0,  # times ln(vocabulary): after warm-up, a loss above it ends the run
        }
    )
    config.checkpoint = ConfigDict(
        {
            "every_s": 120.0,  # seconds between checkpoints; 0: only where asked by `keep_at`
            "every": 0,  # steps between checkpoints, on top of the clock; 0: off
            "keep_last": 2,
            "keep_at": (),  # steps whose checkpoints stay
            "final": "weights",  # of a finished run stay: weights | all | nothing
        }
    )
    config.log = ConfigDict({"wandb": "", "tensorboard": False})  # wandb: online | offline
    config.mesh = ConfigDict({"data": 0})  # devices along the batch; 0: all
    config.runs = "runs"  # folder of run directories
    return config


# What a run is, is independent of where, how visibly and how safely it runs: these never enter its id. Nor does the
# tokenizer's name, which may be a path: the content hashes know the tokenizer.
OUTSIDE_ID = ("checkpoint", "log", "mesh", "runs", "data.threads", "data.tokenizer")
# Fields added after schema 1, with the default under which the older runs ran: left out of the id where equal.
ADDED_LATER: dict[str, Any] = {}

# ------------------------------------------------------------------------------------------------ argument strings


def parse_arg(arg: str, **defaults: Any) -> ConfigDict:
    """`"size=s,steps=200"` -> the given defaults, updated; values take the type of the default.

    A bare name is `name=True`. Lists are written with colons: `budgets=1e12:2e12`. Raises `BadInput` for unknown
    names and for values that are not of the type.
    """
    values = dict(defaults)
    for item in filter(None, (part.strip() for part in arg.split(","))):
        name, eq, text = item.partition("=")
        if name not in defaults:
            raise BadInput(f"config argument {name}", text if eq else True, _suggest(name, defaults))
        default = defaults[name]
        if isinstance(default, tuple):
            kind = type(default[0]) if default else str
            values[name] = tuple(_convert(f"config argument {name}", part, kind) for part in text.split(":"))
        else:
            values[name] = _convert(f"config argument {name}", text if eq else "true", type(default))
    return ConfigDict(values)


def _suggest(name: str, known: Iterable[str]) -> str:
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    return (f"no such field; did you mean {near[0]}? " if near else "no such field; ") + "known: " + ", ".join(known)


def _convert(field: str, text: str, kind: type) -> Any:
    """Text from a command line -> a value of the kind. Python literals for tuples and dicts."""
    try:
        if kind is bool:
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
        if kind is str:
            return text
        if kind is int:
            value = int(text) if text.lstrip("+-").isdigit() else float(text)
            if value != int(value):
                raise ValueError
            return int(value)
        if kind is float:
            value = float(text)
            if not math.isfinite(value):
                raise ValueError
            return value
        value = ast.literal_eval(text)
        return _freeze(value if isinstance(value, kind) else (value,)) if kind is tuple else kind(value)
    except (ValueError, KeyError, SyntaxError, OverflowError, TypeError):
        wanted = {"int": "a whole number", "float": "a finite number", "bool": "true or false"}
        raise BadInput(field, text, f"must be {wanted.get(kind.__name__, 'a Python ' + kind.__name__)}") from None


def _freeze(value: Any) -> Any:
    return tuple(_freeze(item) for item in value) if isinstance(value, list | tuple) else value


# ------------------------------------------------------------------------------------------------ loading


@dataclasses.dataclass(frozen=True)
class ConfigFile:
    """A config file, found by path or by the name of a built-in one, and the argument it was given."""

    name: str
    path: pathlib.Path
    arg: str
    _get_config: Callable[[str], ConfigDict]
    _sweep: Callable[[str], Iterable[Any]] | None

    def get_config(self, arg: str | None = None) -> ConfigDict:
        """The file's config for an argument (default: the one that it was named with)."""
        with _users_code(self.name, self.path):
            config = self._get_config(self.arg if arg is None else arg)
        if not isinstance(config, ConfigDict):
            raise BadInput("get_config", type(config).__name__, "must return an ml_collections.ConfigDict")
        return config

    def sweep(self) -> list[Any] | None:
        """The sweep's points (dotted overrides, or `sweep.Dropped`); None if the file has no `sweep`."""
        if self._sweep is None:
            return None
        with _users_code(self.name, self.path):
            return list(self._sweep(self.arg))


def builtin_folder() -> pathlib.Path:
    spec = importlib.util.find_spec("scalelab.configs")
    if spec is not None and spec.submodule_search_locations:
        return pathlib.Path(next(iter(spec.submodule_search_locations)))
    return pathlib.Path(__file__).parent.parent / "configs"  # a checkout that is not installed


def load_file(reference: str) -> ConfigFile:
    """`path/to/file.py[:arg]`, or `name[:arg]` for a built-in config."""
    name, _, arg = reference.partition(":")
    path = pathlib.Path(name)
    if path.suffix != ".py":
        path = builtin_folder() / f"{name}.py"
        if not path.is_file():
            known = (p.stem for p in builtin_folder().glob("[!_]*.py"))
            raise BadInput(
                "--config", name, f"no built-in config of that name ({', '.join(sorted(known))}) nor a .py file"
            )
    elif not path.is_file():
        raise BadInput("--config", name, "no such file")
    with _users_code(name, path):
        module = runpy.run_path(str(path), run_name=f"scalelab_config_{path.stem}")
    if not callable(module.get("get_config")):
        raise BadInput("--config", name, "must define get_config(arg)")
    return ConfigFile(name, path, arg, module["get_config"], module.get("sweep"))


@contextlib.contextmanager
def _users_code(name: str, path: pathlib.Path) -> Iterator[None]:
    """An error in a config file is its author's to mend: one line, with the place in the file."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        lines += [error.lineno] if isinstance(error, SyntaxError) else []
        where = f"line {lines[-1]}: " if lines else ""
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise BadInput("--config", name, f"does not run: {where}{reason}") from error


def override(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
    """A copy of the config with dotted fields changed; strings are read as the field's type.

    Raises `BadInput` for a field that does not exist or a value of another type.
    """
    config = config.copy_and_resolve_references()
    for dotted, value in changes.items():
        _assign(config, dotted, value)
    return config


def _assign(config: ConfigDict, dotted: str, value: Any) -> None:
    *sections, last = dotted.split(".")
    node: Any = config
    for depth, name in enumerate(sections):
        if not isinstance(node, ConfigDict) or name not in node:
            if sections[:depth] == ["data", "sources"]:  # the one open section: a new source is named into being
                with node.unlocked():
                    node[name] = ConfigDict({"kind": "text", "path": "", "weight": 1.0})
            else:
                fields = node.keys() if isinstance(node, ConfigDict) else ()
                raise BadInput(f"config.{dotted}", value, _suggest(name, fields))
        node = node[name]
    if not isinstance(node, ConfigDict) or last not in node:
        if sections == ["data", "sources"] and isinstance(value, Mapping):
            with node.unlocked():
                node[last] = ConfigDict({"kind": "text", "path": "", "weight": 1.0} | dict(value))
            return
        raise BadInput(f"config.{dotted}", value, _suggest(last, node.keys() if isinstance(node, ConfigDict) else ()))
    old = node[last]
    if isinstance(old, ConfigDict):
        if dotted == "data.sources" and isinstance(value, str | Mapping):
            sources = _convert(f"config.{dotted}", value, dict) if isinstance(value, str) else dict(value)
            with config.data.unlocked():
                config.data.sources = ConfigDict()
            for name, source in sources.items():
                _assign(config, f"data.sources.{name}", source)
            return
        raise BadInput(f"config.{dotted}", value, f"is a section; set one of its fields: {', '.join(old.keys())}")
    if isinstance(value, str) and not isinstance(old, str):
        value = _convert(f"config.{dotted}", value, type(old))
    elif isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    elif isinstance(old, int) and isinstance(value, float) and value == int(value) and not isinstance(old, bool):
        value = int(value)
    elif isinstance(old, tuple):
        value = _freeze(value)
    if type(value) is not type(old):
        raise BadInput(f"config.{dotted}", value, f"must be of type {type(old).__name__}, as {old!r}")
    node[last] = value


# ------------------------------------------------------------------------------------------------ validation


def choice(field: str, value: str, allowed: Iterable[str]) -> None:
    allowed = tuple(allowed)
    if value not in allowed:
        raise BadInput(f"config.{field}", value, f"must be one of {', '.join(allowed)}")


def at_least(field: str, value: float, least: float, *, above: bool = False) -> None:
    if not math.isfinite(value) or value < least or (above and value == least):
        raise BadInput(f"config.{field}", value, f"must be {'above' if above else 'at least'} {least}")


def between(field: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise BadInput(f"config.{field}", value, f"must lie in [{low}, {high}]")


def validate(config: ConfigDict) -> None:
    """Checks that need no model and no data. `models.validate` and `data.open` hold their own."""
    _check_schema(config)
    data, optim, train = config.data, config.optim, config.train
    for field in ("seq_len", "batch_size", "held_out_tokens", "threads"):
        at_least(f"data.{field}", data[field], 1)
    if not data.sources:
        raise BadInput("config.data.sources", {}, "needs at least one source")
    for name, source in data.sources.items():
        choice(f"data.sources.{name}.kind", source.kind, ("text", "tokens", "synthetic"))
        at_least(f"data.sources.{name}.weight", source.weight, 0, above=True)
    choice("optim.name", optim.name, ("adamw",))
    choice("optim.schedule", optim.schedule, ("cosine", "wsd", "constant"))
    at_least("optim.lr", optim.lr, 0, above=True)
    at_least("optim.eps", optim.eps, 0, above=True)
    for field in ("weight_decay", "clip"):
        at_least(f"optim.{field}", optim[field], 0)
    for field in ("warmup", "cooldown", "final_lr", "beta1", "beta2"):
        between(f"optim.{field}", optim[field], 0, 1)
    if optim.schedule == "wsd" and optim.warmup + optim.cooldown > 1:
        raise BadInput("config.optim.cooldown", optim.cooldown, f"warmup {optim.warmup} + cooldown must not exceed 1")
    at_least("train.steps", train.steps, 1)
    at_least("train.accum_steps", train.accum_steps, 1)
    at_least("train.z_loss", train.z_loss, 0)
    between("train.eval_every", train.eval_every, 0, 1)
    at_least("train.diverge_above", train.diverge_above, 0, above=True)
    if data.batch_size % train.accum_steps:
        raise BadInput(
            "config.train.accum_steps", train.accum_steps, f"must divide data.batch_size = {data.batch_size}"
        )
    for field in ("every_s", "every"):
        at_least(f"checkpoint.{field}", config.checkpoint[field], 0)
    at_least("checkpoint.keep_last", config.checkpoint.keep_last, 1)
    choice("checkpoint.final", config.checkpoint.final, ("weights", "all", "nothing"))
    for step in config.checkpoint.keep_at:
        if not isinstance(step, int) or not 0 < step <= train.steps:
            raise BadInput("config.checkpoint.keep_at", step, f"must be steps from 1 to {train.steps}")
    choice("log.wandb", config.log.wandb, ("", "online", "offline"))
    at_least("mesh.data", config.mesh.data, 0)
    for field in ("seed", "data_seed"):
        between(field, config[field], 0, 2**32 - 1)


def _check_schema(config: ConfigDict) -> None:
    """The config of a user's file has the fields of `base()`, no other, and of their types."""

    def walk(node: Mapping[str, Any], model: Mapping[str, Any], path: str) -> None:
        for name, value in node.items():
            field = f"{path}{name}"
            if path == "data.sources.":
                walk(value, {"kind": "", "path": "", "weight": 1.0}, f"{field}.")
                continue
            if name not in model:
                raise BadInput(f"config.{field}", value, _suggest(name, model))
            if isinstance(model[name], Mapping):
                if not isinstance(value, Mapping):
                    raise BadInput(f"config.{field}", value, "is a section")
                walk(value, model[name], f"{field}.")
            elif type(value) is not type(model[name]):
                raise BadInput(f"config.{field}", value, f"must be of type {type(model[name]).__name__}")
        for name in model:
            if name not in node and path != "data.sources.":
                raise BadInput(f"config.{path}{name}", None, f"is missing; the default is {model[name]!r}")

    walk(config.to_dict(), base().to_dict(), "")


def load(reference: str, overrides: Mapping[str, Any] | None = None) -> ConfigDict:
    """A config by reference (`transformer:size=s`), with dotted overrides, checked and locked."""
    file = load_file(reference)
    return finish(file.get_config(), overrides or {})


def finish(config: ConfigDict, overrides: Mapping[str, Any]) -> ConfigDict:
    config = override(config, overrides)
    validate(config)
    return config.lock()


# ------------------------------------------------------------------------------------------------ RunSpec


@dataclasses.dataclass(frozen=True)
class RunSpec:
    """A resolved config, frozen, with the content hashes of its data. `id` names the run and its directory.

    `content` maps every data source to a hash of what it holds, tokenizer included: the id knows data by content and
    never by path.
    """

    config: ConfigDict
    content: Mapping[str, str]
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        object.__setattr__(self, "config", self.config.copy_and_resolve_references().lock())
        object.__setattr__(self, "content", dict(self.content))

    @property
    def id(self) -> str:
        fields = flatten(self.config.to_dict())
        kept = {
            name: value
            for name, value in fields.items()
            if not any(name == out or name.startswith(f"{out}.") for out in OUTSIDE_ID)
            and not (name.startswith("data.sources.") and name.endswith(".path"))
            and not (name in ADDED_LATER and ADDED_LATER[name] == value)
        }
        text = canonical_json({"config": kept, "content": self.content, "schema": self.schema})
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def to_json(self) -> str:
        document = {"schema": self.schema, "id": self.id, "config": self.config.to_dict(), "content": self.content}
        return json.dumps(document, indent=1, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = "spec.json") -> RunSpec:
        try:
            document = json.loads(text)
            schema, stored, content = document["schema"], document["config"], document["content"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise BadInput(where, text, f"is not a run's spec ({error})") from None
        if schema > SCHEMA:
            raise BadInput(f"{where}: schema", schema, f"this scalelab reads up to {SCHEMA}; upgrade it")
        config = base()
        with config.data.unlocked():
            config.data.sources = ConfigDict()
        for name, value in flatten(stored, stop=("data.sources",)).items():
            if isinstance(value, Mapping):
                for source, fields in value.items():
                    _assign(config, f"data.sources.{source}", fields)
            else:
                _assign(config, name, value)
        return cls(config, content, schema)


def flatten(tree: Mapping[str, Any], prefix: str = "", stop: tuple[str, ...] = ()) -> dict[str, Any]:
    """Nested mapping -> dotted names. Mappings named in `stop` stay whole."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping) and path not in stop:
            flat.update(flatten(value, f"{path}.", stop))
        else:
            flat[path] = value
    return flat


def canonical_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)
