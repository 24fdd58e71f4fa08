"""One model on a text, streamed: its hidden states and routing, for references that outlive the model.

Shapes: R rows, one for every token of every window, window after window; D hidden, K experts per token.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from converters.shard.whole import open_whole
from converters.source import Source
from runtime.moe.router import Routing
from runtime.streaming.options import Progress, StreamOptions
from runtime.streaming.plan import StreamMemory, plan_stream
from runtime.streaming.reading import ReadAhead
from runtime.streaming.rows import RowPlan
from runtime.streaming.run import LaneSpec, Matrices, Stream, lane_rows, make_lanes
from runtime.streaming.sides import Side, plan_batches
from runtime.streaming.threads import computing_threads
from runtime.streaming.watch import Values, Watcher

_LANE = "model"
# parts of a layer that can be kept: what it is given, and what its halves make of it before the residual sums, (R, D);
# in MoE layers the router's logits (R, E) and the weights of the experts (R, K)
INPUT, ATTENTION, MLP, ROUTER_LOGITS, ROUTING_WEIGHTS = "input", "attention", "mlp", "router_logits", "routing_weights"
# part, layer, first row, and the rows
OnPart = Callable[[str, int, int, torch.Tensor], None]


@dataclass(frozen=True, slots=True)
class OneModel:
    """What a model made of a text.

    Attributes:
        final_hidden_RD: behind the final norm, fp32.
        routing_ids: expert ids (R, K) int64 by MoE layer; that of the MTP layer has no last row of a window.
        mtp_hidden_RD: behind the MTP layer's norm, fp32; None without MTP layer. A window's last row is zero.
        norms: L2 norms (R,) fp32 of the hidden states behind each layer, without the MTP layer.
        memory: what was planned.
        bytes_read: of the checkpoint.
    """

    final_hidden_RD: torch.Tensor
    routing_ids: Mapping[int, torch.Tensor]
    mtp_hidden_RD: torch.Tensor | None
    norms: Mapping[int, torch.Tensor]
    memory: StreamMemory
    bytes_read: int


@dataclass(slots=True)
class _Record(Watcher):
    on_part: OnPart | None
    ids: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    norms: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    layer: int = 0
    is_mtp: bool = False

    def begin(self, layer: int, *, is_mtp: bool) -> None:
        self.layer, self.is_mtp = layer, is_mtp

    def inputs(self, rows_R: torch.Tensor, inputs: Values) -> None:
        self._tell(INPUT, rows_R, inputs[_LANE])

    def attention(self, rows_R: torch.Tensor, outputs: Values) -> None:
        self._tell(ATTENTION, rows_R, outputs[_LANE])

    def routers(self, rows_R: torch.Tensor, routings: Mapping[str, Routing], biases: Values) -> None:
        routing = routings[_LANE]
        self.ids.setdefault(self.layer, []).append(routing.topk_ids_TK.cpu())
        self._tell(ROUTER_LOGITS, rows_R, routing.router_logits_TE)
        self._tell(ROUTING_WEIGHTS, rows_R, routing.topk_weights_TK)

    def mlp(self, rows_R: torch.Tensor, outputs: Values) -> None:
        self._tell(MLP, rows_R, outputs[_LANE])

    def states(self, rows_R: torch.Tensor, states: Values) -> None:
        if not self.is_mtp:
            self.norms.setdefault(self.layer, []).append(states[_LANE].float().norm(dim=-1).cpu())

    def _tell(self, part: str, rows_R: torch.Tensor, values: torch.Tensor) -> None:
        if self.on_part is not None and not self.is_mtp:
            self.on_part(part, self.layer, int(rows_R[0]), values)


@contextmanager
def planned_one(
    folder: Path, text: RowPlan, options: StreamOptions, *, behind: int | None = None
) -> Iterator["OneJob"]:
    """Open a checkpoint and plan a run of it; only headers are read.

    Args:
        folder: a checkpoint in any layout and format that the runtime loads.
        text: tokens and windows.
        options: how; levels and floor are not used.
        behind: bytes that are held beside the model's own head and a block of logits once the layers are done; None
            where no logits are made.
    Raises:
        InputError: it cannot be loaded. ResourceError: too little memory.
    """
    with open_whole(folder) as source:
        yield OneJob(source, text, options, behind)


class OneJob:
    """A planned run of one open checkpoint; see `planned_one`.

    Attributes:
        memory: what it takes.
    """

    def __init__(self, source: Source, text: RowPlan, options: StreamOptions, behind: int | None) -> None:
        self._text, self._options, self._with_head = text, options, behind is not None
        self._sides = [Side.of(_LANE, source, options)]
        self._specs = [LaneSpec(_LANE, 0, text.num_rows)]
        self._batches = plan_batches(self._sides)
        self.memory: StreamMemory = plan_stream(
            self._sides,
            self._batches,
            text,
            lane_rows(self._specs, self._sides),
            options,
            with_heads=self._with_head,
            other_heads=behind or 0,
        )

    @property
    def read_bytes(self) -> int:
        """Bytes of weights that a run reads at most, the head's among them, once, where logits are made of it.

        Rows of the embedding are not counted.
        """
        (side,) = self._sides
        names = [name for batch in self._batches for of_side in batch.names for name in of_side]
        return side.loader.stored_bytes((*names, *(side.head_names() if self._with_head else ())))

    @torch.inference_mode()
    def run(self, on_part: OnPart | None = None, progress: Progress | None = None) -> OneModel:
        """Run the layers; arguments and errors as those of `stream_one`."""
        (side,), text, options = self._sides, self._text, self._options
        matrices = Matrices(side.source.config.hidden_size, options, on_disk=self.memory.hidden_on_disk)
        (lane,) = lanes = make_lanes(self._specs, self._sides, matrices, options)
        record = _Record(on_part)
        advance = progress.advance if progress is not None else lambda _: None
        with (
            computing_threads(text.num_rows, options),
            ReadAhead([side.loader], self._batches, options.workers, advance) as reads,
        ):
            has_mtp = Stream(lanes, self._sides, text, matrices, reads, record, options, progress).run()
        return OneModel(
            final_hidden_RD=lane.input_TD if has_mtp else lane.state_TD,
            routing_ids={layer: torch.cat(ids) for layer, ids in record.ids.items()},
            mtp_hidden_RD=lane.state_TD if has_mtp else None,
            norms={layer: torch.cat(norms) for layer, norms in record.norms.items()},
            memory=self.memory,
            bytes_read=reads.bytes_read,
        )


def stream_one(
    folder: Path,
    text: RowPlan,
    options: StreamOptions,
    on_part: OnPart | None = None,
    progress: Progress | None = None,
    *,
    behind: int | None = None,
) -> OneModel:
    """Run one model on a text, in the memory of a few experts.

    Args:
        folder, text, options, behind: as those of `planned_one`.
        on_part: told what each layer but the MTP layer is given and makes of it, each part in order of rows.
        progress: told where it is.
    Raises:
        InputError: it cannot be loaded. ResourceError: too little memory, or no room for a scratch file.
    """
    with planned_one(folder, text, options, behind=behind) as job:
        return job.run(on_part, progress)
