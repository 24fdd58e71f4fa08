"""safetensors headers: what the library writes is read alike, what the format forbids is refused."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save_file

from converters.checkpoint.header import build_header, parse_header, read_header
from converters.errors import InputError

GOOD = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}


def file_with(path: Path, header: object, data: bytes = bytes(32), length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def test_entries_of_a_library_file_give_its_bytes(tmp_path: Path) -> None:
    tensors = {
        "x": torch.arange(6.0).view(2, 3),
        "y": torch.arange(5).to(torch.bfloat16),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(3.0),
        "codes": torch.arange(7).to(torch.float8_e4m3fn),
    }
    save_file(tensors, tmp_path / "m.safetensors", metadata={"format": "pt", "other": "text"})
    raw = (tmp_path / "m.safetensors").read_bytes()
    entries = {entry.name: entry for entry in read_header(tmp_path / "m.safetensors")}
    assert entries.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert entries[name].shape == tuple(tensor.shape)
        assert raw[entries[name].begin : entries[name].end] == bytes(
            tensor.contiguous().view(-1).view(torch.uint8).tolist()
        )


def test_built_header_is_read_by_the_library_and_by_us(tmp_path: Path) -> None:
    prefix, entries = build_header([("f", "F32", (2,)), ("g", "BF16", (3,)), ("h", "F8_E4M3", (1, 5))])
    assert len(prefix) % 8 == 0
    data = prefix + bytes(8 + 6 + 5)
    assert {n: (t.dtype, tuple(t.shape)) for n, t in load(data).items()} == {
        "f": (torch.float32, (2,)),
        "g": (torch.bfloat16, (3,)),
        "h": (torch.float8_e4m3fn, (1, 5)),
    }
    (tmp_path / "x.safetensors").write_bytes(data)
    assert read_header(tmp_path / "x.safetensors") == entries


def changed(name: str, **fields: object) -> dict[str, object]:
    return {**GOOD, name: {**GOOD[name], **fields}}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (changed("b", data_offsets=[20, 28]), "b to begin at byte .* overlaps its neighbour"),
        (changed("a", data_offsets=[4, 28]), "a to begin at byte .* leaves a hole"),
        (changed("b", shape=[3], data_offsets=[24, 30]), "bytes that belong to no tensor"),
        (changed("b", shape=[8], data_offsets=[24, 40]), "The file is cut off"),
        (changed("a", data_offsets=[0, 20]), "24 bytes for a"),
        (changed("a", data_offsets=[24, 0]), "24 bytes for a"),
        (changed("a", data_offsets=[-24, 0]), "two byte offsets for a"),
        (changed("a", data_offsets=[0]), "two byte offsets for a"),
        (changed("a", data_offsets=[0.0, 24]), "two byte offsets for a"),
        (changed("a", shape=[2, -3]), "sizes as the shape of a"),
        (changed("a", shape=[True, 6]), "sizes as the shape of a"),
        (changed("a", shape=[1 << 62, 4, 0]), "0 bytes for a"),
        (changed("a", shape=[1 << 62, 1 << 62]), "bytes for a"),
        (changed("a", shape=[1] * 9), "at most 8 sizes"),
        (changed("a", dtype="F7"), "a known dtype for a"),
        (changed("a", dtype=["F32"]), "a known dtype for a"),
        (changed("a", extra=1), "dtype, shape and data_offsets for a"),
        ({**GOOD, "a\x1b[31m": GOOD["a"]}, "printable ASCII"),
        ({**GOOD, "n" * 513: GOOD["a"]}, "1 to 512"),
        ({**GOOD, "__metadata__": {"k": 1}}, "__metadata__ to map strings"),
        (b' {"a": 1}', "starts with '{'"),
        (b'{"a": ', "a JSON header"),
        (b'{"a": {"dtype": "F32"}, "a": {"dtype": "F32"}}', "key 'a' stands twice"),
        (b'{"a": ' + b"[" * 50_000, "a JSON header"),
        (b'{"\xff": 1}', "a JSON header"),
    ],
)
def test_forbidden_header_is_refused(tmp_path: Path, header: object, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_header(file_with(tmp_path / "m.safetensors", header))
    assert str(tmp_path / "m.safetensors") in str(caught.value)


@pytest.mark.parametrize("length", [1 << 63, (1 << 64) - 1, 100_000_001, 1000])
def test_header_longer_than_the_file_or_the_limit_is_not_read(tmp_path: Path, length: int) -> None:
    with pytest.raises(InputError, match="a header of at most"):
        read_header(file_with(tmp_path / "m.safetensors", GOOD, length=length))


@pytest.mark.parametrize("size", [0, 7])
def test_file_shorter_than_a_header_is_refused(tmp_path: Path, size: int) -> None:
    (tmp_path / "m.safetensors").write_bytes(bytes(size))
    with pytest.raises(InputError, match="at least 8 bytes"):
        read_header(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    "content",
    [b"version https://git-lfs.github.com/spec/v1\n", b"<!DOCTYPE html><html></html>", b"PK\x03\x04" + bytes(60)],
)
def test_other_kinds_of_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(InputError):
        read_header(tmp_path / "m.safetensors")


def test_too_many_tensors_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    parse_header(Path("m"), json.dumps(GOOD).encode(), 32)
    monkeypatch.setattr("converters.checkpoint.header.MAX_TENSORS", 0)
    with pytest.raises(InputError, match="at most 0 tensors, found 3 objects"):
        parse_header(Path("m"), json.dumps(GOOD).encode(), 32)
