"""A model on kernels in triton's interpreter; run as a program, prints JSON."""

import json
import sys

import torch

from tests.runtime.kernels.older_interpreter import mend
from tests.runtime.model.kernel_models import compare

if __name__ == "__main__":
    torch.set_num_threads(1)
    mend()
    json.dump(compare("cpu"), sys.stdout)
