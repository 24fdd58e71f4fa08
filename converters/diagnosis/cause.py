"""What a diagnosis says: a cause, and the numbers that prove it. Plain values, ready for JSON and tables."""

from dataclasses import dataclass
from enum import StrEnum


class CauseCode(StrEnum):
    """What went wrong, for programs; `Cause.statement` says it for readers."""

    EXCHANGED = "exchanged"  # tensors, experts or layers that hold each other's values
    PERMUTED = "permuted"  # more than two of them
    COPIED = "copied"  # one that holds the values of another one, which is right itself
    EP_RANKS_PERMUTED = "ep-ranks-permuted"
    TP_SLICES_PERMUTED = "tp-slices-permuted"
    SLICE_CUT_IN_BLOCK = "slice-cut-in-block"
    GATE_UP_EXCHANGED = "gate-up-exchanged"
    GATE_UP_INTERLEAVED = "gate-up-interleaved"
    QKV_ORDER = "qkv-order"
    ROPE_ORDER = "rope-order"
    ROWS_SHIFTED = "rows-shifted"
    HALVES_EXCHANGED = "halves-exchanged"
    TRANSPOSED = "transposed"
    TIED_HEAD = "tied-head"
    ZERO = "zero"
    IDENTITY_GAIN = "identity-gain"  # a norm whose weights are all 1
    NON_FINITE = "non-finite"
    GAIN = "gain"  # every value times one factor
    NEGATED = "negated"
    FACTOR_BAKED_IN = "factor-baked-in"  # that factor is routed_scaling_factor
    ROUNDED_FURTHER = "rounded-further"
    FEW_ELEMENTS = "few-elements"
    SCALE_INVERTED = "scale-inverted"
    SCALE_TRANSPOSED = "scale-transposed"
    SCALES_EXCHANGED = "scales-exchanged"
    SCALE_LOST = "scale-lost"
    SCALE_WRONG = "scale-wrong"
    GLOBAL_SCALES_DIFFER = "global-scales-differ"
    UNSCALED = "unscaled"
    NIBBLE_ORDER = "nibble-order"
    ZERO_POINT = "zero-point"
    CONFIG = "config"
    VOCABULARY_PADDED = "vocabulary-padded"
    EOS_LOST = "eos-lost"
    TEMPLATE_CHANGED = "template-changed"
    FILE_CHANGED = "file-changed"
    MISSING = "missing"
    EXPERT_MISSING = "expert-missing"
    LAYER_MISSING = "layer-missing"
    INDEX_INCOMPLETE = "index-incomplete"
    MTP_MISSING = "mtp-missing"
    BIAS_ROUNDED = "bias-rounded"
    ROUTER_QUANTIZED = "router-quantized"


@dataclass(frozen=True, slots=True)
class Cause:
    """One proved cause.

    Attributes:
        code: its kind.
        subject: tensor, expert, layer, file or field, shortest name that holds all of `tensors`.
        statement: what happened, a sentence without a full stop.
        evidence: the numbers that prove it.
        remedy: what to do about it, a full sentence.
        tensors: official names of the tensors that it explains, in the order of the table; empty for config and files.
    """

    code: CauseCode
    subject: str
    statement: str
    evidence: str
    remedy: str
    tensors: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return the one-line message."""
        return f"{self.sentence} ({self.evidence})"

    @property
    def sentence(self) -> str:
        """Subject and statement; the subject once, where the statement begins with it."""
        return self.statement if self.statement.startswith(self.subject) else f"{self.subject}: {self.statement}"
