"""What is measured of each layer as the lanes of a comparison pass through it.

Shapes: R rows, D hidden, E experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from runtime.moe.router import Routing
from runtime.streaming.rows import RowPlan
from runtime.streaming.watch import Values
from runtime.verify.finite import FiniteWatch
from runtime.verify.layer_metrics import ExpertSum, OutputErrorSum, RouterSum, ScoreChange
from runtime.verify.results import EndsDifference, LayerDifference, OutputError

# names of lanes: both models on their own states, the candidate on the reference's, and the reference with noise
REFERENCE, CANDIDATE, FORCED, FLOOR, NOISY = "reference", "candidate", "forced", "floor", "noisy"
_WORDS = {REFERENCE: "reference", FORCED: "candidate", CANDIDATE: "candidate, on its own states"}


@dataclass(slots=True)
class _Error:
    """Outputs of two lanes, and those of two that show the floor."""

    lanes: tuple[str, str]
    floor_lanes: tuple[str, str]
    error: OutputErrorSum = field(default_factory=OutputErrorSum)
    floor: OutputErrorSum = field(default_factory=OutputErrorSum)

    def add(self, tokens_R: torch.Tensor, values: Values) -> None:
        for sums, (ours, theirs) in ((self.error, self.lanes), (self.floor, self.floor_lanes)):
            if theirs in values:
                sums.add(values[ours], values[theirs], tokens_R)

    @property
    def floor_relative(self) -> float | None:
        return self.floor.relative if self.floor.num_tokens else None


def _forced() -> _Error:
    return _Error((REFERENCE, FORCED), (REFERENCE, FLOOR))


def _free() -> _Error:
    return _Error((REFERENCE, CANDIDATE), (REFERENCE, NOISY))


@dataclass(slots=True)
class _Layer:
    """Sums of the layer at hand."""

    layer: int
    is_mtp: bool
    experts: ExpertSum
    attention: _Error = field(default_factory=_forced)
    normed: _Error = field(default_factory=_forced)
    mlp: _Error = field(default_factory=_forced)
    residual: _Error = field(default_factory=_free)
    router: RouterSum = field(default_factory=RouterSum)
    router_own: RouterSum = field(default_factory=RouterSum)
    router_floor: RouterSum = field(default_factory=RouterSum)
    change: ScoreChange = field(default_factory=ScoreChange)
    change_own: ScoreChange = field(default_factory=ScoreChange)

    def result(self, non_finite: Mapping[str, str]) -> LayerDifference:
        has_router = bool(self.router.num_tokens)
        floor = self.router_floor.weight_moved if self.router_floor.num_tokens else None
        experts = self.experts.result() if has_router else ()
        return LayerDifference(
            layer=self.layer,
            is_mtp=self.is_mtp,
            attention=self.attention.error.result(self.attention.floor_relative),
            mlp=self.mlp.error.result(self.mlp.floor_relative),
            residual=self.residual.error.result(self.residual.floor_relative),
            router=self.router.result(self.change.margin_limit(), floor) if has_router else None,
            router_own=self.router_own.result(self.change_own.margin_limit()) if has_router else None,
            experts=experts if any(expert.num_tokens for expert in experts) else (),
            # the reference's own fault is the candidate's in any case, and what came in is no fault of this layer
            first_non_finite=next((non_finite[lane] for lane in _WORDS if lane in non_finite), None),
            mlp_norm=self.normed.error.result(self.normed.floor_relative),
        )


class LayerWatch(FiniteWatch):
    """Measures every layer.

    Args:
        plan: which token is in which row.
        num_experts: of a layer.
    Attributes:
        layers: those that are done.
    """

    def __init__(self, plan: RowPlan, num_experts: int) -> None:
        super().__init__(plan, _WORDS)
        self._num_experts = num_experts
        self._now = _Layer(0, False, ExpertSum(0))
        self._embedding, self._final, self._mtp_norm = OutputErrorSum(), OutputErrorSum(), OutputErrorSum()
        self.layers: list[LayerDifference] = []

    def begin(self, layer: int, *, is_mtp: bool) -> None:
        """Start the sums of a layer."""
        super().begin(layer, is_mtp=is_mtp)
        self._now = _Layer(layer, is_mtp, ExpertSum(self._num_experts))

    def inputs(self, rows_R: torch.Tensor, inputs: Values) -> None:
        """Measure the embeddings, which the first layer is given."""
        super().inputs(rows_R, inputs)
        if self._now.layer == 0:
            self._embedding.add(inputs[REFERENCE], inputs[CANDIDATE], self.tokens(rows_R))

    def attention(self, rows_R: torch.Tensor, outputs: Values) -> None:
        """Measure attention."""
        super().attention(rows_R, outputs)
        self._now.attention.add(self.tokens(rows_R), outputs)

    def normed(self, rows_R: torch.Tensor, outputs: Values) -> None:
        """Measure the norm in front of the MLP."""
        super().normed(rows_R, outputs)
        self._now.normed.add(self.tokens(rows_R), outputs)

    def routers(self, rows_R: torch.Tensor, routings: Mapping[str, Routing], biases: Values) -> None:
        """Measure routers."""
        super().routers(rows_R, routings, biases)
        now, tokens_R, ours = self._now, self.tokens(rows_R), routings[REFERENCE]
        now.router.add(ours, routings[FORCED], biases[REFERENCE], tokens_R)
        now.router_own.add(ours, routings[CANDIDATE], biases[REFERENCE], tokens_R)
        if FLOOR in routings:
            now.router_floor.add(ours, routings[FLOOR], biases[REFERENCE], tokens_R)
        now.experts.add_candidate(routings[CANDIDATE].topk_ids_TK)
        for change, noisy in ((now.change, FLOOR), (now.change_own, NOISY)):
            if noisy in routings:
                change.add(ours.router_logits_TE, routings[noisy].router_logits_TE)

    def expert(self, expert: int, rows_R: torch.Tensor, outputs: Values) -> None:
        """Measure an expert."""
        super().expert(expert, rows_R, outputs)
        if FORCED in outputs:
            self._now.experts.add(expert, outputs[REFERENCE], outputs[FORCED], self.tokens(rows_R))

    def mlp(self, rows_R: torch.Tensor, outputs: Values) -> None:
        """Measure the MLP."""
        super().mlp(rows_R, outputs)
        self._now.mlp.add(self.tokens(rows_R), outputs)

    def states(self, rows_R: torch.Tensor, states: Values) -> None:
        """Measure what leaves the layer."""
        super().states(rows_R, states)
        self._now.residual.add(self.tokens(rows_R), states)

    def final(self, rows_R: torch.Tensor, outputs: Values) -> None:
        """Measure the norm behind the last layer, or behind the MTP layer."""
        sums = self._mtp_norm if self._now.is_mtp else self._final
        sums.add(outputs[REFERENCE], outputs[FORCED], self.tokens(rows_R))

    def ends(self, head: OutputError) -> EndsDifference:
        """Return what lies in front of the layers and behind them, once all of them are done."""
        mtp_norm = self._mtp_norm.result() if self._mtp_norm.num_tokens else None
        return EndsDifference(self._embedding.result(), self._final.result(), head, mtp_norm)

    def end(self) -> None:
        """Take the layer's figures."""
        self.layers.append(self._now.result(self.of_layer))
