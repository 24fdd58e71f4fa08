"""Products by blocks: those of the whole weight to rounding, whatever it is stored as, and each input by itself."""

import pytest
import torch

from runtime.model import products as module
from runtime.model.products import products

SCALE = torch.linspace(0.5, 2, 70)[:, None]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture(params=["built in", "missing"])
def library(request, monkeypatch):
    if request.param == "missing":
        monkeypatch.setattr(module, "_LINEAR", None)


@pytest.fixture(params=[1, 24 * 4 * 16, 1 << 20], ids=["rows", "blocks", "whole"])
def block(request, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_BYTES", request.param)


@pytest.mark.usefixtures("block", "library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_a_product_is_that_of_the_whole_weight(dtype):
    stored = random(70, 24).to(dtype)
    scale = SCALE if dtype is torch.float8_e4m3fn else None
    weight = stored.float() * (1 if scale is None else scale)
    inputs = [random(rows, 24) for rows in (1, 7, 0, 33)]
    for rows, out in zip(inputs, products(stored, scale, inputs), strict=True):
        exact = rows.double() @ weight.double().T
        # 24 products and their sums, each rounded
        bound = 25 * 2.0**-24 * (rows.double().abs() @ weight.double().abs().T)
        assert out.dtype is torch.float32
        assert out.shape == exact.shape
        assert bool(((out - exact).abs() <= bound).all())


@pytest.mark.usefixtures("block")
def test_equal_values_have_equal_results_however_they_are_stored():
    stored, rows = random(70, 24).bfloat16(), random(5, 24)
    (narrow,), (wide,) = products(stored, None, [rows]), products(stored.float(), None, [rows])
    assert torch.equal(narrow, wide)


@pytest.mark.usefixtures("block", "library")
def test_each_input_is_a_product_of_its_own():
    stored, rows = random(70, 24).bfloat16(), random(5, 24)
    alone = products(stored, None, [rows])[0]
    several = products(stored, None, [random(9, 24), rows, rows])
    assert torch.equal(several[1], alone)
    assert torch.equal(several[2], alone)


@pytest.mark.usefixtures("library")
def test_what_is_not_finite_stays_in_its_row_and_column():
    weight, rows = random(70, 24), random(5, 24)
    rows[2, 3], weight[7, 1] = torch.nan, torch.inf
    (out,) = products(weight, None, [rows])
    is_hit = torch.zeros(5, 70, dtype=torch.bool)
    is_hit[2], is_hit[:, 7] = True, True
    assert torch.equal(~out.isfinite(), is_hit)
