"""Which backend multiplies a checkpoint's experts, and in which scheme they are held: from headers and choices."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from converters.config import Glm4MoeConfig
from converters.errors import UsageError
from converters.formats.inputs import InputCode, InputScheme
from converters.formats.weights import WHOLE, Coding, Use, WeightFormat
from runtime.config import OFF, ON, EngineConfig, multiplies_fp4, supports_cutlass, supports_triton
from runtime.moe.grouped import ALIGNMENT_BYTES
from runtime.moe.plan import AUTO, BATCHED, CUTLASS, TRITON, VANILLA, VANILLA_PLAN, LayerPlan, MoePlan
from runtime.moe.weights import BLOCK, GROUP, PLAIN_DTYPES, ExpertScheme

_CHANNEL_CODES = {"F8_E4M3": ExpertScheme.FP8_CHANNEL, "I8": ExpertScheme.INT8_CHANNEL}
# inputs whose codes kernels multiply with the codes of weights
_CODE_INPUTS = {
    ExpertScheme.FP8_CHANNEL: InputScheme(InputCode.FP8),
    ExpertScheme.FP8_BLOCK: InputScheme(InputCode.FP8, BLOCK),
    ExpertScheme.INT8_CHANNEL: InputScheme(InputCode.INT8),
}
# one for each expert, below a scale that was calibrated
_FP4_INPUTS = InputScheme(InputCode.NVFP4, GROUP, is_static=True)
_NVFP4_CODINGS = (Coding.NVFP4_DIVISOR, Coding.NVFP4_FACTOR)


@dataclass(frozen=True, slots=True)
class StoredExperts:
    """How the experts of a layer lie in the checkpoint.

    Args:
        routed: of all routed ones; None: some differ from others, or no grouped layout has it.
        shared: of the shared one.
        inputs: what engines do to inputs, of each weight of the routed ones.
        shared_inputs: the same of the shared one; None: as of the routed ones.
    """

    routed: ExpertScheme | None
    shared: ExpertScheme | None
    inputs: frozenset[InputScheme | None] = frozenset({None})
    shared_inputs: frozenset[InputScheme | None] | None = None

    @property
    def is_static(self) -> bool:
        """Whether inputs are rounded by calibrated scales, which each expert has its own of."""
        return any(scheme is not None and scheme.is_static for scheme in self.inputs)

    @property
    def is_fp4(self) -> bool:
        """Whether NVFP4 codes of inputs may be multiplied with those of weights."""
        return self.routed is ExpertScheme.NVFP4 and self.inputs == {_FP4_INPUTS}


def scheme_of(found: WeightFormat, plain: ExpertScheme) -> ExpertScheme | None:
    """Return the scheme that a weight can be held in as it is stored; `plain` for values; None: it must be decoded."""
    if found.is_plain:
        return plain
    codes, scale = found.used(Use.CODES)[0], found.used(Use.SCALE)[0]
    if found.coding in _NVFP4_CODINGS:
        return ExpertScheme.NVFP4 if scale.grain == (1, GROUP) else None
    if found.coding is not Coding.SCALED:
        return None
    if scale.grain in ((1, WHOLE), (WHOLE, WHOLE)):
        return _CHANNEL_CODES.get(codes.dtype)
    is_block = codes.dtype == "F8_E4M3" and scale.grain == (BLOCK, BLOCK)
    return ExpertScheme.FP8_BLOCK if is_block else None


def plain_scheme(engine: EngineConfig) -> ExpertScheme:
    """Return the scheme of values in the dtype of compute."""
    return next(scheme for scheme, dtype in PLAIN_DTYPES.items() if dtype is engine.torch_dtype)


def plan_experts(stored: Mapping[int, StoredExperts], config: Glm4MoeConfig, engine: EngineConfig) -> MoePlan:
    """Return the plan of a model.

    Args:
        stored: what each MoE layer has.
        config: the model.
        engine: choices; its moe_backend is refused where it cannot do what the checkpoint asks for.
    Raises:
        UsageError: backend, shared expert or inputs do not go together.
    """
    backend, why = engine.moe_backend, ""
    if backend == AUTO:
        backend, why = _choose(stored, config, engine)
    notes = [f"Experts run in the backend {backend}: {why}."] if why else []
    if backend == VANILLA:
        _refuse_vanilla(engine, why)
        return MoePlan(notes=tuple(notes)) if notes else VANILLA_PLAN
    _check_inputs(stored, backend, engine)
    _check_alignment(config, engine, backend)
    layers = {
        layer: _layer_plan(found, backend, engine, num_shared=_num_shared(layer, found, config, engine))
        for layer, found in stored.items()
    }
    return MoePlan(backend, layers, engine.moe_deterministic, (*notes, *_notes(stored, layers, backend, engine)))


def _choose(stored: Mapping[int, StoredExperts], config: Glm4MoeConfig, engine: EngineConfig) -> tuple[str, str]:
    """Return a backend, and why."""
    rows = engine.prefill_chunk_tokens * config.num_experts_per_tok / config.n_routed_experts
    many = f"{rows:.3g} rows for each expert of a prefill chunk"
    is_fp4_taken = engine.device != "cpu" and engine.dtype == "bfloat16" and multiplies_fp4(engine.device)
    if any(found.is_static and not (found.is_fp4 and is_fp4_taken) for found in stored.values()):
        return VANILLA, "inputs are rounded by scales that each expert has its own of"
    if engine.device == "cpu":
        if engine.moe_deterministic or engine.fused_shared_experts == ON:
            return BATCHED, "on the CPU it is the one that does what is asked for"
        return VANILLA, f"on the CPU it copies no weights ({many})"
    if supports_triton(engine.device) and engine.dtype == "bfloat16":
        return TRITON, f"kernels for this GPU, which take few rows and many ({many})"
    is_plain = all(found.routed is plain_scheme(engine) for found in stored.values())
    is_taken = supports_cutlass(engine.device, engine.dtype) and not _misaligned(config, engine)
    if is_plain and rows >= 1 and is_taken and not engine.moe_deterministic:
        return CUTLASS, f"plain weights, a GPU that the kernels are not made for, {many}"
    return BATCHED, f"the kernels are not made for this GPU or dtype ({many})"


def _refuse_vanilla(engine: EngineConfig, why: str) -> None:
    if engine.moe_deterministic or engine.fused_shared_experts == ON:
        raise UsageError(
            f"moe_backend {engine.moe_backend!r}",
            expected="a checkpoint whose experts can be grouped, for moe_deterministic or fused_shared_experts 'on'",
            found=why,
            next_step="Take activations as they are.",
        )


def _check_inputs(stored: Mapping[int, StoredExperts], backend: str, engine: EngineConfig) -> None:
    for layer, found in stored.items():
        if found.is_fp4 and backend == TRITON:
            _check_fp4(backend, engine)
        elif found.is_static or len(found.inputs) > 1:
            raise UsageError(
                f"moe_backend {backend!r}",
                expected=f"inputs of all experts of layer {layer} rounded alike, without calibrated scales",
                found=" and ".join(sorted("as they are" if one is None else one.label for one in found.inputs)),
                next_step=f"Use --moe-backend {VANILLA}, or take activations as they are.",
            )


def _check_fp4(backend: str, engine: EngineConfig) -> None:
    if not multiplies_fp4(engine.device):
        raise UsageError(
            f"moe_backend {backend!r}",
            expected="a GPU of compute capability 10.0 or later, for inputs in NVFP4",
            found=torch.cuda.get_device_name(),
            next_step=f"Use --moe-backend {VANILLA}, or take activations as they are.",
        )


def _check_alignment(config: Glm4MoeConfig, engine: EngineConfig, backend: str) -> None:
    for name, size in _misaligned(config, engine).items() if backend == CUTLASS else ():
        raise UsageError(
            f"moe_backend {backend!r}",
            expected=f"{name} to be a multiple of {_step(engine)}",
            found=str(size),
            next_step=f"Use --moe-backend {BATCHED}.",
        )


def _misaligned(config: Glm4MoeConfig, engine: EngineConfig) -> dict[str, int]:
    """Return the sizes that torch's grouped product does not take."""
    sizes = {"hidden_size": config.hidden_size, "moe_intermediate_size": config.moe_intermediate_size}
    return {name: size for name, size in sizes.items() if size % _step(engine)}


