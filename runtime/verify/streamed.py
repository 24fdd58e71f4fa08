"""Two models on the same tokens, layer by layer, in the memory of a few experts.

Both go through a layer together, so that its own error, on the reference's input and routing, and the accumulated one
are measured in one pass over each checkpoint; see `runtime.verify.results` for the lanes.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from converters.config import CONFIG_FILE, Glm4MoeConfig
from converters.errors import InputError
from converters.shard.whole import open_whole
from converters.source import Source
from runtime.model.linear import Linear
from runtime.streaming.head import heads
from runtime.streaming.one import OneModel, OnPart
from runtime.streaming.one import stream_one as _stream_one
from runtime.streaming.options import LAYERS, LOGITS, Progress, StreamOptions
from runtime.streaming.plan import StreamMemory, plan_stream
from runtime.streaming.reading import ReadAhead
from runtime.streaming.rows import RowPlan
from runtime.streaming.run import LaneSpec, Matrices, Stream, lane_rows, make_lanes
from runtime.streaming.sides import Side, plan_batches, runs_mtp
from runtime.streaming.threads import computing_threads
from runtime.verify.finite import FiniteWatch
from runtime.verify.results import ModelComparison, Spent
from runtime.verify.store_layout import CONFIG_FIELDS
from runtime.verify.streamed_layers import CANDIDATE, FLOOR, FORCED, NOISY, REFERENCE, LayerWatch
from runtime.verify.streamed_logits import Scorer, head_error
from runtime.verify.summary import summarize
from runtime.verify.tokens import EncodedText


def compare_streamed(
    source: Path, candidate: Path, text: EncodedText, options: StreamOptions, progress: Progress | None = None
) -> ModelComparison:
    """Compare two checkpoints on a text, the source as reference; see `StreamedJob.run`."""
    with planned(source, candidate, text, options) as job:
        return job.run(progress)


@contextmanager
def planned(source: Path, candidate: Path, text: EncodedText, options: StreamOptions) -> Iterator["StreamedJob"]:
    """Open two checkpoints and plan their comparison; only headers are read.

    Raises:
        InputError: a checkpoint that cannot be loaded, or two models whose layers or logits do not correspond.
        ResourceError: too little memory.
    """
    with open_whole(source) as ours, open_whole(candidate) as theirs:
        _check_comparable(ours.config, theirs.config, candidate)
        yield StreamedJob((ours, theirs), text, options)


def stream_one(
    folder: Path,
    text: EncodedText,
    options: StreamOptions,
    on_part: OnPart | None = None,
    progress: Progress | None = None,
    *,
    behind: int | None = None,
) -> OneModel:
    """Run one model on a text; see `runtime.streaming.one.stream_one`."""
    plan = RowPlan(text.token_ids, text.plan.windows)
    return _stream_one(folder, plan, options, on_part, progress, behind=behind)


class StreamedJob:
    """A planned comparison of two open checkpoints.

    Args:
        sources: reference and candidate, open until the run is over.
        text: tokens and windows.
        options: how, and what is to be measured.
    Attributes:
        memory: what it takes.
        floor_rows: tokens on which the floor is measured; 0 where it is not.
    """

    def __init__(self, sources: tuple[Source, Source], text: EncodedText, options: StreamOptions) -> None:
        self._text, self._options = text, options
        self._sides = [
            Side.of(name, source, options) for name, source in zip((REFERENCE, CANDIDATE), sources, strict=True)
        ]
        self._plan = RowPlan(text.token_ids, text.plan.windows)
        self.floor_rows = self._plan.leading_rows(options.floor_tokens) if options.floor else 0
        self._specs = list(self._lanes())
        self._batches = plan_batches(self._sides)
        lanes = lane_rows(self._specs, self._sides)
        self.memory: StreamMemory = plan_stream(
            self._sides, self._batches, self._plan, lanes, options, with_heads=bool(options.levels)
        )

    @property
    def read_bytes(self) -> int:
        """Bytes of weights that a run reads of both checkpoints at most: experts that no token goes to are left out.

        Rows of the embedding are not counted.
        """
        heads_read = [side.head_names() if self._options.levels else () for side in self._sides]
        batches = [*(batch.names for batch in self._batches), heads_read]
        return sum(
            side.loader.stored_bytes(names) for both in batches for side, names in zip(self._sides, both, strict=True)
        )

    @torch.inference_mode()
    def run(self, progress: Progress | None = None) -> ModelComparison:
        """Run both models and return what was found; NaN and Inf are reported and do not end the run.

        Raises:
            InputError: a weight that cannot be read, or a code or scale to be decoded that is not finite.
            ResourceError: no room for the scratch file.
        """
        with computing_threads(self._plan.num_rows, self._options):
            return self._run(progress)

    def _run(self, progress: Progress | None) -> ModelComparison:
        begin, options = time.monotonic(), self._options
        advance = progress.advance if progress is not None else lambda _: None
        config = self._sides[0].source.config
        watch = LayerWatch(self._plan, config.n_routed_experts) if LAYERS in options.levels else None
        finite = watch or FiniteWatch(self._plan, {name: name for name in (REFERENCE, CANDIDATE)})
        matrices = Matrices(config.hidden_size, options, on_disk=self.memory.hidden_on_disk)
        lanes = make_lanes(self._specs, self._sides, matrices, options)
        loaders = [side.loader for side in self._sides]
        with ReadAhead(loaders, self._batches, options.workers, advance) as reads:
            stream = Stream(lanes, self._sides, self._plan, matrices, reads, finite, options, progress)
            has_mtp = stream.run()
        found = ModelComparison(
            protocol=self._text.plan.protocol,
            dtype=options.dtype,
            device=options.device,
            activations=options.activations,
            layers=tuple(watch.layers) if watch is not None else (),
            tokens=None,
            summary=None,
            mtp=None,
            floor=None,
            notes=self._notes(),
            first_non_finite=() if watch is not None else tuple(finite.of_run.values()),
        )
        waited, head_bytes = reads.seconds_waiting, 0
        if options.levels:
            found, head_bytes, seconds = self._behind(found, stream, advance, watch, has_mtp=has_mtp)
            waited += seconds
        spent = Spent(
            seconds=time.monotonic() - begin,
            seconds_waiting=waited,
            bytes_read=reads.bytes_read + head_bytes,
            planned_peak_bytes=self.memory.peak_bytes,
            bytes_skipped=reads.bytes_skipped,
        )
        return replace(found, spent=spent)

    def _lanes(self) -> Iterator[LaneSpec]:
        rows, has_layers = self._plan.num_rows, LAYERS in self._options.levels
        yield LaneSpec(REFERENCE, 0, rows)
        if has_layers:
            yield LaneSpec(FORCED, 1, rows, leader=REFERENCE)
        yield LaneSpec(CANDIDATE, 1, rows)
        if self.floor_rows:
            if has_layers:
                yield LaneSpec(FLOOR, 0, self.floor_rows, leader=REFERENCE, is_noisy=True)
            yield LaneSpec(NOISY, 0, self.floor_rows, is_noisy=True)

    def _behind(
        self,
        found: ModelComparison,
        stream: Stream,
        advance: Callable[[int], None],
        watch: LayerWatch | None,
        *,
        has_mtp: bool,
    ) -> tuple[ModelComparison, int, float]:
        """Return the comparison with what heads and watch say, the heads' bytes and the seconds of reading them."""
        if stream.progress is not None:
            stream.progress.describe("head")
        finals = {lane.name: lane.input_TD if has_mtp else lane.state_TD for lane in stream.lanes if lane.is_free}
        read = list[int]()

        def count(num_bytes: int) -> None:
            read.append(num_bytes)
            advance(num_bytes)

        begin = time.monotonic()
        with heads(self._sides, count) as held:
            seconds = time.monotonic() - begin
            both = held[REFERENCE], held[CANDIDATE]
            if watch is not None:
                found = replace(found, ends=watch.ends(head_error(both, finals[REFERENCE], self._plan)))
            if LOGITS in self._options.levels:
                drafts = {lane.name: lane.state_TD for lane in stream.lanes} if has_mtp else None
                found = self._score(found, both, finals, drafts)
        return found, sum(read), seconds

    def _score(
        self,
        found: ModelComparison,
        both: tuple[Linear, Linear],
        finals: Mapping[str, torch.Tensor],
        drafts: Mapping[str, torch.Tensor] | None,
    ) -> ModelComparison:
        """Return the comparison with what the heads say of the final hidden states and of the MTP layer's."""
        scorer = Scorer(self._text, self._plan, both, self._options.seed, by_window=self._options.deterministic)
        final = finals[REFERENCE], finals[CANDIDATE]
        table = scorer.main(final)
        floor = scorer.floor(finals[REFERENCE], finals[NOISY]) if NOISY in finals else None
        mtp = None if drafts is None else scorer.mtp(final, (drafts[REFERENCE], drafts[CANDIDATE]))
        summary = summarize(table.scores, table.windows_T, seed=self._options.seed)
        return replace(found, tokens=table, summary=summary, mtp=mtp, floor=floor)

    def _notes(self) -> tuple[str, ...]:
        notes = [f"{side.name}: {note}" for side in self._sides for note in side.loader.notes]
        if not runs_mtp(self._sides) and any(side.mtp is not None for side in self._sides):
            without = next(side.name for side in self._sides if side.mtp is None)
            notes.append(f"The {without} has no MTP layer; the other one's was not run.")
        return tuple(notes)


def _check_comparable(ours: Glm4MoeConfig, theirs: Glm4MoeConfig, candidate: Path) -> None:
    for name in CONFIG_FIELDS:
        if getattr(ours, name) != getattr(theirs, name):
            raise InputError(
                f"{candidate / CONFIG_FILE}: {name}",
                expected=f"{getattr(ours, name)}, as in the source",
                found=str(getattr(theirs, name)),
                next_step="See --level structure for all differences.",
            )
