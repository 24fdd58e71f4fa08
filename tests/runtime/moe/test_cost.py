"""The arithmetic of floors, held against tables that were made without it."""

from math import comb

import pytest

from converters.config import Glm4MoeConfig, read_json
from runtime.moe import cost
from runtime.moe.cost import H200, SHAPES
from runtime.moe.layouts import capacity
from runtime.moe.plan import BACKENDS, BATCHED, CUTLASS, TRITON, VANILLA
from runtime.moe.weights import ExpertScheme
from tests.architecture.sources import ROOT

SCHEMES = (ExpertScheme.BF16, ExpertScheme.FP8_BLOCK, ExpertScheme.INT8_CHANNEL, ExpertScheme.NVFP4)
MEM, FL = "mem", "fl"
# M: distinct experts, GFLOP, then MB, microseconds and what binds for each of SCHEMES
FLOORS = {
    "GLM-4.6": {
        1: (8.0, 0.4, (425, 98.8, MEM), (212, 49.4, MEM), (212, 49.4, MEM), (120, 27.8, MEM)),
        4: (29.7, 1.7, (1448, 337, MEM), (724, 168, MEM), (724, 168, MEM), (407, 94.8, MEM)),
        16: (89.6, 6.8, (4275, 994, MEM), (2139, 497, MEM), (2138, 497, MEM), (1203, 280, MEM)),
        64: (154.0, 27.2, (7318, 1702, MEM), (3663, 852, MEM), (3662, 852, MEM), (2062, 480, MEM)),
        256: (160, 109, (7616, 1771, MEM), (3819, 888, MEM), (3818, 888, MEM), (2156, 501, MEM)),
        1024: (160, 435, (7675, 1785, MEM), (3877, 902, MEM), (3876, 901, MEM), (2214, 551, FL)),
        4096: (160, 1740, (7907, 2202, FL), (4110, 1101, FL), (4109, 2202, FL), (2447, 2202, FL)),
        16384: (160, 6958, (8838, 8807, FL), (5041, 4404, FL), (5040, 8807, FL), (3378, 8807, FL)),
    },
    "GLM-4.5-Air": {
        1: (8.0, 0.3, (311, 72.4, MEM), (156, 36.2, MEM), (156, 36.2, MEM), (88, 20.4, MEM)),
        4: (29.1, 1.2, (1043, 243, MEM), (522, 121, MEM), (521, 121, MEM), (293, 68.2, MEM)),
        16: (82.4, 5.0, (2888, 672, MEM), (1445, 336, MEM), (1444, 336, MEM), (813, 189, MEM)),
        64: (125.9, 19.9, (4397, 1023, MEM), (2201, 512, MEM), (2201, 512, MEM), (1240, 288, MEM)),
        256: (128, 79.7, (4481, 1042, MEM), (2250, 523, MEM), (2249, 523, MEM), (1273, 296, MEM)),
        1024: (128, 319, (4532, 1054, MEM), (2301, 535, MEM), (2301, 535, MEM), (1324, 404, FL)),
        4096: (128, 1276, (4739, 1615, FL), (2507, 807, FL), (2507, 1615, FL), (1530, 1615, FL)),
        16384: (128, 5102, (5563, 6459, FL), (3331, 3229, FL), (3331, 6459, FL), (2354, 6459, FL)),
    },
}
# rows computed for each useful one, found there by drawing routings
PADDING = {
    16: {16: 11.1, 64: 4.8, 256: 1.43, 1024: 1.15, 4096: 1.04},
    32: {16: 22, 64: 9.6, 256: 2.5, 1024: 1.26, 4096: 1.07},
    64: {16: 44, 64: 19, 256: 5.0, 1024: 1.28, 4096: 1.19},
    128: {16: 90, 64: 39, 256: 10, 1024: 2.5, 4096: 1.25},
}
GLM_4_6 = SHAPES["GLM-4.6"]


def unit(printed: float) -> float:
    """Half of the last place that a figure was printed with; whole ones had been rounded to one place before."""
    places = len(f"{printed}".partition(".")[2])
    return 0.5 * 10.0**-places + (0 if places else 0.05)


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_those_of_the_released_configs(name: str) -> None:
    config = Glm4MoeConfig.from_hf(read_json(ROOT / "fixtures" / "configs" / f"{name}.json"))
    assert SHAPES[name] == cost.LayerShape(
        config.hidden_size,
        config.moe_intermediate_size,
        config.n_routed_experts,
        config.num_experts_per_tok,
        config.n_shared_experts,
    )


