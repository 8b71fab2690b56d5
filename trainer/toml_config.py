"""TOML into nested frozen dataclasses, strictly: each bad value is refused in a sentence that names its key.

A field's type gives its legal values: int, float, bool, str, Path, Literal, X | None, tuple, nested dataclass (a
section), and dict[str, V] (a free table, whose keys are not checked). A field gives its bounds with `bounded` or, below
trainer/, with `dataclasses.field(metadata={"minimum": 1})`. The word none stands for no value in an optional field,
since TOML has no null.
"""

import json
import math
import operator
import re
import sys
import tomllib
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import MISSING, Field, field, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, TypeVar, Union, cast, get_args, get_origin, get_type_hints, overload

from farspan.errors import ConfigError, shortened
from farspan.paths import expanded_setting
from farspan.registry import nearest_name_hint
from farspan.trainer.renamed import refuse_old_key, refuse_old_value

T = TypeVar("T")
Tree = dict[str, Any]
Bound = float | None

# Python type of a TOML value, and the words for it; bool is a subclass of int, hence the exact comparison of types.
SCALARS: dict[Any, tuple[tuple[type, ...], str]] = {
    int: ((int,), "an integer"),
    float: ((int, float), "a number"),
    bool: ((bool,), "true or false"),
    str: ((str,), "a string"),
    Path: ((str,), "a path"),
    Any: ((int, float, bool, str, list, tuple, dict), "a number, a string, true or false, a list or a table"),
}
BOUNDS = (
    ("minimum", "at least", operator.ge),
    ("exclusive_minimum", "greater than", operator.gt),
    ("maximum", "at most", operator.le),
)
INT64_MAX = 2**63 - 1
BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


@overload
def bounded(default: T, *, minimum: Bound = None, maximum: Bound = None, above: Bound = None) -> T: ...
@overload
def bounded(*, minimum: Bound = None, maximum: Bound = None, above: Bound = None) -> Any: ...
def bounded(default: Any = MISSING, *, minimum: Bound = None, maximum: Bound = None, above: Bound = None) -> Any:
    """Return a dataclass field whose loaded numbers lie in these bounds; required when it has no default.

    Without a maximum they are finite, and no number is NaN.
    """
    rules = {"minimum": minimum, "exclusive_minimum": above, "maximum": maximum}
    return field(default=default, metadata={name: limit for name, limit in rules.items() if limit is not None})


def load_config(cls: type[T], source: str | Path | Mapping[str, Any] | T, overrides: Sequence[str] = ()) -> T:
    """Read a file, or take its values or a `cls`; apply `section.key=value` overrides in order and check the result."""
    if isinstance(source, cls):
        tree = tomllib.loads(to_toml(source))
    else:
        tree = deepcopy(dict(source)) if isinstance(source, Mapping) else _read(Path(cast(str | Path, source)))
    for text in overrides:
        _override(cls, tree, text)
    return from_tree(cls, tree)


def from_tree(cls: type[T], tree: Tree, where: str = "") -> T:
    """Build `cls` from a tree of TOML values; `where` is the dotted name of the section in messages."""
    if not isinstance(tree, dict):
        _refuse_section(where, tree)
    parts = _fields(cls)
    values: Tree = {}
    for name, value in tree.items():
        key = _join(where, name)
        if name not in parts:
            _refuse_key(key, f"{key}={_show(value)}", name, parts)
        part, kind = parts[name]
        values[name] = _convert(kind, value, key)
        _check_bounds(part.metadata, values[name], key)
    for name, (part, kind) in parts.items():
        if name not in tree and part.default is MISSING and part.default_factory is MISSING:
            key = _join(where, name)
            if not is_dataclass(kind):
                raise ConfigError(
                    f"{key} is missing; write it in the file, or add {key}=VALUE with {describe_type(kind)}."
                )
            values[name] = from_tree(cast(type, kind), {}, key)  # Its own defaults, or the first key that it misses.
    return cls(**values)


def to_toml(config: Any, *, brief: bool = False) -> str:
    """Write `config` as TOML that loads again to an equal object; absent optional values are left out.

    brief: leave out all values that equal their defaults.
    """
    return "\n\n".join(_sections(_tree(config, brief=brief), "")).strip() + "\n"


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _fields(cls: Any) -> dict[str, tuple[Field[Any], Any]]:
    kinds = get_type_hints(cls)
    return {part.name: (part, kinds[part.name]) for part in fields(cls) if part.init}


