"""A server's rounds over sites that say what a test wants them to say."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from lepton_fl.config import parse
from lepton_fl.federation import Federation
from lepton_fl.federation.grids import WrappingGrid
from lepton_fl.messages import CONFIG, METRICS, WEIGHT, identify, to_record, update_reply
from lepton_fl.simulation import InProcessGrid
from lepton_fl.study import Study

RUN = "0123456789abcdef" * 2
STUDY: dict[str, Any] = {
    "study": {"name": "rounds"},
    "task": {"kind": "binary", "target": "ill"},
    "privacy": {"epsilon": 4.0, "delta": 1e-3},
    "secure_aggregation": {"enabled": False, "min_sites": 2, "min_survivors": 2},
    "train": {"rounds": 3, "sample_rate": 0.2, "lr": 0.5, "optimizer": "sgd", "deadline": 5.0},
    "features": {"columns": {"x": {"type": "float", "range": [-1, 1]}}},
}
MODEL = {"w": np.zeros((1, 2), np.float32), "b": np.zeros(1, np.float32)}


@pytest.fixture(autouse=True)
def _known_to_flower() -> None:
    identify(RUN, 1)


@pytest.fixture
def make_study() -> Callable[..., Study]:
    """The study with keys of these tables changed."""

    def make(**changes: Any) -> Study:
        raw = {key: {**STUDY.get(key, {}), **changes.get(key, {})} for key in [*STUDY, *changes]}
        return parse(Study, raw, file="study.toml")

    return make


@pytest.fixture
def study(make_study: Callable[..., Study]) -> Study:
    return make_study()


@pytest.fixture
def good() -> Callable[[Message], Message]:
    """An update of ones."""
    return lambda message: update_reply(message, {n: np.ones_like(a) for n, a in MODEL.items()})


@pytest.fixture
def bad() -> dict[str, Callable[[Message], Message]]:
    """Malformed replies to a train message, by what is wrong with them."""

    def reply(message: Message, arrays: Any = None, metrics: Any = None, **more: Any) -> Message:
        arrays = {n: np.ones_like(a) for n, a in MODEL.items()} if arrays is None else arrays
        metrics = {WEIGHT: 1.0} if metrics is None else metrics
        records = {"arrays": to_record(arrays), METRICS: MetricRecord(metrics), **more}
        return Message(RecordDict(records), reply_to=message)

    w, b = np.ones((1, 2), np.float32), np.ones(1, np.float32)
    nan, inf = np.full(1, np.nan, np.float32), np.full(1, np.inf, np.float32)
    return {
        "a name missing": lambda m: reply(m, {"w": w}),
        "a name more": lambda m: reply(m, {"w": w, "b": b, "c": b}),
        "names in another order": lambda m: reply(m, {"b": b, "w": w}),
        "a shape": lambda m: reply(m, {"w": w.T, "b": b}),
        "float64": lambda m: reply(m, {"w": w.astype(np.float64), "b": b}),
        "integers": lambda m: reply(m, {"w": w.astype(np.int32), "b": b}),
        "NaN": lambda m: reply(m, {"w": w, "b": nan}),
        "infinity": lambda m: reply(m, {"w": w, "b": inf}),
        "a weight of 1e12": lambda m: reply(m, metrics={WEIGHT: 1e12}),
        "a weight of 0": lambda m: reply(m, metrics={WEIGHT: 0.0}),
        "no weight": lambda m: reply(m, metrics={}),
        "a metric more": lambda m: reply(m, metrics={WEIGHT: 1.0, "loss": 0.1}),
        "members claimed": lambda m: reply(m, config=ConfigRecord({"members": [101, 102, 103]})),
        "another config": lambda m: reply(m, options=ConfigRecord({"a": 1})),
        "two updates": lambda m: reply(m, more=to_record({"w": w, "b": b})),
        "nothing at all": lambda m: Message(RecordDict(), reply_to=m),
    }


@pytest.fixture
def make_app(good) -> Callable[..., ClientApp]:
    """A site that joins under a name and answers training as it is told."""

    def make(name: str, train: Callable[[Message], Message] = good) -> ClientApp:
        app = ClientApp()
        app.query("join")(
            lambda m, _: Message(RecordDict({CONFIG: ConfigRecord({"site": name})}), reply_to=m)
        )
        app.train()(lambda m, _: train(m))
        app.evaluate()(lambda m, _: Message(RecordDict({METRICS: MetricRecord({WEIGHT: 1.0})}), reply_to=m))
        return app

    return make


class Seen:
    """An observer that keeps every report."""

    def __init__(self) -> None:
        self.rounds: list[Any] = []

    def joined(self, cohort: tuple[str, ...], refused: dict[str, str]) -> None:
        self.cohort, self.refused = cohort, refused

    def round_done(self, report: Any, model: Any) -> None:
        self.rounds.append(report)


@pytest.fixture
def seen() -> Seen:
    return Seen()


@pytest.fixture
def killed_after() -> Callable[[int], Seen]:
    """An observer that kills the process's run after that round."""

    class Killer(Seen):
        def __init__(self, last: int) -> None:
            super().__init__()
            self.last = last

        def round_done(self, report: Any, model: Any) -> None:
            super().round_done(report, model)
            if report.number == self.last:
                raise KeyboardInterrupt

    return Killer


@pytest.fixture
def make_federation(study, seen) -> Callable[..., Federation]:
    """A run of the study from a model of zeros."""
    return lambda **more: Federation(
        **{"study": study, "model": dict(MODEL), "observer": seen, "run_id": RUN, **more}
    )


@pytest.fixture
def make_grid(make_app) -> Callable[..., InProcessGrid]:
    """Sites a, b and c under node ids 101, 102 and 103, those named answering training as said."""
    return lambda **trains: InProcessGrid(
        {101 + i: make_app(name, *([trains[name]] if name in trains else [])) for i, name in enumerate("abc")}
    )


@pytest.fixture
def altered() -> Callable[..., WrappingGrid]:
    """A grid whose replies pass through a function on their way to the server."""

    class Altered(WrappingGrid):
        def __init__(self, inner: Any, change: Callable[[list[Message]], Iterable[Message]]) -> None:
            super().__init__(inner)
            self.change = change

        def send_and_receive(
            self, messages: Iterable[Message], *, timeout: float | None = None
        ) -> Iterable[Message]:
            return self.change(list(self.inner.send_and_receive(messages, timeout=timeout)))

    return Altered