def _step(engine: EngineConfig) -> int:
    return ALIGNMENT_BYTES // engine.torch_dtype.itemsize


def _layer_plan(found: StoredExperts, backend: str, engine: EngineConfig, *, num_shared: int) -> LayerPlan:
    """Return the scheme that a layer's experts have in memory, and whether it is multiplied as it is."""
    scheme, plain = found.routed, plain_scheme(engine)
    (inputs,) = found.inputs
    if found.is_fp4:
        # other backends were refused
        return LayerPlan(ExpertScheme.NVFP4, num_shared, multiplies_codes=True)
    if scheme is None or scheme.is_plain:
        return LayerPlan(plain, num_shared)
    multiplies = inputs is not None and inputs == _CODE_INPUTS.get(scheme)
    if backend == CUTLASS:
        # torch multiplies codes with codes only, and of these only those
        is_kept = multiplies and scheme is ExpertScheme.FP8_CHANNEL
        return LayerPlan(scheme, num_shared, is_kept) if is_kept else LayerPlan(plain, num_shared)
    if backend != TRITON or not multiplies:
        return LayerPlan(scheme, num_shared)
    is_int8 = scheme is ExpertScheme.INT8_CHANNEL
    return LayerPlan(ExpertScheme.INT8_W8A8 if is_int8 else scheme, num_shared, multiplies_codes=True)


