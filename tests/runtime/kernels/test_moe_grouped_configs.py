"""Tiles of the grouped products: what is chosen for how many rows, and that all of it is shipped."""

import pytest

from runtime.kernels.moe.configs import (
    BLACKWELL,
    HOPPER,
    SHARED_MEMORY_BYTES,
    SHIPPED,
    Shipped,
    Tiles,
    can_describe,
    choose,
)
from runtime.moe.weights import ExpertScheme

BF16, FP8, FP8_BLOCK, NVFP4 = ExpertScheme.BF16, ExpertScheme.FP8_CHANNEL, ExpertScheme.FP8_BLOCK, ExpertScheme.NVFP4
# rows per expert of GLM-4.6, 160 experts and 8 choices, for 1 to 16,384 tokens
ROWS = [8 * 2**power / 160 for power in range(15)]
# what a model can be planned with: schemes, whether inputs are codes that are multiplied with the weights', and GPUs
PLANNED = [
    (scheme, is_quantized, capability)
    for is_quantized, schemes in (
        (False, (BF16, FP8, FP8_BLOCK, ExpertScheme.INT8_CHANNEL, NVFP4)),
        (True, (FP8, FP8_BLOCK, ExpertScheme.INT8_W8A8, NVFP4)),
    )
    for scheme in schemes
    for capability in (HOPPER, BLACKWELL)
    if (scheme, is_quantized, capability) != (NVFP4, True, HOPPER)
]


def chosen(scheme: ExpertScheme, rows: float, **options) -> Tiles:
    shape = {"hidden_size": 5120, "intermediate_size": 1536, "capability": HOPPER, **options}
    return choose(scheme, rows_per_expert=rows, **shape)


@pytest.mark.parametrize(
    ("rows", "block_m", "swap_ab", "is_gemv"),
    [
        (0.05, 16, True, True),
        (0.29, 16, True, True),
        (0.3, 16, True, False),
        (10.6, 16, True, False),
        (10.7, 32, True, False),
        (21.3, 32, True, False),
        (21.4, 64, True, False),
        (47.9, 64, True, False),
        (48.0, 64, False, False),
        (127.9, 64, False, False),
        (128.0, 128, False, False),
    ],
)
def test_form_follows_rows_per_expert(rows: float, block_m: int, swap_ab: bool, is_gemv: bool) -> None:
    tiles = chosen(BF16, rows)
    assert (tiles.block_m, tiles.up.swap_ab, tiles.is_gemv) == (block_m, swap_ab, is_gemv)
    assert (tiles.down.block_m, tiles.down.swap_ab) == (block_m, swap_ab)


@pytest.mark.parametrize("rows", ROWS)
def test_weights_that_are_widened_stay_on_the_wide_side(rows: float) -> None:
    assert chosen(FP8, rows).up.swap_ab
    assert chosen(NVFP4, rows).up.swap_ab
    assert not chosen(NVFP4, rows).is_gemv


@pytest.mark.parametrize("scheme", ExpertScheme)
def test_batch_invariant_tiles_are_the_same_for_all_rows(scheme: ExpertScheme) -> None:
    tiles = {chosen(scheme, rows, batch_invariant=True) for rows in ROWS}
    assert len(tiles) == 1
    assert not tiles.pop().is_gemv


def test_rows_that_cannot_be_described_are_read_by_pointers() -> None:
    tiles = chosen(NVFP4, 1.0, intermediate_size=176)
    assert (tiles.up.tma, tiles.down.tma) == (True, False)
    assert can_describe(FP8, 176)
    assert not can_describe(FP8, 88)


@pytest.mark.parametrize(("scheme", "is_quantized", "capability"), PLANNED)
def test_whatever_is_chosen_is_shipped(scheme: ExpertScheme, is_quantized: bool, capability: int) -> None:
    for rows in ROWS:
        tiles = chosen(scheme, rows, capability=capability, is_quantized=is_quantized)
        for op, config in (("up", tiles.up), ("down", tiles.down)):
            assert Shipped(op, scheme, is_quantized, capability, config) in SHIPPED, (rows, config)


def test_shipped_names_are_unique() -> None:
    assert len({shipped.name for shipped in SHIPPED}) == len(SHIPPED)


@pytest.mark.parametrize("shipped", SHIPPED, ids=lambda shipped: shipped.name)
def test_stages_fit_into_shared_memory(shipped: Shipped) -> None:
    """Codes of inputs have as many bytes as those of weights; inputs that are no codes have 2."""
    config, width = shipped.config, shipped.scheme.code_dtype.itemsize
    row_bytes = config.block_n * width + config.block_m * (width if shipped.is_quantized else 2)
    assert config.num_stages * config.block_k * row_bytes <= SHARED_MEMORY_BYTES


def test_scales_of_blocks_divide_steps() -> None:
    assert {128 % shipped.config.block_k for shipped in SHIPPED} == {0}


def test_small_fp8_tiles_can_write_codes() -> None:
    tiles = {rows: chosen(FP8, rows, is_quantized=True) for rows in (1.0, 16.0, 32.0, 48.0, 128.0)}
    assert [rows for rows, tile in tiles.items() if not tile.can_write_codes] == [128.0]
