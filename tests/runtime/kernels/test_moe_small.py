"""Routing, index, GEMV and combine in triton's interpreter: the values of the torch twins, on the CPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from converters.errors import UsageError
from runtime.moe.weights import ExpertScheme, ExpertWeights, Packed
from tests.runtime.kernels.budgets import beyond, unequal
from tests.runtime.kernels.moe_small import LAYOUTS, cases


@pytest.fixture(scope="module")
def found(child: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """What the cases found; any rows that hypothesis makes have been checked before."""
    return child("moe_small", TRITON_INTERPRET="1", OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")


@pytest.mark.parametrize("name", list(cases()))
def test_kernel_agrees_with_its_twin(found: dict[str, Any], name: str) -> None:
    assert found[name] == []


def test_every_case_ran(found: dict[str, Any], tally: Callable[[str], None]) -> None:
    assert set(found) == set(cases())
    kinds = [name.split()[0] for name in found]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    tally(f"small MoE kernels against their twins: {counts} cases, {LAYOUTS} layouts by hypothesis")


def test_gemv_refuses_four_bit_weights_by_name() -> None:
    from runtime.kernels.moe.gemv import up_gemv_launch

    packed = Packed(torch.zeros(1, 4, 16, dtype=torch.uint8))
    weights = ExpertWeights(ExpertScheme.NVFP4, packed, packed, 1, 0, 32, 2)
    with pytest.raises(UsageError, match="experts in nvfp4: expected a scheme .*found 4-bit codes. Use the grouped"):
        up_gemv_launch(torch.zeros(1, 32), torch.zeros(1, 1, dtype=torch.int32), weights)


def test_a_difference_is_seen() -> None:
    ones = torch.ones(3)
    assert beyond("x", ones, ones.double(), ones * 0) == []
    assert beyond("x", ones, ones.double() + 1e-3, ones * 1e-4) == ["x: 3 of 3 values off by up to 10 budgets"]
    assert beyond("x", ones * float("nan"), ones.double(), ones) == ["x: 3 of 3 values off by up to inf budgets"]
    assert unequal("x", ones, ones.clone()) == []
    assert unequal("x", -0.0 * ones, 0.0 * ones) == ["x: 3 bytes differ, first [3, 7, 11]"]
    assert unequal("x", ones, ones.half()) == ["x: torch.float32 (3,), not torch.float16 (3,)"]
