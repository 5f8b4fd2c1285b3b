"""Configs: argument strings and overrides -> a validated ConfigDict -> a frozen, hashed RunSpec.

A config file defines `get_config(arg="")` and returns a locked `ml_collections.ConfigDict` that starts from
`schema.base()`; every field is reachable from the command line as `--config.section.field=value`. What can be wrong
with a config is said before anything is compiled, as `errors.BadInput`.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
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
from scalelab.schema import ADDED_LATER, CHANGED_LATER, OUTSIDE_ID, Config, base, suggest, validate

__all__ = ["ConfigFile", "RunSpec", "base", "finish", "load", "load_file", "override", "parse_arg", "validate"]

SCHEMA = 1

# ------------------------------------------------------------------------------------------------ argument strings


def parse_arg(arg: str, **defaults: Any) -> Config:
    """`"size=s,steps=200"` -> the given defaults, updated; values take the type of the default.

    A bare name is `name=True`. Lists are written with colons: `budgets=1e12:2e12`. Raises `BadInput` for unknown
    names and for values that are not of the type.
    """
    values = dict(defaults)
    for item in filter(None, (part.strip() for part in arg.split(","))):
        name, eq, text = item.partition("=")
        if name not in defaults:
            raise BadInput(f"config argument {name}", text if eq else True, suggest(name, defaults))
        default = defaults[name]
        if isinstance(default, tuple):
            kind = type(default[0]) if default else str
            values[name] = tuple(_convert(f"config argument {name}", part, kind) for part in text.split(":"))
        else:
            values[name] = _convert(f"config argument {name}", text if eq else "true", type(default))
    return ConfigDict(values)


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
    _get_config: Callable[[str], Config]
    _sweep: Callable[[str], Iterable[Any]] | None

    def get_config(self, arg: str | None = None) -> Config:
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

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """A function that the file's sweep gave as a value, called as its other code is."""
        with _users_code(self.name, self.path):
            return function(*args)


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


def override(config: Config, changes: Mapping[str, Any]) -> Config:
    """A copy of the config with dotted fields changed; strings are read as the field's type.

    Raises `BadInput` for a field that does not exist or a value of another type.
    """
    config = config.copy_and_resolve_references()
    for dotted, value in changes.items():
        _assign(config, dotted, value)
    return config


def _add_source(sources: Config, name: str) -> None:
    with sources.unlocked():
        sources[name] = ConfigDict({"kind": "text", "path": "", "weight": 1.0})


def _assign(config: Config, dotted: str, value: Any) -> None:
    *sections, last = dotted.split(".")
    node: Any = config
    for depth, name in enumerate(sections):
        if not isinstance(node, ConfigDict) or name not in node:
            if sections[:depth] == ["data", "sources"]:  # the one open section: a new source is named into being
                _add_source(node, name)
            else:
                fields = node.keys() if isinstance(node, ConfigDict) else ()
                raise BadInput(f"config.{dotted}", value, suggest(name, fields))
        node = node[name]
    if not isinstance(node, ConfigDict) or last not in node:
        if sections == ["data", "sources"]:
            if not isinstance(value, Mapping):
                remedy = "must be a mapping, such as {'kind': 'text', 'path': 'corpus'}"
                raise BadInput(f"config.{dotted}", value, remedy)
            _add_source(node, last)
            for field, entry in value.items():
                _assign(config, f"{dotted}.{field}", entry)
            return
        raise BadInput(f"config.{dotted}", value, suggest(last, node.keys() if isinstance(node, ConfigDict) else ()))
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
    elif isinstance(old, int) and isinstance(value, float) and value.is_integer() and not isinstance(old, bool):
        value = int(value)
    elif isinstance(old, tuple):
        value = _freeze(value)
    if type(value) is not type(old):
        raise BadInput(f"config.{dotted}", value, f"must be of type {type(old).__name__}, as {old!r}")
    node[last] = value


def load(reference: str, overrides: Mapping[str, Any] | None = None) -> Config:
    """A config by reference (`transformer:size=s`), with dotted overrides, checked and locked."""
    file = load_file(reference)
    return finish(file.get_config(), overrides or {})


def finish(config: Config, overrides: Mapping[str, Any]) -> Config:
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

    config: Config
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
        for name, (former, new) in CHANGED_LATER.items():
            kept[name] = former if kept[name] == new else kept[name]
        text = canonical_json({"config": kept, "content": self.content, "schema": self.schema})
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def to_json(self) -> str:
        document = {"schema": self.schema, "id": self.id, "config": self.config.to_dict(), "content": self.content}
        return json.dumps(document, indent=1, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def load(cls, path: pathlib.Path) -> RunSpec:
        """Raises `BadInput` where the file cannot be read or is no run's spec."""
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput("spec", str(path), f"cannot be read ({error})") from None
        return cls.from_json(text, str(path))

    @classmethod
    def from_json(cls, text: str, where: str = "spec.json") -> RunSpec:
        try:
            document = json.loads(text)
            schema, stored, content = int(document["schema"]), dict(document["config"]), dict(document["content"])
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(where, text, f"is not a run's spec ({type(error).__name__}: {error})") from None
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
