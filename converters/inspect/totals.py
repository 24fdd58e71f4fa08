"""Parameters, bytes and memory: exact counts from headers, next to what the config leads one to expect."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

from converters.checkpoint.dtypes import BY_CONFIG_NAME, FLOAT_DTYPES, itemsize
from converters.checkpoint.header import TensorEntry
from converters.errors import InputError
from converters.formats.weights import match_scheme
from converters.inspect.logical import LogicalView
from converters.inspect.quantization import Declared
from converters.inspect.structure import Structure
from converters.layout import Stored
from converters.schema import DtypePolicy, ModelSchema, Role, Tensor

_PLAIN_KV_BYTES = 2
_FP32_BYTES = 4
_EXPERT_ROLES = frozenset({Role.EXPERT})


@dataclass(frozen=True, slots=True)
class Totals:
    """Counts of a checkpoint. Parameters count weights, not scales; `elements` counts everything stored.

    `expected_bytes` is None where the quantization scheme is not implemented.
    """

    parameters: int
    expected_parameters: int
    tensors: int
    expected_tensors: int | None
    bytes: int
    expected_bytes: int | None
    elements: int
    bits_per_weight: float
    main_parameters: int
    mtp_parameters: int
    active_parameters: int
    active_parameters_without_embedding: int
    parameters_by_role: dict[str, int]
    kv_bytes_per_token: int
    kv_bytes_per_token_fp8: int


@dataclass(frozen=True, slots=True)
class DtypeRow:
    """One line of the census. `bytes` counts data, not headers."""

    dtype: str
    tensors: int
    elements: int
    bytes: int


def census(entries: Iterable[TensorEntry]) -> tuple[DtypeRow, ...]:
    """Return tensors, elements and bytes by dtype, most bytes first."""
    rows: dict[str, list[int]] = {}
    for entry in entries:
        row = rows.setdefault(entry.dtype, [0, 0, 0])
        for index, count in enumerate((1, entry.nbytes // itemsize(entry.dtype), entry.nbytes)):
            row[index] += count
    found = (DtypeRow(dtype, *counts) for dtype, counts in rows.items())
    return tuple(sorted(found, key=lambda row: (-row.bytes, row.dtype)))


def active_parameters(schema: ModelSchema) -> int:
    """Return the parameters that one token meets in the main model.

    Everything but the experts it is not routed to: per MoE layer, of n_routed_experts only num_experts_per_tok count.
    Embedding and head count in full, the MTP layer does not. GLM-4.5: 33.63 billion, Air: 13.42 billion.
    """
    config = schema.config
    main = [tensor for tensor in schema.tensors.values() if not _is_mtp(schema, tensor)]
    experts = sum(tensor.numel for tensor in main if tensor.spec.role in _EXPERT_ROLES)
    rest = sum(tensor.numel for tensor in main) - experts
    return rest + experts // config.n_routed_experts * config.num_experts_per_tok


def count(structure: Structure, view: LogicalView, rows: Iterable[DtypeRow], declared: Declared) -> Totals:
    """Return the counts of a checkpoint; `rows` is its census."""
    schema, config = structure.schema, structure.schema.config
    present = [tensor for name, tensor in schema.tensors.items() if name in structure.modules]
    by_role: Counter[str] = Counter()
    for tensor in present:
        by_role[tensor.spec.role.value] += tensor.numel
    mtp = sum(tensor.numel for tensor in present if _is_mtp(schema, tensor))
    rows = tuple(rows)
    parameters, nbytes = by_role.total(), sum(row.bytes for row in rows)
    active = active_parameters(schema)
    embedding = sum(t.numel for t in schema.tensors.values() if t.spec.role is Role.EMBEDDING)
    kv_elements = 2 * config.kv_size * config.num_hidden_layers
    expected_tensors, expected_bytes = _expected(structure, view, declared)
    return Totals(
        parameters=parameters,
        expected_parameters=sum(tensor.numel for tensor in schema.tensors.values()),
        tensors=sum(row.tensors for row in rows),
        expected_tensors=expected_tensors,
        bytes=nbytes,
        expected_bytes=expected_bytes,
        elements=sum(row.elements for row in rows),
        bits_per_weight=8 * nbytes / max(1, parameters),
        main_parameters=parameters - mtp,
        mtp_parameters=mtp,
        active_parameters=active,
        active_parameters_without_embedding=active - embedding,
        parameters_by_role=dict(by_role),
        kv_bytes_per_token=_PLAIN_KV_BYTES * kv_elements,
        kv_bytes_per_token_fp8=kv_elements,
    )


def _expected(structure: Structure, view: LogicalView, declared: Declared) -> tuple[int | None, int | None]:
    """Return how many tensors and bytes the config leads to: its dtype, fp32 correction biases, codes with scales.

    A quantized weight that fits a declared scheme has the size that the scheme gives it. None where the config does not
    decide it: a scheme that is not implemented, a quantized weight that is missing.
    """
    plain = itemsize(BY_CONFIG_NAME[structure.schema.config.dtype])
    num_tensors = nbytes = 0
    for name, stored in structure.layout.stored.items():
        parts = view.parts.get(name, {})
        spec = stored.elements[0][0].tensor.spec
        own = parts.get("")
        may_be_codes = declared.block is not None and len(stored.elements[0][0].tensor.shape) > 1
        if (own is not None and own.dtype in FLOAT_DTYPES) or not may_be_codes:
            num_tensors += 1
            nbytes += prod(stored.shape) * (_FP32_BYTES if spec.dtype is DtypePolicy.KEEP_FP32 else plain)
        elif _fits(stored, parts, declared):
            num_tensors += len(parts)
            nbytes += sum(entry.nbytes for entry in parts.values())
        else:
            return None, None
    return num_tensors, nbytes


def _fits(stored: Stored, parts: Mapping[str, TensorEntry], declared: Declared) -> bool:
    try:
        match_scheme(stored.name, parts, declared.schemes, stored.stack, (stored.rows, stored.columns))
    except InputError:
        return False
    return True


def _is_mtp(schema: ModelSchema, tensor: Tensor) -> bool:
    return schema.mtp_layer is not None and tensor.layer == schema.mtp_layer
