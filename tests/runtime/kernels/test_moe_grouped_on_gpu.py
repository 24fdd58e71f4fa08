"""Grouped products on a real GPU: the grid of the interpreter."""

import pytest
import torch

from tests.runtime.kernels.moe_grouped import cases, run_case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("name", list(cases()))
def test_kernel_is_within_its_budget(name: str) -> None:
    found = run_case(cases()[name], "cuda")
    assert {part: share for part, share in found.items() if part.startswith(("up", "down")) and share > 1} == {}
    assert found["different"] == 0
