"""What is predicted, with which model, and how it is judged. Models and tasks plug in by entry point."""

from lepton_fl.tasks.arrays import Arrays, arrays_of, check_like, load_arrays, model_hash
from lepton_fl.tasks.models import ModelSpec, build_model, registered_models
from lepton_fl.tasks.task import TaskSpec, registered_tasks, task_of

__all__ = [
    "Arrays",
    "ModelSpec",
    "TaskSpec",
    "arrays_of",
    "build_model",
    "check_like",
    "load_arrays",
    "model_hash",
    "registered_models",
    "registered_tasks",
    "task_of",
]
