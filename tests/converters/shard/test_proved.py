"""Shards that were damaged after they were written: named while they are read, and nothing is finished."""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import xxhash
from builders import assert_same_tensors, read_tensors, small_checkpoint
from quantized import DIALECTS, quantized_checkpoint

from converters.checkpoint.content_digest import Algorithm, new_hasher
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
    small_checkpoint(work / "src", **TP4)
    return cut_again(work)


def cut_again(work: Path) -> Path:
    return shard(work / "src", work / "cut", MAPPING, ShardLayout.RANK)


def flip(folder: Path, rank: int, name: str, at: int = -1) -> Path:
    """Flip the lowest bit of a byte of a tensor and return its file."""
    path = rank_file(folder, rank, name)
    entry = next(entry for entry in read_header(path) if entry.name == name)
    data = bytearray(path.read_bytes())
    data[entry.begin + at % entry.nbytes] ^= 1
    path.write_bytes(data)
    return path


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
    before = dict(raw_tensors(rank_file(folder, 1, name)))[name]
    for algorithm, hasher in (("xxh3", xxhash.xxh3_128), ("sha256", hashlib.sha256)):
        if algorithm == "sha256":
            know_by_sha256(folder)
        path = flip(folder, 1, name, at)
        expected, found = (hasher(data).hexdigest() for data in (before, dict(raw_tensors(path))[name]))
        with pytest.raises(InputError) as refused:
            merge(folder, work / algorithm)
        told = f"expected {algorithm} {expected}, as {MANIFEST_FILE} says, found {found}."
        assert str(refused.value).startswith(f"{path}: tensor {name} of rank 1: {told}")
        assert not (work / algorithm / "config.json").exists()
        with pytest.raises(InputError, match=f"tensor {name} of rank 1: expected {algorithm}"):
            shard(folder, work / f"{algorithm}-anew", ParallelMapping(tp=2), ShardLayout.RANK)
        assert not (work / f"{algorithm}-anew" / MANIFEST_FILE).exists()
        flip(folder, 1, name, at)


def know_by_sha256(folder: Path) -> None:
    """Put sha256 instead of xxh3 into a manifest, as one of the form before has it."""
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    written = {
        (rank, name): data
        for rank in range(MAPPING.tp)
        for path in folder.glob(f"rank-{rank:05d}-*")
        for name, data in raw_tensors(path)
    }
    for name, facts in manifest["tensors"].items():
        for part in facts["slices"]:
            data = written[part["ranks"][0], name]
            assert part.pop("xxh3") == xxhash.xxh3_128_hexdigest(data)
            part["sha256"] = hashlib.sha256(data).hexdigest()
    manifest["schema"] = "glm4moe.manifest/2"
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))


def rank_file(folder: Path, rank: int, name: str) -> Path:
    paths = sorted(folder.glob(f"rank-{rank:05d}-*"))
    return next(path for path in paths if any(entry.name == name for entry in read_header(path)))


def raw_tensors(path: Path) -> list[tuple[str, bytes]]:
    data = path.read_bytes()
    return [(entry.name, data[entry.begin : entry.begin + entry.nbytes]) for entry in read_header(path)]


def test_a_scale_is_proved_like_its_codes(work: Path) -> None:
    src, _ = quantized_checkpoint(work / "src", DIALECTS["ct-fp8-channel"], moe_intermediate_size=32)
    folder = shard(src, work / "cut", ParallelMapping(tp=2), ShardLayout.RANK)
    flip(folder, 1, "model.layers.1.mlp.experts.0.up_proj.weight_scale")
    with pytest.raises(InputError, match=r"tensor model.layers.1.mlp.experts.0.up_proj.weight_scale of rank 1: exp"):
        merge(folder, work / "merged")


@pytest.mark.parametrize(
    "name",
    [
        "model.norm.weight",  # on all ranks
        "model.layers.1.mlp.experts.0.gate_proj.weight",  # whole on its rank
    ],
)
def test_a_flipped_byte_in_a_plain_copy_is_named(work: Path, name: str) -> None:
    folder = shard(small_checkpoint(work / "src", **TP4), work / "cut", ParallelMapping(tp=2, ep=2), ShardLayout.RANK)
    path = flip(folder, 0, name)
    with pytest.raises(InputError) as refused:
        merge(folder, work / "merged")
    assert str(refused.value).startswith(f"{path}: tensor {name} of rank 0: expected xxh3 ")
    assert not list((work / "merged").glob("*.safetensors"))


class Counting:
    """A hasher that counts what it takes."""

    def __init__(self, counts: Counter[str], algorithm: Algorithm) -> None:
        self._counts, self._algorithm, self._hasher = counts, algorithm, new_hasher(algorithm)
        self.hexdigest = self._hasher.hexdigest

    def update(self, data: memoryview) -> None:
        self._counts[self._algorithm] += len(data)
        self._hasher.update(data)


def test_every_byte_is_hashed_once_as_it_is_read_and_once_as_it_is_written(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what is fast: SHA-256 took longer than all else that cuts and merges do."""
    counts = Counter[str]()
    for module in ("converters.digests", "converters.shard.proved"):
        monkeypatch.setattr(f"{module}.new_hasher", lambda algorithm: Counting(counts, algorithm))
    folder = cut(work)
    assert counts.pop("xxh3")
    assert not counts
    size = sum(tensor.nbytes for tensor in read_tensors(work / "src").values())
    merge(folder, work / "merged")
    # pieces are proved, joined, and known by what they became: of what is joined, the source has a digest too
    assert 2 * size <= counts.pop("xxh3") <= 3 * size
    assert not counts
    know_by_sha256(folder)
    merge(folder, work / "merged-again")
    assert counts["sha256"] == size


def test_what_reads_back_a_resumed_cut_has_all_digests(work: Path) -> None:
    """A damaged shard is made again, beside those that the manifest's records stand for."""
    folder = cut(work)
    written = (folder / MANIFEST_FILE).read_bytes()
    assert all("xxh3" in part for facts in json.loads(written)["tensors"].values() for part in facts["slices"])
    rank_file(folder, 2, "lm_head.weight").unlink()
    assert (cut_again(work) / MANIFEST_FILE).read_bytes() == written


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


@pytest.mark.parametrize(
    "change", [{"sha256": "no digest"}, {"sha256": 7}, {}, {"sha256": "00", "xxh3": 7}, {"sha256": "00", "xxh3": "?"}]
)
def test_a_manifest_without_digests_is_refused(work: Path, change: dict[str, Any]) -> None:
    folder = cut(work)
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    part = manifest["tensors"]["lm_head.weight"]["slices"][0]
    del part["xxh3"]
    part |= change
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=MANIFEST_FILE):
        open_sharded(folder)
