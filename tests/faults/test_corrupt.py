"""Damaged checkpoints are refused with exit 4 before anything is written, or converted to the right bytes."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from builders import read_tensors, small_checkpoint, small_config, write_checkpoint
from safetensors.torch import load_file, save_file

from converters.checkpoint.index import INDEX_FILE
from converters.errors import ConfigError, Glm4MoeError, InputError
from converters.source import open_source
from glm4moe_cli.main import run

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def refusal(folder: Path) -> str:
    """Return the message of the gate, and check that the command ends with 4 and writes nothing."""
    with pytest.raises(InputError) as caught:
        open_source(folder)
    assert run(["convert", str(folder), str(folder.parent / "dst"), "-q"]) == 4
    assert not (folder.parent / "dst").exists()
    return str(caught.value)


def header_of(path: Path) -> tuple[dict[str, dict[str, list[int]]], bytes]:
    """Return the parsed header and the data of a file."""
    raw = path.read_bytes()
    end = 8 + struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8:end]), raw[end:]


def write_header(path: Path, header: object, data: bytes) -> None:
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


@pytest.mark.parametrize("cut", [1, 4096, 0.5, 1.0])
def test_cut_off_shard(small: Path, cut: float) -> None:
    size = (small / SECOND).stat().st_size
    os.truncate(small / SECOND, size - int(size * cut if isinstance(cut, float) else cut))
    assert f"{small}/{SECOND}" in refusal(small)


def test_shards_with_swapped_contents(small: Path) -> None:
    (small / FIRST).rename(small / "x")
    (small / SECOND).rename(small / FIRST)
    (small / "x").rename(small / SECOND)
    assert "expected in model-0000" in refusal(small)


def test_byte_after_the_end(small: Path) -> None:
    with (small / FIRST).open("ab") as file:
        file.write(b"\0")
    assert "bytes that belong to no tensor" in refusal(small)


@pytest.mark.parametrize("shape", [[], [0, 48], [64, 48, 1], [1, 64, 48], [48 * 64], [1] * 64])
def test_shape_that_the_model_does_not_have(small: Path, shape: list[int]) -> None:
    """Rank 0, no elements, other ranks: legal in the format, not in this model."""
    header, data = header_of(small / FIRST)
    header["model.embed_tokens.weight"]["shape"] = shape
    write_header(small / FIRST, header, data)
    assert "model.embed_tokens.weight" in refusal(small)


@pytest.mark.parametrize("shape", [[1 << 63], [1 << 62, 1 << 62], [-1, 2], [1 << 64, 0], [2.0, 3], ["2"], None, {}])
def test_shape_beyond_64_bits_or_of_another_kind(small: Path, shape: object) -> None:
    header, data = header_of(small / FIRST)
    header["model.embed_tokens.weight"]["shape"] = shape
    write_header(small / FIRST, header, data)
    assert "model.embed_tokens.weight" in refusal(small)


def test_tensor_without_elements_reads_as_one(tmp_path: Path) -> None:
    """The format has them; nothing divides by their size."""
    folder = small_checkpoint(tmp_path / "src", num_shards=1)
    tensors = {**read_tensors(folder), "model.embed_tokens.weight": torch.empty(0, 48, dtype=torch.bfloat16)}
    write_checkpoint(folder, tensors, small_config(), 1)
    assert "shape [64, 48], from config.json, found [0, 48]" in refusal(folder)


@pytest.mark.parametrize("equal", [True, False])
def test_tensor_in_two_shards(small: Path, equal: bool) -> None:
    """The index names one of them; libraries take the last file by name."""
    name = "model.embed_tokens.weight"
    tensors = load_file(small / SECOND)
    tensors[name] = load_file(small / FIRST)[name] + (0 if equal else 1)
    save_file(tensors, small / SECOND, metadata={"format": "pt"})
    assert f"tensor {name}: expected one file, found both {FIRST} and {SECOND}" in refusal(small)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.gate.e_score_correction_bias",
        "model.layers.2.mlp.experts.3.down_proj.weight",
        "model.layers.3.eh_proj.weight",
        "model.layers.0.self_attn.k_proj.bias",
    ],
)
def test_tensor_gone_from_shard_and_index(small: Path, name: str) -> None:
    """Nothing contradicts anything; only the config knows that it is missing."""
    tensors = read_tensors(small)
    del tensors[name]
    folder = write_checkpoint(small.parent / "less", tensors, small_config())
    assert f"tensor {name}" in refusal(folder)


def test_expert_that_the_config_does_not_have(small: Path) -> None:
    tensors = read_tensors(small)
    tensors["model.layers.1.mlp.experts.4.up_proj.weight"] = tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    folder = write_checkpoint(small.parent / "more", tensors, small_config())
    assert "model.layers.1.mlp.experts.4.up_proj.weight" in refusal(folder)


def test_transposed_weight(small: Path) -> None:
    tensors = read_tensors(small)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].t().contiguous()
    folder = write_checkpoint(small.parent / "t", tensors, small_config())
    assert f"tensor {name}: expected shape [80, 48], from config.json, found [48, 80]" in refusal(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 2},
        {"num_hidden_layers": 4},
        {"n_routed_experts": 3},
        {"n_routed_experts": 5},
        {"first_k_dense_replace": 0},
        {"first_k_dense_replace": 2},
        {"use_qk_norm": False},
        {"attention_bias": False},
        {"vocab_size": 65},
        {"num_nextn_predict_layers": 2},
        {"hidden_size": "48"},
        {"num_hidden_layers": 10**9},
        {"n_routed_experts": 10**9},
        {"hidden_size": 1 << 64},
        {"num_hidden_layers": 3.5},
        {"head_dim": True},
        {"rope_theta": float("nan")},
        {"moe_intermediate_size": -24},
    ],
)
def test_config_that_does_not_fit(small: Path, change: dict[str, object]) -> None:
    (small / "config.json").write_text(json.dumps(small_config(**change)))
    refusal(small)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '{"a": 1, "a": 2}', "[" * 10**5, "\xff", '{"model_type": 1}'])
def test_config_that_is_none(small: Path, text: str) -> None:
    (small / "config.json").write_bytes(text.encode("latin-1"))
    refusal(small)


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"weight_map": {"a": {}}}', '{"weight_map": {"a": "x", "a": "y"}}', "[" * 10**5],
)
def test_index_that_is_none(small: Path, text: str) -> None:
    (small / INDEX_FILE).write_text(text)
    refusal(small)


def test_wrong_total_of_the_index_is_put_right(small: Path, tmp_path: Path) -> None:
    """Published checkpoints have them, and nobody reads the field; what we write is exact."""
    index = json.loads((small / INDEX_FILE).read_text())
    total = index["metadata"]["total_size"]
    index["metadata"]["total_size"] = 7
    (small / INDEX_FILE).write_text(json.dumps(index))
    assert run(["convert", str(small), str(tmp_path / "dst"), "-q", "--max-shard-size", "100kB"]) == 0
    assert json.loads((tmp_path / "dst" / INDEX_FILE).read_text())["metadata"]["total_size"] == total


@pytest.mark.parametrize("content", ["one file", "no file"])
def test_index_of_a_million_names(small: Path, content: str, budget: Callable[[float], None]) -> None:
    """It passes the size limit of JSON files, so looking it through may not take long."""
    file = FIRST if content == "one file" else "x.safetensors"
    weight_map = dict.fromkeys((f"{number:x}" for number in range(300_000)), file)
    (small / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    refusal(small)
    budget(60)


def test_key_twice_at_the_end_of_a_long_index(small: Path, budget: Callable[[float], None]) -> None:
    """Once, each key was counted in the list of all keys: hours."""
    pairs = ",".join(f'"{number:x}":1' for number in range(400_000))
    (small / INDEX_FILE).write_text(f'{{{pairs},"a":1}}')
    assert "'a' twice" in refusal(small)
    budget(60)


@pytest.mark.parametrize("filling", [b" ", b'"a":{},', b"[", b'{"a":', b'"a":1,'])
@pytest.mark.parametrize("size", [100_000_000, 32 << 20])
def test_largest_header_costs_neither_time_nor_memory(
    small: Path, filling: bytes, size: int, budget: Callable[[float], None]
) -> None:
    """The format's limit, which is refused unread, and ours."""
    body = b"{" + filling * ((size - 2) // len(filling))
    (small / FIRST).write_bytes(struct.pack("<Q", size) + body.ljust(size - 1) + b"}")
    del body
    assert FIRST in refusal(small)
    budget(30)


@pytest.fixture
def budget() -> Callable[[float], None]:
    """Reset the peak of this process's memory; then check that the peak grew by less than 512 MB, and the time since.

    Own time counts, not what else the machine does; and what it is to catch takes minutes or hours.
    """
    import time

    status = Path("/proc/self/status")
    Path("/proc/self/clear_refs").write_text("5")
    before, start = int(status.read_text().split("VmRSS:")[1].split()[0]), time.process_time()

    def check(seconds: float) -> None:
        assert time.process_time() - start < seconds
        peak = int(status.read_text().split("VmHWM:")[1].split()[0])
        assert (peak - before) * 1024 < 512 << 20, f"{(peak - before) >> 10} MB"

    return check


def test_flipped_bits_in_config_never_crash(small: Path) -> None:
    text = (small / "config.json").read_bytes()
    refused = 0
    for position in range(0, len(text), 3):
        data = bytearray(text)
        data[position] ^= 1 << (position % 8)
        (small / "config.json").write_bytes(data)
        try:
            open_source(small).reader.close()
        except ConfigError:
            refused += 1
        except Glm4MoeError:
            pass
    assert refused > 100


def test_gate_reads_no_data(small: Path) -> None:
    """Headers alone decide, so a refusal costs seconds even for a checkpoint of 700 GB."""
    for file in (FIRST, SECOND):
        header, data = header_of(small / file)
        write_header(small / file, header, b"\xff" * len(data))
    open_source(small).reader.close()
