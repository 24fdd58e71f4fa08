"""Calibrate a checkpoint: embed all tokens, then one layer at a time, and keep what its linear modules saw."""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import converters
from converters.errors import InputError
from converters.quant.choice import QuantizeOptions
from converters.quant.identity import model_digest
from converters.quant.rounded import MANIFEST, prove_files, recipe_json
from converters.quant.rounded_writer import RoundedWriter
from converters.quant.scheme import Recipe
from converters.quant.stats import CalibrationStats, LayerCoverage, coverage
from converters.schema import Role
from converters.source import Source, open_source
from runtime.calibrate.identity import job_identity
from runtime.calibrate.layers import Stream
from runtime.calibrate.memory import MemoryPlan, plan_memory
from runtime.calibrate.options import CalibrateOptions
from runtime.calibrate.rounder import Rounder, rounding_recipes
from runtime.calibrate.state import CalibrationState, Point, state_bytes
from runtime.calibrate.text import CalibrationText, read_texts
from runtime.config import EngineConfig
from runtime.model.loader import ModelLoader
from runtime.streaming.embedding import embed, names_of
from runtime.streaming.hidden import token_matrix
from runtime.streaming.options import Progress as Progress


@dataclass(frozen=True, slots=True)
class LayerDone:
    """A layer that has passed: its index, how many there are, and how its experts fared, if it has any."""

    layer: int
    num_layers: int
    coverage: LayerCoverage | None


def calibrate(
    folder: Path,
    texts: Sequence[Path],
    options: CalibrateOptions,
    progress: Progress | None = None,
    on_layer: Callable[[LayerDone], None] | None = None,
) -> CalibrationStats:
    """Return the statistics of a checkpoint over texts; see `CalibrationJob`."""
    with planned(folder, texts, options) as job:
        return job.run(progress, on_layer)


@contextmanager
def planned(
    folder: Path, texts: Sequence[Path], options: CalibrateOptions, rounding: "Rounding | None" = None
) -> Iterator["CalibrationJob"]:
    """Open a checkpoint and plan its calibration; only headers and texts are read.

    Raises:
        InputError: the checkpoint cannot be loaded, or its tokenizer is not its own.
        UsageError: texts or options that leave nothing to measure. ResourceError: too little memory.
    """
    with open_source(folder) as source:
        yield CalibrationJob(source, read_texts(folder, texts, options), options, rounding)


@dataclass(frozen=True, slots=True)
class Rounding:
    """Round weights on the way, by GPTQ, as a quantization with these options stores them, into a folder."""

    options: QuantizeOptions
    folder: Path


