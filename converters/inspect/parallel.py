"""Which tensor-, expert- and pipeline-parallel sizes fit a model in a storage scheme, and why the others do not.

A rank gets whole heads, and whole quantization groups of every width it takes a slice of. Source of the rules: how
vLLM, SGLang and TensorRT-LLM cut `Glm4MoeForCausalLM`; kernels may ask for more, see `kernel_note`.
"""

from dataclasses import dataclass, replace

from converters.config import Glm4MoeConfig

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128)
# scheme -> elements that share a scale along a dim that tensor parallelism cuts
SCHEMES = {
    "BF16, or FP8 and INT8 per channel": 1,
    "FP8 in blocks of 128, INT4 in groups of 128": 128,
    "groups of 64": 64,
    "groups of 32, MXFP4, MXFP8": 32,
    "NVFP4, groups of 16": 16,
}
# what 8-bit tensor-core GEMMs want of the dim they sum over, and Marlin of the merged gate and up
_GEMM_COLUMNS = 16
_MARLIN_ROWS = 64


@dataclass(frozen=True, slots=True)
class Fit:
    """Whether a size fits: if not, `reasons` has why; `note` says what to expect where it does."""

    size: int
    reasons: tuple[str, ...] = ()
    note: str = ""

    @property
    def fits(self) -> bool:
        """Whether nothing stands against it."""
        return not self.reasons


@dataclass(frozen=True, slots=True)
class SchemeLimits:
    """Sizes of SIZES that fit under one scheme, by part of the model, by width alone.

    `model`: tensor parallelism of everything. `with_ep`: the same with routed experts left whole.
    """

    scheme: str
    group_size: int
    dense: tuple[int, ...]
    experts: tuple[int, ...]
    model: tuple[int, ...]
    with_ep: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ParallelReport:
    """Parallel sizes for the scheme that the checkpoint is in, and in short for every other."""

    group_size: int
    tensor: tuple[Fit, ...]
    tensor_with_ep: tuple[Fit, ...]
    expert: tuple[Fit, ...]
    pipeline: tuple[Fit, ...]
    schemes: tuple[SchemeLimits, ...]


def parallel_report(config: Glm4MoeConfig, group_size: int, *, is_quantized: bool) -> ParallelReport:
    """Return which sizes fit a model whose weights share scales in groups of `group_size` (1: per channel or none)."""

    def fits(*, split_experts: bool) -> tuple[Fit, ...]:
        found = (tensor_fit(config, group_size, size, split_experts=split_experts) for size in SIZES)
        if not is_quantized:
            return tuple(found)
        return tuple(
            replace(fit, note=kernel_note(config, fit.size, split_experts=split_experts)) if fit.fits else fit
            for fit in found
        )

    return ParallelReport(
        group_size,
        fits(split_experts=True),
        fits(split_experts=False),
        tuple(expert_fit(config, size) for size in SIZES),
        tuple(pipeline_fit(config, size) for size in SIZES),
        tuple(scheme_limits(config, scheme, unit) for scheme, unit in SCHEMES.items()),
    )


def scheme_limits(config: Glm4MoeConfig, scheme: str, group_size: int) -> SchemeLimits:
    """Return the sizes that fit under one scheme."""

    def fitting(width: int) -> tuple[int, ...]:
        return tuple(size for size in SIZES if not cut_reason(width, group_size, size))

    def whole(split_experts: bool) -> tuple[int, ...]:
        fits = (tensor_fit(config, group_size, size, split_experts=split_experts) for size in SIZES)
        return tuple(fit.size for fit in fits if fit.fits)

    dense = fitting(config.intermediate_size) if config.first_k_dense_replace else SIZES
    experts = fitting(config.moe_intermediate_size)
    return SchemeLimits(scheme, group_size, dense, experts, whole(True), whole(False))


def cut_reason(width: int, group_size: int, size: int) -> str:
    """Return why `width` rows or columns in groups cannot be cut into `size` equal slices; empty if they can."""
    if width % group_size:
        return f"{width} is {width / group_size:g} groups of {group_size}"
    if width % size:
        return f"{width} does not divide by {size}"
    if width // size % group_size:
        return f"{width} / {size} = {width // size} is {width / size / group_size:g} groups of {group_size}"
    return ""


def tensor_fit(config: Glm4MoeConfig, group_size: int, size: int, *, split_experts: bool) -> Fit:
    """Return whether tensor parallelism of this size fits; the shared expert is cut like the dense layers.

    Args:
        config: the model.
        group_size: elements that share a scale; 1 if there are no groups.
        size: ranks.
        split_experts: routed experts are cut too; False: expert parallelism keeps them whole.
    """
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    reasons = []
    if heads % size:
        reasons.append(f"attention: {heads} heads do not divide by {size}")
    if kv_heads % size and size % kv_heads:
        reasons.append(f"attention: {kv_heads} key-value heads neither divide by {size} nor repeat evenly over it")
    widths = {"shared expert": config.shared_intermediate_size}
    if not heads % size:
        widths["attention output"] = config.q_size
    if config.first_k_dense_replace:
        widths["dense layers"] = config.intermediate_size
    if split_experts:
        widths["experts"] = config.moe_intermediate_size
    cuts = {part: cut_reason(width, group_size, size) for part, width in widths.items()}
    reasons += [f"{part}: {reason}" for part, reason in cuts.items() if reason]
    return Fit(size, tuple(reasons))


def kernel_note(config: Glm4MoeConfig, size: int, *, split_experts: bool) -> str:
    """Return what kernels for 8-bit weights may object to although the slices are even; empty if nothing is known."""
    widths = {"dense layers": config.intermediate_size} if config.first_k_dense_replace else {}
    if split_experts:
        widths["experts"] = config.moe_intermediate_size
    for part, width in widths.items():
        if width // size % _GEMM_COLUMNS:
            return f"{part}: {width // size} columns a rank; 8-bit GEMMs usually want a multiple of {_GEMM_COLUMNS}"
        if 2 * width // size % _MARLIN_ROWS:
            merged = 2 * width // size
            return (
                f"{part}: {merged} merged rows a rank; Marlin, for GPUs without FP8, wants a multiple of {_MARLIN_ROWS}"
            )
    return ""


def expert_fit(config: Glm4MoeConfig, size: int) -> Fit:
    """Return whether the routed experts divide over this many ranks."""
    experts = config.n_routed_experts
    reason = f"{experts} experts do not divide by {size}" if experts % size else ""
    held = experts // size
    note = "" if reason else f"{held} expert{'' if held == 1 else 's'} a rank"
    return Fit(size, (reason,) if reason else (), note)


def pipeline_fit(config: Glm4MoeConfig, size: int) -> Fit:
    """Return whether every stage gets a layer; stages may differ by one."""
    layers = config.num_hidden_layers
    if size > layers:
        return Fit(size, (f"{layers} layers are fewer than {size} stages",))
    least, rest = divmod(layers, size)
    return Fit(size, (), f"{least} to {least + 1} layers a stage" if rest else f"{_layers(least)} a stage")


def _layers(count: int) -> str:
    return f"{count} layer{'' if count == 1 else 's'}"
