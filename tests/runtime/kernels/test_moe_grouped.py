"""Grouped products in the interpreter: within what rounding allows of fp64, bit for bit where sums are exact."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.runtime.kernels.moe_grouped import cases


@pytest.fixture(scope="module")
def found(child: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """What the program found."""
    return child("moe_grouped", TRITON_INTERPRET="1", OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")


@pytest.mark.parametrize("name", list(cases()))
def test_kernel_and_twin_are_within_their_budget(found: dict[str, Any], name: str) -> None:
    case = found["cases"][name]
    assert {part: share for part, share in case.items() if part.startswith(("up", "down")) and share > 1} == {}
    assert case["different"] == 0
    assert case["values"] > 0


def test_grid_is_as_wide_as_it_says(found: dict[str, Any], tally: Callable[[str], None]) -> None:
    assert set(found["cases"]) == set(cases())
    assert len(found["cases"]) == 178
    kinds = ("tokens", "704", "352", "176", "96 experts", "160 experts", "top-", "filtered", "one ", "none ", "shared")
    counts = {kind: sum(kind in name for name in found["cases"]) for kind in kinds}
    assert min(counts.values()) >= 2, counts
    tally(f"grouped products against fp64: {len(found['cases'])} cases: {counts}")
    # budgets are used, not so wide that anything passes
    assert max(case["down kernel"] for case in found["cases"].values()) > 0.5


def test_faults_of_the_interpreter_are_seen(found: dict[str, Any]) -> None:
    """It multiplies the bits of bf16 and truncates: kernels that do not work around it must fail."""
    faulty = found["canaries"]["bits of bf16 multiplied"]
    assert min(faulty["up kernel"], faulty["down kernel"]) > 100
    assert max(faulty["up twin"], faulty["down twin"]) <= 1
    assert found["canaries"]["results truncated"]["different"] > 100


def test_row_does_not_depend_on_its_batch(found: dict[str, Any]) -> None:
    assert found["dependent rows"] == []


def test_nan_stays_in_its_row(found: dict[str, Any]) -> None:
    assert found["NaN spreads"] == 0


def test_codes_of_rows_are_those_of_twin_and_simulation(found: dict[str, Any]) -> None:
    assert found["wrong codes"] == []