def _read(path: Path) -> Tree:
    text = ""
    try:
        text = path.read_bytes().decode()
        return tomllib.loads(text)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; name a configuration file that does.") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); name a readable TOML file.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text at byte {error.start}; save it as UTF-8.") from None
    except ValueError as error:
        place = str(error).replace("(at end of document)", f"(at line {len(text.splitlines())}, the end of the file)")
        raise ConfigError(f"{path} is not valid TOML; fix this: {place}.") from None


def _override(cls: Any, tree: Tree, text: str) -> None:
    """Put the value of one `section.key=value` into `tree`, typed by the field it is for."""
    dotted, equals, value = (part.strip() for part in text.partition("="))
    names = dotted.split(".")
    if not equals or not all(names):
        raise ConfigError(f"Override {text!r} has no key and value; write it as section.key=value.")
    kind, node = cls, tree
    for depth, name in enumerate(names):
        section = _section_type(kind)
        where, key = ".".join(names[:depth]), ".".join(names[: depth + 1])
        if section is None:
            raise ConfigError(
                f"{dotted}={value} is inside {where}, which is {describe_type(kind)}; set {where} itself."
            )
        if is_dataclass(section):
            parts = _fields(section)
            if name not in parts:
                _refuse_key(key, f"{dotted}={value}", name, parts)
            kind = parts[name][1]
        else:
            kind = get_args(section)[1] if get_args(section) else Any
        if depth + 1 < len(names):
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                _refuse_section(key, node)
    node[names[-1]] = _literal(kind, value)


def _section_type(kind: Any) -> Any:
    """Return the dataclass or dict type among the alternatives of `kind`, or None where no key can follow."""
    for member in get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,):
        if is_dataclass(member) or get_origin(member) is dict or member is dict or member is Any:
            return member
    return None


