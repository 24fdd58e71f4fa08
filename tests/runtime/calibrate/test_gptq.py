"""GPTQ against a textbook that eliminates one column at a time, and against plain rounding."""

import numpy as np
import pytest
import torch

from converters.formats.weights import Coding
from converters.quant.scheme import Arithmetic, Format, Recipe, ScaleSearch
from converters.quant.storage import transform_of
from converters.transforms.dequantize import Dequantize
from runtime.calibrate.gptq import DAMPING, Hessian, factor, gptq, weighted_error
from runtime.calibrate.grid import Grid

RECIPES = {
    "int8": Recipe("int8"),
    "channel": Recipe("int8-weight-only"),
    "g32": Recipe("int8-weight-only", group=32),
    "nvfp4": Recipe("nvfp4-weight-only"),
    "nvfp4 searched": Recipe("nvfp4", search=ScaleSearch.MSE),
    "nvfp4 modelopt": Recipe("nvfp4", format=Format.MODELOPT, arithmetic=Arithmetic.MODELOPT),
    "nvfp4 ct": Recipe("nvfp4", arithmetic=Arithmetic.COMPRESSED_TENSORS),
}


def problem(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a bf16 weight and inputs whose columns go together and differ in size, as those of a model do."""
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(rows, columns, generator=generator) * 0.05).to(torch.bfloat16)
    mix = torch.randn(columns, columns, generator=generator) * 0.3 + torch.eye(columns)
    sizes = torch.exp(torch.randn(columns, generator=generator))
    return weight, torch.randn(4 * columns, columns, generator=generator) @ mix * sizes


def hessian_of(inputs: torch.Tensor) -> torch.Tensor:
    hessian = Hessian(inputs.shape[1], "cpu")
    for part in inputs.split(50):
        hessian.add(part[None])
    return hessian.value()


def grid_of(weight: torch.Tensor, name: str) -> Grid:
    return Grid.of(weight, weight.abs().max().float().view(1, 1), RECIPES[name])


def textbook(weight: np.ndarray, hessian: np.ndarray, grid: Grid) -> np.ndarray:
    """Algorithm 1 without blocks and without Cholesky: after each column the inverse loses its row and column."""
    diagonal = hessian.diagonal().copy()
    inverse = np.linalg.inv(hessian + DAMPING * diagonal.mean() * np.eye(len(hessian)))
    left, codes = weight.copy(), np.zeros(weight.shape, dtype=np.int64)
    todo = sorted(range(len(hessian)), key=lambda column: -diagonal[column])
    while todo:
        column, *todo = todo
        encoded = grid.encode(torch.from_numpy(left[:, column]).float(), column)
        codes[:, column] = encoded.numpy()
        error = (left[:, column] - grid.decode(encoded, column).numpy()) / inverse[column, column]
        left[:, todo] -= np.outer(error, inverse[column, todo])
        inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return codes


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("rows", "columns"), [(5, 32), (24, 96), (3, 288)])
def test_codes_are_those_of_the_textbook(recipe, rows, columns):
    weight, inputs = problem(rows, columns)
    hessian, grid = hessian_of(inputs), grid_of(weight, recipe)
    codes = gptq(weight.float(), hessian, grid)
    expected = textbook(weight.double().numpy(), hessian.double().numpy(), grid)
    assert codes.dtype == grid.plain_OI.dtype
    assert (codes.numpy() == expected).all()
    assert (codes != grid.plain_OI).float().mean() > 0.05


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_error_on_the_text_is_lower_than_that_of_plain_rounding(recipe):
    weight, inputs = problem(64, 128, seed=1)
    hessian, grid = hessian_of(inputs), grid_of(weight, recipe)
    plain = weighted_error(weight.float(), grid.values(grid.plain_OI), hessian)
    ours = weighted_error(weight.float(), grid.values(gptq(weight.float(), hessian, grid)), hessian)
    assert 0 < ours < 0.9 * plain


def test_the_weighted_error_is_that_of_the_outputs():
    weight, inputs = problem(10, 32)
    grid = grid_of(weight, "nvfp4")
    rounded = grid.values(grid.plain_OI)
    outputs = inputs.double() @ (weight.double() - rounded.double()).T
    expected = 2 * float(outputs.square().sum()) / len(inputs)
    assert weighted_error(weight.float(), rounded, hessian_of(inputs)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("recipe", RECIPES)
def test_plain_codes_of_a_grid_are_what_the_transform_stores(recipe):
    weight, _ = problem(12, 64)
    weight[3] = 0
    weight[4, 5] = -0.0
    weight[5, :32] *= 100
    largest = weight.abs().max().float().view(1, 1)
    grid = grid_of(weight, recipe)
    for ours, theirs in zip(grid.stored(grid.plain_OI), transform_of(RECIPES[recipe])(weight, largest), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_column_is_encoded_as_the_transform_does(recipe):
    """Without any error to make up for, GPTQ is plain rounding."""
    weight, _ = problem(200, 64)
    grid = grid_of(weight, recipe)
    codes = torch.stack([grid.encode(weight[:, column].float(), column) for column in range(64)], dim=1)
    assert torch.equal(codes, grid.plain_OI)
    values = torch.stack([grid.decode(codes[:, column], column) for column in range(64)], dim=1)
    assert torch.equal(values, grid.values(codes))


def test_values_are_those_that_a_result_is_decoded_to():
    weight, inputs = problem(16, 64)
    grid = grid_of(weight, "nvfp4")
    codes = gptq(weight.float(), hessian_of(inputs), grid)
    packed, local, divisor = grid.stored(codes)
    decoded = Dequantize(Coding.NVFP4_DIVISOR, 4, 64, 16, "F32")(packed, local, divisor.expand(16, 1))[0]
    torch.testing.assert_close(grid.values(codes), decoded, rtol=2**-22, atol=0)
    grid = grid_of(weight, "g32")
    words, scale = grid.stored(gptq(weight.float(), hessian_of(inputs), grid))
    decoded = Dequantize(Coding.PACKED_INT, 8, 64, 32, "F32")(words, scale)[0]
    assert torch.equal(grid.values(gptq(weight.float(), hessian_of(inputs), grid)), decoded)


def test_a_tie_goes_to_the_even_code():
    weight = torch.full((1, 16), 6.0)
    grid = Grid.of(weight, torch.tensor([[6.0]]), RECIPES["nvfp4"])
    step = float(grid.step_GO[0, 0])
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 9.0]) * step
    assert grid.decode(grid.encode(ties, 0), 0).div(step).tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0]
    assert grid.decode(grid.encode(-ties, 0), 0).div(step).tolist() == [-0.0, -1.0, -1.0, -2.0, -2.0, -4.0, -4.0, -6.0]


def test_columns_without_input_are_rounded_plainly_and_disturb_nothing():
    weight, inputs = problem(8, 64)
    inputs[:, 10:20] = 0
    hessian, grid = hessian_of(inputs), grid_of(weight, "channel")
    codes = gptq(weight.float(), hessian, grid)
    assert torch.equal(codes[:, 10:20], grid.plain_OI[:, 10:20])
    assert weighted_error(weight.float(), grid.values(codes), hessian) < weighted_error(
        weight.float(), grid.values(grid.plain_OI), hessian
    )


def test_fewer_rows_than_columns_can_be_factored():
    """An expert that saw two tokens: only the damping makes its matrix regular."""
    _, inputs = problem(1, 64)
    upper = factor(hessian_of(inputs[:2]))
    assert torch.isfinite(upper).all()
    assert (upper.diagonal() > 0).all()


def test_the_hessian_does_not_depend_on_how_rows_come():
    _, inputs = problem(1, 32)
    whole = Hessian(32, "cpu")
    whole.add(inputs)
    torch.testing.assert_close(whole.value(), hessian_of(inputs), rtol=1e-5, atol=1e-6)
    assert Hessian(4, "cpu").value().abs().max() == 0