@pytest.mark.parametrize(("name", "num_tokens"), [(name, tokens) for name in FLOORS for tokens in FLOORS[name]])
def test_floor_is_that_of_the_table(name: str, num_tokens: int) -> None:
    distinct, gflop, *floors = FLOORS[name][num_tokens]
    shape = SHAPES[name]
    assert cost.distinct_experts(shape, num_tokens) == pytest.approx(distinct, abs=0.05)
    for scheme, (megabytes, microseconds, binds) in zip(SCHEMES, floors, strict=True):
        found = cost.floor(shape, scheme, num_tokens)
        assert found.flop / 1e9 == pytest.approx(gflop, abs=unit(gflop))
        assert found.num_bytes / 1e6 == pytest.approx(megabytes, abs=unit(megabytes)), scheme
        assert found.floor_s(H200) * 1e6 == pytest.approx(microseconds, abs=unit(microseconds)), scheme
        assert found.is_memory_bound(H200) == (binds == MEM), scheme


@pytest.mark.parametrize(
    ("name", "crossovers"), [("GLM-4.6", (3290, 3290, 1640, 920)), ("GLM-4.5-Air", (2630, 2630, 1320, 740))]
)
def test_crossover_of_weights_alone_is_that_of_the_table(name: str, crossovers: tuple[int, ...]) -> None:
    for scheme, printed in zip(SCHEMES, crossovers, strict=True):
        found = cost.crossover_tokens(SHAPES[name], scheme, H200, weights_only=True)
        # printed in tens
        assert abs(found - printed) <= 5, scheme
        # rows are moved as well
        assert cost.crossover_tokens(SHAPES[name], scheme, H200) > found


@pytest.mark.parametrize(("block_m", "num_tokens"), [(block, tokens) for block in PADDING for tokens in PADDING[block]])
def test_padding_is_that_of_the_table(block_m: int, num_tokens: int) -> None:
    printed = PADDING[block_m][num_tokens]
    found = cost.padding_factor(GLM_4_6, num_tokens, block_m)
    # drawn routings scatter
    assert found == pytest.approx(printed, abs=unit(printed), rel=0.02)


def test_experts_with_several_blocks_are_as_many_as_in_the_table() -> None:
    printed = {(16, 128): 0, (16, 256): 14, (16, 512): 97, (32, 512): 9, (64, 1024): 3}
    for (block_m, num_tokens), percent in printed.items():
        assert 100 * cost.share_above(GLM_4_6, num_tokens, block_m) == pytest.approx(percent, abs=1)


@pytest.mark.parametrize("num_tokens", [1, 7, 64])
def test_row_counts_are_binomial(num_tokens: int) -> None:
    chance = GLM_4_6.num_chosen / GLM_4_6.num_routed
    found = dict(cost.row_counts(GLM_4_6, num_tokens))
    for rows in range(num_tokens + 1):
        exact = comb(num_tokens, rows) * chance**rows * (1 - chance) ** (num_tokens - rows)
        assert found.get(rows, 0.0) == pytest.approx(exact, rel=1e-9, abs=1e-15)


def test_row_counts_of_many_tokens_have_their_mean() -> None:
    found = dict(cost.row_counts(GLM_4_6, 1 << 20))
    assert sum(found.values()) == pytest.approx(1)
    assert sum(rows * chance for rows, chance in found.items()) == pytest.approx((1 << 20) / 20)


@pytest.mark.parametrize("num_tokens", [1, 16, 256, 4096])
def test_no_backend_reads_fewer_weights_than_the_floor(num_tokens: int) -> None:
    for scheme in SCHEMES:
        least = cost.touched_bytes(GLM_4_6, scheme, num_tokens)
        for backend in BACKENDS:
            made = cost.products(backend, GLM_4_6, scheme, num_tokens, 16)
            assert made.weight_bytes >= least * (1 - 1e-12)
            assert made.padding >= 1


def test_products_of_backends() -> None:
    one = {backend: cost.products(backend, GLM_4_6, ExpertScheme.BF16, 1, 16) for backend in BACKENDS}
    assert one[VANILLA].launches == pytest.approx(27)
    assert one[CUTLASS].launches == one[TRITON].launches == 2
    assert one[VANILLA].weight_bytes == pytest.approx(one[TRITON].weight_bytes)
    # weights are copied beside their rows: read, written, read
    assert one[BATCHED].weight_bytes == pytest.approx(3 * one[TRITON].weight_bytes)
    assert one[BATCHED].rows == capacity(9, 161, 16) == 144
    quantized = cost.products(CUTLASS, GLM_4_6, ExpertScheme.NVFP4, 1, 16)
    assert quantized.weight_bytes > 10 * cost.products(TRITON, GLM_4_6, ExpertScheme.NVFP4, 1, 16).weight_bytes
