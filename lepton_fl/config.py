"""Strict TOML files: an unknown key, a wrong type or a value out of range is one clear line.

Used by study.toml, site.toml and policy.toml alike.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from lepton_fl.errors import ConfigError


class Strict(BaseModel):
    """Base of every configuration model: frozen, no coercion, no unknown key, no NaN."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        str_strip_whitespace=True,
        validate_default=True,
        use_attribute_docstrings=True,
    )


M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")
Array = Annotated[tuple[T, ...], Field(strict=False)]
"""A TOML array as a tuple; its items stay strict."""


def read_toml(path: Path) -> dict[str, Any]:
    """The parsed file.

    Raises:
        ConfigError: the file is missing, unreadable, not UTF-8 or not TOML.
    """
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file", fix="lepton-fl init DIR --template diagnosis") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


def parse(model: type[M], raw: dict[str, Any], *, file: str) -> M:
    """`raw` as a `model`, or the first thing wrong with it as a ConfigError naming `file`."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise _explain(model, error, file) from None


def load(model: type[M], path: Path) -> M:
    """Read and parse the TOML file at `path`."""
    return parse(model, read_toml(path), file=str(path))


def _explain(model: type[BaseModel], error: ValidationError, file: str) -> ConfigError:
    # Unknown keys first: a misspelt key also makes its right spelling "missing".
    details = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    first, key = details[0], _dotted(details[0]["loc"])
    # A union fails once for each alternative: those are one mistake, not several.
    same = [d for d in details if _dotted(d["loc"]) == key and d["type"] != "extra_forbidden"]
    others = len({_dotted(d["loc"]) for d in details}) - 1
    more = f" (and {others} more)" if others else ""
    if first["type"] == "extra_forbidden":
        known = _keys_at(model, first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.5)
        meant = f"did you mean {near[0]!r}? " if near else ""
        return ConfigError(f"{file}: {key}: unknown key; {meant}allowed here: {', '.join(known)}{more}")
    if first["type"] == "missing":
        return ConfigError(f"{file}: {key}: missing, and it has no default{more}")
    if first["type"] == "value_error":
        said = str(first.get("ctx", {}).get("error", first["msg"]))
        return ConfigError(f"{file}: {key}: {said}{more}" if key else f"{file}: {said}{more}")
    allowed = " or ".join(d["msg"].removeprefix("Input should be ") for d in same)
    return ConfigError(f"{file}: {key}: found {_short(first)}, allowed: {allowed}{more}")


def _short(detail: ErrorDetails) -> str:
    text = repr(detail["input"])
    return text if len(text) <= 60 else text[:57] + "..."


# What pydantic puts into a location to say which member of a union it tried.
_UNION_TAG = re.compile(r"float|category|constrained-\w+|literal\[.*|tuple\[.*|str|int|bool|nullable.*")


def _dotted(location: tuple[int | str, ...]) -> str:
    """`features.columns.age.range`: a key as the user wrote it, without pydantic's union tags."""
    # The first three parts are always the user's own: table, key, and the key of a mapping.
    tail = [p for p in location[3:] if isinstance(p, int) or not _UNION_TAG.fullmatch(p)]
    head = list(location[:3])
    if len(head) == 3 and isinstance(head[2], str) and head[1] != "columns":
        head = head[:2] if _UNION_TAG.fullmatch(head[2]) else head
    return ".".join(str(part) for part in [*head, *tail])


def _keys_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The keys allowed at `location`, following nested models, mappings and unions."""
    current: list[type[BaseModel]] = [model]
    for part in location:
        found: list[type[BaseModel]] = []
        for candidate in current:
            field = candidate.model_fields.get(str(part))
            if field is not None:
                found += _models_in(field.annotation)
        # A mapping's key or a union's tag names no field: stay where we are.
        current = found or current
    return sorted({name for m in current for name in m.model_fields})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for arg in get_args(annotation) for m in _models_in(arg)]
