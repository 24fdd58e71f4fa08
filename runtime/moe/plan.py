"""What multiplies the experts of a model, layer by layer; decided once, before any weight is read."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from runtime.moe.weights import ExpertScheme

AUTO = "auto"
VANILLA, BATCHED, CUTLASS, TRITON = BACKENDS = ("vanilla", "batched", "cutlass", "triton")


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """How a layer's experts are held in grouped layout.

    Args:
        scheme: of its weights in memory.
        num_shared: 1: its shared expert is one of them.
        multiplies_codes: inputs are rounded to codes that kernels multiply with the weights' codes.
    """

    scheme: ExpertScheme
    num_shared: int = 0
    multiplies_codes: bool = False


@dataclass(frozen=True, slots=True)
class MoePlan:
    """The backend, and what it finds in each MoE layer.

    Args:
        backend: one of BACKENDS.
        layers: plans of all MoE layers, the MTP layer's too; none for the vanilla backend, whose experts are modules.
        is_batch_invariant: the result of a token does not depend on what it is batched with.
        notes: what was decided, and why, a sentence each.
    """

    backend: str = VANILLA
    layers: Mapping[int, LayerPlan] = field(default_factory=dict)
    is_batch_invariant: bool = False
    notes: tuple[str, ...] = ()


VANILLA_PLAN = MoePlan()
