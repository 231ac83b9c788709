"""A YAML recipe and dotted overrides become one frozen pydantic model, or one line that says what is wrong.

YAML is read by the 1.2 rules where they differ from PyYAML's 1.1: only `true` and `false` are booleans (so
`mixed_precision: no` is the word "no"), `1e-4` is a number, and a date or `12:30` stays text.
"""

import difflib
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from latentvae.errors import UserError, one_line

Model = TypeVar("Model", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """A safe loader with the scalar rules above, that refuses a key written twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be a word", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_FLOAT = r"[-+]?(?:\d[\d_]*\.\d*|\.\d+)(?:[eE][-+]?\d+)?|[-+]?\d+[eE][-+]?\d+|[-+]?\.inf|\.nan"
_SCALARS = {  # tag -> (pattern, the characters that a scalar of this kind can begin with)
    "bool": (r"true|false", "tf"),
    "float": (_FLOAT, "-+0123456789."),
    "int": (r"[-+]?(?:0|[1-9][\d_]*)", "-+0123456789"),
    "merge": (r"<<", "<"),
    "null": (r"~|null|", ["~", "n", ""]),
}
_Loader.yaml_implicit_resolvers = {}
for _tag, (_pattern, _first) in _SCALARS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first))


class _Dumper(yaml.SafeDumper):
    """Quotes what either YAML 1.1 or the loader above would read as something other than text."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(rf"^(?:{_FLOAT})$"), list("-+0123456789."))


def load_config(model: type[Model], file: str | Path | None = None, overrides: Sequence[str] = ()) -> Model:
    """Read `file` (None: all defaults), apply the overrides `a.b=value` in their order, and validate.

    A value is parsed as YAML: `true`, `3`, `1e-4`, `[0, 1]` and `null` are what they look like, the rest is text. A
    section left empty means its defaults. Raises UserError with one line: an unknown key with a suggestion, a value of
    the wrong type or out of bounds with what is allowed, a missing or broken file.
    """
    values = _filled(model, _read(Path(file)) if file is not None else {})
    keys = [_override(values, text) for text in overrides]
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(model, error, values, "recipe" if file is None else str(file), keys)) from error


def dump_yaml(config: BaseModel) -> str:
    """Every field with its value, as YAML that `load_config` reads back to an equal model."""
    values = config.model_dump(mode="json")
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level of dotted names; lists stay values."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _read(file: Path) -> dict[str, Any]:
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise UserError(f"cannot read the recipe {file}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not valid YAML: {one_line(error)}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{file} holds {_shown(values)}; a recipe is a mapping of sections, such as `training:`")
    return values


