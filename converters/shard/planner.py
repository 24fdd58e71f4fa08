"""What each rank of a mapping would hold, without cutting anything: weights, KV cache, and how to serve it."""

from collections.abc import Hashable
from dataclasses import dataclass

from converters.convert import ConvertOptions
from converters.layout import Stored
from converters.schema import Role
from converters.shard.cut import Cutter
from converters.shard.limits import Limit, check_mapping
from converters.shard.mapping import ParallelMapping, Placement, SharedExperts
from converters.shard.plan import balance, slice_units
from converters.shard.units import SliceUnits, part_bytes
from converters.source import Source

# keys and values in 16 bits
_KV_BYTES = 2


@dataclass(frozen=True, slots=True)
class RankMemory:
    """What one rank holds.

    Attributes:
        weight_bytes: with scales.
        expert_bytes: of them, routed experts.
        copied_bytes: of them, what other ranks of its stage have as well.
        kv_bytes_per_token: of the body's layers, in 16 bits.
        mtp_kv_bytes_per_token: of the MTP layer, where it drafts.
        kv_tokens: how many fit beside the weights into the memory given; None if none is.
    """

    rank: int
    stage: int
    first_layer: int
    num_layers: int
    weight_bytes: int
    expert_bytes: int
    copied_bytes: int
    kv_bytes_per_token: int
    mtp_kv_bytes_per_token: int
    kv_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class ParallelPlan:
    """All ranks, how even they are, and how engines are told.

    Attributes:
        balance: weights of the largest rank over the mean; 1 is even.
        gpu_memory: bytes that each rank has; None if not said.
        flags: command line by engine; empty where it cannot have this mapping, and then `reasons` has why.
    """

    mapping: ParallelMapping
    ranks: tuple[RankMemory, ...]
    balance: float
    gpu_memory: int | None
    limits: tuple[Limit, ...]
    flags: dict[str, str]
    reasons: dict[str, str]


def plan_ranks(source: Source, mapping: ParallelMapping, gpu_memory: int | None = None) -> ParallelPlan:
    """Return what the ranks hold.

    Args:
        source: its headers are enough.
        mapping: the ranks.
        gpu_memory: bytes that a rank has for weights, cache and everything else.
    Raises:
        MappingRefused: a size does not fit.
    """
    planner, layout = slice_units(source, source.layout, ConvertOptions()), source.layout
    wholes = planner.target.stored
    limits = check_mapping(planner, wholes.values(), mapping, layout)
    mapping = balance(planner, source.schema, mapping)
    cutter = Cutter(source.schema, mapping, layout)
    sizes, experts, copied = ([0] * mapping.world_size for _ in range(3))
    shares = _Shares(cutter, planner)
    for whole in wholes.values():
        is_expert = whole.elements[0][0].tensor.spec.role is Role.EXPERT
        for stage in cutter.stages(whole):
            for holders, nbytes in shares.of(whole):
                for tp in holders:
                    rank = stage * mapping.tp + tp
                    sizes[rank] += nbytes
                    experts[rank] += nbytes * is_expert
                    copied[rank] += nbytes * (len(holders) > 1)
    ranks = tuple(
        _rank_memory(source, mapping, index, (sizes[index], experts[index], copied[index]), gpu_memory)
        for index in range(mapping.world_size)
    )
    reasons = _reasons(mapping)
    flags = {engine: "" if engine in reasons else line for engine, line in serving_flags(mapping).items()}
    even = max(sizes) * len(sizes) / max(1, sum(sizes))
    return ParallelPlan(mapping, ranks, even, gpu_memory, limits, flags, reasons)


