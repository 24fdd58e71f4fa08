"""A candidate's layers against those that a stored reference kept: judged one by one, without the source.

Each layer of the candidate is given the reference's own input and routing, as in a comparison with the source, and its
free run goes along: attention, MLP or MoE, norms, routers, embedding, final norm and head have the figures of such a
comparison. Single experts, the MTP layer and the floor of noise have none, as the file does not hold what they need.

Shape suffixes: R rows of all windows.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from converters.shard.whole import open_whole
from converters.source import Source
from runtime.moe.router import Routing
from runtime.streaming.options import LOGITS, Progress, StreamOptions
from runtime.streaming.plan import StreamMemory, plan_stream
from runtime.streaming.reading import ReadAhead
from runtime.streaming.rows import RowPlan
from runtime.streaming.run import LaneSpec, Matrices, Stream, lane_rows, make_lanes
from runtime.streaming.sides import Side, plan_batches
from runtime.streaming.threads import computing_threads
from runtime.streaming.watch import Values
from runtime.verify.reference import (
    Heads,
    ReferenceComparison,
    check_reference,
    find_heads,
    other_head_bytes,
    routing_agreement,
    score_reference,
)
from runtime.verify.results import ModelComparison
from runtime.verify.store import StoredReference
from runtime.verify.store_layout import ModelRun
from runtime.verify.streamed_layers import CANDIDATE, FORCED, REFERENCE, LayerWatch
from runtime.verify.streamed_logits import head_error

_SPECS = ((REFERENCE, None), (FORCED, REFERENCE), (CANDIDATE, None))


@contextmanager
def planned_replay(
    stored: StoredReference, candidate: Path, options: StreamOptions, *, source: Path | None = None
) -> Iterator["ReplayJob"]:
    """Open a candidate and plan its comparison with a reference that keeps its layers; only headers are read.

    Args:
        stored: the reference.
        candidate: checkpoint folder.
        options: how to run it; with LOGITS among the levels its predictions are scored too.
        source: the reference's checkpoint, if it is at hand.
    Raises:
        UsageError: the reference keeps no layers, or was run in another way. InputError: another model, or a checkpoint
            that cannot be loaded. ResourceError: too little memory.
    """
    check_reference(stored, candidate, options, source=source)
    with open_whole(candidate) as opened:
        yield ReplayJob(stored, candidate, opened, options, source)


class ReplayJob:
    """A planned comparison; see `planned_replay`.

    Attributes:
        memory: what it takes.
    """

    def __init__(
        self, stored: StoredReference, candidate: Path, opened: Source, options: StreamOptions, source: Path | None
    ) -> None:
        self._stored, self._candidate, self._source = stored, candidate, source
        self._options = replace(options, with_mtp=False, floor=False)
        self._text = stored.text
        self._plan = RowPlan(self._text.token_ids, self._text.plan.windows)
        self._side = Side.of(CANDIDATE, opened, self._options)
        self._layers = stored.layers(self._side.loader.engine)
        self._specs = [LaneSpec(name, 0, self._plan.num_rows, leader=leader) for name, leader in _SPECS]
        self._batches = plan_batches([self._side])
        lanes = lane_rows(self._specs, [self._side])
        self.memory: StreamMemory = plan_stream(
            [self._side],
            self._batches,
            self._plan,
            lanes,
            self._options,
            with_heads=True,
            other_heads=other_head_bytes(stored, source, self._options),
        )

    @property
    def read_bytes(self) -> int:
        """Bytes of the candidate's weights that a run reads at most, without head and embedding."""
        return sum(self._side.loader.stored_bytes(names) for batch in self._batches for names in batch.names)

    def run(self, progress: Progress | None = None) -> ReferenceComparison:
        """Run the candidate and return what was found; NaN and Inf are reported and do not end the run.

        Raises:
            InputError: a weight that cannot be read, or the head that belongs to the reference is nowhere.
            ResourceError: no room for the scratch file.
        """
        # a head that is nowhere is found before the run; none is held while layers are
        self._heads()
        with torch.inference_mode(), computing_threads(self._plan.num_rows, self._options):
            return self._run(progress)

    def _heads(self) -> Heads:
        return find_heads(self._stored, self._candidate, self._options, source=self._source)

    def _run(self, progress: Progress | None) -> ReferenceComparison:
        options, loader = self._options, self._side.loader
        config = self._side.source.config
        watch = _ReplayWatch(self._plan, config.n_routed_experts)
        matrices = Matrices(config.hidden_size, options, on_disk=self.memory.hidden_on_disk)
        lanes = make_lanes(self._specs, [self._side], matrices, options)
        lanes[0].replay = self._layers
        advance = progress.advance if progress is not None else lambda _: None
        with ReadAhead([loader], self._batches, options.workers, advance) as reads:
            Stream(lanes, [self._side], self._plan, matrices, reads, watch, options, progress).run()
        heads = self._heads()
        ends = watch.ends(head_error((heads.reference, heads.candidate), lanes[0].state_TD, self._plan))
        run = ModelRun(lanes[-1].state_TD, {layer: torch.cat(ids) for layer, ids in watch.ids.items()})
        if LOGITS in options.levels:
            found = score_reference(self._stored, lanes[0].state_TD, run, heads, options, seed=options.seed)
        else:
            found = ModelComparison(
                protocol=self._text.plan.protocol,
                dtype=options.dtype,
                device=options.device,
                activations=options.activations,
                layers=(),
                tokens=None,
                summary=None,
                mtp=None,
                floor=None,
            )
        found = replace(found, layers=tuple(watch.layers), ends=ends, notes=tuple(loader.notes))
        return ReferenceComparison(found, routing_agreement(self._stored, run), self._stored.facts.source_digest)


class _ReplayWatch(LayerWatch):
    """Keeps the experts that the candidate's own run chooses, too."""

    def __init__(self, plan: RowPlan, num_experts: int) -> None:
        super().__init__(plan, num_experts)
        self.ids: dict[int, list[torch.Tensor]] = {}

    def routers(self, rows_R: torch.Tensor, routings: Mapping[str, Routing], biases: Values) -> None:
        super().routers(rows_R, routings, biases)
        routing = routings[CANDIDATE]
        self.ids.setdefault(routing.layer, []).append(routing.topk_ids_TK.cpu())
