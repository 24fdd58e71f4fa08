"""What one MoE layer moves, computes and launches, by arithmetic alone: floors, and what each backend adds to them.

Routing is taken as uniform and independent, which overstates the experts that a few tokens of real text touch.

Shapes: M tokens, E routed experts, K chosen of them, S shared ones, H hidden, I intermediate; k = K + S slots a token.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from runtime.moe.batched import BatchedExperts
from runtime.moe.layouts import capacity
from runtime.moe.plan import BATCHED, CUTLASS, VANILLA
from runtime.moe.weights import BLOCK, GROUP, ExpertScheme

# of activations, and of scales that are fp32
ACTIVATION_BYTES, SCALE_BYTES = 2, 4


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Sizes of a layer's experts; shared ones are as wide as routed ones."""

    hidden_size: int
    intermediate_size: int
    num_routed: int
    num_chosen: int
    num_shared: int = 1

    @property
    def num_slots(self) -> int:
        """Of a token."""
        return self.num_chosen + self.num_shared

    @property
    def num_experts(self) -> int:
        """Shared ones included."""
        return self.num_routed + self.num_shared

    @property
    def expert_weights(self) -> int:
        """Weights of one expert's three matrices."""
        return 3 * self.hidden_size * self.intermediate_size


@dataclass(frozen=True, slots=True)
class Device:
    """What a GPU can do at most; bytes and operations a second."""

    name: str
    bytes_per_s: float
    flop_per_s: float


# a copy and a product of random bf16 matrices, as measured on that GPU
H200 = Device("H200", 4.3e12, 790e12)
SHAPES = {
    "GLM-4.6": LayerShape(5120, 1536, 160, 8),
    "GLM-4.5-Air": LayerShape(4096, 1408, 128, 8),
}
_NARROW_PRODUCTS = (ExpertScheme.FP8_CHANNEL, ExpertScheme.FP8_BLOCK, ExpertScheme.INT8_W8A8)


@dataclass(frozen=True, slots=True)
class Cost:
    """What something takes at least.

    Args:
        num_bytes: read and written in memory.
        flop: products and sums; useful rows only.
        flop_speedup: how many times faster than bf16 a matrix unit multiplies these operands.
    """

    num_bytes: float
    flop: float
    flop_speedup: float = 1.0

    def bytes_s(self, device: Device) -> float:
        """Seconds to move the bytes."""
        return self.num_bytes / device.bytes_per_s

    def flop_s(self, device: Device) -> float:
        """Seconds to compute."""
        return self.flop / (device.flop_per_s * self.flop_speedup)

    def floor_s(self, device: Device) -> float:
        """Seconds that nothing can be faster than: both at once."""
        return max(self.bytes_s(device), self.flop_s(device))

    def is_memory_bound(self, device: Device) -> bool:
        """Whether bytes take longer."""
        return self.bytes_s(device) >= self.flop_s(device)


def bytes_per_weight(scheme: ExpertScheme) -> float:
    """Return bytes of a weight, scales of blocks and groups included; those of channels are next to nothing."""
    match scheme:
        case ExpertScheme.NVFP4:
            return 0.5 + 1 / GROUP
        case ExpertScheme.FP8_BLOCK:
            return 1 + SCALE_BYTES / BLOCK**2
        case _:
            return scheme.code_dtype.itemsize


def distinct_experts(shape: LayerShape, num_tokens: int) -> float:
    """Return how many routed experts M tokens are expected to touch: E (1 - (1 - K / E)^M)."""
    return shape.num_routed * (1 - (1 - shape.num_chosen / shape.num_routed) ** num_tokens)


def floor(shape: LayerShape, scheme: ExpertScheme, num_tokens: int, *, is_quantized: bool | None = None) -> Cost:
    """Return what two kernels take that waste nothing: weights once, x and y once, the I-wide activation twice.

    Args:
        shape: of the layer.
        scheme: of its weights.
        num_tokens: M.
        is_quantized: inputs are rounded to 8 bits, and products are of codes; None: where the scheme's name says so.
    """
    is_narrow = scheme in _NARROW_PRODUCTS if is_quantized is None else is_quantized
    weights = touched_bytes(shape, scheme, num_tokens)
    rows = 2 * num_tokens * shape.hidden_size + 2 * num_tokens * shape.num_slots * shape.intermediate_size
    flop = 2.0 * shape.expert_weights * shape.num_slots * num_tokens
    return Cost(weights + rows * ACTIVATION_BYTES, flop, 2.0 if is_narrow else 1.0)


def touched_bytes(shape: LayerShape, scheme: ExpertScheme, num_tokens: int) -> float:
    """Return bytes of the weights that M tokens need, shared experts included."""
    num_experts = distinct_experts(shape, num_tokens) + shape.num_shared
    return num_experts * shape.expert_weights * bytes_per_weight(scheme)


