"""What each rank holds, against slices taken with torch by the rules of the engines, written down once more here."""

import json
from pathlib import Path

import pytest
import torch
from builders import assert_same_tensors, read_tensors, small_checkpoint, write_checkpoint
from quantized import DIALECTS, quantized_checkpoint

from converters.convert import ConvertOptions, plan_convert
from converters.job import run
from converters.layout import Layout
from converters.pipeline import RunOptions
from converters.shard.mapping import ParallelMapping, Placement, SharedExperts
from converters.shard.naming import ShardLayout
from converters.source import open_source
from tests.converters.shard.models import merge, rank_tensors, shard

# 6 query heads over 2 key-value heads would not go over 4 ranks; 4 experts of width 24, dense width 80
MODEL = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 4}
TP, EP = 4, 2
MOE_TP = TP // EP


def bits(value: torch.Tensor) -> torch.Tensor:
    return value.reshape(-1).contiguous().view(torch.uint8)


def chunk(value: torch.Tensor, index: int, count: int, dim: int = 0) -> torch.Tensor:
    return value.chunk(count, dim)[index]


def expected_slice(name: str, value: torch.Tensor, tp: int) -> torch.Tensor | None:
    """Return what rank `tp` of TP ranks, in EP groups, has of an official tensor; None if nothing."""
    module = name.split(".")[-2]
    if "experts." in name and "shared_experts" not in name:
        expert = int(name.split("experts.")[1].split(".")[0])
        if expert // 2 != tp % EP:  # 4 experts, 2 a rank of EP, contiguous
            return None
        return chunk(value, tp // EP, MOE_TP, 1 if module == "down_proj" else 0)
    if module in ("k_proj", "v_proj"):
        return chunk(value, tp // 2, 2)  # two ranks share a head
    if module in ("q_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head", "head"):
        return chunk(value, tp, TP)
    if module in ("o_proj", "down_proj"):
        return chunk(value, tp, TP, 1)
    return value


def test_every_rank_has_its_slice_of_every_tensor(work: Path) -> None:
    src = small_checkpoint(work / "src", **MODEL)
    found = rank_tensors(shard(src, work / "dst", ParallelMapping(tp=TP, ep=EP), ShardLayout.RANK))
    expected = {
        f"{rank}/{name}": own
        for rank in range(TP)
        for name, value in read_tensors(src).items()
        if (own := expected_slice(name, value, rank)) is not None
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_shared_expert_replicated_is_whole_on_every_rank_and_recorded(work: Path) -> None:
    src = small_checkpoint(work / "src", **MODEL)
    mapping = ParallelMapping(tp=TP, ep=EP, shared_experts=SharedExperts.REPLICATE)
    dst = shard(src, work / "dst", mapping, ShardLayout.RANK)
    found, whole = rank_tensors(dst), read_tensors(src)
    name = "model.layers.1.mlp.shared_experts.down_proj.weight"
    assert all(torch.equal(found[f"{rank}/{name}"], whole[name]) for rank in range(TP))
    facts = json.loads((dst / "glm4moe-manifest.json").read_text())
    assert facts["distribution"]["shared_expert_output"]["copies"] == TP
    assert [part["ranks"] for part in facts["tensors"][name]["slices"]] == [list(range(TP))]


def test_fused_tensors_are_slices_of_each_part(work: Path) -> None:
    """qkv of a rank is its q above its k above its v, not a slice of the fused tensor."""
    src = small_checkpoint(work / "src", **MODEL)
    with open_source(src) as source:
        conversion = plan_convert(source, ConvertOptions(layout=Layout.FUSED))
        run(conversion, work / "fused", RunOptions(1), lambda _: None)
    found = rank_tensors(shard(work / "fused", work / "dst", ParallelMapping(tp=TP), ShardLayout.RANK))
    whole = read_tensors(src)
    prefix = "model.layers.0.self_attn."
    for rank in range(TP):
        own = [expected_slice(f"{prefix}{x}_proj.weight", whole[f"{prefix}{x}_proj.weight"], rank) for x in "qkv"]
        assert torch.equal(found[f"{rank}/{prefix}qkv_proj.weight"], torch.cat(own))
        gate, up = (chunk(whole[f"model.layers.0.mlp.{x}_proj.weight"], rank, TP) for x in ("gate", "up"))
        assert torch.equal(found[f"{rank}/model.layers.0.mlp.gate_up_proj.weight"], torch.cat((gate, up)))


def test_packed_experts_are_stacked_in_the_order_of_the_slots(work: Path) -> None:
    src = small_checkpoint(work / "src", **MODEL)
    mapping = ParallelMapping(tp=2, ep=2, placement=Placement.ROUND_ROBIN, redundant_experts=2)
    dst = shard(src, work / "dst", mapping, ShardLayout.RANK, layout=Layout.PACKED)
    slots = json.loads((dst / "glm4moe-manifest.json").read_text())["distribution"]["experts_of_moe_ep"]
    assert slots == [[0, 2, 1], [1, 3, 2]]
    found, whole = rank_tensors(dst), read_tensors(src)
    for rank, experts in enumerate(slots):
        down = [whole[f"model.layers.1.mlp.experts.{expert}.down_proj.weight"] for expert in experts]
        assert torch.equal(found[f"{rank}/model.layers.1.mlp.experts.down_proj"], torch.stack(down))


# scales and words of a column-parallel (q_proj) and of a row-parallel (down_proj) weight under TP 2: how each is cut
CUTS = {
    "ct-fp8-channel": {"weight": (0, 1), "weight_scale": (0, None)},
    "ct-fp8-tensor": {"weight": (0, 1), "weight_scale": (None, None), "input_scale": (None, None)},
    "ct-fp8-block": {"weight": (0, 1), "weight_scale": (0, 1)},
    "ct-int8-packed-group": {"weight_packed": (0, 1), "weight_scale": (0, 1)},
    "ct-int8-packed-channel": {"weight_packed": (0, 1), "weight_scale": (0, None)},
    "ct-nvfp4": {"weight_packed": (0, 1), "weight_scale": (0, 1), "weight_global_scale": (None, None)},
    "modelopt-nvfp4": {"weight": (0, 1), "weight_scale": (0, 1), "weight_scale_2": (None, None)},
    "deepseek-fp8-block": {"weight": (0, 1), "weight_scale_inv": (0, 1)},
}
QUANTIZED = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 96, "moe_intermediate_size": 192}
QUANTIZED |= {"intermediate_size": 192, "vocab_size": 64}


@pytest.mark.parametrize("dialect", CUTS)
def test_scales_follow_their_weights(work: Path, dialect: str) -> None:
    src, _ = quantized_checkpoint(work / "src", DIALECTS[dialect], **QUANTIZED)
    found = rank_tensors(shard(src, work / "dst", ParallelMapping(tp=2), ShardLayout.RANK))
    whole = read_tensors(src)
    for suffix, dims in CUTS[dialect].items():
        for module, dim in zip(("self_attn.q_proj", "mlp.experts.1.down_proj"), dims, strict=True):
            name = f"model.layers.1.{module}.{suffix}"
            for rank in range(2):
                own = whole[name] if dim is None else chunk(whole[name], rank, 2, dim)
                assert found[f"{rank}/{name}"].shape == own.shape
                assert torch.equal(bits(found[f"{rank}/{name}"]), bits(own)), name
    if "packed" in dialect:
        name = "model.layers.1.mlp.experts.1.down_proj.weight_shape"
        assert whole[name].tolist() == [64, 192]
        assert found[f"0/{name}"].tolist() == [64, 96]


def test_scales_of_heads_go_with_their_heads(work: Path) -> None:
    """compressed-tensors keeps one scale a head for attn_head caches; a rank has those of its heads."""
    src, _ = quantized_checkpoint(work / "src", DIALECTS["ct-fp8-channel"], **QUANTIZED)
    tensors = read_tensors(src)
    scales = torch.tensor([0.5, 0.25], dtype=torch.bfloat16)
    tensors["model.layers.0.self_attn.k_scale"] = scales.view(2, 1, 1)
    tensors["model.layers.1.self_attn.k_scale"] = torch.tensor([0.75], dtype=torch.bfloat16)
    src = write_checkpoint(work / "scaled", tensors, json.loads((src / "config.json").read_text()))
    found = rank_tensors(shard(src, work / "dst", ParallelMapping(tp=2), ShardLayout.RANK))
    for rank in range(2):
        assert found[f"{rank}/model.layers.0.self_attn.k_scale"].tolist() == [[[float(scales[rank])]]]
        assert found[f"{rank}/model.layers.1.self_attn.k_scale"].tolist() == [0.75]
    assert_same_tensors(read_tensors(merge(work / "dst", work / "merged")), tensors)
    shard(work / "dst", work / "tp1", ParallelMapping(tp=1), ShardLayout.RANK)
    assert_same_tensors(read_tensors(merge(work / "tp1", work / "again")), tensors)


def test_stages_have_their_layers_and_the_last_the_mtp_layer(work: Path) -> None:
    src = small_checkpoint(work / "src", mtp_copies=False)
    dst = shard(src, work / "dst", ParallelMapping(pp=3), ShardLayout.RANK)
    names = [{name.partition("/")[2] for name in rank_tensors(dst) if name.startswith(f"{r}/")} for r in range(3)]
    layers = [{int(name.split(".")[2]) for name in own if name.startswith("model.layers.")} for own in names]
    assert layers == [{0}, {1}, {2, 3}]
    assert ["model.embed_tokens.weight" in own for own in names] == [True, False, True], "the MTP layer embeds tokens"
    assert ["lm_head.weight" in own for own in names] == [False, False, True]


def test_the_manifest_says_which_slice_of_which_tensor_is_where(work: Path) -> None:
    """Put together by the manifest alone, the slices are the tensors of the source."""
    src, _ = quantized_checkpoint(work / "src", DIALECTS["ct-int4-packed-group"], **QUANTIZED)
    dst = shard(src, work / "dst", ParallelMapping(tp=2, ep=2, pp=2), ShardLayout.RANK)
    found, whole = rank_tensors(dst), read_tensors(src)
    tensors = json.loads((dst / "glm4moe-manifest.json").read_text())["tensors"]
    assert tensors.keys() == whole.keys()
    for name, facts in tensors.items():
        value = whole[name]
        assert facts["shape"] == list(value.shape)
        if name.endswith("weight_shape"):
            continue
        matrix = value.view(-1, value.shape[-1]) if value.ndim > 1 else value.view(-1, 1)
        for part in facts["slices"]:
            rows = torch.cat([matrix[start:stop] for start, stop in part.get("rows", [[0, len(matrix)]])])
            start, stop = part.get("columns", [0, matrix.shape[1]])
            for rank in part["ranks"]:
                own = found[f"{rank}/{name}"]
                assert torch.equal(bits(own), bits(rows[:, start:stop]))
