"""What an unfinished calibration has found so far, on disk beside its statistics, so that the same job goes on with it.

    .STATS.unfinished/.glm4moe/      removed when STATS stands
        lock                         held with flock by the process that runs
        hidden-00003.f32             what goes into layer 3: a row of fp32 a token
        point.json                   the job, the layers that have passed, what was measured, and sha256 of all that

Both are written after each layer, hidden states first; point.json is replaced as a whole, so that it always speaks of
files that are complete. Of what is damaged nothing is used: the job begins anew.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from converters.blocks import as_bytes
from converters.checkpoint.disk_read import open_file, read_exactly
from converters.checkpoint.journal import differing_options
from converters.checkpoint.lock import locked
from converters.checkpoint.writer import disk_errors, partial_path, publish, remove_partials, sync_folder, write_file
from converters.config import read_json
from converters.errors import InputError, UsageError
from converters.leftovers import remove_state
from converters.quant.quality import TensorQuality
from converters.quant.rounded import rounded_folder
from converters.quant.rounded_writer import remove_unfinished
from runtime.calibrate.meter import Measured
from runtime.calibrate.record import Record

POINT_FILE = "point.json"
_MAX_POINT_BYTES = 256 << 20
_BLOCK_BYTES = 8 << 20
# a module's line of point.json, and another one of a weight that is rounded
_MODULE_BYTES = 640


@dataclass(frozen=True, slots=True)
class Point:
    """How far a job is.

    Args:
        num_layers: layers that have passed.
        record: what was measured.
        errors: by module, of GPTQ; see `Rounder`.
        quality: by tensor, of GPTQ.
        rounded: sha256 of each file of rounded weights.
    """

    num_layers: int
    record: Record
    errors: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    quality: Mapping[str, TensorQuality] = field(default_factory=dict)
    rounded: Mapping[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return it in values that JSON has."""
        record = self.record
        return {
            "num_layers": self.num_layers,
            "measured": {name: asdict(measured) for name, measured in record.measured.items()},
            "tokens": record.tokens,
            "filled": record.filled,
            "key_amax": {str(layer): amax for layer, amax in record.key_amax.items()},
            "value_amax": {str(layer): amax for layer, amax in record.value_amax.items()},
            "errors": dict(self.errors),
            "quality": {name: asdict(quality) for name, quality in self.quality.items()},
            "rounded": dict(self.rounded),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Point":
        """Build from what `as_json` returned."""
        record = Record(
            measured={name: Measured(**measured) for name, measured in value["measured"].items()},
            tokens=value["tokens"],
            filled=value["filled"],
            key_amax={int(layer): amax for layer, amax in value["key_amax"].items()},
            value_amax={int(layer): amax for layer, amax in value["value_amax"].items()},
        )
        errors = {name: (plain, cost) for name, (plain, cost) in value["errors"].items()}
        quality = {name: TensorQuality(**errors) for name, errors in value["quality"].items()}
        return cls(value["num_layers"], record, errors, quality, value["rounded"])


class CalibrationState:
    """The state of one job, held against other runs; see `kept_state`.

    Args:
        folder: exists.
        job: what the job is, in flat values of JSON.
        tell: is told, in words, what becomes of what an earlier run left.
    """

    def __init__(self, folder: Path, job: Mapping[str, Any], tell: Callable[[str], None]) -> None:
        self.folder, self.job, self.tell = folder, dict(job), tell

    @property
    def is_begun(self) -> bool:
        """Whether a layer has passed in this run or an earlier one."""
        return (self.folder / POINT_FILE).is_file()

    def load(self, hidden_TD: torch.Tensor) -> Point | None:
        """Return how far an earlier run came, and fill in the hidden states; None if there was none.

        Raises:
            UsageError: it was another job. InputError: what it left is damaged.
        """
        if not self.is_begun:
            return None
        envelope = read_json(self.folder / POINT_FILE, _MAX_POINT_BYTES)
        text = json.dumps(envelope.get("state"), sort_keys=True)
        if envelope.get("sha256") != hashlib.sha256(text.encode()).hexdigest():
            raise InputError(str(self.folder / POINT_FILE), expected="what was written", found="something else")
        state = envelope["state"]
        self._check_same_job(state["job"])
        point = Point.from_json(state["point"])
        if state["hidden"] is not None:
            self._read_hidden(point.num_layers, hidden_TD, state["hidden"])
        return point

    def save(self, point: Point, hidden_TD: torch.Tensor | None) -> None:
        """Keep how far this run has come; hidden_TD is None after the last layer, when nobody needs it.

        Raises:
            ResourceError: the disk has no room.
        """
        hidden = None if hidden_TD is None else self._write_hidden(point.num_layers, hidden_TD)
        state = {"job": self.job, "point": point.as_json(), "hidden": hidden}
        text = json.dumps(state, sort_keys=True)
        envelope = f'{{"sha256": "{hashlib.sha256(text.encode()).hexdigest()}", "state": {text}}}\n'
        write_file(self.folder / POINT_FILE, envelope.encode())
        self._remove_hidden(but=None if hidden is None else _hidden_file(point.num_layers))

    def clear(self) -> None:
        """Forget everything, the point first: it speaks of the rest."""
        with disk_errors(self.folder):
            (self.folder / POINT_FILE).unlink(missing_ok=True)
            sync_folder(self.folder)
        self._remove_hidden(but=None)

    def _check_same_job(self, recorded: Mapping[str, Any]) -> None:
        if recorded != self.job:
            raise UsageError(
                f"unfinished calibration in {self.folder.parent}",
                expected="the same model, texts and options",
                found=differing_options(recorded, self.job),
                next_step="Run that job's command, or begin anew with --restart.",
            )

    def _remove_hidden(self, *, but: str | None) -> None:
        with disk_errors(self.folder):
            remove_partials(self.folder, {POINT_FILE})
            for name in os.listdir(self.folder):
                if "hidden-" in name and name != but:
                    (self.folder / name).unlink(missing_ok=True)

    def _write_hidden(self, layer: int, hidden_TD: torch.Tensor) -> str:
        """Write the rows under their final name, durably; return sha256."""
        path, data, digest = self.folder / _hidden_file(layer), as_bytes(hidden_TD), hashlib.sha256()
        partial = partial_path(path)
        with disk_errors(path):
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            try:
                os.posix_fallocate(descriptor, 0, len(data))
                for begin in range(0, len(data), _BLOCK_BYTES):
                    block = data[begin : begin + _BLOCK_BYTES]
                    digest.update(block)
                    while len(block):
                        block = block[os.write(descriptor, block) :]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            publish(partial, path)
        return digest.hexdigest()

    def _read_hidden(self, layer: int, hidden_TD: torch.Tensor, expected: str) -> None:
        path, data, digest = self.folder / _hidden_file(layer), as_bytes(hidden_TD), hashlib.sha256()
        if not path.is_file():
            raise InputError(str(path), expected="the hidden states of an unfinished calibration", found="none")
        descriptor = open_file(path)
        try:
            for begin in range(0, len(data), _BLOCK_BYTES):
                block = data[begin : begin + _BLOCK_BYTES]
                read_exactly(descriptor, block, begin, path)
                digest.update(block)
        finally:
            os.close(descriptor)
        if digest.hexdigest() != expected:
            raise InputError(str(path), expected=f"sha256 {expected[:12]}", found=digest.hexdigest()[:12])


def state_place(stats: Path) -> Path:
    """Return the hidden folder that belongs to a file of statistics while it is unfinished."""
    return stats.with_name(f".{stats.name}.unfinished")


def state_bytes(num_tokens: int, hidden_size: int, num_modules: int) -> int:
    """Return the disk that the state takes: what was kept last stands until what comes next is complete."""
    return 2 * (num_tokens * hidden_size * torch.float32.itemsize + num_modules * _MODULE_BYTES)


@contextmanager
def kept_state(
    stats: Path, job: Mapping[str, Any], tell: Callable[[str], None], *, restart: bool = False
) -> Iterator[CalibrationState]:
    """Hold the state of a file of statistics; it is removed at the end, unless a run that failed can be gone on with.

    Args:
        stats: written, or found to be there, by who holds the state.
        job: see `CalibrationState`.
        tell: likewise.
        restart: forget what an earlier run left.
    Raises:
        LockedError: another process holds it.
    """
    place = state_place(stats)
    with locked(place) as lock:
        state = CalibrationState(lock.state, job, tell)
        if restart:
            state.clear()
            remove_unfinished(rounded_folder(stats))
        is_over = False
        try:
            yield state
            is_over = True
        finally:
            if is_over or not state.is_begun:
                remove_state(lock)
                with suppress(OSError):
                    place.rmdir()


def remove_leftover(stats: Path) -> None:
    """Remove the state of a job whose statistics stand: a run may have been killed between the two."""
    if state_place(stats).is_dir():
        with kept_state(stats, {}, lambda _: None):
            pass


def _hidden_file(layer: int) -> str:
    return f"hidden-{layer:05d}.f32"
