"""Writing shards: one read of the source for all ranks, the same bytes always, resume, refusal of damage."""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import assert_same_tensors, read_tensors, small_checkpoint
from quantized import DIALECTS, quantized_checkpoint
from safetensors.torch import save_file

from converters.checkpoint.reader import CheckpointReader
from converters.convert import ConvertOptions, MtpChoice
from converters.errors import InputError, UsageError
from converters.job import JobOptions, run
from converters.layout import Layout
from converters.parts import Part
from converters.pipeline import RunOptions
from converters.shard.mapping import ParallelMapping
from converters.shard.naming import ShardLayout
from converters.shard.plan import ShardOptions, plan_shard
from converters.shard.source import is_sharded, open_sharded
from converters.source import open_source
from tests.converters.shard.models import merge, rank_tensors, shard

TP4 = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 4}
MAPPING = ParallelMapping(tp=4, ep=2)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


def cut(src: Path, dst: Path, options: RunOptions, how: JobOptions | None = None, mapping: Any = MAPPING) -> Any:
    with open_source(src) as source:
        conversion = plan_shard(source, ShardOptions(mapping=mapping, convert=ConvertOptions(max_shard_bytes=9000)))
        return run(conversion, dst, options, lambda _: None, how)


@pytest.mark.parametrize("mapping", [{"tp": 4}, {"tp": 4, "ep": 4}, {"tp": 4, "ep": 2, "pp": 2}])
def test_every_byte_of_the_source_is_read_once(
    work: Path, monkeypatch: pytest.MonkeyPatch, mapping: dict[str, int]
) -> None:
    """Four ranks take columns of the same rows, and norms whole: still each tensor is read as often as it is long."""
    src = small_checkpoint(work / "src", **TP4)
    read: Counter[str] = Counter()
    original = CheckpointReader.read_into

    def read_into(self: CheckpointReader, name: str, offset: int, buffer: memoryview) -> None:
        read[name] += len(buffer)
        original(self, name, offset, buffer)

    monkeypatch.setattr(CheckpointReader, "read_into", read_into)
    cut(src, work / "dst", RunOptions(2, 1 << 20), mapping=ParallelMapping(**mapping))
    with open_source(src) as source:
        for name in source.reader.names:
            entry = source.reader.entry(name)
            # rows of repeated key-value heads, and of the embedding's copy for the MTP layer, are shared alike
            assert read[name] == entry.nbytes, name


def test_bytes_depend_on_neither_workers_nor_memory(work: Path) -> None:
    src = small_checkpoint(work / "src", **TP4)
    cut(src, work / "one", RunOptions(1))
    cut(src, work / "three", RunOptions(3, 20_000))
    assert digests(work / "one") == digests(work / "three")


def test_parts_make_the_same_bytes(work: Path) -> None:
    src = small_checkpoint(work / "src", **TP4)
    cut(src, work / "one", RunOptions(1))
    outcomes = [cut(src, work / "parts", RunOptions(1), JobOptions(part=Part(index, 3))) for index in (2, 3, 1)]
    assert [outcome.is_part for outcome in outcomes] == [True, True, False]
    assert digests(work / "one") == digests(work / "parts")


def test_a_lost_file_of_a_finished_result_is_made_again(work: Path) -> None:
    src = small_checkpoint(work / "src", **TP4)
    cut(src, work / "dst", RunOptions(1))
    before = digests(work / "dst")
    lost = sorted(work.glob("dst/rank-00002-*.safetensors"))[0]
    lost.unlink()
    outcome = cut(src, work / "dst", RunOptions(1))
    assert outcome.written == (lost.name,)
    assert digests(work / "dst") == before


def test_config_and_files_around_are_those_of_the_source(work: Path) -> None:
    src = small_checkpoint(work / "src", **TP4)
    cut(src, work / "dst", RunOptions(1))
    for name in ("config.json", "generation_config.json", "LICENSE"):
        assert (work / "dst" / name).read_bytes() == (src / name).read_bytes()
    assert (merge(work / "dst", work / "merged") / "config.json").read_bytes() == (src / "config.json").read_bytes()


def test_tensorrt_llm_has_a_file_a_rank_and_its_mapping_in_the_config(work: Path) -> None:
    src = small_checkpoint(work / "src", **TP4)
    dst = shard(src, work / "dst", ParallelMapping(tp=4, ep=2, pp=2), ShardLayout.TENSORRT_LLM)
    assert sorted(path.name for path in dst.glob("*.safetensors")) == [f"rank{rank}.safetensors" for rank in range(8)]
    config = json.loads((dst / "config.json").read_text())
    sizes = {"world_size": 8, "tp_size": 4, "pp_size": 2, "moe_tp_size": 2, "moe_ep_size": 2}
    assert config.pop("mapping") == sizes
    assert config == json.loads((src / "config.json").read_text())


def test_a_sharded_folder_is_no_whole_checkpoint(work: Path) -> None:
    src = small_checkpoint(work / "src", **TP4)
    dst = shard(src, work / "dst", MAPPING, ShardLayout.RANK)
    assert is_sharded(dst)
    assert not is_sharded(src)
    with pytest.raises(InputError, match="cut for ranks: --merge of shard joins it"):
        open_source(dst)
    with pytest.raises(UsageError, match="expected a sharded checkpoint"):
        open_sharded(src)


def damaged(work: Path) -> Path:
    src = small_checkpoint(work / "src", **TP4)
    return shard(src, work / "dst", MAPPING, ShardLayout.RANK)


