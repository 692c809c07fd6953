"""The schema contract: which columns a study reads, and the features that they become.

B = rows of a batch, F = features, C = columns.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

from lepton_fl.data.cells import MISSING, Batch, nfc, normal
from lepton_fl.data.columns import Encoded, Encoder, encoder_for
from lepton_fl.errors import ConfigError
from lepton_fl.study import CategoryColumn, FloatColumn, Study


@dataclass(frozen=True, slots=True, eq=False)
class EncodedBatch:
    """The features of a batch, and by column what was seen."""

    x_BF: NDArray[np.float32]
    columns: dict[str, Encoded]


@dataclass(frozen=True, kw_only=True)
class Contract:
    """What every site's table must offer, and its encoding.

    Guarantee: the encoding of a row depends on that row and on the study alone. It is the same at
    every site, in every batch and in whatever order the study's file lists its columns, so it costs
    no privacy.
    """

    columns: tuple[tuple[str, FloatColumn | CategoryColumn], ...]
    """Features by name, sorted."""
    target: str
    positive: str
    """Normal text of the label that counts as positive."""
    unit: str | None
    """Column that names whose record it is; None where each record is a unit."""
    time: str | None
    """Column to split by; None where units are held out by their keys."""
    study: str = field(compare=False)
    """Name of the study, for errors."""

    @classmethod
    def of(cls, study: Study) -> Contract:
        """The contract of a study.

        Raises:
            ConfigError: an unknown named vocabulary, two entries of a vocabulary that are one code,
                a code or label that reads as missing, or two features of one name.
        """
        positive = normal(study.task.positive)
        if positive in MISSING:
            raise ConfigError.at(
                "study",
                "task.positive",
                found=study.task.positive,
                allowed="a label that does not mean a missing value",
            )
        unit, time = study.privacy.unit, study.evaluation.time_column
        named = [(nfc(name), column) for name, column in study.features.columns.items()]
        contract = cls(
            columns=tuple(sorted(named, key=itemgetter(0))),
            target=nfc(study.task.target),
            positive=positive,
            unit=None if unit == "record" else nfc(unit),
            time=None if time is None else nfc(time),
            study=study.study.name,
        )
        for first, second in pairwise(sorted(contract.feature_names)):
            if first == second:
                raise ConfigError(f"study: features.columns: two features are named {first!r}")
        return contract

    @property
    def needed(self) -> tuple[str, ...]:
        """Names of all columns to be read: features, target, unit and time, each once."""
        rest = [name for name in (self.target, self.unit, self.time) if name is not None]
        return tuple(dict.fromkeys([*(name for name, _ in self.columns), *rest]))

    @cached_property
    def encoders(self) -> tuple[tuple[str, Encoder], ...]:
        """By column, in the order of `columns`."""
        return tuple((name, encoder_for(name, column)) for name, column in self.columns)

    @cached_property
    def feature_names(self) -> tuple[str, ...]:
        """`age`, `age:missing`, `cp=3`, `cp=other`, `merchant#17`, in the order of the encoding."""
        return tuple(name for _, encoder in self.encoders for name in encoder.names)

    @property
    def width(self) -> int:
        """Number of features."""
        return len(self.feature_names)

    @property
    def raw_categorical(self) -> tuple[bool, ...]:
        """By column: whether a tree should treat its raw value as a category."""
        return tuple(encoder.categorical for _, encoder in self.encoders)

    def encode(self, batch: Batch) -> EncodedBatch:
        """The features of a batch. A bad cell is counted and encoded as missing, never raised."""
        x_BF = np.zeros((len(batch), self.width), dtype=np.float32)
        columns: dict[str, Encoded] = {}
        start = 0
        for name, encoder in self.encoders:
            end = start + len(encoder.names)
            columns[name] = encoder.encode(batch.cells[name], x_BF[:, start:end])
            start = end
        return EncodedBatch(x_BF, columns)
