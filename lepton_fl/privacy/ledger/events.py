"""A charged event as data: a mechanism's name and its parameters. The ledger knows no parameter by name."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from lepton_fl.errors import ConfigError
from lepton_fl.privacy.accounting import DiscreteGaussian, Event, Gaussian
from lepton_fl.secagg.encoding import Value, shaped

MECHANISMS: Mapping[str, type[Gaussian] | type[DiscreteGaussian]] = {
    "poisson-gaussian": Gaussian,
    "poisson-discrete-gaussian": DiscreteGaussian,
}
"""By the name that is stored, and never changes its meaning."""

_FLOAT = struct.Struct("<d")
_LARGEST = 1 << 63


def mechanism(event: Event) -> str:
    """The stored name of an event's mechanism."""
    return next(name for name, kind in MECHANISMS.items() if type(event) is kind)


def parameters(event: Event) -> dict[str, object]:
    """The event's parameters, by name."""
    return {field.name: getattr(event, field.name) for field in fields(event)}


def to_value(event: Event) -> Sequence[Value]:
    """The event for the encoding; a float is its eight bytes, little-endian, so that nothing is rounded.

    Raises:
        ValueError: a number is not finite, or is beyond 64 bits.
    """
    return mechanism(event), [(name, _stored(name, value)) for name, value in parameters(event).items()]


def from_value(name: str, stored: Sequence[Any]) -> Event:
    """The event that `to_value` wrote.

    Raises:
        ConfigError: of a mechanism that this release does not know.
        VerificationFailed: not of the encoding's form.
        ValueError, TypeError: of parameters that the mechanism does not have or allow.
    """
    kind = MECHANISMS.get(name)
    if kind is None:
        raise ConfigError(
            f"charged by mechanism {name!r}, which this release does not know",
            fix="install the release that wrote it, or a later one",
        )
    given: dict[str, Any] = dict(shaped(pair, str, object) for pair in stored)
    return kind(
        **{key: _FLOAT.unpack(value)[0] if type(value) is bytes else value for key, value in given.items()}
    )


def _stored(name: str, value: object) -> Value:
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{name} {value} must be finite")
        return _FLOAT.pack(value)
    if isinstance(value, int) and not -_LARGEST < value < _LARGEST:
        raise ValueError(f"{name} {value} is beyond 64 bits")
    if not isinstance(value, int | str):
        raise TypeError(f"{name}: a {type(value).__name__} is no parameter of an event")
    return value
