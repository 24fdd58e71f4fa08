"""What does not fit is refused before anything is written, with the sizes that do and the way round."""

from pathlib import Path
from typing import Any

import pytest
from builders import small_checkpoint
from quantized import BLOCK, DIALECTS, quantized_checkpoint

from converters.config import Glm4MoeConfig
from converters.convert import ConvertOptions
from converters.errors import UsageError
from converters.layout import Layout
from converters.schema import Role
from converters.shard.limits import Limit, MappingRefused, mapping_limits
from converters.shard.mapping import ParallelMapping, SharedExperts
from converters.shard.plan import ShardOptions, plan_shard
from converters.source import open_source
from tests.converters.inspect.fakes import config_of

AIR, LARGE = (Glm4MoeConfig.from_hf(config_of(name)) for name in ("GLM-4.5-Air", "GLM-4.6"))
MLPS = (Role.DENSE_MLP, Role.EXPERT, Role.SHARED_EXPERT)


def limits(config: Glm4MoeConfig, unit: int, **mapping: Any) -> dict[str, Limit]:
    units = dict.fromkeys((*MLPS, Role.ATTENTION), unit)
    return {row.part: row for row in mapping_limits(config, units, ParallelMapping(**mapping), Layout.SPLIT)}


def largest_power(limit: Limit) -> int:
    return max((size for size in limit.sizes if size & (size - 1) == 0), default=0)


# the published table: group -> Air dense, Air experts, 4.x dense, 4.x experts; 128 stands for more, 1 for whole only
@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        (1, (64, 128, 128, 128)),
        (128, (1, 1, 32, 4)),
        (64, (1, 2, 64, 8)),
        (32, (2, 4, 128, 16)),
        (16, (4, 8, 128, 32)),
    ],
)
def test_widths_divide_as_published(unit: int, expected: tuple[int, ...]) -> None:
    rows = [limits(config, unit)[part] for config in (AIR, LARGE) for part in ("dense layers", "experts")]
    assert tuple(map(largest_power, rows)) == expected


def test_blocks_at_tp8_say_what_else_works() -> None:
    rows = limits(LARGE, 128, tp=8)
    reasons = {part: row.reason for part, row in rows.items() if row.reason}
    why = "1536 / 8 = 192 is 1.5 groups of 128"
    assert reasons == {"experts": why, "shared expert": why}
    assert rows["experts"].way_round.startswith("use --ep 2, 4, 8, which cuts experts less or not at all; or quantize")
    assert rows["shared expert"].way_round.startswith("use --shared-experts replicate, or choose another --tp; or quan")
    around = limits(LARGE, 128, tp=8, ep=8, shared_experts=SharedExperts.REPLICATE)
    assert not [row for row in around.values() if row.reason]


def test_heads_and_experts() -> None:
    rows = limits(LARGE, 1, tp=64, ep=64)
    assert rows["attention heads"].reason == "96 does not divide by 64"
    assert rows["expert slots"].reason == "160 experts do not divide by 64"
    assert rows["expert slots"].way_round == "add --redundant-experts 32, or choose another --ep"
    assert limits(AIR, 1, tp=512, ep=512)["expert slots"].way_round == "choose another --ep"
    assert not limits(LARGE, 1, tp=32, ep=32)["expert slots"].reason
    assert limits(LARGE, 1, tp=3)["key-value heads"].reason == "8 heads neither divide by 3 nor repeat evenly over it"
    assert limits(LARGE, 1, tp=16)["key-value heads"].reason == ""
    assert limits(LARGE, 1, pp=93)["layers"].reason == "92 layers are fewer than 93 stages"


def refused(src: Path, mapping: ParallelMapping, **convert: Any) -> MappingRefused:
    with open_source(src) as source, pytest.raises(MappingRefused) as caught:
        plan_shard(source, ShardOptions(mapping=mapping, convert=ConvertOptions(**convert)))
    return caught.value


def test_the_message_names_option_part_sizes_and_way_round(work: Path) -> None:
    src = small_checkpoint(work / "src", n_routed_experts=6, num_attention_heads=8, num_key_value_heads=8, head_dim=4)
    error = refused(src, ParallelMapping(tp=4, ep=4))
    assert str(error) == (
        "--ep 4: expert slots: expected a size that fits: 1, 2, 3, 6, found 6 experts do not divide by 4. "
        "Add --redundant-experts 2, or choose another --ep."
    )
    assert error.exit_code == 2


def test_groups_are_those_of_the_format_as_stored(work: Path) -> None:
    """Blocks of 32 x 48: rows of gate and up in 32, columns of down in 48; per channel nothing stays together."""
    sizes = {"moe_intermediate_size": 96, "intermediate_size": 96, "head_dim": 96}
    blocks, _ = quantized_checkpoint(work / "blocks", DIALECTS["ct-fp8-block"], **sizes)
    rows = {row.part: row for row in refused(blocks, ParallelMapping(tp=2)).limits}
    assert rows["experts"].unit == 96 == BLOCK[0] * BLOCK[1] // 16
    assert rows["experts"].reason == "96 / 2 = 48 is 0.5 groups of 96"
    channel, _ = quantized_checkpoint(work / "channel", DIALECTS["ct-fp8-channel"], **sizes)
    with open_source(channel) as source:
        plan_shard(source, ShardOptions(mapping=ParallelMapping(tp=2)))
    with open_source(blocks) as source:
        plan_shard(source, ShardOptions(mapping=ParallelMapping(tp=2), convert=ConvertOptions(dequantize=True)))


def test_a_slot_of_a_fused_shared_expert_is_cut_as_its_neighbours(work: Path) -> None:
    src = small_checkpoint(work / "src")
    mapping = ParallelMapping(tp=2, shared_experts=SharedExperts.REPLICATE)
    convert = ConvertOptions(layout=Layout.FUSED_SHARED)
    with open_source(src) as source:
        with pytest.raises(UsageError, match="expected a slot cut as the experts that it lies among"):
            plan_shard(source, ShardOptions(mapping=mapping, convert=convert))
        both = ParallelMapping(tp=2, ep=2, shared_experts=SharedExperts.REPLICATE)
        plan_shard(source, ShardOptions(mapping=both, convert=convert))


def test_more_redundant_experts_than_experts_are_refused(work: Path) -> None:
    src = small_checkpoint(work / "src")
    error = refused(src, ParallelMapping(tp=2, ep=2, redundant_experts=6))
    assert str(error) == (
        "--redundant-experts 6: redundant experts: expected a size that fits: 0, 2, 4, "
        "found 6 redundant experts are more than the 4 there are"
    )
