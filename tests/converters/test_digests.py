"""What a tensor was made from, as a digest: which algorithm, over which bytes, and records of the form before."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from builders import read_tensors, small_checkpoint

from converters.checkpoint.content_digest import Algorithm, ContentDigest
from converters.checkpoint.journal import ShardRecord, TensorRecord, append_journal, read_journal
from converters.checkpoint.manifest import MANIFEST_FILE, read_manifest, tensor_records
from converters.errors import InputError
from converters.shard.mapping import ParallelMapping
from converters.shard.naming import ShardLayout
from glm4moe_cli.main import run
from tests.converters.shard.models import shard

FP8 = ("--scheme", "fp8", "-q")
DIGEST = ContentDigest(Algorithm.XXH3, "12")


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def xxh3(tensor: torch.Tensor) -> str:
    return f"xxh3:{xxhash.xxh3_128_hexdigest(raw(tensor))}"


def tensors_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST_FILE).read_text())["tensors"]


def test_copies_share_the_digest_of_their_output_and_others_have_that_of_their_source(
    small: Path, tmp_path: Path
) -> None:
    assert run(["quantize", str(small), str(tmp_path / "dst"), *FP8]) == 0
    source, kinds = read_tensors(small), set[str]()
    for name, facts in tensors_of(tmp_path / "dst").items():
        made_from = source[facts["sources"][0]["name"]]
        kind = facts["source_digest"].partition(":")[0]
        kinds.add(kind)
        if facts["transform"]["name"] == "copy":
            sha256 = hashlib.sha256(raw(made_from)).hexdigest()
            assert (facts["sha256"], facts["source_digest"]) == (sha256, f"sha256:{sha256}"), name
        else:
            assert facts["source_digest"] == xxh3(made_from), name
    assert kinds == {"sha256", "xxh3"}


def test_slices_of_columns_have_the_digest_of_all_columns_and_others_none_of_their_own(tmp_path: Path) -> None:
    src = small_checkpoint(tmp_path / "src", num_key_value_heads=2, num_attention_heads=6)
    folder, source = shard(src, tmp_path / "cut", ParallelMapping(tp=2), ShardLayout.RANK), read_tensors(src)
    num_cut = 0
    for name, facts in tensors_of(folder).items():
        for part in facts["slices"]:
            num_cut += "columns" in part
            assert part.get("source_digest") == (xxh3(source[name]) if "columns" in part else None), name
            assert "sha256" not in part, name
    assert num_cut
    manifest = read_manifest(folder)
    assert manifest is not None
    norm = tensor_records(manifest)["rank 1"]["model.norm.weight"]
    assert norm.source == norm.content
    assert norm.content.text == xxh3(source["model.norm.weight"])


def test_manifest_of_the_form_before_is_refused(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dst = tmp_path / "dst"
    assert run(["quantize", str(small), str(dst), *FP8]) == 0
    path = dst / MANIFEST_FILE
    old = path.read_text().replace("glm4moe.manifest/3", "glm4moe.manifest/1").replace("source_digest", "source_sha256")
    path.write_text(old)
    assert run(["quantize", str(small), str(dst), *FP8, "--update"]) == 4
    told = " ".join(capsys.readouterr().err.split())
    assert "expected a manifest of the form glm4moe.manifest/3, found glm4moe.manifest/1. Remove it" in told
    with pytest.raises(InputError, match="manifest/1"):
        read_manifest(dst)


def test_manifest_of_the_form_with_sha256_alone_is_read(small: Path, tmp_path: Path) -> None:
    dst = tmp_path / "dst"
    assert run(["convert", str(small), str(dst), "-q"]) == 0
    manifest = json.loads((dst / MANIFEST_FILE).read_text())
    manifest["schema"] = "glm4moe.manifest/2"
    del manifest["job"]["options"]["digest"]
    (dst / MANIFEST_FILE).write_text(json.dumps(manifest))
    assert run(["verify", str(dst), "--level", "bytes", "-q"]) == 0
    kept = {path.name: path.stat().st_ino for path in dst.glob("*.safetensors")}
    assert run(["convert", str(small), str(dst), "--update", "-q"]) == 0
    assert kept == {path.name: path.stat().st_ino for path in dst.glob("*.safetensors")}, "linked, not made again"
    assert json.loads((dst / MANIFEST_FILE).read_text())["schema"] == "glm4moe.manifest/3"


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.update(schema=["glm4moe.manifest/3"]),
        lambda manifest: manifest["job"].update(options=[]),
        lambda manifest: manifest["tensors"]["lm_head.weight"].update(file=[]),
        lambda manifest: manifest["tensors"]["lm_head.weight"].update(sha256=7),
        lambda manifest: manifest["tensors"]["lm_head.weight"].update(sha256="no hex"),
        lambda manifest: manifest["tensors"]["lm_head.weight"].update(xxh3=7),
        lambda manifest: manifest["tensors"]["lm_head.weight"].update(source_digest="md5:00"),
    ],
)
def test_a_manifest_of_odd_values_is_refused_as_damaged(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[dict[str, Any]], None]
) -> None:
    dst = tmp_path / "dst"
    assert run(["convert", str(small), str(dst), "-q"]) == 0
    manifest = json.loads((dst / MANIFEST_FILE).read_text())
    change(manifest)
    (dst / MANIFEST_FILE).write_text(json.dumps(manifest))
    capsys.readouterr()
    for command in (
        ["verify", str(dst), "--level", "bytes"],
        ["convert", str(small), str(dst), "--update", "--mtp", "drop"],
    ):
        assert run([*command, "-q"]) == 4
        assert capsys.readouterr().err.startswith("Error: ")


def test_shards_in_a_journal_of_the_form_before_are_made_again(tmp_path: Path) -> None:
    path, record = tmp_path / "journal.jsonl", ShardRecord("a.safetensors", 9, {"x": TensorRecord(DIGEST, DIGEST)})
    append_journal(tmp_path, record, path.name)
    line = path.read_bytes().split(b"\n")[1].partition(b" ")[2]
    text = line.replace(b"source_digest", b"source_sha256")
    digest = hashlib.sha256(text).hexdigest()[:16].encode()
    path.write_bytes(b"\n" + digest + b" " + text + b"\n")
    assert read_journal(tmp_path) == {}
    append_journal(tmp_path, record, path.name)
    assert read_journal(tmp_path) == {record.file: record}
