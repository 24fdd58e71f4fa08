"""One layer over all tokens of the text, loaded part by part.

Windows are run one at a time and rows in blocks of constant size, so that neither the memory allowed nor how windows
are grouped changes a number. An expert runs once, on all of its tokens; results are added in the order of experts.

Shapes: T all tokens, D hidden, E experts, K experts per token, R rows at a time.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch

from converters.schema import Tensor
from runtime.calibrate.coverage import Routed, extra_tokens, fill_from_layer
from runtime.calibrate.meter import finite
from runtime.calibrate.parts import LayerParts, Part, layer_parts, metered
from runtime.calibrate.record import Record
from runtime.calibrate.rounder import Rounder
from runtime.model.decoder import DecoderLayer
from runtime.model.loader import ModelLoader
from runtime.model.mtp import MtpLayer
from runtime.moe.runner import MoE
from runtime.streaming.attention import WindowAttention, chunks
from runtime.streaming.experts import EXPERT_ROWS, add_weighted, normed_rows


@dataclass(slots=True)
class Stream:
    """The model's state between two layers.

    Args:
        loader: of the model; no layer is filled.
        bounds: begin and end of each window among the tokens.
        hidden_TD: (T, D) fp32 on the CPU, what goes into the next layer.
        added_TD: the same shape, for what the MLP adds.
        min_expert_tokens: see CalibrateOptions.
        advance: told the bytes read.
        rounder: rounds weights as the layers pass; None: they stay as they are.
    """

    loader: ModelLoader
    bounds: list[tuple[int, int]]
    hidden_TD: torch.Tensor
    added_TD: torch.Tensor
    min_expert_tokens: int
    advance: Callable[[int], None]
    rounder: Rounder | None = None
    record: Record = field(default_factory=Record)

    @property
    def num_tokens(self) -> int:
        """Tokens that go into the next layer."""
        return sum(end - begin for begin, end in self.bounds)

    def run(self, layer: int, module: DecoderLayer) -> None:
        """Run a layer: hidden_TD becomes what comes out of it.

        Raises:
            InputError: a weight that cannot be decoded, or values that are not finite.
        """
        parts = layer_parts(self.loader, layer)
        is_rounded = self.rounder is not None and self.rounder.begin(layer)
        with self._resident(parts.attention.names):
            if isinstance(module, MtpLayer):
                self._join(module)
            self._attention(layer, module, parts.attention)
            self._mlp(module, parts)
        if self.rounder is not None and is_rounded:
            self.rounder.end()

    @contextmanager
    def _resident(self, names: tuple[str, ...]) -> Iterator[None]:
        self.loader.fill(names, self.advance)
        try:
            yield
        finally:
            self.loader.release(names)

    def _rows(self, begin: int, end: int) -> torch.Tensor:
        return self.hidden_TD[begin:end].to(self._device)

    def _join(self, module: MtpLayer) -> None:
        """Put what the MTP layer runs on in place of the normed hidden state: joined with the next token's embedding.

        added_TD holds that embedding.
        """
        for begin, end in chunks(self.bounds):
            next_RD = self.added_TD[begin:end].to(self._device)
            joined = torch.cat([module.enorm(next_RD), module.hnorm(self._rows(begin, end))], dim=-1)
            self.hidden_TD[begin:end] = module.eh_proj(joined).cpu()

    def _attention(self, layer: int, module: DecoderLayer, part: Part) -> None:
        self._round(part, lambda: self._attend(module, write=False))
        with metered(self.loader, part, self.record):
            key_amax, value_amax = self._attend(module, write=True)
        self.record.key_amax[layer] = finite(key_amax, f"keys of layer {layer}")
        self.record.value_amax[layer] = finite(value_amax, f"values of layer {layer}")
        self._count(part.weights, self.num_tokens)

    def _round(self, part: Part, sweep: Callable[[], object]) -> None:
        """Round the weights of a part, if they are to be, on what they see in a sweep over the tokens."""
        if self.rounder is not None and self.rounder.wants(part):
            with self.rounder.rounding(part):
                sweep()

    def _attend(self, module: DecoderLayer, *, write: bool) -> tuple[float, float]:
        """Run attention over all windows and return the largest key and value; `write`: hidden_TD takes the result."""
        device = self._device
        longest = max(end - begin for begin, end in self.bounds)
        attention = WindowAttention(self.loader.model.config, longest, torch.float32, device)
        key_amax, value_amax = torch.zeros((), device=device), torch.zeros((), device=device)
        for window in self.bounds:
            attention.reset()
            for start, stop in chunks([window]):
                rows_1RD = self._rows(start, stop)[None]
                rows_1RD = rows_1RD + attention.run(module, rows_1RD)
                if write:
                    self.hidden_TD[start:stop] = rows_1RD[0].cpu()
            keys, values = attention.seen()
            key_amax = torch.maximum(key_amax, keys.abs().max())
            value_amax = torch.maximum(value_amax, values.abs().max())
        return float(key_amax), float(value_amax)

    def _mlp(self, module: DecoderLayer, parts: LayerParts) -> None:
        routed: list[Routed] = []
        with self._resident(parts.mlp.names):
            self._round(parts.mlp, lambda: self._common(module))
            with metered(self.loader, parts.mlp, self.record):
                routed += self._common(module)
        self._count(parts.mlp.weights, self.num_tokens)
        if isinstance(module.mlp, MoE):
            self._experts(module, module.mlp, parts, Routed.cat(routed))
        self.hidden_TD += self.added_TD

    def _common(self, module: DecoderLayer) -> list[Routed]:
        """Run what every token passes, the dense MLP or the shared expert, and return what the router decides."""
        routed = []
        for begin, end in chunks(self.bounds):
            normed_RD = module.post_attention_layernorm(self._rows(begin, end))
            dense = module.mlp
            if isinstance(dense, MoE):
                routed.append(Routed.of(dense.gate(normed_RD)))
                dense = dense.shared_experts
            self.added_TD[begin:end] = dense(normed_RD).cpu()
        return routed

    def _experts(self, module: DecoderLayer, moe: MoE, parts: LayerParts, routed: Routed) -> None:
        rows = torch.cat([torch.arange(begin, end) for begin, end in self.bounds])
        for index, (expert, part) in enumerate(zip(moe.experts, parts.experts, strict=True)):
            tokens, weights = routed.of_expert(index)
            extra = extra_tokens(routed, index, self.min_expert_tokens)
            with self._resident(part.names):
                seen = rows[torch.cat([tokens, extra])]
                self._round(part, partial(self._see, module, expert, seen))
                with metered(self.loader, part, self.record):
                    for block, scale in zip(tokens.split(EXPERT_ROWS), weights.split(EXPERT_ROWS), strict=True):
                        add_weighted(self._expert(module, expert, rows[block]), scale, rows[block], self.added_TD)
                    self._see(module, expert, rows[extra])
            self._count(part.weights, len(tokens))
            if len(extra):
                text = f"{len(tokens)} routed tokens and {len(extra)} more by router score"
                self.record.filled |= {weight.module: text for weight in part.weights}
        fill_from_layer(self.record, parts.experts)

    def _see(self, module: DecoderLayer, expert: torch.nn.Module, rows: torch.Tensor) -> None:
        """Run an expert on rows for those who watch it."""
        for block in rows.split(EXPERT_ROWS):
            self._expert(module, expert, block)

    def _expert(self, module: DecoderLayer, expert: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
        norm = module.post_attention_layernorm
        return expert(normed_rows(self.hidden_TD, rows, norm, torch.float32, self._device))

    @property
    def _device(self) -> str:
        return self.loader.engine.device

    def _count(self, weights: tuple[Tensor, ...], num_tokens: int) -> None:
        self.record.tokens |= {weight.module: num_tokens for weight in weights}
