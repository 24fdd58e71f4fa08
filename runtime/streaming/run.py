"""A run from the tokens to the hidden states behind the last layer, layer by layer, for any number of lanes.

Shapes: T rows, D hidden.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from runtime.streaming.attention import CHUNK_TOKENS
from runtime.streaming.embedding import embed
from runtime.streaming.hidden import token_matrix
from runtime.streaming.lanes import Lane, Noise
from runtime.streaming.layer import LayerRun
from runtime.streaming.options import Progress, StreamOptions
from runtime.streaming.plan import LaneRows
from runtime.streaming.reading import ReadAhead
from runtime.streaming.replay import Replay
from runtime.streaming.rows import RowPlan
from runtime.streaming.sides import Side, runs_mtp
from runtime.streaming.watch import Watcher


@dataclass(frozen=True, slots=True)
class LaneSpec:
    """A lane to be made: see `Lane`; `leader` is the name of an earlier one."""

    name: str
    side: int
    num_rows: int
    leader: str | None = None
    is_noisy: bool = False

    def matrices(self, *, has_mtp: bool) -> int:
        """Return how many (T, D) matrices it has of its own."""
        if self.leader is None:
            return 2 + has_mtp
        return 1 + self.is_noisy


def lane_rows(specs: Sequence[LaneSpec], sides: Sequence[Side]) -> list[LaneRows]:
    """Return what lanes keep, for the plan of memory."""
    return [LaneRows(spec.num_rows, spec.matrices(has_mtp=runs_mtp(sides))) for spec in specs]


class Matrices:
    """Makes matrices of hidden states: in memory, on the device, or on disk.

    Args:
        width: D.
        options: of the run.
        on_disk: in a scratch file.
    """

    def __init__(self, width: int, options: StreamOptions, *, on_disk: bool) -> None:
        self._width, self._device = width, options.device
        self._scratch = (options.scratch or Path(tempfile.gettempdir())) if on_disk else None

    def __call__(self, num_rows: int) -> torch.Tensor:
        """Return (num_rows, D) fp32 zeros.

        Raises:
            ResourceError: no room on the disk.
        """
        if self._scratch is None and self._device != "cpu":
            return torch.zeros(num_rows, self._width, device=self._device)
        return token_matrix(num_rows, self._width, self._scratch)


def make_lanes(
    specs: Sequence[LaneSpec], sides: Sequence[Side], matrices: Matrices, options: StreamOptions
) -> list[Lane]:
    """Return the lanes, in order."""
    lanes: dict[str, Lane] = {}
    for number, spec in enumerate(specs):
        leader = lanes[spec.leader] if spec.leader is not None else None
        state_TD = matrices(spec.num_rows) if leader is None or spec.is_noisy else leader.state_TD
        lanes[spec.name] = Lane(
            name=spec.name,
            side=sides[spec.side],
            num_rows=spec.num_rows,
            input_TD=state_TD if leader is None else leader.input_TD,
            state_TD=state_TD,
            added_TD=matrices(spec.num_rows),
            leader=leader,
            noise=Noise(options.seed + number) if spec.is_noisy else None,
        )
    return list(lanes.values())


@dataclass(slots=True)
class Stream:
    """Lanes on their way.

    Args:
        lanes: see `make_lanes`.
        sides: their models.
        plan: which token is in which row.
        matrices: make more of them for the MTP layer.
        reads: hands out the weights.
        watcher: told of every layer.
        options: of the run.
        progress: told where it is.
    """

    lanes: Sequence[Lane]
    sides: Sequence[Side]
    plan: RowPlan
    matrices: Matrices
    reads: ReadAhead
    watcher: Watcher
    options: StreamOptions
    progress: Progress | None = None

    def run(self) -> bool:
        """Run everything but the head; return whether there was an MTP layer.

        Then a free lane's `state_TD` is what stands behind the final norm; or, after an MTP layer, its `input_TD` is,
        and `state_TD` stands behind the MTP layer's norm, where a window's last row is not used.

        Raises:
            InputError: a weight that cannot be read or decoded. ResourceError: no room for a scratch file.
        """
        dtype = self.sides[0].loader.engine.torch_dtype
        free = [lane for lane in self.lanes if lane.is_free]
        for lane in free:
            if lane.replay is not None:
                _fill(lane, lane.replay)
            else:
                self.reads.bytes_read += embed(lane.side.source, self.plan.ids[: lane.num_rows], lane.input_TD, dtype)
        runner = LayerRun(self.lanes, self.plan, self.reads, self.watcher, deterministic=self.options.deterministic)
        has_mtp, count = runs_mtp(self.sides), self.sides[0].num_layers
        for layer in range(count):
            self._describe(f"layer {layer + 1}/{count + has_mtp}")
            runner.run(layer)
        runner.norm()
        if has_mtp:
            self._describe(f"layer {count + 1}/{count + 1} (MTP)")
            for lane in self.lanes:
                if lane.is_free:
                    lane.state_TD = self.matrices(lane.num_rows)
                else:
                    lane.input_TD = lane.owner.input_TD
                    lane.state_TD = lane.owner.state_TD if lane.noise is None else lane.state_TD
            runner.run(count, is_mtp=True)
        return has_mtp

    def _describe(self, text: str) -> None:
        if self.progress is not None:
            self.progress.describe(text)


def _fill(lane: Lane, replay: Replay) -> None:
    """Give a replayed lane what its first layer was given, a block of rows at a time."""
    for begin in range(0, lane.num_rows, CHUNK_TOKENS):
        end = min(begin + CHUNK_TOKENS, lane.num_rows)
        lane.input_TD[begin:end] = replay.embedded(begin, end).to(lane.input_TD)
