"""How much memory a calibration takes, from sizes alone, and what of it goes to disk.

What stays whatever the length of the text: the weights of the largest part of a layer, in fp32, and what one block of
rows needs on its way through it. What grows with the text: two rows of fp32 a token, which may lie in a scratch file,
and the decisions of one router.
"""

from collections.abc import Container
from dataclasses import dataclass

from runtime.calibrate.options import CalibrateOptions
from runtime.calibrate.parts import LayerParts, Part, layer_parts
from runtime.calibrate.text import CalibrationText
from runtime.model.loader import ModelLoader
from runtime.streaming.memory import activation_bytes, fitted

_FP32 = 4
_INT64 = 8
_FP64 = 8
# an activation, its magnitudes, and their places in the histogram
_METER_BYTES = _FP32 + 16
# of a weight that is rounded: as stored, widened, in order, as codes, as what they stand for, its error in fp64
_WEIGHT_COPIES = 8


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes at the peak, by what they are for.

    Args:
        weights: the parts of a layer that are loaded at once, and one of their weights as it is read or decoded.
        activations: of one block of rows.
        routing: of one layer's router.
        rounding: of GPTQ: what is gathered of the inputs of a part, and what it takes to round one of its weights.
        hidden: what goes into a layer and what is added to it.
        hidden_on_disk: the hidden states lie in a scratch file.
    """

    weights: int
    activations: int
    routing: int
    rounding: int
    hidden: int
    hidden_on_disk: bool

    @property
    def peak_bytes(self) -> int:
        """Memory, a mapped scratch file not counted."""
        return (
            self.weights + self.activations + self.routing + self.rounding + (0 if self.hidden_on_disk else self.hidden)
        )

    @property
    def scratch_bytes(self) -> int:
        """Disk."""
        return self.hidden if self.hidden_on_disk else 0


def plan_memory(
    loader: ModelLoader, text: CalibrationText, options: CalibrateOptions, rounded: Container[str] = ()
) -> MemoryPlan:
    """Return what a run needs; `rounded` has the names of the weights that GPTQ rounds.

    Raises:
        ResourceError: it would not fit even with the hidden states on disk.
    """
    config = loader.model.config
    layers = [layer_parts(loader, layer) for layer in range(len(loader.model.model.layers))]
    weights = max(_layer_bytes(loader, parts) for parts in layers)
    routing = text.num_tokens * (config.n_routed_experts * _FP32 + config.num_experts_per_tok * (_INT64 + _FP32))
    # the decisions window by window, and put together
    plan = MemoryPlan(
        weights=weights,
        activations=activation_bytes(config, max(map(len, text.windows)), element_bytes=_METER_BYTES),
        routing=2 * routing,
        rounding=max(_rounding_bytes(part, rounded) for parts in layers for part in parts),
        hidden=2 * text.num_tokens * config.hidden_size * _FP32,
        hidden_on_disk=False,
    )
    return fitted(
        plan,
        options.max_memory,
        least="the largest part of a layer and a block of its activations",
        remedy="Raise it, or lower --context-length and --num-tokens.",
    )


def _layer_bytes(loader: ModelLoader, parts: LayerParts) -> int:
    """Return what is filled at once: attention and norms stay while the rest comes and goes."""
    attention = _part_bytes(loader, parts.attention)
    return attention + max(_part_bytes(loader, part) for part in (parts.mlp, *parts.experts))


def _part_bytes(loader: ModelLoader, part: Part) -> int:
    sizes = [loader.model.get_parameter(name).numel() * _FP32 for name in part.names]
    return sum(sizes) + max(sizes)


def _rounding_bytes(part: Part, rounded: Container[str]) -> int:
    leaders = [one for one in part.leaders if any(weight.name in rounded for weight in part.fellows(one))]
    if not leaders:
        return 0
    gathered = sum(leader.shape[1] ** 2 * _FP32 for leader in leaders)
    columns = max(leader.shape[1] for leader in leaders)
    # the matrix averaged, and put in order; in fp64 damped, factored, and inverted
    factors = columns**2 * (2 * _FP32 + 3 * _FP64)
    return gathered + factors + max(weight.numel for weight in part.weights) * _WEIGHT_COPIES * _FP32
