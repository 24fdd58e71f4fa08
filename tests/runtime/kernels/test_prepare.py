"""What has a kernel, what is left to the transform, and what a block takes on the CPU meanwhile."""

import pytest
import torch

from converters.quant.scheme import Arithmetic, ScaleSearch
from converters.transforms.quantize import QuantizeFp8Tensor, QuantizeInt8Packed, QuantizeNvfp4
from converters.transforms.restore import is_quantizing
from converters.transforms.rows import Cast, Copy
from runtime.kernels.accelerator import BLOCK_BYTES, CudaAccelerator
from runtime.kernels.quantize import is_sound, prepare
from tests.runtime.kernels.grid import cases

ONE = torch.ones(1, 1)
FLOAT32, MODELOPT = Arithmetic.FLOAT32, Arithmetic.MODELOPT
QUANTIZING = {repr(case.transform): case.transform for case in cases().values()}


@pytest.mark.parametrize("name", list(QUANTIZING))
def test_every_quantizing_transform_has_a_kernel(name: str) -> None:
    transform = QUANTIZING[name]
    assert is_quantizing(transform)
    assert CudaAccelerator.supports(CudaAccelerator.__new__(CudaAccelerator), transform)
    assert prepare(transform, torch.ones(3, 256, dtype=torch.bfloat16), ONE) is not None


@pytest.mark.parametrize("transform", [Copy(), Cast("F32")])
def test_no_other_transform_has_one(transform: Copy | Cast) -> None:
    assert not CudaAccelerator.supports(CudaAccelerator.__new__(CudaAccelerator), transform)
    assert prepare(transform, torch.ones(2, 16)) is None


@pytest.mark.parametrize(
    ("transform", "rows", "largest"),
    [
        (QuantizeInt8Packed(FLOAT32, 64), torch.ones(2, 80), ONE),
        (QuantizeNvfp4(FLOAT32), torch.ones(2, 24), ONE),
        (QuantizeNvfp4(FLOAT32), torch.ones(2, 32, dtype=torch.float64), ONE),
        (QuantizeNvfp4(FLOAT32), torch.ones(32, 2).t(), ONE),
        (QuantizeNvfp4(FLOAT32), torch.ones(0, 32), ONE),
        (QuantizeNvfp4(MODELOPT, ScaleSearch.MSE), torch.full((2, 32), 1e-36), ONE * 1e-36),
        (QuantizeNvfp4(MODELOPT), torch.full((2, 32), 1e37), ONE * 1e37),
    ],
)
def test_what_kernels_cannot_take_is_left_to_the_transform(
    transform: QuantizeInt8Packed | QuantizeNvfp4, rows: torch.Tensor, largest: torch.Tensor
) -> None:
    assert prepare(transform, rows, largest) is None


def test_scales_out_of_range_are_left_to_the_transform() -> None:
    """Zero times infinity has another sign on a GPU, and so has its code."""
    codes = torch.zeros(1, 1)
    for scale in (0.0, float("inf"), float("nan")):
        assert not is_sound((codes, torch.tensor([[1.0, scale]])))
        assert not is_sound((codes, torch.tensor([[1.0, scale]], dtype=torch.bfloat16)))
    assert not is_sound((codes, torch.tensor([[0x38, 0x7F]], dtype=torch.uint8).view(torch.float8_e4m3fn)))
    assert is_sound((codes, torch.tensor([[0x38, 0x01]], dtype=torch.uint8).view(torch.float8_e4m3fn)))
    assert is_sound((codes, torch.tensor([[1e-45]])))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", list(QUANTIZING))
def test_copies_of_a_block_fit_into_what_the_plan_allows(name: str, dtype: torch.dtype) -> None:
    """The block, and page-locked memory of up to twice what goes to the GPU and comes back."""
    columns = 5120
    rows_RC = torch.ones(256, columns, dtype=dtype)
    launch = prepare(QUANTIZING[name], rows_RC, ONE)
    assert launch is not None
    block, made = rows_RC.nbytes, sum(output.nbytes for output in launch.outputs)
    if "rows=3" not in name:
        assert block + 2 * (block + made) <= QUANTIZING[name].working_bytes * block
    assert block <= BLOCK_BYTES


def test_scale_of_a_tensor_is_the_twin_s() -> None:
    transform = QuantizeFp8Tensor(MODELOPT)
    rows_RC, largest_11 = torch.randn(2, 16, dtype=torch.bfloat16), torch.full((1, 1), 3.25)
    launch = prepare(transform, rows_RC, largest_11)
    assert launch is not None
    assert torch.equal(launch.outputs[1], transform(rows_RC, largest_11)[1])
