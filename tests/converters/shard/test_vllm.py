"""--layout vllm: the parameters that vLLM's sharded_state loader asks for, and the engine itself."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import assert_same_tensors, read_tensors, small_checkpoint
from quantized import DIALECTS, quantized_checkpoint
from safetensors import safe_open

from converters.errors import UsageError
from converters.shard.mapping import ParallelMapping, Placement, SharedExperts
from converters.shard.naming import VLLM_VERSION, ShardLayout
from converters.shard.plan import ShardOptions, plan_shard
from converters.source import open_source
from tests.converters.shard.models import merge, rank_tensors, shard

ROOT = Path(__file__).parents[3]
INTERPRETER = os.environ.get("GLM4MOE_VLLM_PYTHON", "")
LAYER = "model.layers.4."
# one MoE layer of fixtures/tiny in vLLM 0.32.0's state dict on one rank, as its loader filters it
PARAMETERS = {
    "self_attn.qkv_proj.weight": [384, 128],
    "self_attn.qkv_proj.bias": [384],
    "self_attn.o_proj.weight": [128, 256],
    "self_attn.attn._k_scale": [],
    "self_attn.attn._v_scale": [],
    "self_attn.attn._q_scale": [],
    "self_attn.attn._prob_scale": [],
    "self_attn.q_norm.weight": [32],
    "self_attn.k_norm.weight": [32],
    "mlp.gate.weight": [16, 128],
    "mlp.experts.routed_experts.e_score_correction_bias": [16],
    "mlp.experts.routed_experts.w13_weight": [16, 128, 128],
    "mlp.experts.routed_experts.w2_weight": [16, 128, 64],
    "mlp.experts._shared_experts._layer.gate_up_proj.weight": [128, 128],
    "mlp.experts._shared_experts._layer.down_proj.weight": [128, 64],
    "input_layernorm.weight": [128],
    "post_attention_layernorm.weight": [128],
}


def names_of(path: Path) -> set[str]:
    with safe_open(path, framework="pt") as file:
        return set(file.keys())


def test_parameters_are_those_of_its_state_dict(tiny: Path, work: Path) -> None:
    dst = shard(tiny, work / "dst", ParallelMapping(), ShardLayout.VLLM)
    found = rank_tensors(dst)
    own = {name.removeprefix(f"0/{LAYER}"): list(v.shape) for name, v in found.items() if name.startswith(f"0/{LAYER}")}
    assert own == PARAMETERS
    assert all(value.item() == 1 for name, value in found.items() if ".attn._" in name)
    body = names_of(dst / "model-rank-0-part-0.safetensors")
    assert not any(name.startswith("model.layers.7.") for name in body), "its loader refuses names it does not know"
    assert all(name.startswith("model.layers.7.") for name in names_of(dst / "mtp-rank-0-part-0.safetensors"))


def test_experts_are_gate_above_up_of_the_rank(work: Path) -> None:
    src = small_checkpoint(work / "src")
    whole = read_tensors(src)
    found = rank_tensors(shard(src, work / "dst", ParallelMapping(tp=2), ShardLayout.VLLM))
    experts = "model.layers.1.mlp.experts."
    for rank in range(2):
        halves = [
            torch.cat([whole[f"{experts}{expert}.{part}_proj.weight"].chunk(2)[rank] for part in ("gate", "up")])
            for expert in range(4)
        ]
        assert torch.equal(found[f"{rank}/{experts}routed_experts.w13_weight"], torch.stack(halves))
        down = [whole[f"{experts}{expert}.down_proj.weight"].chunk(2, 1)[rank] for expert in range(4)]
        assert torch.equal(found[f"{rank}/{experts}routed_experts.w2_weight"], torch.stack(down))


@pytest.mark.parametrize("mapping", [{"tp": 2}, {"tp": 2, "ep": 2}, {"tp": 2, "pp": 2}, {"pp": 3}])
def test_merged_it_is_the_original(work: Path, mapping: dict[str, int]) -> None:
    src = small_checkpoint(work / "src", mtp_copies=False)
    dst = shard(src, work / "dst", ParallelMapping(**mapping), ShardLayout.VLLM, max_shard_bytes=30_000)
    assert_same_tensors(read_tensors(merge(dst, work / "merged")), read_tensors(src))
    again = shard(dst, work / "rank", ParallelMapping(tp=2), ShardLayout.RANK)
    expected = shard(src, work / "expected", ParallelMapping(tp=2), ShardLayout.RANK)
    assert_same_tensors(rank_tensors(again), rank_tensors(expected))


def test_files_of_stages_have_the_names_and_parameters_of_stages(tiny: Path, work: Path) -> None:
    dst = shard(tiny, work / "dst", ParallelMapping(pp=2), ShardLayout.VLLM)
    names = {path.name: names_of(path) for path in dst.glob("*.safetensors")}
    first, last = "model-pp-0-tp-0-part-0.safetensors", "model-pp-1-tp-0-part-0.safetensors"
    assert names.keys() == {first, last, "mtp-pp-1-tp-0-part-0.safetensors"}
    ends = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert names[first] & ends == {"model.embed_tokens.weight"}
    assert names[last] & ends == {"model.norm.weight", "lm_head.weight"}


def planned(src: Path, mapping: ParallelMapping, **options: Any) -> None:
    with open_source(src) as source:
        plan_shard(source, ShardOptions(mapping=mapping, files=ShardLayout.VLLM, **options))


def test_what_was_not_run_is_said(tiny: Path) -> None:
    with open_source(tiny) as source:
        for mapping, count in (
            (ParallelMapping(tp=2), 0),
            (ParallelMapping(tp=2, ep=2), 1),
            (ParallelMapping(pp=2), 1),
        ):
            conversion = plan_shard(source, ShardOptions(mapping=mapping, files=ShardLayout.VLLM))
            assert len(conversion.notes) == count
            assert all("tokens were compared for tensor parallelism alone" in note for note in conversion.notes)


def test_other_versions_are_refused_by_name(tiny: Path) -> None:
    with pytest.raises(UsageError, match=r"--vllm-version 0\.33\.0: expected 0\.32\.0, .* found 0\.33\.0\. Names of"):
        planned(tiny, ParallelMapping(tp=2), vllm_version="0.33.0")


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        (ParallelMapping(tp=2, shared_experts=SharedExperts.REPLICATE), "--shared-experts split, found replicate"),
        (ParallelMapping(tp=2, ep=2, placement=Placement.ROUND_ROBIN), "dealt contiguously"),
        (ParallelMapping(tp=2, ep=2, redundant_experts=2), "none twice"),
    ],
)
def test_mappings_that_it_does_not_have_are_refused(tiny: Path, mapping: ParallelMapping, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        planned(tiny, mapping)


def test_ep_inside_tp_is_refused(work: Path) -> None:
    src = small_checkpoint(work / "src", num_attention_heads=8, num_key_value_heads=4, head_dim=4)
    with pytest.raises(UsageError, match="--ep 1 or 4, as --enable-expert-parallel has it, found --ep 2"):
        planned(src, ParallelMapping(tp=4, ep=2))


def test_formats_that_its_loader_was_not_seen_to_take_are_refused(work: Path) -> None:
    src, _ = quantized_checkpoint(work / "src", DIALECTS["ct-fp8-channel"])
    with pytest.raises(UsageError, match="expected bfloat16 weights, found BF16, F8_E4M3. Use --layout rank"):
        planned(src, ParallelMapping(tp=2))


def test_a_vocabulary_that_it_would_pad_is_refused(work: Path) -> None:
    src = small_checkpoint(work / "src", vocab_size=96)
    with pytest.raises(UsageError, match="a vocabulary that divides by 64"):
        planned(src, ParallelMapping(tp=2))


def greedy(folder: Path, load_format: str, out: Path) -> dict[str, Any]:
    script = Path(__file__).parent / "vllm_greedy.py"
    command = [INTERPRETER, str(script), str(folder), load_format, str(out)]
    # a folder of its own: vLLM writes caches and logs beside it
    ended = subprocess.run(command, cwd=out.parent, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-4000:]
    return json.loads(out.read_text())


@pytest.mark.vllm
@pytest.mark.skipif(not INTERPRETER, reason="GLM4MOE_VLLM_PYTHON names no interpreter that has vLLM")
def test_the_engine_gives_the_same_tokens_from_shards(tiny: Path, work: Path, tally: Callable[[str], None]) -> None:
    """Two CPU ranks: the unsharded folder through vLLM's own loader, and our shards through sharded_state."""
    dst = shard(tiny, work / "dst", ParallelMapping(tp=2), ShardLayout.VLLM)
    shards = greedy(dst, "sharded_state", work / "shards.json")
    whole = greedy(tiny, "auto", work / "whole.json")
    assert shards["version"] == VLLM_VERSION
    assert shards["tokens"] == whole["tokens"]
    assert shards["logprobs"] == whole["logprobs"]
    count = sum(map(len, shards["tokens"]))
    tally(f"shard: vLLM {shards['version']}, two CPU ranks: {count} greedy tokens and their log-probabilities equal")
