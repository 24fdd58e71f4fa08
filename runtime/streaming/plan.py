"""How much memory a run takes, from headers alone, and what of it goes to disk.

What stays whatever the length of the text: the weights in use and those read ahead, a block of rows on its way through
a layer, and at the end the heads with a block of logits. What grows with the text: a few rows of fp32 a token, which
may lie in a scratch file, and the decisions of the routers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from runtime.model.products import BLOCK_BYTES
from runtime.streaming.attention import CHUNK_TOKENS
from runtime.streaming.memory import FP32, activation_bytes, expert_bytes, fitted
from runtime.streaming.options import LOGITS, StreamOptions
from runtime.streaming.reading import Batch, batches_ahead
from runtime.streaming.rows import RowPlan
from runtime.streaming.sides import Side

# as measured: interpreter and torch; and of each parameter the module that has it, and where it is read
_PROGRAM_BYTES = 320 << 20
_PARAMETER_BYTES = 5 << 10
# positions whose logits are held at once
LOGIT_ROWS = 128
# of a block of logits: in parts and put together, on both sides
_LOGIT_COPIES = 4
# log-probabilities, differences and their like of a chunk of rows, 64 MB each
_SCORE_BYTES = 10 * (64 << 20)
# differences of a block of logits in fp64, where only the heads are compared
_ERROR_BYTES = 4 * (16 << 20)
# rows of a head that are widened at a time
_HEAD_ROWS = 16384
_INT64 = 8
# what has to be there in any case, and what the user can do
_LEAST_LAYERS = (
    "weights in use and read ahead, and blocks of rows",
    "Raise it, or lower --context-length and --workers.",
)
_LEAST_HEAD = ("heads, and a block of logits with its scores", "Raise it.")


@dataclass(frozen=True, slots=True)
class LaneRows:
    """Rows of fp32 that lanes keep: `matrices` of `rows` each."""

    rows: int
    matrices: int


@dataclass(frozen=True, slots=True)
class StreamMemory:
    """Bytes at the peak, by what they are for.

    Args:
        base: the program itself, and its models without weights.
        weights: those in use and those read ahead, as they are stored, one while it is decoded, and one widened.
        activations: of one block of rows.
        routing: of the routers of one layer.
        head: instead of weights and rows, once the layers are done: the heads, and blocks of them and of logits.
        hidden: the hidden states of all tokens.
        hidden_on_disk: they lie in a scratch file.
    """

    base: int
    weights: int
    activations: int
    routing: int
    head: int
    hidden: int
    hidden_on_disk: bool

    @property
    def layers(self) -> int:
        """Memory beside program and hidden states while layers are run."""
        return self.weights + self.activations + self.routing

    @property
    def peak_bytes(self) -> int:
        """Memory, a mapped scratch file not counted."""
        return self.base + max(self.layers, self.head) + (0 if self.hidden_on_disk else self.hidden)

    @property
    def scratch_bytes(self) -> int:
        """Disk."""
        return self.hidden if self.hidden_on_disk else 0


def plan_stream(
    sides: Sequence[Side],
    batches: Sequence[Batch],
    plan: RowPlan,
    lanes: Sequence[LaneRows],
    options: StreamOptions,
    *,
    with_heads: bool,
    other_heads: int = 0,
) -> StreamMemory:
    """Return what a run needs; `other_heads` are bytes of heads, and of what else is held beside those of the sides.

    Raises:
        ResourceError: it would not fit even with the hidden states on disk.
    """
    config = sides[0].source.config
    chunk = plan.longest if options.deterministic else CHUNK_TOKENS
    # the decisions chunk by chunk, and put together
    decision = 2 * (config.n_routed_experts * FP32 + config.num_experts_per_tok * (_INT64 + FP32))
    # given and put out by all lanes, side by side to be compared
    compared = 2 * len(lanes) * min(plan.longest, chunk) * config.hidden_size * FP32
    experts = len(lanes) * expert_bytes(config)
    memory = StreamMemory(
        base=_PROGRAM_BYTES + _PARAMETER_BYTES * sum(len(side.loader.parameter_names) for side in sides),
        weights=peak_weights(sides, batches, options.workers) + _widened_bytes(sides, batches, options),
        activations=max(activation_bytes(config, plan.longest, chunk=chunk) + compared, experts),
        routing=sum(lane.rows for lane in lanes) * decision,
        head=_head_bytes(sides, options) + other_heads if with_heads else 0,
        hidden=sum(lane.rows * lane.matrices for lane in lanes) * config.hidden_size * FP32,
        hidden_on_disk=False,
    )
    least, remedy = _LEAST_HEAD if memory.head > memory.layers else _LEAST_LAYERS
    return fitted(memory, options.max_memory, least=least, remedy=remedy)


def _head_bytes(sides: Sequence[Side], options: StreamOptions) -> int:
    config = sides[0].source.config
    heads = sum(side.loader.held_bytes(side.head_names(), as_stored=True) for side in sides)
    logits = _LOGIT_COPIES * LOGIT_ROWS * config.vocab_size * FP32
    scores = _SCORE_BYTES if LOGITS in options.levels else _ERROR_BYTES
    return heads + logits + scores + _HEAD_ROWS * config.hidden_size * FP32


def peak_weights(sides: Sequence[Side], batches: Sequence[Batch], workers: int) -> int:
    """Return the most bytes of weights that are held at once, those that are read ahead included."""
    held = [
        sum(side.loader.held_bytes(names, as_stored=True) for side, names in _of(sides, batch)) for batch in batches
    ]
    names = ((side, name) for batch in batches for side, names in _of(sides, batch) for name in names)
    stored = max(side.loader.stored_bytes((name,)) for side, name in names)
    ahead, peak = batches_ahead(workers), 0
    for index, batch in enumerate(batches):
        # attention and mlp stand right before the experts of their layer
        first = next((back for back in range(index, -1, -1) if batches[back].layer != batch.layer), -1) + 1
        stays = sum(held[back] for back in range(first, index) if batches[back].stays_for(batch))
        peak = max(peak, stays + sum(held[index : index + 1 + ahead]))
    return peak + workers * stored


def _widened_bytes(sides: Sequence[Side], batches: Sequence[Batch], options: StreamOptions) -> int:
    """Return what the weight at hand takes in fp32: a block of it, or, in deterministic mode, the whole."""
    if not options.deterministic and options.device == "cpu":
        return BLOCK_BYTES
    names = ((side, name) for batch in batches for side, found in _of(sides, batch) for name in found)
    return max(side.loader.numel(name) for side, name in names) * FP32


def _of(sides: Sequence[Side], batch: Batch) -> Sequence[tuple[Side, tuple[str, ...]]]:
    return list(zip(sides, batch.names, strict=True))