def _why_apart(found: StoredExperts, config: Glm4MoeConfig) -> str:
    """Return why a shared expert cannot be one of the experts; empty if it can."""
    if config.n_shared_experts != 1:
        return f"{config.n_shared_experts} shared experts side by side"
    if found.routed is None or found.shared is None:
        return "routed experts in several schemes, or in one that has to be decoded"
    if found.routed is not found.shared:
        return f"routed experts in {found.routed}, the shared one in {found.shared}"
    is_alike = found.shared_inputs in (None, found.inputs)
    return "" if is_alike else "inputs of the shared expert that are rounded otherwise"


def _num_shared(layer: int, found: StoredExperts, config: Glm4MoeConfig, engine: EngineConfig) -> int:
    """Return 1 if the shared expert is to be one of the experts.

    Raises:
        UsageError: that was asked for and cannot be.
    """
    why = _why_apart(found, config)
    # a shared expert of its own is a product of as many rows as there are tokens
    is_asked = engine.fused_shared_experts == ON or engine.moe_deterministic
    if why and is_asked:
        raise UsageError(
            "fused_shared_experts" if not engine.moe_deterministic else "moe_deterministic",
            expected=f"one shared expert in the scheme of the routed ones in layer {layer}",
            found=why,
            next_step="" if engine.moe_deterministic else "Use fused_shared_experts 'off'.",
        )
    return int(not why and engine.fused_shared_experts != OFF)


def _notes(
    stored: Mapping[int, StoredExperts], layers: Mapping[int, LayerPlan], backend: str, engine: EngineConfig
) -> list[str]:
    decoded = [layer for layer, plan in layers.items() if plan.scheme.is_plain and not _is_plain(stored[layer])]
    apart = [layer for layer, plan in layers.items() if not plan.num_shared]
    notes = []
    if decoded:
        notes.append(f"Experts of {_layers(decoded)} are multiplied out to {engine.dtype} for the backend {backend}.")
    if apart and engine.fused_shared_experts != OFF:
        notes.append(f"The shared expert of {_layers(apart)} is computed apart: its scheme or number differs.")
    return notes


def _is_plain(found: StoredExperts) -> bool:
    return found.routed is not None and found.routed.is_plain


def _layers(numbers: Sequence[int]) -> str:
    return f"layer {numbers[0]}" if len(numbers) == 1 else f"{len(numbers)} layers"
