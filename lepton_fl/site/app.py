"""The ClientApp of an institution: a few messages, each behind the site's own controls."""

from __future__ import annotations

from dataclasses import replace
from typing import Generic

import numpy as np
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from numpy.typing import NDArray

from lepton_fl.errors import ConfigError, PolicyRefused, ProtocolError
from lepton_fl.messages import (
    CONFIG,
    EVALUATE,
    JOIN,
    METRICS,
    PHASES,
    TRAIN,
    WEIGHT,
    counts_reply,
    error_reply,
    read_assignment,
    received,
    update_reply,
)
from lepton_fl.site.mods import mods_of, unknown_type
from lepton_fl.site.policy import may_release
from lepton_fl.site.site import S_co, Site, Surroundings, Workbench
from lepton_fl.study import Study
from lepton_fl.tasks.arrays import MAX_MAGNITUDE, Arrays, check_like, load_arrays
from lepton_fl.tasks.histogram import histogram, one_of_each
from lepton_fl.tasks.metrics import evaluate as evaluate_metric
from lepton_fl.tasks.task import score
from lepton_fl.training.local import LocalPlan


class SiteApp(ClientApp, Generic[S_co]):
    """The ClientApp of one site.

    Flower raises on a message type that nobody registered, before any mod is asked. Here it is refused.
    """

    def __init__(self, site: Site[S_co]) -> None:
        super().__init__(mods=mods_of(site))
        self.site = site

    def __call__(self, message: Message, context: Context) -> Message:
        if message.metadata.message_type not in (JOIN, TRAIN, EVALUATE, *PHASES.values()):
            error = unknown_type(message)
            self.site.refusals.append(error)
            return error_reply(message, error)
        return super().__call__(message, context)


def client_app(site: Site[S_co]) -> SiteApp[S_co]:
    """Flower's ClientApp for `site`, its policy and its ledger built in.

    Guarantee: without a policy and a ledger there is no `Site`, so there is no app; with them, an update
    leaves only after its cost is in the ledger on disk.
    """
    app = SiteApp(site)

    @app.query("join")
    def join(message: Message, _: Context) -> Message:
        """Would you take part? Reaching this line says yes; the reply carries the site's name only."""
        return Message(RecordDict({CONFIG: ConfigRecord({"site": site.name})}), reply_to=message)

    @app.train()
    def train(message: Message, _: Context) -> Message:
        assignment = read_assignment(message)
        study, bench = assignment.study, site.bench(assignment.study)
        update = site.surroundings.train(
            assignment,
            bench,
            received(message, bench.template),
            LocalPlan.of(study, bench.guarantee, coordinates=bench.coordinates),
            site.noise.of(study.id),
        )
        _check_update(update.delta, bench, study)
        charged = bench.round_event(site.summed_with(assignment))
        # The ledger was charged for what the study says; what leaves is what really ran.
        if charged is not None:
            # Charged for a person's units at all of their sites; this is one site's part.
            own = replace(charged, steps=study.train.local_steps)
            if not update.is_within(own, local_noise=study.privacy.noise == "local"):
                raise PolicyRefused("training spent more than was charged; the update does not leave")
        if study.secure_aggregation.enabled:
            # For the mod, which rounds it to integers of its own.
            return update_reply(message, update.delta)
        return update_reply(message, {name: a.astype(np.float32) for name, a in update.delta.items()})

    @app.evaluate()
    def evaluate(message: Message, _: Context) -> Message:
        """Judge the model on this site's held-out records; what leaves is for its policy to say."""
        assignment = read_assignment(message)
        study, bench = assignment.study, site.bench(assignment.study)
        if study.secure_aggregation.enabled:
            return counts_reply(message, _counts(site, study, received(message, bench.template)))
        metrics = MetricRecord({WEIGHT: 1.0})
        if site.policy.release.metrics == "exact":
            load_arrays(bench.model, received(message, bench.template))
            test = bench.data.test
            value = evaluate_metric(study.task.metric, test.y_N, score(bench.model, bench.task, test.x_NF))
            site.ledger.release(
                site.policy.data.id,
                study=study.id,
                run=assignment.run,
                what=f"{study.task.metric} on held-out records",
                charged=bench.guarantee.event is not None,
            )
            metrics[study.task.metric] = value
        return Message(RecordDict({METRICS: metrics}), reply_to=message)

    def secagg(message: Message, _: Context) -> Message:
        """A later exchange of a secure round that this site is in."""
        return site.aggregation.answer(message, read_assignment(message))

    for kind in PHASES.values():
        app.query(kind.removeprefix("query."))(secagg)

    return app


def _check_update(delta: Arrays, bench: Workbench, study: Study) -> None:
    """Refuse an update that nobody would take.

    Under secure aggregation only what is not finite: a refusal would tell the size of one site's update, and
    under shared noise, which it has not yet, of single records what a study with a large clip and a small
    expected batch asks. There it is cut, like everybody's, and not judged.

    Raises:
        ConfigError: it is not finite, or enormous.
    """
    limit = np.inf if study.secure_aggregation.enabled else MAX_MAGNITUDE
    try:
        check_like(delta, bench.template, limit=limit)
    except ProtocolError as error:
        raise ConfigError(
            f"study {study.study.name}: training diverges: {error.message}",
            fix="lower train.lr",
            public="training diverges: lower train.lr",
        ) from None


def _counts(site: Site[Surroundings], study: Study, model: Arrays) -> NDArray[np.int64]:
    """The histogram of this site's held-out records, in clear: for the mod that lets it leave masked.

    All zeros where the policy releases nothing, and then no record is looked at.
    """
    if not may_release(site.policy, study):
        return np.zeros((2, study.score_bins), np.int64)
    bench, test = site.bench(study), site.bench(study).data.test
    load_arrays(bench.model, model)
    y_N, score_N = test.y_N, score(bench.model, bench.task, test.x_NF)
    if study.evaluation.release == "dp":
        noise = site.noise.of(study.id)
        draws = np.random.default_rng(list(noise.key("a record of each unit", study.evaluation_round)))
        which_U = one_of_each(test.unit_N, draws)
        y_N, score_N = y_N[which_U], score_N[which_U]
    return histogram(y_N, score_N, study)
