"""What quantizers refuse, and what is known of their outputs before anything is read."""

import pytest
import torch
from quantization_peers import ct_block

from converters.errors import InputError, UsageError
from converters.quant.scheme import Arithmetic, ScaleSearch
from converters.transforms.quantize import (
    QuantizeFp8Block,
    QuantizeFp8Channel,
    QuantizeFp8Tensor,
    QuantizeInt8,
    QuantizeInt8Packed,
    QuantizeNvfp4,
    scale_dtype,
)
from converters.transforms.rows import RowTransform

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
FLOAT32, MODELOPT = Arithmetic.FLOAT32, Arithmetic.MODELOPT


def largest(weight: torch.Tensor) -> torch.Tensor:
    return weight.abs().max().float().view(1, 1)


EVERY: dict[str, RowTransform] = {
    "channel": QuantizeFp8Channel(FLOAT32),
    "block": QuantizeFp8Block(FLOAT32),
    "inverse": QuantizeFp8Block(FLOAT32, inverse=True),
    "int8": QuantizeInt8(FLOAT32),
    "packed": QuantizeInt8Packed(FLOAT32, 32),
    "nvfp4": QuantizeNvfp4(FLOAT32, ScaleSearch.MSE),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), -float("nan")])
@pytest.mark.parametrize("name", EVERY)
def test_non_finite_weight_is_refused_with_its_row(name: str, value: float, dtype: torch.dtype) -> None:
    weight_RC = torch.ones(4, 64, dtype=dtype)
    weight_RC[2, 33] = value
    with pytest.raises(InputError, match="row 2: expected finite weights, found NaN or Inf"):
        EVERY[name](weight_RC, torch.ones(1, 1))


def test_columns_that_do_not_divide_into_groups_are_refused() -> None:
    with pytest.raises(InputError, match="expected columns that divide by 16, found 24 columns"):
        QuantizeNvfp4(FLOAT32)(torch.ones(2, 24), torch.ones(1, 1))
    with pytest.raises(InputError, match="expected columns that divide by 128, found 130 columns"):
        QuantizeInt8Packed(FLOAT32, 128)(torch.ones(2, 130))


def test_what_has_no_format_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match="group size: expected one of 0, 32, 64, 128, found 48"):
        QuantizeInt8Packed(FLOAT32, 48)
    with pytest.raises(UsageError, match="modelopt"):
        QuantizeInt8Packed(MODELOPT, 128)


@pytest.mark.parametrize("arithmetic", Arithmetic)
@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "BF16"), (torch.float16, "F16"), (torch.float32, "F32")])
def test_scale_dtype_is_known_before_reading(arithmetic: Arithmetic, dtype: torch.dtype, name: str) -> None:
    names = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3"}
    weight_RC = torch.randn(3, 64).to(dtype)
    for transform in (
        QuantizeFp8Channel(arithmetic),
        QuantizeFp8Block(arithmetic),
        QuantizeFp8Block(arithmetic, inverse=True),
        QuantizeFp8Tensor(arithmetic),
        QuantizeInt8(arithmetic),
        QuantizeNvfp4(arithmetic),
    ):
        assert names[transform(weight_RC, largest(weight_RC))[1].dtype] == transform.scale_dtype(name)
    assert names[QuantizeInt8(arithmetic)(weight_RC)[1].dtype] == scale_dtype(name, arithmetic)


def test_block_of_the_last_rows_has_its_own_scale() -> None:
    weight_RC = torch.ones(130, 131)
    weight_RC[128:] *= 3
    weight_RC[:, 128:] *= 5
    _, scale = QuantizeFp8Block(FLOAT32)(weight_RC)
    assert torch.equal(scale, ct_block(weight_RC, 128, 128)[1])
    assert torch.equal(scale * 448, torch.tensor([[1.0, 5.0], [3.0, 15.0]]))
