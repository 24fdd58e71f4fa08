"""What ranks hold, against figures computed by hand for the released models."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from builders import small_checkpoint

from converters.shard.limits import MappingRefused
from converters.shard.mapping import ParallelMapping, Placement, SharedExperts
from converters.shard.naming import ShardLayout
from converters.shard.planner import plan_ranks, serving_flags
from converters.source import Source, open_source
from tests.converters.inspect.fakes import config_of, official
from tests.converters.shard.models import rank_tensors, shard

# By hand, in elements, for one rank of TP 8. q and o: 12288 / 8 rows or columns, k and v one head of 128.
#   Air: attention 2*1536*4096 + 2*128*4096 + 1536 + 2*128 = 13,633,280; norms 2*4096; dense MLP 3*4096*1368;
#     MoE: router 128*4096, experts 128*3*4096*176 (EP 8: 16*3*4096*1408, the same), shared 3*4096*176, bias 128, fp32;
#     embedding, head and the MTP layer's own two: 4 * 18944*4096; eh_proj 8192*4096 and four norms of 4096 more.
#     47 * (13,633,280 + 8192) + 16,809,984 + 46 * (524,288 + 276,824,064 + 2,162,688) + 4*77,594,624 + 33,554,432
#     + 4*4096 = 13,859,416,320 in bf16 and 46*128 in fp32
#   4.6: attention 2*1536*5120 + 2*128*5120 + 1792 + 2*128 of q/k norms, 92 + 1 layers; dense 3*5120*1536, three times;
#     MoE 160*5120 + 160*3*5120*192 + 3*5120*192, 90 of them; embedding and head 2*18944*5120; eh_proj 5120*10240.
AIR_TP8 = 27_718_856_192
LARGE_TP8 = 89_419_047_168
# TP 4 x PP 2: stages of 24 and 22, and of 48 and 44 layers; the last has norm, head and MTP layer, 4.6's also a copy of
# the embedding, which its MTP layer does not have
AIR_STAGES = ((24, 27_377_716_736), (22, 27_943_825_920))
LARGE_STAGES = ((48, 89_483_251_840), (44, 89_488_451_200))
# keys and values of one head: 2 * 128 * 2 bytes a layer
HEAD = 512


@pytest.fixture(scope="module")
def air(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Source]:
    with open_source(official(tmp_path_factory.mktemp("air"), config_of("GLM-4.5-Air"))) as source:
        yield source


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Source]:
    folder = official(tmp_path_factory.mktemp("large"), config_of("GLM-4.6"), mtp_copies=False)
    with open_source(folder) as source:
        yield source


def elements_of_air() -> int:
    layer, moe = 13_633_280 + 8192, 524_288 + 276_824_064 + 2_162_688
    return 47 * layer + 16_809_984 + 46 * moe + 4 * 77_594_624 + 33_554_432 + 4 * 4096


def elements_of_large() -> int:
    layer = 2 * 1536 * 5120 + 2 * 128 * 5120 + 1792 + 256 + 2 * 5120
    moe = 160 * 5120 + 160 * 3 * 5120 * 192 + 3 * 5120 * 192
    return 93 * layer + 3 * 3 * 5120 * 1536 + 90 * moe + 2 * 18_944 * 5120 + 5120 * 10_240 + 4 * 5120


def test_the_figures_by_hand() -> None:
    assert 2 * elements_of_air() + 4 * 46 * 128 == AIR_TP8
    assert 2 * elements_of_large() + 4 * 90 * 160 == LARGE_TP8


@pytest.mark.parametrize("ep", [1, 8])
def test_tp8_with_and_without_ep8(air: Source, large: Source, ep: int) -> None:
    for source, weights, layers, tokens in ((air, AIR_TP8, 46, 2_172_587), (large, LARGE_TP8, 92, 0)):
        plan = plan_ranks(source, ParallelMapping(tp=8, ep=ep), gpu_memory=80_000_000_000)
        assert {rank.weight_bytes for rank in plan.ranks} == {weights}
        assert {rank.kv_bytes_per_token for rank in plan.ranks} == {HEAD * layers}
        assert {rank.mtp_kv_bytes_per_token for rank in plan.ranks} == {HEAD}
        assert plan.balance == 1.0
        # (80,000,000,000 - 27,718,856,192) / (47 * 512), the MTP layer's cache included; 4.6 leaves nothing of 80 GB
        assert {rank.kv_tokens for rank in plan.ranks} == {tokens}
    experts = 46 * 128 * 3 * 4096 * 176 * 2
    assert {rank.expert_bytes for rank in plan_ranks(air, ParallelMapping(tp=8, ep=ep)).ranks} == {experts}


def test_tp4_pp2_is_balanced_by_bytes(air: Source, large: Source) -> None:
    for source, stages in ((air, AIR_STAGES), (large, LARGE_STAGES)):
        plan = plan_ranks(source, ParallelMapping(tp=4, pp=2))
        assert plan.mapping.stages == tuple(layers for layers, _ in stages)
        for stage, (layers, weights) in enumerate(stages):
            own = [rank for rank in plan.ranks if rank.stage == stage]
            assert len(own) == 4
            assert {rank.weight_bytes for rank in own} == {weights}
            assert {rank.kv_bytes_per_token for rank in own} == {2 * HEAD * layers}
        total = 4 * sum(weights for _, weights in stages)
        assert plan.balance == pytest.approx(8 * max(weights for _, weights in stages) / total, rel=1e-12)


def test_more_ranks_than_key_value_heads_repeat_them(air: Source) -> None:
    plan = plan_ranks(air, ParallelMapping(tp=16))
    assert {rank.kv_bytes_per_token for rank in plan.ranks} == {HEAD * 46}
    # k and v of two ranks: 2 * 128 rows of 4096, and their biases; norms, routers and eh_proj are on all ranks
    copies = 47 * (2 * 128 * 4096 + 256 + 2 * 4096) + 46 * 128 * 4096 + 2 * 4096 * 4096 + 4 * 4096
    assert {rank.copied_bytes for rank in plan.ranks} == {2 * copies + 4 * 46 * 128}


def test_bytes_are_those_that_shard_writes(work: Path) -> None:
    src = small_checkpoint(work / "src", mtp_copies=False)
    for mapping in (
        ParallelMapping(tp=2, ep=2, pp=2, redundant_experts=2),
        ParallelMapping(tp=2, pp=3, shared_experts=SharedExperts.REPLICATE),
    ):
        with open_source(src) as source:
            plan = plan_ranks(source, mapping)
        found = rank_tensors(shard(src, work / f"{mapping.pp}", mapping, ShardLayout.RANK))
        for rank in plan.ranks:
            own = [v for name, v in found.items() if name.startswith(f"{rank.rank}/")]
            assert rank.weight_bytes == sum(v.numel() * v.element_size() for v in own)


def test_sizes_that_do_not_fit_are_refused(large: Source) -> None:
    with pytest.raises(MappingRefused, match="96 does not divide by 64"):
        plan_ranks(large, ParallelMapping(tp=64))


def test_flags_of_the_engines() -> None:
    assert serving_flags(ParallelMapping(tp=8)) == {
        "vLLM": "--tensor-parallel-size 8",
        "SGLang": "--tp-size 8",
        "TensorRT-LLM": "--tp_size 8",
    }
    mapping = ParallelMapping(tp=8, ep=8, pp=2, redundant_experts=16).balanced((48, 44))
    assert serving_flags(mapping) == {
        "vLLM": "VLLM_PP_LAYER_PARTITION=48,44 --tensor-parallel-size 8 --enable-expert-parallel --enable-eplb "
        "--eplb-config '{\"num_redundant_experts\": 16}' --pipeline-parallel-size 2",
        "SGLang": "SGLANG_PP_LAYER_PARTITION=48,44 --tp-size 8 --ep-size 8 --ep-num-redundant-experts 16 --pp-size 2",
        "TensorRT-LLM": "--tp_size 8 --ep_size 8 --pp_size 2",
    }


def test_what_an_engine_cannot_have_is_said(air: Source) -> None:
    assert plan_ranks(air, ParallelMapping(tp=8, ep=8)).reasons == {}
    inside = plan_ranks(air, ParallelMapping(tp=8, ep=4))
    assert inside.flags["vLLM"] == ""
    assert inside.reasons == {"vLLM": "its expert parallelism has all ranks of tensor parallelism: --ep 1 or 8"}
    dealt = plan_ranks(air, ParallelMapping(tp=8, ep=8, placement=Placement.ROUND_ROBIN))
    assert dealt.flags == {"vLLM": "", "SGLang": "", "TensorRT-LLM": ""}
