"""Rank files proved as they are read: each tensor against the digest that the manifest has of it.

It is XXH3, which costs next to nothing beside the read; sha256 where a manifest has no other.
The bytes are hashed as they come, so that nothing is read for it alone, unless a reader takes up a tensor in its
middle: then what it left out is read first. A tensor is proved, or refused, by the read that completes it, before a
file that is made of it can be finished. Copies on ranks that nobody reads are not looked at.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from converters.blocks import DIGEST_BLOCK_BYTES
from converters.checkpoint.content_digest import Algorithm, ContentDigest, Hasher, new_hasher
from converters.checkpoint.index import CheckpointIndex
from converters.checkpoint.manifest import MANIFEST_FILE
from converters.checkpoint.reader import CheckpointReader
from converters.errors import InputError


def slice_digests(tensors: Mapping[str, Any]) -> dict[str, ContentDigest]:
    """Return the digest of every tensor of every rank, by rank and name, from the tensors of a manifest.

    Raises:
        InputError: it has none of them.
    """
    try:
        return {
            f"{rank}/{name}": digest
            for name, facts in tensors.items()
            for part in facts["slices"]
            for digest in [ContentDigest.from_json(part)]
            for rank in part["ranks"]
        }
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(MANIFEST_FILE, expected="ranks and digests of every slice", found=repr(error)) from error


@dataclass(slots=True)
class _Proof:
    """How far a tensor is hashed."""

    digest: Hasher
    position: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class ProvedReader(CheckpointReader):
    """Reads tensors of ranks and refuses those that are not what the manifest says.

    Args:
        index: of all files; names of tensors begin with the rank.
        digests: of each tensor.
    """

    def __init__(self, index: CheckpointIndex, digests: Mapping[str, ContentDigest]) -> None:
        super().__init__(index)
        self._digests = digests
        self._proofs: dict[str, _Proof | None] = {}
        self._proofs_lock = threading.Lock()

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill a buffer as any reader does.

        Raises:
            InputError: the tensor, read to its end, is not the one that was written.
        """
        super().read_into(name, offset, buffer)
        with self._proofs_lock:
            if name not in self._proofs:
                expected = self._digests.get(name)
                self._proofs[name] = _Proof(new_hasher(expected.algorithm if expected else Algorithm.XXH3))
            proof = self._proofs[name]
        if proof is not None:
            with proof.lock:
                self._take(name, proof, offset, buffer)

    def _take(self, name: str, proof: _Proof, offset: int, data: memoryview) -> None:
        """Hash what was not hashed before, what lies between included; compare at the end."""
        stop = offset + len(data)
        if proof.position < stop:
            self._catch_up(name, proof, offset)
            proof.digest.update(data[proof.position - offset :])
            proof.position = stop
        if proof.position == self.entry(name).nbytes:
            self._compare(name, proof.digest.hexdigest())
            with self._proofs_lock:
                self._proofs[name] = None

    def _catch_up(self, name: str, proof: _Proof, offset: int) -> None:
        buffer = memoryview(bytearray(min(DIGEST_BLOCK_BYTES, max(0, offset - proof.position))))
        while proof.position < offset:
            block = buffer[: min(len(buffer), offset - proof.position)]
            super().read_into(name, proof.position, block)
            proof.digest.update(block)
            proof.position += len(block)

    def _compare(self, name: str, found: str) -> None:
        expected = self._digests.get(name)
        if expected is None or found != expected.digest:
            known = f"{expected}, as {MANIFEST_FILE} says" if expected else ""
            rank, _, own_name = name.partition("/")
            raise InputError(
                f"{self.path(self.index.entries[name][0])}: tensor {own_name} of rank {rank}",
                expected=known or f"a digest in {MANIFEST_FILE}",
                found=found,
                next_step="The file is damaged; take it from another copy, or cut the checkpoint anew.",
            )
