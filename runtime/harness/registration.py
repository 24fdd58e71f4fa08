"""Registers this runtime with lm-evaluation-harness; importing this module does it.

A harness behind 0.4.13 finds the model by the entry point of this package, and needs nothing of this. One without entry
points looks a model up in a table of its own, and imports nothing of others before that but what a task file names
with `!function`: TASK_FILE is an empty group of tasks that names `register` here.
"""

from pathlib import Path

import lm_eval.models as models
from lm_eval.api.registry import model_registry

MODEL_NAME = "glm4moe"
TASK_FILE = Path(__file__).with_name("glm4moe.yaml")
_TARGET = "runtime.harness.model:Glm4Moe"


def register() -> None:
    """Make `--model glm4moe` known to lm_eval in this process."""
    # the table of its own models is entered only where nothing else is
    assert models is not None
    if MODEL_NAME not in model_registry:
        model_registry.register(MODEL_NAME, target=_TARGET)


register()
