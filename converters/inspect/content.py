"""One pass over the data of a checkpoint: a sha256 per official tensor, and what its values look like.

Tensors are read in blocks by several threads; memory is one block a thread, whatever the size of a tensor.
"""

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeAlias

import numpy as np

from converters.checkpoint.dtypes import itemsize
from converters.checkpoint.reader import CheckpointReader
from converters.errors import InputError
from converters.inspect.logical import SHAPE_SUFFIX, LogicalTensor
from converters.numerics.finite import first_non_finite
from converters.workers import start_pool

BLOCK_BYTES = 4 << 20
# the smallest stretch of zeros that is taken for a hole
HOLE_BYTES = 1 << 20
DIGEST_HEADER = b"glm4moe content digest 1\n"
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
_FLOATS = frozenset({"BF16", "F16", "F32", "F64", "F8_E4M3", "F8_E5M2"})
_PROBE = 64
_TASKS_PER_THREAD = 16
_E8M0_NAN = 255
Progress = Callable[[int], None]


@dataclass(slots=True)
class Values:
    """What the values of one tensor look like; element indices count from its start.

    Attributes:
        first_bits: the first element's bits, as an unsigned integer; for a tensor of one element, its value.
        first_non_finite: index of the first NaN or Inf, None if there is none.
        first_hole: index of the first stretch of HOLE_BYTES that is all zero, None if there is none.
        is_zero: every value is 0 or -0.
        is_constant: all elements have the same bits.
        is_scale: every value can be a scale: above zero, and no NaN of the exponent-only format.
    """

    first_bits: int | None = None
    first_non_finite: int | None = None
    first_hole: int | None = None
    is_zero: bool = True
    is_constant: bool = True
    is_scale: bool = True

    def add(self, block: memoryview, dtype: str, start: int) -> None:
        """Take in one block, whose first element has index `start`."""
        width = itemsize(dtype)
        bits = np.frombuffer(block, _UNSIGNED[width])
        if self.first_bits is None:
            self.first_bits = int(bits[0])
        if self.first_non_finite is None:
            bad = first_non_finite(block, dtype)
            self.first_non_finite = None if bad is None else start + bad
        if self.first_hole is None:
            hole = _first_hole(bits)
            self.first_hole = None if hole is None else start + hole
        # -0.0 is a zero too
        sign = 1 << (8 * width - 1) if dtype in _FLOATS else 0
        self.is_zero = self.is_zero and _all_zero(bits, ~bits.dtype.type(sign))
        self.is_constant = self.is_constant and _all_equal(bits, self.first_bits)
        if self.is_scale:
            # seen as an integer a float has the same sign; the exponents of E8M0 have neither sign nor zero
            self.is_scale = int(bits.max()) < _E8M0_NAN if dtype == "U8" else int(bits.view(_SIGNED[width]).min()) > 0


_Bits: TypeAlias = np.ndarray[Any, np.dtype[np.unsignedinteger[Any]]]


def _all_equal(bits: _Bits, value: int) -> bool:
    # almost every tensor is told apart by its first few elements
    return bool((bits[:_PROBE] == value).all()) and bool((bits == value).all())


def _all_zero(bits: _Bits, mask: "np.unsignedinteger[Any]") -> bool:
    return not (bits[:_PROBE] & mask).any() and not (bits & mask).any()


def _first_hole(bits: _Bits) -> int | None:
    """Return where the first HOLE_BYTES of zeros lie, of the stretches that start at a multiple of it."""
    count = HOLE_BYTES // bits.itemsize
    starts = range(0, len(bits) - count + 1, count)
    return next((begin for begin in starts if _all_equal(bits[begin : begin + count], 0)), None)


@dataclass(frozen=True, slots=True)
class TensorContent:
    """What the pass learned of one tensor. `sha256` is that of its bytes, empty if not asked for or unreadable."""

    tensor: LogicalTensor
    sha256: str = ""
    values: Values = field(default_factory=Values)
    error: str = ""


class _Buffers(threading.local):
    """One block a thread, kept from tensor to tensor."""

    def __init__(self) -> None:
        self.block = memoryview(bytearray(BLOCK_BYTES))


@dataclass(frozen=True)
class ContentScan:
    """The pass: which of its two results are wanted, and who is told of bytes read, from any thread."""

    reader: CheckpointReader
    want_hash: bool
    want_values: bool
    on_bytes: Progress
    buffers: _Buffers = field(default_factory=_Buffers)

    def run(self, tensors: Iterable[LogicalTensor]) -> Iterator[TensorContent]:
        """Yield the content of every tensor, in the order of their data so that disks are read forwards."""
        places = self.reader.index.entries

        def place(tensor: LogicalTensor) -> tuple[str, int]:
            file, entry = places[tensor.pieces[0].stored]
            return file, entry.begin + tensor.pieces[0].begin

        # `map` would queue every tensor at once; in portions, an interrupted pass ends soon
        ordered = iter(sorted((tensor for tensor in tensors if tensor.pieces), key=place))
        num_threads = len(os.sched_getaffinity(0))
        with start_pool(num_threads, "inspect") as pool:
            while portion := list(islice(ordered, num_threads * _TASKS_PER_THREAD)):
                yield from pool.map(self._scan, portion)

    def _scan(self, tensor: LogicalTensor) -> TensorContent:
        digest, values, done = hashlib.sha256(), Values(), 0
        try:
            for block in self._blocks(tensor):
                if self.want_hash:
                    digest.update(block)
                if self.want_values:
                    values.add(block, tensor.dtype, done // itemsize(tensor.dtype))
                done += len(block)
                self.on_bytes(len(block))
        except InputError as error:
            return TensorContent(tensor, error=f"{error.found} at {error.subject}")
        return TensorContent(tensor, digest.hexdigest() if self.want_hash else "", values)

    def _blocks(self, tensor: LogicalTensor) -> Iterator[memoryview]:
        filled = 0
        for span in tensor.spans():
            begin = span.begin
            while begin < span.end:
                count = min(BLOCK_BYTES - filled, span.end - begin)
                self.reader.read_into(span.stored, begin, self.buffers.block[filled : filled + count])
                begin, filled = begin + count, filled + count
                if filled == BLOCK_BYTES:
                    yield self.buffers.block[:filled]
                    filled = 0
        if filled:
            yield self.buffers.block[:filled]


def content_digest(contents: Iterable[TensorContent]) -> str:
    """Return the digest of a checkpoint's content: the same for the same weights in any files, order or layout.

    It is sha256 over a header line and one line a tensor, sorted: official name, dtype, rows and columns, sha256 of its
    bytes. What only repeats a shape as values is left out.
    """
    lines = sorted(_digest_line(content) for content in contents if content.tensor.suffix != SHAPE_SUFFIX)
    return hashlib.sha256(DIGEST_HEADER + "".join(lines).encode()).hexdigest()


def _digest_line(content: TensorContent) -> str:
    # a vector is a column: some formats store the same scales as [N], others as [N, 1]
    shape = (*content.tensor.shape, 1, 1)[:2] if len(content.tensor.shape) < 2 else content.tensor.shape
    return f"{content.tensor.name} {content.tensor.dtype} {' x '.join(map(str, shape))} {content.sha256}\n"
