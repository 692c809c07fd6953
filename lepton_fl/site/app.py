"""The ClientApp of an institution: three messages, each behind the site's own controls."""

from __future__ import annotations

from typing import Generic

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from lepton_fl.errors import BadRequest, PolicyRefused
from lepton_fl.messages import (
    ARRAYS,
    CONFIG,
    EVALUATE,
    JOIN,
    METRICS,
    TRAIN,
    WEIGHT,
    error_reply,
    from_record,
    read_assignment,
    update_reply,
)
from lepton_fl.site.mods import mods_of, unknown_type
from lepton_fl.site.site import S_co, Site, Workbench
from lepton_fl.tasks.arrays import MAX_MAGNITUDE, Arrays, check_like, load_arrays
from lepton_fl.tasks.metrics import evaluate as evaluate_metric
from lepton_fl.tasks.task import score
from lepton_fl.training.local import LocalPlan, train_locally


class SiteApp(ClientApp, Generic[S_co]):
    """The ClientApp of one site.

    Flower raises on a message type that nobody registered, before any mod is asked. Here it is refused.
    """

    def __init__(self, site: Site[S_co]) -> None:
        super().__init__(mods=mods_of(site))
        self.site = site

    def __call__(self, message: Message, context: Context) -> Message:
        if message.metadata.message_type not in (JOIN, TRAIN, EVALUATE):
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
        update = train_locally(
            bench.model,
            bench.task,
            _received(message, bench),
            bench.data.train,
            LocalPlan.of(study, bench.guarantee),
            site.noise.of(study.id),
            assignment.round,
        )
        charged = bench.guarantee.round_event
        # The ledger was charged for what the study says; what leaves is what really ran.
        if charged is not None and not update.is_within(
            charged, clip=study.privacy.clip, local_noise=study.privacy.noise == "local"
        ):
            raise PolicyRefused("training spent more than was charged; the update does not leave")
        return update_reply(message, update.delta)

    @app.evaluate()
    def evaluate(message: Message, _: Context) -> Message:
        """Judge the model on this site's held-out records; the figure leaves only if policy says so."""
        assignment = read_assignment(message)
        study, bench = assignment.study, site.bench(assignment.study)
        metrics = MetricRecord({WEIGHT: 1.0})
        if site.policy.release.metrics == "exact":
            load_arrays(bench.model, _received(message, bench))
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

    return app


def _received(message: Message, bench: Workbench) -> Arrays:
    """The parameters in a message, checked against the study's model.

    Raises:
        ProtocolError: names, shapes or types are not the model's, or a value is not finite or is enormous.
            Decided before any record is touched, so that the answer tells nothing of the records.
    """
    record = message.content.array_records.get(ARRAYS)
    if record is None:
        raise BadRequest("message: carries no parameters")
    arrays = from_record(record)
    check_like(arrays, bench.template, limit=MAX_MAGNITUDE)
    return arrays
