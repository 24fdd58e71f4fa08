"""Parallel sizes against the arithmetic of the released models, row by row."""

import pytest

from converters.config import Glm4MoeConfig
from converters.inspect.parallel import (
    SCHEMES,
    SIZES,
    cut_reason,
    expert_fit,
    parallel_report,
    pipeline_fit,
    scheme_limits,
    tensor_fit,
)
from tests.converters.inspect.fakes import config_of

AIR, LARGE = (Glm4MoeConfig.from_hf(config_of(name)) for name in ("GLM-4.5-Air", "GLM-4.6"))
POWERS = [size for size in SIZES if size & (size - 1) == 0]


def largest_power(sizes: tuple[int, ...]) -> int:
    """Return the largest power of two, with all smaller ones there too; 0 if none fits."""
    powers = [size for size in sizes if size in POWERS]
    assert powers == POWERS[: len(powers)]
    return powers[-1] if powers else 0


# group size -> Air dense, Air experts, 4.x dense, 4.x experts: largest power of two, 128 standing for more
@pytest.mark.parametrize(
    ("group_size", "expected"),
    [
        (1, (64, 128, 128, 128)),
        (128, (0, 1, 32, 4)),
        (64, (1, 2, 64, 8)),
        (32, (2, 4, 128, 16)),
        (16, (4, 8, 128, 32)),
    ],
)
def test_width_limits_are_those_of_the_released_models(group_size: int, expected: tuple[int, ...]) -> None:
    scheme = next(name for name, unit in SCHEMES.items() if unit == group_size)
    air, large = scheme_limits(AIR, scheme, group_size), scheme_limits(LARGE, scheme, group_size)
    assert tuple(map(largest_power, (air.dense, air.experts, large.dense, large.experts))) == expected


def test_heads_limit_tensor_parallelism() -> None:
    fits = [size for size in SIZES if tensor_fit(LARGE, 1, size, split_experts=False).fits]
    assert fits == [1, 2, 4, 8, 16, 24, 32, 48]
    assert tensor_fit(LARGE, 1, 12, split_experts=False).reasons == (
        "attention: 8 key-value heads neither divide by 12 nor repeat evenly over it",
    )
    assert tensor_fit(LARGE, 1, 64, split_experts=False).reasons == ("attention: 96 heads do not divide by 64",)


@pytest.mark.parametrize(
    ("config", "group_size", "size", "reasons"),
    [
        (LARGE, 128, 4, ()),
        (
            LARGE,
            128,
            8,
            (
                "shared expert: 1536 / 8 = 192 is 1.5 groups of 128",
                "experts: 1536 / 8 = 192 is 1.5 groups of 128",
            ),
        ),
        (AIR, 128, 1, ("dense layers: 10944 is 85.5 groups of 128",)),
        (AIR, 16, 8, ("dense layers: 10944 / 8 = 1368 is 85.5 groups of 16",)),
        (
            LARGE,
            1,
            3,
            ("attention: 8 key-value heads neither divide by 3 nor repeat evenly over it",),
        ),
    ],
)
def test_every_size_that_does_not_fit_says_why(
    config: Glm4MoeConfig, group_size: int, size: int, reasons: tuple[str, ...]
) -> None:
    assert tensor_fit(config, group_size, size, split_experts=True).reasons == reasons


def test_expert_parallelism_leaves_the_shared_expert_to_cut() -> None:
    assert tensor_fit(LARGE, 128, 8, split_experts=False).reasons == (
        "shared expert: 1536 / 8 = 192 is 1.5 groups of 128",
    )


def test_expert_and_pipeline_sizes() -> None:
    assert [size for size in SIZES if expert_fit(LARGE, size).fits] == [1, 2, 4, 8, 16, 32]
    assert [size for size in SIZES if expert_fit(AIR, size).fits] == POWERS
    assert expert_fit(LARGE, 64).reasons == ("160 experts do not divide by 64",)
    assert expert_fit(LARGE, 8).note == "20 experts a rank"
    assert pipeline_fit(LARGE, 8).note == "11 to 12 layers a stage"
    assert pipeline_fit(LARGE, 4).note == "23 layers a stage"
    assert pipeline_fit(AIR, 48).reasons == ("46 layers are fewer than 48 stages",)


def test_kernel_notes_are_for_quantized_checkpoints_only() -> None:
    plain, quantized = (parallel_report(AIR, 1, is_quantized=flag) for flag in (False, True))
    assert {fit.note for fit in plain.tensor} == {""}
    notes = {fit.size: fit.note for fit in quantized.tensor if fit.note}
    assert notes[4] == ("dense layers: 5472 merged rows a rank; Marlin, for GPUs without FP8, wants a multiple of 64")
    assert notes[8] == "dense layers: 1368 columns a rank; 8-bit GEMMs usually want a multiple of 16"
    assert 2 not in notes


def test_cut_reason_is_empty_exactly_when_every_slice_is_whole_groups() -> None:
    for width in (64, 96, 1408):
        for group_size in (1, 16, 64):
            for size in SIZES:
                whole = width % size == 0 and width // size % group_size == 0
                assert (cut_reason(width, group_size, size) == "") == whole
