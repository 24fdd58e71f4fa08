"""All lanes through one layer, part by part.

Attention runs window by window. Experts run on all tokens of a lane at a time, or, in deterministic mode, on those of
one window, which is what the model in memory does. Lanes are never joined into one product: two that have the same
weights and inputs have the same outputs, bit for bit.

Shapes: R rows at a time, D hidden, E experts.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest

import torch

from runtime.model.decoder import DecoderLayer
from runtime.model.mlp import GatedMlp
from runtime.model.mtp import MtpLayer
from runtime.model.norm import RMSNorm
from runtime.moe.router import Routing
from runtime.moe.runner import MoE
from runtime.streaming.attention import CHUNK_TOKENS, Bounds, WindowAttention, attend_whole, chunks
from runtime.streaming.embedding import embed
from runtime.streaming.experts import EXPERT_ROWS, ExpertCall, ExpertRows, add_weighted, normed_rows, run_expert
from runtime.streaming.lanes import Lane
from runtime.streaming.reading import ReadAhead
from runtime.streaming.routed import Routed
from runtime.streaming.rows import RowPlan
from runtime.streaming.watch import Watcher


class LayerRun:
    """Runs layers one after the other; the weights come from `reads`, in the order of `plan_batches`.

    Args:
        lanes: a leader before those it leads.
        plan: which token is in which row.
        reads: hands out the weights.
        watcher: told of everything.
        deterministic: compute as the model in memory does.
    """

    def __init__(
        self, lanes: Sequence[Lane], plan: RowPlan, reads: ReadAhead, watcher: Watcher, *, deterministic: bool
    ) -> None:
        self._lanes, self._plan, self._reads, self._watcher = lanes, plan, reads, watcher
        self._deterministic, self._layer = deterministic, 0
        self._chunk = plan.longest if deterministic else CHUNK_TOKENS
        engine = lanes[0].side.loader.engine
        self._dtype, self._device = engine.torch_dtype, engine.device

    def run(self, layer: int, *, is_mtp: bool = False) -> None:
        """Run the next layer.

        Raises:
            InputError: a weight that cannot be read or decoded.
        """
        self._layer = layer
        modules = {lane.side.name: lane.side.layer(layer) for lane in self._lanes}
        bounds = self._plan.mtp_bounds if is_mtp else self._plan.bounds
        self._watcher.begin(layer, is_mtp=is_mtp)
        with self._reads.resident():
            self._attend(modules, bounds)
            with self._reads.resident():
                self._route(modules, bounds)
                self._reads.narrow(layer, self._needed())
                rows = torch.cat([torch.arange(begin, end) for begin, end in bounds])
                while (batch := self._reads.peek()) is not None and batch.experts:
                    with self._reads.resident():
                        self._experts(modules, batch.experts, rows)
                self._finish(modules, bounds)
            if is_mtp:
                self._norm(bounds, {name: _mtp(module).shared_head.norm for name, module in modules.items()})
        self._watcher.end()

    def norm(self) -> None:
        """Put the final norm, the next weights, to the hidden states of the free lanes, and show what others make."""
        with self._reads.resident():
            norms = {lane.side.name: lane.side.loader.model.model.norm for lane in self._lanes}
            self._norm(self._plan.bounds, norms)

    def _norm(self, bounds: Bounds, norms: Mapping[str, RMSNorm]) -> None:
        for begin, end in chunks(bounds, self._chunk):
            lanes = [lane for lane in self._active(end) if lane.is_free or lane.shares_state]
            outputs: dict[str, torch.Tensor] = {}
            for lane in lanes:
                if lane.replay is not None:
                    outputs[lane.name] = lane.replay.final(begin, end)
                else:
                    outputs[lane.name] = norms[lane.side.name](self._rows(lane.state_TD, begin, end))
            self._watcher.final(torch.arange(begin, end), outputs)
            for lane in lanes:
                if lane.is_free:
                    lane.state_TD[begin:end] = outputs[lane.name].to(lane.state_TD)

    def _active(self, end: int) -> list[Lane]:
        return [lane for lane in self._lanes if end <= lane.num_rows]

    def _rows(self, matrix_TD: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        return matrix_TD[begin:end].to(device=self._device, dtype=self._dtype)

    def _attend(self, modules: dict[str, DecoderLayer], bounds: Bounds) -> None:
        longest = max((end - begin for begin, end in bounds), default=0)
        caches: dict[str, WindowAttention] = {}
        if longest > self._chunk:
            caches = {
                lane.name: WindowAttention(lane.side.source.config, longest, self._dtype, self._device)
                for lane in self._lanes
                if lane.replay is None
            }
        for window in bounds:
            for cache in caches.values():
                cache.reset()
            for begin, end in chunks([window], self._chunk):
                self._attend_chunk(modules, caches, (begin, end), is_whole=(begin, end) == window)

    def _attend_chunk(
        self,
        modules: dict[str, DecoderLayer],
        caches: dict[str, WindowAttention],
        span: tuple[int, int],
        *,
        is_whole: bool,
    ) -> None:
        begin, end = span
        rows, lanes = torch.arange(begin, end), self._active(end)
        given = self._given(modules, lanes, begin, end)
        self._watcher.inputs(rows, {lane.name: given[lane.name][0] for lane in lanes if lane.is_free})
        outputs: dict[str, torch.Tensor] = {}
        for lane in lanes:
            module, given_1RD = modules[lane.side.name], given[lane.name]
            if lane.replay is not None:
                outputs[lane.name] = lane.replay.attention(self._layer, begin, end)[None]
            elif is_whole:
                outputs[lane.name] = attend_whole(lane.side.source.config, module, given_1RD)
            else:
                outputs[lane.name] = caches[lane.name].run(module, given_1RD)
        self._watcher.attention(rows, {name: out_1RD[0] for name, out_1RD in outputs.items()})
        for lane in lanes:
            if lane.is_free:
                lane.state_TD[begin:end] = (given[lane.name] + outputs[lane.name])[0].to(lane.state_TD)

    def _given(
        self, modules: dict[str, DecoderLayer], lanes: Sequence[Lane], begin: int, end: int
    ) -> dict[str, torch.Tensor]:
        """Return what each lane's attention is given, (1, R, D), by name."""
        given: dict[str, torch.Tensor] = {}
        embedded: dict[str, torch.Tensor] = {}
        for lane in lanes:
            rows_RD = self._rows(lane.owner.input_TD, begin, end)
            if lane.noise is not None and not lane.is_free:
                rows_RD = lane.noise(rows_RD)
            module, owner = modules[lane.side.name], lane.owner.side
            if isinstance(module, MtpLayer):
                if owner.name not in embedded:
                    next_RD = torch.empty_like(rows_RD)
                    embed(owner.source, self._plan.ids[begin + 1 : end + 1], next_RD, self._dtype)
                    embedded[owner.name] = next_RD
                joined = torch.cat([module.enorm(embedded[owner.name]), module.hnorm(rows_RD)], dim=-1)
                rows_RD = module.eh_proj(joined[None])[0]
            given[lane.name] = rows_RD[None]
        return given

    def _normed(self, modules: dict[str, DecoderLayer], lane: Lane, begin: int, end: int) -> torch.Tensor:
        """Return what a lane's MLP is given: a forced lane what its leader's norm makes of its leader's state."""
        out_RD: torch.Tensor = self._mlp_norm(modules, lane.owner)(self._rows(lane.state_TD, begin, end))
        return out_RD

    def _mlp_norm(self, modules: dict[str, DecoderLayer], lane: Lane) -> RMSNorm:
        if lane.replay is not None:
            return lane.replay.mlp_norm(self._layer)
        norm = modules[lane.side.name].post_attention_layernorm
        assert isinstance(norm, RMSNorm), norm
        return norm

    def _route(self, modules: dict[str, DecoderLayer], bounds: Bounds) -> None:
        """Ask the routers, and clear the sums of the experts' results; a layer without experts has nothing to ask."""
        routed: dict[str, list[Routed]] = {lane.name: [] for lane in self._lanes}
        for begin, end in chunks(bounds, self._chunk):
            rows, routings, normed = torch.arange(begin, end), dict[str, Routing](), dict[str, torch.Tensor]()
            for lane in self._active(end):
                module = modules[lane.side.name]
                if lane.noise is not None and not lane.is_free:
                    lane.state_TD[begin:end] = lane.noise(lane.owner.state_TD[begin:end])
                given_RD = self._normed(modules, lane, begin, end)
                normed[lane.name] = given_RD
                if lane.shares_state:
                    normed[lane.name] = module.post_attention_layernorm(self._rows(lane.state_TD, begin, end))
                if isinstance(module.mlp, MoE):
                    kept = lane.replay
                    gate = module.mlp.gate
                    routings[lane.name] = gate(given_RD) if kept is None else kept.routing(self._layer, begin, end)
                    if lane.is_free:
                        routed[lane.name].append(Routed.of(routings[lane.name]))
            self._watcher.normed(rows, normed)
            if routings:
                biases = {lane.name: self._bias(modules, lane) for lane in self._active(end)}
                self._watcher.routers(rows, routings, biases)
        for lane in self._lanes:
            own = routed[lane.name]
            lane.routed = Routed.cat(own) if own else None
            lane.added_TD.zero_()

    def _bias(self, modules: dict[str, DecoderLayer], lane: Lane) -> torch.Tensor:
        if lane.replay is not None:
            return lane.replay.bias(self._layer)
        moe = modules[lane.side.name].mlp
        assert isinstance(moe, MoE), moe
        return moe.gate.e_score_correction_bias

    def _needed(self) -> list[frozenset[int]]:
        """Return the experts that some token of a lane of each side goes to."""
        experts: dict[str, set[int]] = {lane.side.name: set() for lane in self._lanes}
        for lane in self._lanes:
            if lane.owner.routed is not None and lane.replay is None:
                experts[lane.side.name].update(lane.owner.routed.topk_ids_TK.unique().tolist())
        return [frozenset(found) for found in experts.values()]

    def _experts(self, modules: dict[str, DecoderLayer], experts: range, rows: torch.Tensor) -> None:
        leaders = [lane for lane in self._lanes if lane.is_free]
        for expert in experts:
            for blocks in zip_longest(*(self._blocks(leader, expert, rows) for leader in leaders)):
                calls = [
                    call
                    for leader, block in zip(leaders, blocks, strict=True)
                    if block is not None
                    for call in self._calls(modules, leader, block)
                ]
                self._call(modules, expert, calls)

    def _calls(self, modules: dict[str, DecoderLayer], leader: Lane, block: ExpertRows) -> Iterator[ExpertCall]:
        """Yield what an expert is given by a leader and by those it leads, the leader first."""
        norm = self._mlp_norm(modules, leader)
        shared_RD = normed_rows(leader.state_TD, block.rows, norm, self._dtype, self._device)
        led = [lane for lane in self._lanes if lane.leader is leader]
        for lane in led if leader.replay is not None else [leader, *led]:
            if lane is leader or lane.shares_state:
                yield ExpertCall(lane, block, shared_RD)
                continue
            kept = block.of(block.rows < lane.num_rows)
            if len(kept.rows):
                yield ExpertCall(lane, kept, normed_rows(lane.state_TD, kept.rows, norm, self._dtype, self._device))

    def _call(self, modules: dict[str, DecoderLayer], expert: int, calls: Sequence[ExpertCall]) -> None:
        """Run an expert of each side on what its lanes give it, add the results, and show those of a leader's rows."""
        outputs: dict[str, torch.Tensor] = {}
        for side in dict.fromkeys(call.lane.side.name for call in calls):
            own, moe = [call for call in calls if call.lane.side.name == side], modules[side].mlp
            assert isinstance(moe, MoE), moe
            found = run_expert(moe.experts[expert], [call.given_RD for call in own])
            outputs |= {call.lane.name: out_RD for call, out_RD in zip(own, found, strict=True)}
        for call in calls:
            add_weighted(outputs[call.lane.name], call.block.weights, call.block.rows, call.lane.added_TD)
        for leader in (call for call in calls if call.lane.is_free):
            same = [call for call in calls if call.lane.owner is leader.lane and call.given_RD is leader.given_RD]
            shown = {call.lane.name: outputs[call.lane.name] for call in same}
            self._watcher.expert(expert, leader.block.rows, shown)

    def _blocks(self, lane: Lane, expert: int, rows: torch.Tensor) -> Iterator[ExpertRows]:
        """Yield a lane's rows for an expert, and their weights: of one window at a time, or a constant number."""
        assert lane.routed is not None, lane.name
        tokens, weights = lane.routed.of_expert(expert)
        found = ExpertRows(rows[tokens], weights)
        if not self._deterministic:
            yield from found.split(EXPERT_ROWS) if len(tokens) else ()
            return
        for begin, end in self._plan.bounds:
            inside = (found.rows >= begin) & (found.rows < end)
            if bool(inside.any()):
                yield found.of(inside)

    def _finish(self, modules: dict[str, DecoderLayer], bounds: Bounds) -> None:
        """Add the dense MLP's result, or the experts' and the shared expert's, to the hidden states."""
        for begin, end in chunks(bounds, self._chunk):
            rows, lanes = torch.arange(begin, end), self._active(end)
            outputs = {lane.name: self._mlp(modules, lane, begin, end) for lane in lanes}
            self._watcher.mlp(rows, outputs)
            states: dict[str, torch.Tensor] = {}
            for lane in lanes:
                if lane.is_free:
                    state_RD = self._rows(lane.state_TD, begin, end) + outputs[lane.name]
                    states[lane.name] = state_RD if lane.noise is None else lane.noise(state_RD)
                    lane.state_TD[begin:end] = states[lane.name].to(lane.state_TD)
            self._watcher.states(rows, states)

    def _mlp(self, modules: dict[str, DecoderLayer], lane: Lane, begin: int, end: int) -> torch.Tensor:
        if lane.replay is not None:
            return lane.replay.mlp(self._layer, begin, end)
        normed_RD, mlp = self._normed(modules, lane, begin, end), modules[lane.side.name].mlp
        if isinstance(mlp, GatedMlp):
            dense_1RD: torch.Tensor = mlp(normed_RD[None])
            return dense_1RD[0]
        assert isinstance(mlp, MoE), mlp
        out_RD: torch.Tensor = self._rows(lane.added_TD, begin, end) + mlp.shared_experts(normed_RD)
        return out_RD


def _mtp(module: DecoderLayer) -> MtpLayer:
    assert isinstance(module, MtpLayer), module
    return module
