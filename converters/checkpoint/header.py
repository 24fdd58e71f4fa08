"""The safetensors header: parsed strictly, before any library sees the file, and written deterministically.

A file is `u64 little-endian length | JSON | data`. The JSON maps tensor names to dtype, shape and the half-open byte
range [begin, end) of their data. Ranges must cover the data without hole or overlap. What the format allows but no
checkpoint of this family needs (zero dims, scalars of rank 0 aside) is left to the schema check.
"""

import json
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from converters.checkpoint.disk_read import open_file, read_exactly
from converters.checkpoint.dtypes import is_known, itemsize
from converters.errors import InputError

# the format allows 100 MB, which takes a minute and gigabytes to parse; a 355B checkpoint in one file needs 13 to 26 MB
MAX_HEADER_BYTES = 32 << 20
MAX_TENSORS = 1 << 20
MAX_NAME_LENGTH = 512
MAX_RANK = 8
METADATA_KEY = "__metadata__"
METADATA = {"format": "pt"}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies: bytes [begin, end) of the file, counted from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return self.end - self.begin

    @property
    def rows(self) -> int:
        """Rows of the tensor seen as a matrix; see `num_rows`."""
        return num_rows(self.shape)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.nbytes // max(1, self.rows)


def num_rows(shape: tuple[int, ...]) -> int:
    """Return the rows of a tensor seen as a matrix: all dims but the last; a vector is a column, a scalar one row.

    ModelOpt stores the scales of blocks as [rows, 1, columns, 1].
    """
    if len(shape) > 3 and shape[-1] == shape[-3] == 1:
        return prod(shape[:-3])
    return prod(shape[:-1]) if len(shape) > 1 else prod(shape)


def read_header(path: Path) -> tuple[TensorEntry, ...]:
    """Return the entries of a safetensors file, in the order of their data.

    Raises:
        InputError: anything that the format forbids, with the first offending tensor.
    """
    descriptor = open_file(path)
    try:
        size = os.fstat(descriptor).st_size
        if size < 8:
            raise _bad(path, "at least 8 bytes", f"{size}", "The file is empty or was cut off.")
        prefix = bytearray(8)
        read_exactly(descriptor, memoryview(prefix), 0, path)
        (length,) = struct.unpack("<Q", prefix)
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise _bad(
                path,
                f"a header of at most {min(MAX_HEADER_BYTES, size - 8)} bytes",
                f"length {length}",
                "The file is cut off or is not safetensors.",
            )
        raw = bytearray(length)
        read_exactly(descriptor, memoryview(raw), 8, path)
    finally:
        os.close(descriptor)
    return parse_header(path, raw, data_bytes=size - 8 - length)


def parse_header(path: Path, raw: bytes | bytearray, data_bytes: int) -> tuple[TensorEntry, ...]:
    """Check header JSON against the size of the data that follows it; see `read_header`."""
    if raw[:1] != b"{":
        raise _bad(path, "a header that starts with '{'", repr(bytes(raw[:1])), "The file is not safetensors.")
    _check_counts(path, raw)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique_pairs)
    except (ValueError, RecursionError) as error:
        raise _bad(path, "a JSON header", str(error)) from error
    metadata = header.pop(METADATA_KEY, {})
    if not isinstance(metadata, dict) or any(type(value) is not str for value in metadata.values()):
        raise _bad(path, f"{METADATA_KEY} to map strings to strings", "something else")
    start = 8 + len(raw)
    entries = sorted((_entry(path, name, value, start) for name, value in header.items()), key=_place)
    _check_cover(path, entries, start, start + data_bytes)
    return tuple(entries)


def _check_counts(path: Path, raw: bytes | bytearray) -> None:
    """Refuse what would cost far more memory than its size once parsed: too many objects, or too many strings."""
    # one brace is the header's own and one the metadata's
    objects, quotes = raw.count(b"{"), raw.count(b'"')
    if objects > MAX_TENSORS + 2 or quotes > 16 * objects + (1 << 16):
        raise _bad(path, f"at most {MAX_TENSORS} tensors", f"{objects} objects and {quotes // 2} strings")


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice!r} stands twice")
    return value


def _entry(path: Path, name: str, value: Any, start: int) -> TensorEntry:
    if not 0 < len(name) <= MAX_NAME_LENGTH or not name.isprintable() or not name.isascii():
        raise _bad(path, f"tensor names of 1 to {MAX_NAME_LENGTH} printable ASCII characters", repr(name[:80]))
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _bad(path, f"dtype, shape and data_offsets for {name}", repr(value)[:80])
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not is_known(dtype):
        raise _bad(path, f"a known dtype for {name}", repr(dtype)[:40])
    if not _are_sizes(shape) or len(shape) > MAX_RANK:
        raise _bad(path, f"at most {MAX_RANK} sizes as the shape of {name}", repr(shape)[:80])
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise _bad(path, f"two byte offsets for {name}", repr(offsets)[:80])
    begin, end = offsets
    # python integers do not overflow: a product beyond 2^63 simply differs from every possible byte range
    if prod(shape) * itemsize(dtype) != end - begin:
        raise _bad(path, f"{prod(shape) * itemsize(dtype)} bytes for {name} ({dtype} {shape})", f"{end - begin}")
    return TensorEntry(name, dtype, tuple(shape), start + begin, start + end)


def _place(entry: TensorEntry) -> tuple[int, int]:
    return entry.begin, entry.end


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _check_cover(path: Path, entries: Sequence[TensorEntry], begin: int, end: int) -> None:
    position = begin
    for entry in entries:
        if entry.begin != position:
            kind = "overlaps its neighbour" if entry.begin < position else "leaves a hole before it"
            raise _bad(path, f"{entry.name} to begin at byte {position}", f"{entry.begin}: it {kind}")
        position = entry.end
    if position != end:
        problem = "The file is cut off." if position > end else "It has bytes that belong to no tensor."
        raise _bad(path, f"{position} bytes", f"{end}", problem)


def _bad(path: Path, expected: str, found: str, next_step: str = "") -> InputError:
    return InputError(
        str(path),
        expected=expected,
        found=found,
        next_step=next_step or "Fetch the file again; it is not a valid safetensors file.",
    )


def build_header(tensors: Sequence[tuple[str, str, tuple[int, ...]]]) -> tuple[bytes, tuple[TensorEntry, ...]]:
    """Return the leading bytes of a file that holds (name, dtype, shape) in this order, and where each tensor lies.

    The header is padded with spaces to a multiple of 8, and its bytes depend on the arguments alone.
    """
    table: dict[str, Any] = {METADATA_KEY: METADATA}
    position = 0
    for name, dtype, shape in tensors:
        nbytes = prod(shape) * itemsize(dtype)
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + nbytes]}
        position += nbytes
    raw = json.dumps(table, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    prefix = struct.pack("<Q", len(raw)) + raw
    entries = tuple(_entry(Path(name), name, table[name], len(prefix)) for name, _, _ in tensors)
    return prefix, entries
