"""Sharded checkpoints held against their source, as they are: no merge in between."""

import json
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file, save_file

from converters.compare import compare_structure
from converters.contents import ContentsReport, check_contents
from converters.errors import InputError
from converters.layout import Layout
from converters.quant.certify import CertifyOptions, certify_folders
from converters.shard.naming import ShardLayout
from converters.shard.plan import plan_merge
from converters.shard.source import open_sharded
from converters.shard.whole import merged_entries, open_whole
from tests.converters.shard.models import PLAIN, Case, make, random_case, shard

DIALECTS = (PLAIN, "ct-fp8-channel", "ct-fp8-block", "ct-nvfp4", "ct-int8-packed-group", "modelopt-nvfp4")


def cut(folder: Path, case: Case) -> tuple[Path, Path]:
    source = make(folder, case)
    return source, shard(source, folder / "cut", case.first, case.files)


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_headers_and_weights_are_those_of_the_source(tmp_path: Path, dialect: str, layout: Layout) -> None:
    case = random_case(Random(f"{dialect} {layout}"), dialect, layout)
    source, made = cut(tmp_path, case)
    with open_sharded(made) as opened:
        planned = {entry.name: entry for part in plan_merge(opened).plan.shards for entry in part.entries}
        found = merged_entries(opened)
    assert {n: (e.dtype, e.shape, e.nbytes) for n, e in found.items()} == {
        n: (e.dtype, e.shape, e.nbytes) for n, e in planned.items()
    }
    # the random dialects have ignore lists that engines stumble over, cut or not
    assert set(compare_structure(source, made).findings) <= set(compare_structure(source, source).findings)
    weights = certify_folders(source, made, CertifyOptions(1), lambda _: lambda _: None)
    assert weights.findings == ()
    assert contents(made).findings == ()
    with open_whole(made) as again:
        assert len(weights.tensors) == len(again.schema.tensors)


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A plain checkpoint for four ranks, cut and replicated."""
    case = random_case(Random(3), PLAIN, Layout.SPLIT)
    mapping = replace(case.first, tp=2, ep=1, pp=1, redundant_experts=0, stages=())
    sizes = {"moe_intermediate_size": 16, "intermediate_size": 16, "num_key_value_heads": 2, "num_attention_heads": 4}
    model = {**case.model, **sizes, "vocab_size": 32, "num_hidden_layers": 2, "first_k_dense_replace": 1}
    return cut(tmp_path, replace(case, model=model, first=mapping, files=ShardLayout.RANK))[1]


def contents(folder: Path) -> ContentsReport:
    return check_contents(folder, 1, lambda _: lambda _: None)


def files_of(folder: Path, rank: int) -> list[Path]:
    shards = json.loads((folder / "glm4moe-manifest.json").read_text())["shards"]
    return [folder / file for file, facts in shards.items() if facts["rank"] == rank]


def test_a_copy_on_another_rank_that_differs_is_seen(made: Path) -> None:
    """A comparison of weights reads one of the copies; the digests are of all of them."""
    (file,) = files_of(made, 1)
    tensors = load_file(file)
    name = next(name for name, value in tensors.items() if value.dim() == 1)
    tensors[name] = tensors[name] + 1
    save_file(tensors, file)
    (finding,) = contents(made).findings
    assert finding.subject == f"candidate: tensor {name}"


def test_a_tensor_that_a_rank_lacks_is_seen(made: Path) -> None:
    (file,) = files_of(made, 1)
    tensors = load_file(file)
    name = sorted(tensors)[4]
    del tensors[name]
    save_file(tensors, file)
    assert (f"candidate: tensor {name}", "nothing") in [(one.subject, one.found) for one in contents(made).findings]


def test_ranks_with_different_formats_are_refused(made: Path) -> None:
    (file,) = files_of(made, 1)
    tensors = load_file(file)
    name = next(name for name, value in tensors.items() if value.dim() == 2 and value.dtype == torch.bfloat16)
    tensors[name] = tensors[name].float()
    save_file(tensors, file)
    manifest = json.loads((made / "glm4moe-manifest.json").read_text())
    manifest["shards"][file.name]["bytes"] = file.stat().st_size
    (made / "glm4moe-manifest.json").write_text(json.dumps(manifest))
    with open_sharded(made) as opened, pytest.raises(InputError, match=f"{name}: expected one format on all ranks"):
        merged_entries(opened)