def rewrite(folder: Path, change: Any) -> None:
    path = folder / "glm4moe-manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def test_a_missing_file_is_refused(work: Path) -> None:
    dst = damaged(work)
    sorted(dst.glob("rank*"))[1].unlink()
    with pytest.raises(InputError, match="rank-00001-of-00004-part-00001-of-00001.safetensors: expected a file"):
        open_sharded(dst)


def test_a_tensor_that_the_mapping_does_not_have_is_refused(work: Path) -> None:
    dst = damaged(work)
    tensors = rank_tensors(dst)
    path = sorted(dst.glob("rank*"))[1]
    own = {name.removeprefix("1/"): value for name, value in tensors.items() if name.startswith("1/")}
    save_file({**own, "model.layers.1.mlp.experts.0.up_proj.weight": own["model.norm.weight"].clone()}, path)
    rewrite(dst, lambda manifest: manifest["shards"][path.name].update(bytes=path.stat().st_size))
    with pytest.raises(InputError, match=r"tensor 1/model.layers.1.mlp.experts.0.up_proj.weight: expected none that"):
        open_sharded(dst)
    own.pop("model.layers.1.mlp.experts.2.up_proj.weight")
    save_file(own, path)
    rewrite(dst, lambda manifest: manifest["shards"][path.name].update(bytes=path.stat().st_size))
    with pytest.raises(InputError, match=r"tensor 1/model.layers.1.mlp.experts.2.up_proj.weight: expected in the file"):
        open_sharded(dst)


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest["distribution"]["mapping"].update(tp=2),
        lambda manifest: manifest["distribution"]["mapping"].update(expert_placement="round-robin"),
        lambda manifest: manifest["distribution"]["mapping"].update(tp=1 << 30),
        lambda manifest: manifest["distribution"].update(tensor_layout="fused"),
        lambda manifest: manifest["distribution"].update(schema="x"),
        lambda manifest: manifest["distribution"].pop("mtp"),
        lambda manifest: next(iter(manifest["shards"].values())).update(rank=3),
        lambda manifest: manifest["distribution"]["mapping"].update(layers_of_stages=[]),
        lambda manifest: manifest["distribution"]["mapping"].update(layers_of_stages=[2]),
        lambda manifest: manifest["tensors"]["lm_head.weight"]["slices"][0].update(ranks=[[0]]),
        lambda manifest: manifest["tensors"]["lm_head.weight"].pop("dtype"),
        lambda manifest: manifest.update(schema=["glm4moe.manifest/3"]),
    ],
)
def test_a_manifest_that_does_not_fit_the_files_is_refused(work: Path, change: Any) -> None:
    dst = damaged(work)
    rewrite(dst, change)
    with pytest.raises(InputError):
        open_sharded(dst)


def test_other_files_than_those_that_were_written_are_told(work: Path) -> None:
    """Tensors are proved by their digests; a config that was edited, or a tokenizer that was damaged, is carried on."""
    dst = damaged(work)
    with open_sharded(dst) as source:
        assert source.notes == ()
    (dst / "LICENSE").write_text("another licence\n")
    (dst / "generation_config.json").unlink()
    (dst / "rank-00004-of-00005-part-00001-of-00001.safetensors").write_bytes(b"")
    taken = "is not the file that glm4moe-manifest.json has; what is there is taken."
    with open_sharded(dst) as source:
        assert source.notes == (
            f"LICENSE {taken}",
            "generation_config.json, which glm4moe-manifest.json has, is missing.",
            "rank-00004-of-00005-part-00001-of-00001.safetensors is not in glm4moe-manifest.json; it is left out.",
        )


def test_replicas_that_differ_in_their_scales_are_refused(work: Path) -> None:
    """A row-parallel weight has its row scales on every rank; merged there is room for one."""
    src, _ = quantized_checkpoint(work / "src", DIALECTS["ct-fp8-channel"], moe_intermediate_size=32)
    dst = shard(src, work / "dst", ParallelMapping(tp=2), ShardLayout.RANK)
    path = sorted(dst.glob("rank-00001*"))[0]
    own = {n.removeprefix("1/"): v for n, v in rank_tensors(dst).items() if n.startswith("1/")}
    name = "model.layers.1.mlp.experts.0.down_proj.weight_scale"
    own[name] *= 2
    save_file(own, path)
    digest = hashlib.sha256(own[name].view(torch.uint8).numpy().tobytes()).hexdigest()

    def give_rank_1_its_own(manifest: Any) -> None:
        """The damage is no accident: the manifest agrees with it."""
        part = manifest["tensors"][name]["slices"][0]
        manifest["tensors"][name]["slices"] = [{**part, "ranks": [0]}, {"ranks": [1], "sha256": digest}]
        manifest["shards"][path.name].update(bytes=path.stat().st_size)

    rewrite(dst, give_rank_1_its_own)
    with pytest.raises(UsageError, match=r"1/model.layers.1.mlp.experts.0.down_proj.weight_scale: expected the values"):
        merge(dst, work / "merged")


def test_convert_cuts_in_the_same_pass(work: Path) -> None:
    """Repacked and cut at once equals cut after being repacked; --mtp drop leaves the layer out of the ranks."""
    src = small_checkpoint(work / "src", **TP4)
    dst = shard(src, work / "dst", MAPPING, ShardLayout.RANK, layout=Layout.FUSED, dtype="float32", mtp=MtpChoice.DROP)
    whole = read_tensors(src)
    merged = read_tensors(merge(dst, work / "merged"))
    name = "model.layers.1.self_attn.o_proj.weight"
    assert_same_tensors({name: merged[name]}, {name: whole[name].float()})
    assert not any(name.startswith("model.layers.3.") for name in merged)
    assert json.loads((dst / "config.json").read_text())["num_nextn_predict_layers"] == 0