def _override(values: dict[str, Any], text: str) -> str:
    """Put one `a.b=value` into the nested `values`; returns the dotted key."""
    key, equals, written = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UserError(f"--set {text}: give it as section.field=value, for example training.seed=1")
    try:
        value = yaml.load(written, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(
            f"--set {text}: the value is not valid YAML ({one_line(error)}); quote it: '\"...\"', "
            "or \"'...'\" where it has backslashes"
        ) from error
    for depth, part in enumerate(parts[:-1], start=1):
        if values.get(part) is None:
            values[part] = {}
        values = values[part]
        if not isinstance(values, dict):
            raise UserError(f"--set {text}: {'.'.join(parts[:depth])} is {_shown(values)}, which has no fields")
    values[parts[-1]] = value
    return ".".join(parts)


def _section(annotation: Any) -> type[BaseModel] | None:
    """The pydantic model inside an annotation such as `LossConfig` or `LossConfig | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in get_args(annotation):
        section = _section(argument)
        if section is not None:
            return section
    return None


def _filled(model: type[BaseModel], values: dict[str, Any]) -> dict[str, Any]:
    """A copy of `values` in which a section written without any field (`loss:` alone) is an empty mapping."""
    filled: dict[str, Any] = dict(values)
    for name, field in model.model_fields.items():
        inner = _section(field.annotation)
        value = values.get(name)
        if inner is not None and isinstance(value, dict):
            filled[name] = _filled(inner, value)
        elif inner is not None and name in values and value is None and field.annotation is inner:
            filled[name] = {}
    return filled


def _dotted_fields(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        inner = _section(field.annotation)
        if inner is not None:
            yield from _dotted_fields(inner, f"{prefix}{name}.")


def _explain(
    model: type[BaseModel], error: ValidationError, values: Any, origin: str, overridden: Sequence[str]
) -> str:
    """One line for the first problem, and the number of the others."""
    problems: dict[str, list[Any]] = {}
    given: dict[str, Any] = {}
    for problem in error.errors():
        parts, value = _locate(values, problem["loc"], is_missing=problem["type"] == "missing")
        dotted = ".".join(parts)
        problems.setdefault(dotted, []).append(problem)
        given[dotted] = value
    dotted, found = next(iter(problems.items()))
    if any(key == dotted or key.startswith(f"{dotted}.") for key in overridden):
        origin = "--set"
    if found[0]["type"] == "extra_forbidden":
        text = f"unknown key {dotted}{_suggestion(model, dotted)}"
    elif found[0]["type"] == "missing":
        text = f"{dotted} is not given; write it in the recipe or pass --set {dotted}=..."
    else:
        value = given[dotted]
        subject = dotted if isinstance(value, dict) else f"{dotted} is {_shown(value)}"
        text = f"{subject}; {' or '.join(dict.fromkeys(_allowed(model, dotted, problem) for problem in found))}"
        if found[0]["type"] == "literal_error":
            choices = re.findall(r"'([^']*)'", found[0]["ctx"]["expected"])
            text += _did_you_mean(difflib.get_close_matches(str(value), choices, n=1))
    more = len(problems) - 1
    return one_line(f"{origin}: {text.lstrip('; ')}" + (f" (and {more} more)" if more else ""))


def _locate(values: Any, location: Sequence[str | int], *, is_missing: bool) -> tuple[list[str], Any]:
    """The keys of `location` that the input really has (pydantic adds names of union members), and the value there."""
    parts: list[str] = []
    for part in location:
        if isinstance(values, dict) and (part in values or is_missing):
            values = values.get(part)
        elif isinstance(values, list) and isinstance(part, int) and part < len(values):
            values = values[part]
        else:
            break
        parts.append(str(part))
    return parts, values


def _model_at(model: type[BaseModel], parts: Sequence[str]) -> type[BaseModel] | None:
    for part in parts:
        field = model.model_fields.get(part)
        inner = _section(field.annotation) if field is not None else None
        if inner is None:
            return None
        model = inner
    return model


def _suggestion(model: type[BaseModel], dotted: str) -> str:
    """The nearest known key: first among the siblings, then the same name in another section, then all siblings."""
    *section, name = dotted.split(".")
    parent = _model_at(model, section)
    prefix = "".join(f"{part}." for part in section)
    siblings = list(parent.model_fields) if parent is not None else []
    close = [prefix + match for match in difflib.get_close_matches(name, siblings, n=1)]
    if not close:
        names: dict[str, str] = {}
        for field in _dotted_fields(model):
            names.setdefault(field.rpartition(".")[2], field)
        close = [names[match] for match in difflib.get_close_matches(name, list(names), n=1, cutoff=0.8)]
    return _did_you_mean(close) or f"; allowed here: {', '.join(siblings)}"


def _did_you_mean(close: Sequence[str]) -> str:
    return f"; did you mean {close[0]}?" if close else ""


def _allowed(model: type[BaseModel], dotted: str, problem: Any) -> str:
    if problem["type"] in ("model_type", "model_attributes_type"):
        section = _model_at(model, dotted.split("."))
        return f"it is a section with the fields {', '.join(section.model_fields) if section else ''}"
    message: str = problem["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if message.startswith("Input should"):
        message = "it must" + message.removeprefix("Input should").partition(", unable to parse")[0]
    return message


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
