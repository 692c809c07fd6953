"""pfl-research as a peer of the speed benchmarks. Runs in the peer's environment, without our packages.

It has no DP-SGD of its own at a client; with `noise` a client's epoch is Opacus's.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import worker
from federation import Federation
from models import cifar_cnn
from peer_opacus import private_epoch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByUser
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn
from torch.nn import functional


class _Rounds(TrainingProcessCallback):
    """Says when a round is done."""

    def after_central_iteration(
        self,
        aggregate_metrics: Metrics,  # noqa: ARG002 - a callback's form
        model: PyTorchModel,  # noqa: ARG002 - the same
        *,
        central_iteration: int,
    ) -> tuple[bool, Metrics]:
        worker.say(round=central_iteration + 1)
        return False, Metrics()


class _PrivateAveraging(FederatedAveraging):
    """Federated averaging whose clients train with Opacus."""

    noise: float

    def train_one_user(
        self,
        initial_model_state: Any,
        model: PyTorchModel,
        user_dataset: Dataset,
        central_context: Any,  # noqa: ARG002 - an algorithm's form
    ) -> tuple[Any, Metrics]:
        private_epoch(model.pytorch_model, *user_dataset.raw_data, self.noise)
        return model.get_model_difference(initial_model_state), Metrics()


def _run(
    algorithm: FederatedAveraging,
    module: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    records: Callable[[int], list[Tensor]],
    users: int,
    training: NNTrainHyperParams,
    *,
    cohort: int,
    rounds: int,
) -> None:
    module.loss = MethodType(lambda self, x, y, **_: loss(self(x), y), module)
    # A round is timed, not judged.
    module.metrics = MethodType(lambda *_, **__: {}, module)
    central = torch.optim.SGD(module.parameters(), lr=1.0)
    data = FederatedDataset(
        lambda user: Dataset(raw_data=records(user), user_id=str(user)),
        get_user_sampler("minimize_reuse", list(range(users))),
    )
    algorithm.run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=rounds,
            evaluation_frequency=rounds + 1,
            train_cohort_size=cohort,
            val_cohort_size=0,
        ),
        backend=SimulatedBackend(training_data=data, val_data=data, postprocessors=[WeightByUser()]),
        model=PyTorchModel(module, torch.optim.SGD, central),
        model_train_params=training,
        callbacks=[_Rounds()],
    )


def simulate(path: str, rounds: int) -> dict[str, Any]:
    """The federation of the file, each client with Opacus."""
    federation = Federation.read(path)
    model, algorithm = federation.model(), _PrivateAveraging()
    algorithm.noise = federation.noise
    _run(
        algorithm,
        model,
        functional.binary_cross_entropy_with_logits,
        lambda user: list(federation.records(user)),
        federation.clients,
        # Read by pfl alone: the epoch is Opacus's.
        NNTrainHyperParams(local_num_epochs=1, local_learning_rate=1.0, local_batch_size=None),
        cohort=federation.clients,
        rounds=rounds,
    )
    return {"auc": federation.auc(model)}


def cifar(users: int, images: int, cohort: int, batch: int, rounds: int) -> dict[str, Any]:
    """An epoch of SGD at each of a cohort, without privacy: its own benchmark."""
    draws = torch.Generator().manual_seed(2)
    x_NF = torch.rand(cohort * images, 3072, generator=draws) * 2 - 1
    y_N = torch.randint(0, 10, (cohort * images,), generator=draws)

    def records(user: int) -> list[Tensor]:
        at = user % cohort * images
        return [x_NF[at : at + images], y_N[at : at + images]]

    _run(
        FederatedAveraging(),
        cifar_cnn(),
        functional.cross_entropy,
        records,
        users,
        NNTrainHyperParams(local_num_epochs=1, local_learning_rate=0.1, local_batch_size=batch),
        cohort=cohort,
        rounds=rounds,
    )
    return {}


if __name__ == "__main__":
    worker.serve(simulate=simulate, cifar=cifar)
