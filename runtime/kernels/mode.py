"""Whether kernels are compiled or interpreted; asks the environment, as triton does when it is first imported."""

import os


def is_interpreted() -> bool:
    """Return whether kernels run in triton's interpreter: on the CPU, slowly, to be tested."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