def _literal(kind: Any, text: str) -> Any:
    """Read an override's text as TOML where that suits the field, else as an unquoted string."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except ValueError:
        return text
    value = parsed["value"]
    # In quotes it is a text as it stands.
    if len(parsed) != 1 or (not isinstance(value, str) and not _fits(kind, value) and _fits(kind, text)):
        return text
    return value


def _fits(kind: Any, value: Any) -> bool:
    """Return whether a TOML value has the outer shape of `kind`; parts inside it are checked by `_convert`."""
    if kind is float and type(value) is int:
        return abs(value) <= sys.float_info.max
    if kind in SCALARS:
        if kind is Path:  # An empty text would be the current folder.
            return isinstance(value, str | Path) and value != ""
        return type(value) in SCALARS[kind][0]
    if kind is NoneType:
        return value is None or value == "none"
    origin = get_origin(kind)
    if origin is Literal:
        return any(type(value) is type(member) and value == member for member in get_args(kind))
    if origin in (Union, UnionType):
        return any(_fits(member, value) for member in get_args(kind))
    if origin is tuple:
        return isinstance(value, list | tuple)
    if origin is dict or kind is dict or is_dataclass(kind):
        return isinstance(value, dict)
    raise TypeError(f"toml_config has no rule for fields of type {kind}")


def _convert(kind: Any, value: Any, where: str) -> Any:
    """Return `value` as `kind`, or refuse it by name."""
    refuse_old_value(where, value)
    if not _fits(kind, value):
        if _section_type(kind) is not None and kind is not Any:
            _refuse_section(where, value)
        raise ConfigError(f"{where}={_show(value)} must be {describe_type(kind)}.")
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        # An exact type comes first, so that 1 stays an integer in float | int; none stays none beside str.
        members = sorted(get_args(kind), key=lambda member: (member is not NoneType, type(value) is not member))
        return _convert(next(member for member in members if _fits(member, value)), value, where)
    if kind is NoneType:
        return None
    if kind is Path:
        return Path(expanded_setting(where, str(value)))
    if kind is float:
        return float(value)
    if origin is tuple:
        kinds = get_args(kind)
        kinds = kinds[:1] * len(value) if kinds[-1] is Ellipsis else kinds
        if len(kinds) != len(value):
            raise ConfigError(f"{where}={_show(value)} must be a list of exactly {len(kinds)} values.")
        return tuple(_convert(kinds[index], part, f"{where}[{index}]") for index, part in enumerate(value))
    if is_dataclass(kind):
        return from_tree(cast(type, kind), value, where)
    if origin is dict:
        for name in value:
            refuse_old_key(_join(where, name))
        return {name: _convert(get_args(kind)[1], part, _join(where, name)) for name, part in value.items()}
    return value


def _check_bounds(rules: Mapping[str, Any], value: Any, where: str) -> None:
    if isinstance(value, tuple):
        for index, part in enumerate(value):
            _check_bounds(rules, part, f"{where}[{index}]")
    if not isinstance(value, int | float) or isinstance(value, bool):
        return
    if isinstance(value, int) and abs(value) > INT64_MAX:
        raise ConfigError(f"{where}={_show(value)} must fit in 64 bits.")
    if "maximum" not in rules and not math.isfinite(value):
        raise ConfigError(f"{where}={_show(value)} must be finite.")
    for name, words, holds in BOUNDS:
        # `not holds`, since a NaN is in no range.
        if name in rules and not holds(value, rules[name]):
            raise ConfigError(f"{where}={_show(value)} must be {words} {rules[name]}.")


def describe_type(kind: Any) -> str:
    """Describe the values that a field of type `kind` takes."""
    if kind in SCALARS:
        return SCALARS[kind][1]
    if kind is NoneType:
        return "none"
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(map(repr, args))}"
    words = " or ".join(dict.fromkeys(describe_type(part) for part in args if part is not Ellipsis))
    if origin is tuple:
        return f"a list in which each item is {words}"
    return words if origin in (Union, UnionType) else "a section"


def _show(value: Any) -> str:
    return shortened(toml_value(value))


def _refuse_key(key: str, shown: str, name: str, parts: Mapping[str, Any]) -> NoReturn:
    """Refuse a key that does not exist; `shown` is the setting as the user wrote it."""
    refuse_old_key(key)
    sections = {section: _section_type(kind) for section, (_, kind) in parts.items()}
    below = [f"{section}.{name}" for section, cls in sections.items() if is_dataclass(cls) and name in _fields(cls)]
    hint = f" Did you mean {below[0]!r}?" if below else nearest_name_hint(name, list(parts))
    raise ConfigError(f"{shown} is not a known key; choose one of {', '.join(parts)}.{hint}")


def _refuse_section(where: str, value: Any) -> NoReturn:
    raise ConfigError(f"{where}={_show(value)} must be a section; write [{where}] with its keys below it.")


def _tree(config: Any, *, brief: bool = False) -> Tree:
    """Return a dataclass as a tree of TOML values; None is left out where it is the default anyway."""
    tree: Tree = {}
    for name, (part, _) in _fields(type(config)).items():
        value = getattr(config, name)
        if value is None and part.default in (None, MISSING):
            continue
        default = part.default if part.default_factory is MISSING else part.default_factory()
        if brief and value == default:
            continue
        tree[name] = _tree(value, brief=brief) if is_dataclass(value) else value
    return tree


def _sections(tree: Tree, where: str) -> list[str]:
    """Return the TOML blocks of `tree`: its own values first, then one block per section below it."""
    lines = [f"[{where}]"] if where else []
    lines += [f"{_key(name)} = {toml_value(value)}" for name, value in tree.items() if not isinstance(value, dict)]
    blocks = ["\n".join(lines)] if lines else []
    for name, value in tree.items():
        if isinstance(value, dict):
            blocks += _sections(value, _join(where, _key(name)))
    return blocks


def _key(name: str) -> str:
    return name if BARE_KEY.fullmatch(name) else toml_value(name)


def toml_value(value: Any) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | Path):
        # JSON's escapes are TOML's too; TOML refuses a raw DEL besides.
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    if is_dataclass(value):
        value = _tree(value)
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_key(name)} = {toml_value(part)}' for name, part in value.items())}}}"
    return repr(value) if isinstance(value, int | float) else str(value)


def parse_pattern(text: str, setting: str) -> list[str]:
    """Return the names of one round of a pattern of layers, such as 'lightning*7, dense'.

    Raises ConfigError, which names the setting, for anything else.
    """
    names: list[str] = []
    for part in text.split(","):
        name, star, times = (word.strip() for word in part.partition("*"))
        if not name or (star and not (times.isdecimal() and int(times) > 0)):
            raise ConfigError(
                f"{setting}={text!r} must be names with commas between, each with how many "
                "layers in a row have it, such as 'lightning*7, dense'."
            )
        names += [name] * (int(times) if star else 1)
    return names
