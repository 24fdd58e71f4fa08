"""The integer trick against torch.isfinite, on every 8- and 16-bit pattern."""

import numpy as np
import pytest
import torch

from converters.checkpoint.dtypes import torch_dtype
from converters.numerics.finite import first_non_finite


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F8_E4M3"])
def test_every_bit_pattern_is_judged_as_torch_judges_it(dtype: str) -> None:
    integer = np.uint8 if dtype == "F8_E4M3" else np.uint16
    patterns = np.arange(1 << (8 * integer().itemsize), dtype=np.uint32).astype(integer)
    expected = torch.isfinite(
        torch.from_numpy(patterns.view(f"i{integer().itemsize}")).view(torch_dtype(dtype)).float()
    )
    found = [
        first_non_finite(memoryview(patterns[i : i + 1].copy()).cast("B"), dtype) is None for i in range(len(patterns))
    ]
    assert found == expected.tolist()
    assert 0 < sum(found) < len(found)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), -float("nan")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_position_of_the_first_is_returned(value: float, dtype: torch.dtype) -> None:
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    tensor[[417, 900]] = value
    name = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}[dtype]
    assert first_non_finite(memoryview(tensor.view(torch.uint8).numpy()), name) == 417


def test_integers_and_empty_buffers_are_finite() -> None:
    assert first_non_finite(memoryview(b"\xff" * 8), "I32") is None
    assert first_non_finite(memoryview(b""), "BF16") is None
