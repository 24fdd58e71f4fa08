"""Kernels compiled for Hopper and Blackwell, without either: machine code comes out, and its arithmetic is IEEE's."""

import re
from collections.abc import Callable
from typing import Any

import pytest

NAMES = ("fp8", "fp8 fp16", "fp8 tensor", "fp8 block", "fp8 inverse block", "int8", "packed", "nvfp4", "nvfp4 mse")
# rounds once to nearest even, or not at all; x2: the same for two values
EXACT = re.compile(
    r"(?:add|sub|mul|div)\.rn\.f32(?:x2)?|(?:min|max|abs|neg|mov|setp\.\w+|selp)\.f32|"
    r"(?:ld|st)\..*f32|cvt\.f32\.f16|cvt\.rn\.f16\.f32|cvt\.rn\.f32\.[su]32"
)


@pytest.fixture(scope="module")
def compiled(child: Callable[..., dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What came out, by name and compute capability."""
    return child("compiled")


@pytest.mark.parametrize("capability", [90, 100])
@pytest.mark.parametrize("name", NAMES)
def test_kernel_compiles_to_exact_instructions(compiled: dict[str, dict[str, Any]], name: str, capability: int) -> None:
    """Approximate division, fused products and sums, and flushed subnormals would all change last bits."""
    facts = compiled[f"{name} sm_{capability}"]
    assert facts["cubin_bytes"] > 0
    assert facts["stack_bytes"] == 0
    assert [operation for operation in facts["operations"] if not EXACT.fullmatch(operation)] == []
    assert ("mul.rn.f32" if name == "fp8 inverse block" else "div.rn.f32") in facts["operations"]


def test_everything_that_is_compiled_is_tested(compiled: dict[str, dict[str, Any]]) -> None:
    assert set(compiled) == {f"{name} sm_{capability}" for name in NAMES for capability in (90, 100)}


@pytest.mark.parametrize(
    "operation",
    [
        "div.full.f32",
        "div.approx.f32",
        "div.rn.ftz.f32",
        "fma.rn.f32",
        "mul.f32",
        "cvt.rz.f16.f32",
        "rcp.approx.ftz.f32",
    ],
)
def test_an_inexact_instruction_is_seen(operation: str) -> None:
    assert EXACT.fullmatch(operation) is None
