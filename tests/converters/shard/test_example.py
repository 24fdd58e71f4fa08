"""fixtures/load_rank.py: what an engine's loader has to know, in thirty lines; outputs add up to the model's."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from builders import read_tensors, small_checkpoint

from converters.layout import Layout
from converters.shard.mapping import ParallelMapping, Placement, SharedExperts
from converters.shard.naming import ShardLayout
from tests.converters.shard.models import shard

SCRIPT = Path(__file__).parents[3] / "fixtures" / "load_rank.py"
MODEL = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 4}


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("load_rank", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_has_thirty_lines_and_needs_safetensors_alone() -> None:
    lines = SCRIPT.read_text().splitlines()
    assert len(lines) <= 30
    imported = {line.split()[1].split(".")[0] for line in lines if line.startswith(("import ", "from "))}
    assert imported == {"json", "sys", "pathlib", "safetensors"}


def swiglu(prefix: str, tensors: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    gate, up, down = (tensors[f"{prefix}{part}_proj.weight"].double() for part in ("gate", "up", "down"))
    return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


# a slot of a fused shared expert is cut as the experts that it lies among, so whole only where they are
CASES = [
    *((Layout.SPLIT, shared, ep) for shared in SharedExperts for ep in (1, 2, 4)),
    *((Layout.FUSED_SHARED, SharedExperts.SPLIT, ep) for ep in (1, 2, 4)),
    (Layout.FUSED_SHARED, SharedExperts.REPLICATE, 4),
]


@pytest.mark.parametrize(("layout", "shared", "ep"), CASES)
def test_outputs_of_the_ranks_add_up_to_the_output_of_the_model(
    work: Path, example: ModuleType, layout: Layout, shared: SharedExperts, ep: int
) -> None:
    """Dense MLP, one routed expert and the shared expert, each rank's partial output added once."""
    src = small_checkpoint(work / "src", **MODEL)
    placement = Placement.ROUND_ROBIN if ep == 4 else Placement.CONTIGUOUS
    mapping = ParallelMapping(tp=4, ep=ep, placement=placement, shared_experts=shared)
    dst = shard(src, work / "dst", mapping, ShardLayout.RANK, layout=layout)
    whole = read_tensors(src)
    x = torch.randn(3, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    mlp, expert = "model.layers.1.mlp.", 2
    slot = f"{mlp}experts.4." if layout is Layout.FUSED_SHARED else f"{mlp}shared_experts."
    outputs: dict[str, Any] = dict.fromkeys(("dense", "routed", "shared"), torch.zeros_like(x))
    for rank in range(4):
        tensors, place = example.load_rank(dst, rank)
        assert place["layers"] == [0, 3]
        outputs["dense"] = outputs["dense"] + swiglu("model.layers.0.mlp.", tensors, x)
        if expert in place["experts"]:
            outputs["routed"] = outputs["routed"] + swiglu(f"{mlp}experts.{expert}.", tensors, x)
        if place["adds_shared_expert"]:
            outputs["shared"] = outputs["shared"] + swiglu(slot, tensors, x)
    expected = {
        "dense": swiglu("model.layers.0.mlp.", whole, x),
        "routed": swiglu(f"{mlp}experts.{expert}.", whole, x),
        "shared": swiglu(f"{mlp}shared_experts.", whole, x),
    }
    for name, value in expected.items():
        # sums over the intermediate dim in another order, in fp64
        assert torch.allclose(outputs[name], value, rtol=1e-10, atol=1e-12), name


def test_the_script_runs(work: Path) -> None:
    src = small_checkpoint(work / "src", **MODEL)
    dst = shard(src, work / "dst", ParallelMapping(tp=2, pp=2), ShardLayout.TENSORRT_LLM)
    ended = subprocess.run([sys.executable, str(SCRIPT), str(dst), "3"], capture_output=True, text=True, check=True)
    assert "'rank': 3, 'pp': 1, 'tp': 1" in ended.stdout
    assert "'layers': [" in ended.stdout
