"""NVFP4 codes as Blackwell multiplies them: what kernels hand to the instruction gives what codes and scales say."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.runtime.kernels.moe_grouped import run_case
from tests.runtime.kernels.moe_native_fp4 import cases

_BLACKWELL = (10, 0)


@pytest.fixture(scope="module")
def found(child: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """What the program found."""
    return child("moe_native_fp4", TRITON_INTERPRET="1", OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")


def beyond(case: dict[str, Any]) -> dict[str, float]:
    """Return what is off by more than rounding allows."""
    return {part: share for part, share in case.items() if part.startswith(("up", "down")) and share > 1}


@pytest.mark.parametrize("name", list(cases()))
def test_codes_multiplied_as_they_are_give_what_they_stand_for(found: dict[str, Any], name: str) -> None:
    case = found["cases"][name]
    assert beyond(case) == {}
    assert case["different"] == 0
    # up and down have both gone this way
    assert case["dots"] >= 2 or name == "none"


def test_the_native_branch_was_run(found: dict[str, Any], tally: Callable[[str], None]) -> None:
    num_dots = sum(case["dots"] for case in found["cases"].values())
    assert num_dots > 100
    tally(f"NVFP4 codes as Blackwell takes them: {len(found['cases'])} cases, {num_dots} scaled products")


@pytest.mark.parametrize("fault", ["nibbles", "groups", "rows"])
def test_an_operand_that_is_laid_out_otherwise_is_seen(found: dict[str, Any], fault: str) -> None:
    assert set(beyond(found["canaries"][fault])) == {"up kernel", "down kernel"}


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < _BLACKWELL, reason="needs Blackwell"
)
@pytest.mark.parametrize("name", list(cases()))
def test_blackwell_gives_what_codes_stand_for(name: str) -> None:
    made = run_case(cases()[name], "cuda")
    assert beyond(made) == {}
    assert made["different"] == 0
