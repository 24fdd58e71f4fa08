"""Which rank holds what: sizes of tensor, expert and pipeline parallelism, and where experts and layers go.

Ranks are numbered as TensorRT-LLM numbers them: rank = stage * tp + tp rank. Expert parallelism divides the ranks of a
stage: `moe_tp * ep = tp`, with moe_ep rank = tp rank % ep and moe_tp rank = tp rank // ep.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import accumulate
from typing import Any

from converters.errors import InputError, UsageError


class Placement(StrEnum):
    """How experts are dealt to the ranks of expert parallelism."""

    CONTIGUOUS = "contiguous"
    ROUND_ROBIN = "round-robin"


class SharedExperts(StrEnum):
    """What a rank has of the shared expert."""

    SPLIT = "split"  # its slice: the output is a partial sum
    REPLICATE = "replicate"  # all of it: the output is complete and must be added once


@dataclass(frozen=True, slots=True)
class Rank:
    """Where one process stands."""

    index: int
    stage: int
    tp: int
    moe_tp: int
    moe_ep: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelMapping:
    """Sizes and choices.

    Attributes:
        tp: ranks that a layer is cut over.
        ep: ranks that the routed experts are dealt to; it divides tp.
        pp: stages.
        redundant_experts: slots beyond the routed experts, filled with copies; over all ranks of ep.
        stages: layers of the body that each stage has; empty until they are balanced.
    """

    tp: int = 1
    ep: int = 1
    pp: int = 1
    placement: Placement = Placement.CONTIGUOUS
    redundant_experts: int = 0
    shared_experts: SharedExperts = SharedExperts.SPLIT
    stages: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Refuse sizes that contradict each other; what the model allows is looked at elsewhere."""
        if min(self.tp, self.ep, self.pp) < 1 or self.redundant_experts < 0:
            raise UsageError("--tp, --ep, --pp", expected="sizes from 1", found=f"{self.tp}, {self.ep}, {self.pp}")
        if self.tp % self.ep:
            sizes = [size for size in range(1, self.tp + 1) if self.tp % size == 0]
            raise UsageError(
                f"--ep {self.ep}",
                expected=f"one of {', '.join(map(str, sizes))}: experts are dealt to the {self.tp} ranks of --tp",
                found=f"{self.tp} ranks, which do not divide by {self.ep}",
                next_step="moe_tp * ep = tp: what is left of tp cuts the experts of an ep rank.",
            )
        if self.redundant_experts and self.ep == 1:
            raise UsageError("--redundant-experts", expected="--ep above 1", found="one rank that has all experts")

    @property
    def moe_tp(self) -> int:
        """Ranks that one expert is cut over."""
        return self.tp // self.ep

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tp * self.pp

    def rank(self, index: int) -> Rank:
        """Return where a rank stands."""
        stage, tp = divmod(index, self.tp)
        return Rank(index, stage, tp, tp // self.ep, tp % self.ep)

    def ranks(self) -> Iterator[Rank]:
        """Yield all ranks."""
        return map(self.rank, range(self.world_size))

    def balanced(self, stages: Sequence[int]) -> "ParallelMapping":
        """Return the same mapping with its stages filled in."""
        assert len(stages) == self.pp, (stages, self.pp)
        return replace(self, stages=tuple(stages))

    def stage_of(self, layer: int) -> int:
        """Return the stage of a layer of the body; layers after it, the MTP layer, are on the last."""
        ends = accumulate(self.stages)
        return next((stage for stage, end in enumerate(ends) if layer < end), self.pp - 1)

    def slots(self, num_experts: int) -> list[list[int]]:
        """Return, for each rank of ep, the experts in its slots, in order; no rank has one twice.

        Redundant slots come after the routed ones in the numbering of slots and hold copies from the first expert on,
        as vLLM fills them at the start; dealt round-robin, they begin where no copy meets its original.
        """
        total = num_experts + self.redundant_experts
        shift = int(self.placement is Placement.ROUND_ROBIN and num_experts % self.ep == 0)
        experts = [*range(num_experts), *((slot + shift) % num_experts for slot in range(self.redundant_experts))]
        if self.placement is Placement.ROUND_ROBIN:
            return [experts[rank :: self.ep] for rank in range(self.ep)]
        held = total // self.ep
        return [experts[rank * held : (rank + 1) * held] for rank in range(self.ep)]

    def as_json(self) -> dict[str, Any]:
        """Return the mapping for the manifest."""
        return {
            "tp": self.tp,
            "ep": self.ep,
            "pp": self.pp,
            "moe_tp": self.moe_tp,
            "expert_placement": str(self.placement),
            "redundant_experts": self.redundant_experts,
            "shared_expert": str(self.shared_experts),
            "layers_of_stages": list(self.stages),
        }

    @classmethod
    def from_json(cls, value: Any) -> "ParallelMapping":
        """Read what `as_json` wrote.

        Raises:
            InputError: it is something else.
        """
        try:
            return cls(
                **{name: _size(value, name) for name in ("tp", "ep", "pp", "redundant_experts")},
                placement=Placement(value["expert_placement"]),
                shared_experts=SharedExperts(value["shared_expert"]),
                stages=tuple(map(int, value["layers_of_stages"])),
            )
        except (KeyError, TypeError, ValueError, UsageError) as error:
            raise InputError(
                "manifest: mapping", expected="sizes and places of ranks", found=repr(value)[:200]
            ) from error


def _size(value: Mapping[str, Any], name: str) -> int:
    size = value[name]
    # a hostile manifest must not make us list the ranks of a planet
    if type(size) is not int or not 0 <= size <= 1 << 16:
        raise ValueError(name)
    return size