def crossover_tokens(shape: LayerShape, scheme: ExpertScheme, device: Device, *, weights_only: bool = False) -> int:
    """Return the least M at which computing takes longer than moving bytes; of weights alone, if asked for."""

    def computes(num_tokens: int) -> bool:
        cost = floor(shape, scheme, num_tokens)
        moved = touched_bytes(shape, scheme, num_tokens) if weights_only else cost.num_bytes
        return cost.flop_s(device) > moved / device.bytes_per_s

    least, most = 1, 1
    while not computes(most):
        least, most = most, 2 * most
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (least, middle) if computes(middle) else (middle, most)
    return most


def row_counts(shape: LayerShape, num_tokens: int) -> Iterator[tuple[int, float]]:
    """Yield numbers of rows of a routed expert with their probability: M draws of K / E, as far as they count."""
    chance = shape.num_chosen / shape.num_routed
    mean, spread = num_tokens * chance, (num_tokens * chance * (1 - chance)) ** 0.5
    first, last = max(0, int(mean - 12 * spread)), min(num_tokens, ceil(mean + 12 * spread))
    # from the middle to both sides: at the ends a float may be too small
    below, weight = [1.0], 1.0
    for rows in range(int(mean), first, -1):
        weight *= rows / (num_tokens - rows + 1) * (1 - chance) / chance
        below.append(weight)
    above, weight = [], 1.0
    for rows in range(int(mean), last):
        weight *= (num_tokens - rows) / (rows + 1) * chance / (1 - chance)
        above.append(weight)
    weights = [*reversed(below), *above]
    total = sum(weights)
    yield from ((first + place, weight / total) for place, weight in enumerate(weights))


def expected_blocks(shape: LayerShape, num_tokens: int, block_m: int) -> float:
    """Return how many blocks of rows all routed experts are expected to fill or begin."""
    return shape.num_routed * sum(chance * ceil(rows / block_m) for rows, chance in row_counts(shape, num_tokens))


def padding_factor(shape: LayerShape, num_tokens: int, block_m: int) -> float:
    """Return rows computed for each row of a routed expert that is needed."""
    return expected_blocks(shape, num_tokens, block_m) * block_m / (num_tokens * shape.num_chosen)


def share_above(shape: LayerShape, num_tokens: int, block_m: int) -> float:
    """Return the share of routed experts that have more than one block of rows, and whose weights are read again."""
    return sum(chance for rows, chance in row_counts(shape, num_tokens) if rows > block_m)


@dataclass(frozen=True, slots=True)
class Products:
    """What the products of a backend take, all else aside.

    Args:
        launches: of products.
        weight_bytes: of weights read, and of copies of them written and read.
        rows: that are computed, padding included.
        useful_rows: M k.
    """

    launches: float
    weight_bytes: float
    rows: float
    useful_rows: int

    @property
    def padding(self) -> float:
        """Rows computed for each useful one."""
        return self.rows / self.useful_rows


def products(backend: str, shape: LayerShape, scheme: ExpertScheme, num_tokens: int, block_m: int) -> Products:
    """Return the products of a backend, a layer's shared expert among its experts.

    Args:
        backend: vanilla multiplies each expert's three matrices by its own rows; batched lays an expert's weights
            beside each of as many blocks as there may be; cutlass and triton read an expert's weights where they lie.
        shape: of the layer.
        scheme: of the weights; all but triton multiply what they have dequantized.
        num_tokens: M.
        block_m: rows of a block; vanilla has none.
    """
    num_rows, num_touched = num_tokens * shape.num_slots, distinct_experts(shape, num_tokens) + shape.num_shared
    stored = shape.expert_weights * bytes_per_weight(scheme)
    multiplied = shape.expert_weights * (scheme.code_dtype.itemsize if scheme.is_plain else ACTIVATION_BYTES)
    # written and read once more
    widened = 0 if scheme.is_plain else 2 * multiplied
    num_blocks = expected_blocks(shape, num_tokens, block_m) + shape.num_shared * ceil(num_tokens / block_m)
    if backend == VANILLA:
        return Products(3 * num_touched, num_touched * (stored + widened), num_rows, num_rows)
    if backend == BATCHED:
        num_blocks = capacity(num_rows, shape.num_experts, block_m) // block_m
        # a launch is as large as the copies of weights that it may have
        each = (2 * shape.hidden_size * shape.intermediate_size, shape.hidden_size * shape.intermediate_size)
        steps = [max(1, BatchedExperts().weight_bytes // (size * ACTIVATION_BYTES)) for size in each]
        launches = sum(ceil(num_blocks / step) for step in steps)
        return Products(launches, num_blocks * (stored + 2 * multiplied), num_blocks * block_m, num_rows)
    if backend == CUTLASS:
        # without knowing which experts are touched, all are widened
        copies = shape.num_experts * (stored + multiplied) if widened else 0
        return Products(2, num_touched * multiplied + copies, num_blocks * block_m, num_rows)
    return Products(2, num_touched * stored, num_blocks * block_m, num_rows)