class CalibrationJob:
    """A planned calibration of an open checkpoint in any layout and format that the runtime loads.

    Args:
        source: open until the run is over.
        text: what to run.
        options: how.
        rounding: also round weights; later layers, and the statistics, then see what the codes stand for.
    Attributes:
        memory: what it takes.
        provenance: what decides the statistics.
    Compute is fp32 whatever the checkpoint's dtype. The MTP layer is run as engines run it: on the final hidden state
    of each token and the embedding of the next one.
    """

    def __init__(
        self, source: Source, text: CalibrationText, options: CalibrateOptions, rounding: Rounding | None = None
    ) -> None:
        self.source, self.text, self.options, self.rounding = source, text, options, rounding
        self.recipes = {} if rounding is None else rounding_recipes(source, rounding.options)
        self.loader = ModelLoader(source, EngineConfig(dtype="float32", device=options.device))
        self.memory: MemoryPlan = plan_memory(self.loader, text, options, self.recipes)
        self.provenance: dict[str, Any] = {
            "model_digest": model_digest(source),
            "texts": list(text.texts),
            "num_tokens": text.num_tokens,
            "num_windows": len(text.windows),
            "context_length": options.context_length,
            "seed": options.seed,
            "min_expert_tokens": options.min_expert_tokens,
            "dtype": "float32",
            "device": options.device,
            "version": converters.__version__,
            **({"gptq": _recipes_digest(self.recipes)} if rounding is not None else {}),
        }

    @property
    def has_lost_rounded(self) -> bool:
        """Whether weights are to be rounded and no finished folder of them is there."""
        return self.rounding is not None and not (self.rounding.folder / MANIFEST).is_file()

    @property
    def read_bytes(self) -> int:
        """Bytes of weights that a run reads; rows of the embedding are not counted."""
        return self._layer_bytes(len(self.loader.model.model.layers))

    @property
    def identity(self) -> dict[str, Any]:
        """What another run must share to go on with the state of this one."""
        return job_identity(self.source, self.provenance, self.recipes)

    @property
    def state_bytes(self) -> int:
        """Most disk that the state of an unfinished run takes."""
        return state_bytes(self.text.num_tokens, self.source.config.hidden_size, len(self.source.schema.tensors))

    def _layer_bytes(self, num_layers: int) -> int:
        """Return the bytes of weights of so many layers from the first one on."""
        return sum(self.loader.stored_bytes(self.loader.layer_names(layer)) for layer in range(num_layers))

    @torch.inference_mode()
    def run(
        self,
        progress: Progress | None = None,
        on_layer: Callable[[LayerDone], None] | None = None,
        kept: CalibrationState | None = None,
    ) -> CalibrationStats:
        """Stream the model over the text and return what was measured.

        Args:
            progress: told of bytes and layers.
            on_layer: told of each layer that has passed in this run.
            kept: takes what was found after each layer; where an earlier run left any, this one goes on with it.
        Raises:
            InputError: a weight that cannot be decoded, or values that are not finite.
            ResourceError: no room for the scratch file, or for the state.
            UsageError: the state is another job's.
        """
        if self.rounding is None:
            return self._stream(self._start(progress, None), progress, on_layer, kept)
        writer = RoundedWriter(self.rounding.folder, can_resume=kept is not None)
        rounder = Rounder(self.loader, self.source, self.recipes, writer)
        with writer:
            stats = self._stream(self._start(progress, rounder), progress, on_layer, kept)
            writer.finish(self.provenance, self.recipes, rounder.errors, rounder.quality)
        return stats

    def _stream(
        self,
        stream: Stream,
        progress: Progress | None,
        on_layer: Callable[[LayerDone], None] | None,
        kept: CalibrationState | None,
    ) -> CalibrationStats:
        layers, mtp = self.loader.model.decoder_layers, self.loader.mtp
        steps = [*enumerate(layers), *([(len(layers), mtp)] if mtp is not None else [])]
        done = self._resume(stream, kept)
        stream.advance(self._layer_bytes(done))
        for layer, module in steps[done:]:
            if progress is not None:
                progress.describe(f"layer {layer + 1}/{len(steps)}")
            if module is mtp:
                self._prepare_mtp(stream)
            stream.run(layer, module)
            if kept is not None:
                kept.save(_point(stream, layer + 1), stream.hidden_TD if layer + 1 < len(steps) else None)
            if on_layer is not None:
                on_layer(LayerDone(layer, len(steps), _coverage(stream, layer)))
        return stream.record.stats(self.provenance)

    def _resume(self, stream: Stream, kept: CalibrationState | None) -> int:
        """Set a stream up where an earlier run stopped, or at its beginning; return the layers that have passed."""
        point = None if kept is None else self._point(stream, kept)
        if point is None:
            embed(self.source, self._token_ids(), stream.hidden_TD)
            if stream.rounder is not None:
                stream.rounder.writer.clear()
            return 0
        stream.record = point.record
        if stream.rounder is not None:
            stream.rounder.errors |= point.errors
            stream.rounder.quality |= point.quality
            stream.rounder.writer.digests |= point.rounded
        return point.num_layers

    def _point(self, stream: Stream, kept: CalibrationState) -> Point | None:
        """Return how far an earlier run came; None, and nothing of it is left, if what it kept is damaged."""
        try:
            point = kept.load(stream.hidden_TD)
            if point is not None and self.rounding is not None:
                prove_files(self.rounding.folder, point.rounded)
        except InputError as error:
            kept.tell(f"What an earlier run left is damaged, and this one begins anew. {error}")
            kept.clear()
            return None
        if point is not None:
            kept.tell(f"an earlier run finished {point.num_layers} layers; this one goes on")
        return point

    def _start(self, progress: Progress | None, rounder: Rounder | None) -> Stream:
        sizes = self.text.num_tokens, self.source.config.hidden_size
        scratch = (self.options.scratch or Path(tempfile.gettempdir())) if self.memory.hidden_on_disk else None
        return Stream(
            loader=self.loader,
            bounds=self.text.bounds,
            hidden_TD=token_matrix(*sizes, scratch),
            added_TD=token_matrix(*sizes, scratch),
            min_expert_tokens=self.options.min_expert_tokens,
            advance=progress.advance if progress is not None else lambda _: None,
            rounder=rounder,
        )

    def _token_ids(self) -> torch.Tensor:
        return torch.tensor([token for window in self.text.windows for token in window])

    def _prepare_mtp(self, stream: Stream) -> None:
        """Set a stream up for the MTP layer: final norm, embeddings of the next tokens, and no last token."""
        names = names_of(self.source, Role.NORM)
        self.loader.fill(names)
        for begin, end in stream.bounds:
            rows_RD = stream.hidden_TD[begin:end].to(self.options.device)
            stream.hidden_TD[begin:end] = self.loader.model.model.norm(rows_RD).cpu()
        self.loader.release(names)
        # the last token of a window gets another window's; it is not run
        embed(self.source, self._token_ids().roll(-1), stream.added_TD)
        stream.bounds = [(begin, end - 1) for begin, end in stream.bounds]


def _recipes_digest(recipes: Mapping[str, Recipe]) -> str:
    """Return sha256 over how each weight is stored."""
    value = {name: recipe_json(recipe) for name, recipe in recipes.items()}
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _point(stream: Stream, num_layers: int) -> Point:
    rounder = stream.rounder
    if rounder is None:
        return Point(num_layers, stream.record)
    return Point(num_layers, stream.record, rounder.errors, rounder.quality, rounder.writer.digests)


def _coverage(stream: Stream, layer: int) -> LayerCoverage | None:
    modules = {tensor.module for tensor in stream.loader.schema.tensors.values() if tensor.layer == layer}
    tokens = {name: count for name, count in stream.record.tokens.items() if name in modules}
    return next(iter(coverage(tokens, stream.record.filled)), None)