class _Shares:
    """Bytes of the slices of stored tensors; of thousands of experts, those of one rank are alike."""

    def __init__(self, cutter: Cutter, planner: SliceUnits) -> None:
        self._cutter = cutter
        self._planner = planner
        self._found: dict[Hashable, list[tuple[tuple[int, ...], int]]] = {}

    def of(self, whole: Stored) -> list[tuple[tuple[int, ...], int]]:
        """Return the slices of a tensor within a stage: the tp ranks that have each, and its bytes."""
        parts, tp = self._planner.parts(whole), self._cutter.mapping.tp
        first = whole.elements[0][0].tensor
        key = first.spec.name, len(whole.elements[0]), parts, self._cutter.owners(whole)
        if key not in self._found:
            stage = self._cutter.stages(whole)[0]
            self._found[key] = [
                (
                    tuple(rank % tp for rank in own.ranks if rank // tp == stage),
                    sum(part_bytes(own.stored, part) for part in parts),
                )
                for own in self._cutter.slices(whole)
            ]
        return self._found[key]


def _rank_memory(
    source: Source, mapping: ParallelMapping, index: int, sizes: tuple[int, int, int], gpu_memory: int | None
) -> RankMemory:
    rank, config = mapping.rank(index), source.config
    heads = max(1, config.num_key_value_heads // mapping.tp)
    per_layer = 2 * heads * config.head_dim * _KV_BYTES
    layers = mapping.stages[rank.stage]
    has_mtp = source.schema.has_mtp and rank.stage == mapping.pp - 1
    per_token = per_layer * layers
    tokens = None if gpu_memory is None else max(0, gpu_memory - sizes[0]) // (per_token + per_layer * has_mtp)
    first = sum(mapping.stages[: rank.stage])
    return RankMemory(index, rank.stage, first, layers, *sizes, per_token, per_layer * has_mtp, tokens)


def serving_flags(mapping: ParallelMapping) -> dict[str, str]:
    """Return the part of each engine's command line that says how it is parallel.

    Source: `vllm serve` 0.32, `sglang.launch_server` 0.5.23, `trtllm-serve` of TensorRT-LLM 1.x.
    """
    partition = ",".join(map(str, mapping.stages))
    vllm = [f"--tensor-parallel-size {mapping.tp}"]
    sglang = [f"--tp-size {mapping.tp}"]
    tensorrt = [f"--tp_size {mapping.tp}"]
    if mapping.ep > 1:
        vllm.append("--enable-expert-parallel")
        sglang.append(f"--ep-size {mapping.ep}")
        tensorrt.append(f"--ep_size {mapping.ep}")
    if mapping.redundant_experts:
        config = f'{{"num_redundant_experts": {mapping.redundant_experts}}}'
        vllm.append(f"--enable-eplb --eplb-config '{config}'")
        sglang.append(f"--ep-num-redundant-experts {mapping.redundant_experts}")
    if mapping.pp > 1:
        vllm = [f"VLLM_PP_LAYER_PARTITION={partition}", *vllm, f"--pipeline-parallel-size {mapping.pp}"]
        sglang = [f"SGLANG_PP_LAYER_PARTITION={partition}", *sglang, f"--pp-size {mapping.pp}"]
        tensorrt.append(f"--pp_size {mapping.pp}")
    return {"vLLM": " ".join(vllm), "SGLang": " ".join(sglang), "TensorRT-LLM": " ".join(tensorrt)}


def _reasons(mapping: ParallelMapping) -> dict[str, str]:
    """Return why an engine cannot have this mapping, by engine."""
    found: dict[str, str] = {}
    if mapping.ep not in (1, mapping.tp):
        found["vLLM"] = f"its expert parallelism has all ranks of tensor parallelism: --ep 1 or {mapping.tp}"
    if mapping.placement is Placement.ROUND_ROBIN and mapping.ep > 1:
        found["vLLM"] = "it deals experts round-robin only to models with several expert groups"
        found["SGLang"] = "it places experts contiguously, or as a file of its own says"
        found["TensorRT-LLM"] = "it places experts contiguously, or as its load balancer's file says"
    elif mapping.redundant_experts:
        found["TensorRT-LLM"] = "redundant experts are set in its load balancer's file, not by an option"
    if mapping.shared_experts is SharedExperts.REPLICATE and mapping.tp > 1:
        found["vLLM"] = "it cuts the shared expert over all ranks"
    return found
