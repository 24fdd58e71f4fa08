"""Shards that were damaged after they were written: named while they are read, and nothing is finished."""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from builders import assert_same_tensors, read_tensors, small_checkpoint
from quantized import DIALECTS, quantized_checkpoint

from converters.checkpoint.header import read_header
from converters.checkpoint.manifest import MANIFEST_FILE
from converters.checkpoint.reader import CheckpointReader
from converters.errors import InputError
from converters.shard.mapping import ParallelMapping
from converters.shard.naming import ShardLayout
from converters.shard.source import open_sharded
from tests.converters.shard.models import merge, shard

TP4 = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 4}
MAPPING = ParallelMapping(tp=4, ep=2)


def cut(work: Path) -> Path:
    return shard(small_checkpoint(work / "src", **TP4), work / "cut", MAPPING, ShardLayout.RANK)


def flip(folder: Path, rank: int, name: str, at: int = -1) -> Path:
    """Flip the lowest bit of a byte of a tensor and return its file."""
    for path in sorted(folder.glob(f"rank-{rank:05d}-*")):
        for entry in read_header(path):
            if entry.name == name:
                data = bytearray(path.read_bytes())
                data[entry.begin + at % entry.nbytes] ^= 1
                path.write_bytes(data)
                return path
    raise AssertionError(name)


@pytest.mark.parametrize("at", [0, -1])
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.o_proj.weight",  # columns: the ranks' stand side by side
        "model.layers.1.mlp.shared_experts.up_proj.weight",  # rows: one below the other
        "model.layers.1.mlp.experts.2.down_proj.weight",
        "lm_head.weight",
    ],
)
def test_a_flipped_byte_is_named(work: Path, name: str, at: int) -> None:
    """It was merged without a word: the merged checkpoint had the flipped byte, and a manifest that agreed with it."""
    folder = cut(work)
    path = flip(folder, 1, name, at)
    digest = hashlib.sha256(next(tensor for own, tensor in raw_tensors(path) if own == name)).hexdigest()
    with pytest.raises(InputError) as refused:
        merge(folder, work / "merged")
    assert str(refused.value).startswith(f"{path}: tensor {name} of rank 1: expected sha256 ")
    assert f", as {MANIFEST_FILE} says, found {digest}." in str(refused.value)
    assert not (work / "merged" / "config.json").exists()
    with pytest.raises(InputError, match=f"tensor {name} of rank 1: expected sha256"):
        shard(folder, work / "anew", ParallelMapping(tp=2), ShardLayout.RANK)
    assert not (work / "anew" / MANIFEST_FILE).exists()


def raw_tensors(path: Path) -> list[tuple[str, bytes]]:
    data = path.read_bytes()
    return [(entry.name, data[entry.begin : entry.begin + entry.nbytes]) for entry in read_header(path)]


def test_a_scale_is_proved_like_its_codes(work: Path) -> None:
    src, _ = quantized_checkpoint(work / "src", DIALECTS["ct-fp8-channel"], moe_intermediate_size=32)
    folder = shard(src, work / "cut", ParallelMapping(tp=2), ShardLayout.RANK)
    flip(folder, 1, "model.layers.1.mlp.experts.0.up_proj.weight_scale")
    with pytest.raises(InputError, match=r"tensor model.layers.1.mlp.experts.0.up_proj.weight_scale of rank 1: exp"):
        merge(folder, work / "merged")


def test_the_same_command_finishes_once_the_file_is_mended(work: Path) -> None:
    folder = cut(work)
    path = flip(folder, 3, "lm_head.weight")
    with pytest.raises(InputError, match="of rank 3"):
        merge(folder, work / "merged")
    assert flip(folder, 3, "lm_head.weight") == path
    assert_same_tensors(read_tensors(merge(folder, work / "merged")), read_tensors(work / "src"))


def test_nothing_is_read_for_the_proof_alone(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cut(work)
    read: Counter[str] = Counter()
    original = CheckpointReader.read_into

    def read_into(self: CheckpointReader, name: str, offset: int, buffer: memoryview) -> None:
        read[name] += len(buffer)
        original(self, name, offset, buffer)

    def reads_of_a_merge(dst: Path) -> Counter[str]:
        read.clear()
        merge(folder, dst)
        return Counter(read)

    monkeypatch.setattr(CheckpointReader, "read_into", read_into)
    proved = reads_of_a_merge(work / "proved")
    monkeypatch.setattr("converters.shard.proved.ProvedReader.read_into", read_into)
    assert reads_of_a_merge(work / "unproved") == proved


def test_out_of_order_reads_are_proved_too(work: Path) -> None:
    """Workers that take up a tensor in its middle, again and again from the top, and in pieces of any size."""
    folder, name = cut(work), "1/lm_head.weight"
    with open_sharded(folder) as source:
        size = source.reader.entry(name).nbytes
        for offset, count in ((size // 2, 7), (0, 5), (size // 2 + 3, 20), (0, size - 1), (size - 9, 9), (0, size)):
            source.reader.read_into(name, offset, memoryview(bytearray(count)))
    flip(folder, 1, "lm_head.weight", at=3)
    with open_sharded(folder) as source:
        source.reader.read_into(name, 16, memoryview(bytearray(16)))
        for _ in range(2):
            with pytest.raises(InputError, match="tensor lm_head.weight of rank 1"):
                source.reader.read_into(name, size - 1, memoryview(bytearray(1)))


@pytest.mark.parametrize("change", [{"sha256": "no digest"}, {"sha256": 7}, {}])
def test_a_manifest_without_digests_is_refused(work: Path, change: dict[str, Any]) -> None:
    folder = cut(work)
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    part = manifest["tensors"]["lm_head.weight"]["slices"][0]
    del part["sha256"]
    part |= change
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=MANIFEST_FILE):
        open_sharded(folder)
