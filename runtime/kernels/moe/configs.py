"""Tiles of the grouped products, by closed form: from the scheme, the GPU, and how many rows an expert gets.

Experts with few rows are read once and that is all the time they take, so weights go to the side of the matrix unit
that is 64 or 128 wide, tokens to the one that may be 16 ("swap"). From about 48 rows on, tokens fill the wide side.
Weights that are widened before they are multiplied stay on the wide side: only that operand may come from registers.
"""

from dataclasses import dataclass, replace
from math import ceil

from runtime.moe.weights import ExpertScheme

HOPPER, BLACKWELL = 90, 100
# below so many rows per routed expert, programs without matrix units; from these on, tokens on the wide side
GEMV_ROWS = 0.3
WIDE_ROWS = 48.0
FULL_ROWS = 128.0
# slots of a run of `build_rows`, if there are several; below that many there is one
CHUNK = 8192
ALONE = 4096
SHARED_MEMORY_BYTES = 227 * 1024
_TMA_ALIGNMENT_BYTES = 16


@dataclass(frozen=True, slots=True)
class TileConfig:
    """Tiles of one grouped product.

    Args:
        block_m: rows (tokens).
        block_n: rows of the weight; of up twice as many as results.
        block_k: columns of one step.
        num_warps: of a program.
        num_stages: steps loaded ahead.
        swap_ab: weights are the left operand.
        persistent: as many programs as fit on the GPU, each with many tiles.
        tma: weights, and rows that lie in order, by descriptors.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    swap_ab: bool
    persistent: bool
    tma: bool


@dataclass(frozen=True, slots=True)
class Tiles:
    """What a layer uses for a number of tokens.

    Args:
        up: gate and up.
        down: of the same block_m.
        is_gemv: `up_gemv` and `down_gemv` instead; block_m is not used.
    """

    up: TileConfig
    down: TileConfig
    is_gemv: bool = False

    @property
    def block_m(self) -> int:
        """Rows of a block, for `ContiguousRows`."""
        return self.up.block_m

    @property
    def can_write_codes(self) -> bool:
        """Whether `up` may write E4M3 codes, for which a tile has to hold whole groups of 128 results."""
        return self.up.block_n % 256 == 0


@dataclass(frozen=True, slots=True)
class Shipped:
    """A product that `choose` can ask for.

    Args:
        op: "up" or "down".
        scheme: of the weights.
        is_quantized: whether inputs come as codes.
        capability: of the GPU, 90 or 100.
        config: tiles.
    """

    op: str
    scheme: ExpertScheme
    is_quantized: bool
    capability: int
    config: TileConfig

    @property
    def name(self) -> str:
        """Unique."""
        c = self.config
        inputs = "a16" if not self.is_quantized else "a4" if self.scheme is ExpertScheme.NVFP4 else "a8"
        kind = "swap" if c.swap_ab else "wide"
        return f"{self.op} {self.scheme} {inputs} {kind} {c.block_m}x{c.block_n}x{c.block_k} sm_{self.capability}"


FP8_SCHEMES = (ExpertScheme.FP8_CHANNEL, ExpertScheme.FP8_BLOCK)


def choose(
    scheme: ExpertScheme,
    capability: int,
    rows_per_expert: float,
    *,
    hidden_size: int,
    intermediate_size: int,
    is_quantized: bool = False,
    batch_invariant: bool = False,
) -> Tiles:
    """Return tiles for a layer.

    Args:
        scheme: of the weights.
        capability: compute capability times 10; 90 for what is older or unknown.
        rows_per_expert: tokens x experts per token / routed experts.
        hidden_size: H.
        intermediate_size: I of this shard.
        is_quantized: inputs come as codes.
        batch_invariant: one choice for all numbers of rows, so that a row's result does not depend on the others.
    """
    rows = WIDE_ROWS if batch_invariant else rows_per_expert
    # weights that are widened, and those with a scale for 16, stay on the wide side
    is_widened = scheme is ExpertScheme.NVFP4 or not (scheme.is_plain or is_quantized)
    if rows < WIDE_ROWS or is_widened:
        up, down = _swapped(scheme, rows, is_quantized=is_quantized)
    else:
        up, down = _wide(scheme, rows, capability, is_quantized=is_quantized)
    if capability >= BLACKWELL:
        up, down = _on_blackwell(up, down, scheme, is_quantized=is_quantized)
    is_gemv = rows < GEMV_ROWS and scheme is not ExpertScheme.NVFP4 and not is_quantized
    return Tiles(_described(up, scheme, hidden_size), _described(down, scheme, intermediate_size), is_gemv)


def can_describe(scheme: ExpertScheme, num_columns: int) -> bool:
    """Whether rows of so many columns begin where a descriptor can address them."""
    row_bytes = num_columns // 2 if scheme is ExpertScheme.NVFP4 else num_columns * scheme.code_dtype.itemsize
    return row_bytes % _TMA_ALIGNMENT_BYTES == 0


def num_counts(num_slots: int, num_experts: int) -> int:
    """Return how many int32 values `build_rows` needs as scratch; 0 if one launch does."""
    return 0 if num_slots <= ALONE else -(-num_slots // CHUNK) * padded_experts(num_experts)


def padded_experts(num_experts: int) -> int:
    """Return the bins of a histogram of experts; not everywhere are there any of fewer than a warp has threads."""
    return max(32, 1 << (num_experts - 1).bit_length())


def _described(config: TileConfig, scheme: ExpertScheme, num_columns: int) -> TileConfig:
    return config if can_describe(scheme, num_columns) else replace(config, tma=False)


def _swapped(scheme: ExpertScheme, rows: float, *, is_quantized: bool) -> tuple[TileConfig, TileConfig]:
    """Weights on the wide side; tokens as many as an expert has, and half as many again, for uneven routing."""
    if rows >= FULL_ROWS:
        config = TileConfig(128, 128, 128, 8, 3, True, True, True)
        return config, config
    needed = ceil(1.5 * rows)
    block_m = 64 if needed > 32 else 32 if needed > 16 else 16
    # two sums at a time where scales belong into them: one of a step, one of all
    is_large = block_m == 64 and scheme is ExpertScheme.FP8_BLOCK
    down = TileConfig(block_m, 128, 128, 8 if is_large else 4, 4, True, True, True)
    if scheme in FP8_SCHEMES and is_quantized:
        # wide enough to write codes
        return replace(down, block_n=256, num_warps=8 if block_m == 64 else 4), down
    return down, down


def _wide(scheme: ExpertScheme, rows: float, capability: int, *, is_quantized: bool) -> tuple[TileConfig, TileConfig]:
    """Tokens on the wide side."""
    # Blackwell's matrix unit takes 128
    block_m = 128 if rows >= FULL_ROWS or capability >= BLACKWELL else 64
    block_k = 128 if is_quantized else 64
    num_warps = 8 if block_m == 128 or is_quantized else 4
    config = TileConfig(block_m, 256, block_k, num_warps, 3 if block_m == 128 else 4, False, True, True)
    if scheme in FP8_SCHEMES and block_m == 128:
        # FP8 sums of a step are added to those of all
        config = replace(config, block_n=128, num_stages=4)
    return config, config


def _on_blackwell(
    up: TileConfig, down: TileConfig, scheme: ExpertScheme, *, is_quantized: bool
) -> tuple[TileConfig, TileConfig]:
    """Share registers out to more warps, or take narrower tiles, where they would spill otherwise.

    Sums of a step come out of tensor memory as a whole to be scaled and added to those of all.
    """
    is_coded_block = scheme is ExpertScheme.FP8_BLOCK and is_quantized
    if scheme in (ExpertScheme.INT8_CHANNEL, ExpertScheme.NVFP4) and not is_quantized:
        block_k = 64 if scheme is ExpertScheme.INT8_CHANNEL and up.block_m == 128 else up.block_k
        up, down = (replace(config, num_warps=8, block_k=block_k) for config in (up, down))
    elif is_coded_block and not up.swap_ab:
        up = replace(up, block_n=64)
    elif (is_coded_block and up.block_m == 64) or (scheme is ExpertScheme.INT8_W8A8 and not up.swap_ab):
        up = replace(up, block_n=128)
    elif is_coded_block and up.block_m == 32:
        up = replace(up, num_warps=8)
    return up, down


def shipped() -> tuple[Shipped, ...]:
    """Return every product that `choose` can ask for at shapes that descriptors can address, each once."""
    found: dict[Shipped, None] = {}
    for capability in (HOPPER, BLACKWELL):
        for scheme, is_quantized in _kinds(capability):
            # fp16 has the tiles of bf16: one of either form will do
            some = (1.0, FULL_ROWS) if scheme is ExpertScheme.FP16 else (1.0, 16.0, 32.0, WIDE_ROWS, FULL_ROWS)
            for rows in some:
                tiles = choose(
                    scheme, capability, rows, hidden_size=5120, intermediate_size=1536, is_quantized=is_quantized
                )
                found[Shipped("up", scheme, is_quantized, capability, tiles.up)] = None
                found[Shipped("down", scheme, is_quantized, capability, tiles.down)] = None
    return tuple(found)


def _kinds(capability: int) -> list[tuple[ExpertScheme, bool]]:
    """Return the schemes, and whether inputs are codes, that a GPU has matrix instructions for."""
    # fp32 is for tests; what is stored for w8a8 is the same as for int8 weights alone
    unshipped = {ExpertScheme.FP32, ExpertScheme.INT8_W8A8}
    # E2M1 is unknown to Hopper; int8 is slow on Blackwell, and served there all the same
    codes = [*FP8_SCHEMES, ExpertScheme.INT8_W8A8, *([ExpertScheme.NVFP4] if capability >= BLACKWELL else [])]
    as_they_are = [(scheme, False) for scheme in ExpertScheme if scheme not in unshipped]
    return as_they_are + [(scheme, True) for scheme in codes]


SHIPPED = shipped()
