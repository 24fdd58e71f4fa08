"""Routing, index, GEMV, combine, norm, attention and sampling on a real GPU: the cases of the interpreter."""

from typing import Any

import pytest
import torch

from tests.runtime.kernels import moe_small, ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=name) for module in (moe_small, ops) for name, case in module.cases().items()]
)
def test_kernel_agrees_with_its_twin(case: Any) -> None:
    assert case.differences("cuda") == []
