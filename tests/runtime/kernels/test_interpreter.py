"""Kernels in triton's interpreter: the bytes of the torch twin, on the CPU."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.runtime.kernels.grid import cases


@pytest.fixture(scope="module")
def found(child: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """What the grid found."""
    return child("grid", TRITON_INTERPRET="1")


@pytest.mark.parametrize("name", list(cases()))
def test_kernel_makes_the_bytes_of_its_twin(found: dict[str, Any], name: str) -> None:
    assert found["different"][name] == []


def test_no_weight_that_is_not_finite_passes(found: dict[str, Any]) -> None:
    assert found["not refused"] == []


def test_errors_are_added_up_in_the_twin_s_order(found: dict[str, Any]) -> None:
    assert found["sums"] == 0
