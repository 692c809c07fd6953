"""The simulator in the place of secure aggregation: it forms the sum, and adds the sites' shares of noise.

Every output of a run that used it says `the simulator acts as curator`. A deployed agent never sees it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from flwr.app import Message
from flwr.serverapp import Grid

from lepton_fl.errors import BadReply
from lepton_fl.federation.grids import SummingGrid
from lepton_fl.federation.rounds import read_update
from lepton_fl.messages import CONFIG, ROUND, TRAIN, error_reply, update_reply
from lepton_fl.privacy import Guarantee
from lepton_fl.study import Study
from lepton_fl.tasks.arrays import Arrays
from lepton_fl.training.noise import SimulationNoise


def share_multiplier(study: Study, guarantee: Guarantee, cohort: int) -> float:
    """Noise multiplier of one site's share, so that any allowed rest still adds up to sigma.

    sigma / sqrt(min_survivors - colluders): the shares of the largest allowed dropout, and of the
    colluders, who know their own, may be missing. The study has made sure that one honest share is left.
    """
    if guarantee.event is None:
        return 0.0
    honest = study.survivors(cohort) - study.secure_aggregation.colluders
    return guarantee.event.noise_multiplier / math.sqrt(honest)


class CuratorGrid(SummingGrid):
    """Hands the strategy one reply for each round: the mean of the sites' updates, noised if shared."""

    def __init__(
        self,
        inner: Grid,
        *,
        study: Study,
        guarantee: Guarantee,
        template: Arrays,
        noise: SimulationNoise,
    ) -> None:
        super().__init__(inner)
        self._study = study
        self._guarantee = guarantee
        self._template = template
        self._noise = noise

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        asked = list(messages)
        replies = list(self.inner.send_and_receive(asked, timeout=timeout))
        if not asked or asked[0].metadata.message_type != TRAIN:
            return replies
        number = int(str(asked[0].content.config_records[CONFIG][ROUND]))
        by_node = {message.metadata.dst_node_id: message for message in asked}
        deltas: dict[int, Arrays] = {}
        rest: list[Message] = []
        for reply in replies:
            node = reply.metadata.src_node_id
            # Not asked, or answered before: a repeated reply counts once.
            if node not in by_node or node in deltas:
                continue
            if reply.has_error():
                rest.append(reply)
                continue
            try:
                deltas[node] = read_update(reply, self._template)
            except BadReply as error:
                named = BadReply(error.message, public=error.message)
                rest.append(error_reply(by_node[node], named))
        if not deltas:
            return rest
        members = sorted(deltas)
        mean = self._mean([deltas[node] for node in members], len(asked), number)
        return [update_reply(by_node[members[0]], mean, members=members), *rest]

    def _mean(self, deltas: list[Arrays], cohort: int, number: int) -> Arrays:
        std = 0.0
        if self._study.privacy.noise == "shared":
            share = share_multiplier(self._study, self._guarantee, cohort)
            batch = self._study.train.expected_batch or 1.0
            # Each site's share on its sum; sums are divided by the public batch, then by the sites.
            std = share * self._study.privacy.clip * math.sqrt(len(deltas)) / batch / len(deltas)
        generator = self._noise.torch("curator", number)
        mean: Arrays = {}
        for name in self._template:
            total = np.mean([delta[name].astype(np.float64) for delta in deltas], axis=0)
            if std > 0:
                drawn = torch.randn(total.shape, dtype=torch.float64, generator=generator)
                total = total + std * drawn.numpy()
            mean[name] = np.asarray(total, dtype=np.float32)
        return mean
