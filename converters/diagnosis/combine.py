"""From what explains single tensors to causes: what is the same everywhere is said once, by its largest name."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from converters.diagnosis.cause import Cause, CauseCode
from converters.diagnosis.explained import Explained
from converters.diagnosis.naming import counted, listed, part, subject
from converters.schema import ModelSchema, Role, Tensor

_COPY_AGAIN = "Write these tensors anew from the source; the names they were written under are wrong."
_REMEDIES = {
    CauseCode.ZERO: "Write these tensors anew from the source; nothing was copied into them.",
    CauseCode.IDENTITY_GAIN: "Copy the norm's weights from the source; an engine that leaves them out must be told to.",
    CauseCode.NON_FINITE: "Quantize or copy these tensors anew; a scale overflowed, or the files are damaged.",
    CauseCode.FEW_ELEMENTS: "Copy the file again and compare its digest: bits flipped on disk or on the way.",
    CauseCode.GAIN: "Undo the factor, or write these tensors anew.",
    CauseCode.NEGATED: "Write these tensors anew with the signs of the source.",
    CauseCode.FACTOR_BAKED_IN: "Undo the factor: engines apply routed_scaling_factor to routed experts themselves, and "
    "never to the shared expert.",
    CauseCode.ROUNDED_FURTHER: "Convert these tensors again without the detour.",
    CauseCode.BIAS_ROUNDED: "Keep the correction bias in F32: rounding it changes which experts are chosen.",
    CauseCode.ROUTER_QUANTIZED: "Keep routers as they are: they are small, and their error changes which experts are "
    "chosen.",
    CauseCode.SCALE_INVERTED: "Store the other of scale and inverse scale, whichever the config's format multiplies "
    "with.",
    CauseCode.SCALE_TRANSPOSED: "Transpose the scales.",
    CauseCode.SCALES_EXCHANGED: "Exchange the scales again.",
    CauseCode.SCALE_LOST: "Store the scales that the codes were made with.",
    CauseCode.SCALE_WRONG: "Store the scales that the codes were made with, or quantize anew.",
    CauseCode.NIBBLE_ORDER: "Pack the code of the even column into the low half of each byte.",
    CauseCode.ZERO_POINT: "Symmetric codes have no zero point: pack and unpack them with the same offset.",
    CauseCode.UNSCALED: "Multiply the codes with their scales when the weights are restored.",
    CauseCode.ROPE_ORDER: "Undo the reordering of rows of q and k, of their biases and of their norms alike.",
    CauseCode.QKV_ORDER: "Take the fused tensor apart in the order in which it was put together.",
    CauseCode.GATE_UP_INTERLEAVED: "Take the fused tensor apart in the order in which it was put together.",
    CauseCode.ROWS_SHIFTED: "Write the tensor anew with row i for token i.",
    CauseCode.HALVES_EXCHANGED: "Exchange the halves: the normed embedding comes first, then the hidden state.",
    CauseCode.TP_SLICES_PERMUTED: "Put the slices of the ranks together in the order of the ranks.",
    CauseCode.SLICE_CUT_IN_BLOCK: "Cut at multiples of the block, with a smaller --tp, or quantize per channel.",
}


def combine(found: Sequence[Explained], schema: ModelSchema) -> tuple[Cause, ...]:
    """Return causes, those that explain most tensors first."""
    moved = [one for one in found if one.origin is not None]
    causes = [*_moved(moved, schema), *_alike([one for one in found if one.origin is None], schema)]
    return tuple(sorted(causes, key=lambda cause: -len(cause.tensors)))


def _alike(found: Iterable[Explained], schema: ModelSchema) -> Iterator[Cause]:
    """Yield a cause for all tensors of which the same is said."""
    groups: dict[tuple[CauseCode, str], list[Explained]] = {}
    for one in found:
        groups.setdefault((one.code, one.statement), []).append(one)
    for (code, statement), alike in groups.items():
        tensors = [one.tensor for one in alike]
        yield _cause(code, subject(tensors, schema), statement, alike, _REMEDIES.get(code, _COPY_AGAIN))


def _cause(code: CauseCode, about: str, statement: str, found: Sequence[Explained], remedy: str) -> Cause:
    told = found[0].evidence
    if len(found) > 1:
        sampled = sum(one.sampled for one in found)
        looked = (
            f"{len(found)} tensors, {sampled} of them by a few rows" if sampled else f"{len(found)} tensors in full"
        )
        told = f"{looked}; of the first, {found[0].tensor.name}: {told}"
    return Cause(code, about, statement, told, remedy, tuple(one.tensor.name for one in found))


def _moved(found: Sequence[Explained], schema: ModelSchema) -> Iterator[Cause]:
    """Yield causes for tensors that hold another one's values."""
    experts, layers, parts, rest = [], [], [], []
    for one in found:
        tensor, origin = one.tensor, one.origin
        assert origin is not None, one
        if tensor.spec == origin.spec and tensor.layer == origin.layer:
            experts.append(one)
        elif tensor.spec == origin.spec and tensor.expert == origin.expert:
            layers.append(one)
        elif (tensor.layer, tensor.expert) == (origin.layer, origin.expert) and tensor.layer is not None:
            parts.append(one)
        else:
            rest.append(one)
    yield from _moved_experts(experts, schema)
    yield from _moved_layers(layers, schema)
    yield from _moved_parts(parts, schema)
    yield from _moved_otherwise(rest)


def _moved_experts(found: Sequence[Explained], schema: ModelSchema) -> Iterator[Cause]:
    """Yield which experts hold which, the same in several layers once."""
    by_layer: dict[int, dict[int, list[Explained]]] = {}
    for one in found:
        assert one.tensor.layer is not None and one.tensor.expert is not None, one  # noqa: PT018
        by_layer.setdefault(one.tensor.layer, {}).setdefault(one.tensor.expert, []).append(one)
    same: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for layer, experts in by_layer.items():
        moves = tuple((expert, _origin_expert(alike)) for expert, alike in sorted(experts.items()))
        same.setdefault(moves, []).append(layer)
    for moves, layers in same.items():
        alike = [one for layer in layers for expert, _ in moves for one in by_layer[layer][expert]]
        code, statement = _expert_words(dict(moves), layers, alike, schema)
        about = subject([one.tensor for one in alike], schema)
        yield _cause(code, about, statement, alike, _COPY_AGAIN)


def _origin_expert(found: Sequence[Explained]) -> int:
    origin = found[0].origin
    assert origin is not None, found
    assert origin.expert is not None, found
    return origin.expert


def _expert_words(
    moves: Mapping[int, int], layers: Sequence[int], found: Sequence[Explained], schema: ModelSchema
) -> tuple[CauseCode, str]:
    where = f"of {counted('layer', layers)}"
    parts = list(dict.fromkeys(part(one.tensor) for one in found))
    whole = len({t.spec.part for t in schema.tensors.values() if t.spec.role is found[0].tensor.spec.role})
    what = "" if len(parts) == whole else f"{', '.join(parts)} of "
    if set(moves) != set(moves.values()):
        told = "; ".join(f"expert {expert} holds expert {origin}" for expert, origin in moves.items())
        return CauseCode.COPIED, f"{what}{told}, {where}, twice" if len(moves) == 1 else f"{what}{told}, {where}"
    if len(moves) == 2:
        return CauseCode.EXCHANGED, f"{what}experts {listed(moves)} {where} are exchanged"
    ranks = _rank_order(moves, schema.config.n_routed_experts)
    if ranks:
        order, dealt = ranks
        shown = " ".join(map(str, order))
        words = f"{what}experts {where} are those of {len(order)} EP ranks in the order {shown}, dealt {dealt}"
        return CauseCode.EP_RANKS_PERMUTED, words
    told = ", ".join(f"{expert} holds {origin}" for expert, origin in list(moves.items())[:8])
    return CauseCode.PERMUTED, f"{what}experts {where} are permuted: {told}{' ...' if len(moves) > 8 else ''}"


def _rank_order(moves: Mapping[int, int], num_experts: int) -> tuple[list[int], str] | None:
    """Return which EP rank's experts stand in each rank's place, if all experts moved with their ranks."""
    for ranks in (size for size in range(2, num_experts) if num_experts % size == 0):
        held = num_experts // ranks
        for dealt, experts in (
            ("in blocks", [range(rank * held, (rank + 1) * held) for rank in range(ranks)]),
            ("in turns", [range(rank, num_experts, ranks) for rank in range(ranks)]),
        ):
            first = {own[0]: rank for rank, own in enumerate(experts)}
            order = [first.get(moves.get(own[0], own[0]), -1) for own in experts]
            if sorted(order) != list(range(ranks)) or held == 1:
                continue
            pairs = ((own[i], experts[order[rank]][i]) for rank, own in enumerate(experts) for i in range(held))
            if all(moves.get(expert, expert) == origin for expert, origin in pairs):
                return order, dealt
    return None


def _moved_layers(found: Sequence[Explained], schema: ModelSchema) -> Iterator[Cause]:
    by_layers: dict[tuple[int, int], list[Explained]] = {}
    for one in found:
        assert one.origin is not None, one
        assert one.origin.layer is not None, one
        by_layers.setdefault((one.tensor.layer or 0, one.origin.layer), []).append(one)
    for (layer, origin), alike in by_layers.items():
        back = by_layers.get((origin, layer))
        if back is None:
            about = subject([one.tensor for one in alike], schema)
            yield _cause(CauseCode.COPIED, about, f"it holds what is layer {origin}'s", alike, _COPY_AGAIN)
        elif layer < origin:
            both = [*alike, *back]
            names = {one.tensor.spec.name for one in both}
            what = "" if len(names) > 4 else f"{', '.join(dict.fromkeys(part(one.tensor) for one in both))} of "
            words = f"{what}layers {layer} and {origin} are exchanged"
            yield _cause(CauseCode.EXCHANGED, f"layers {layer} and {origin}", words, both, _COPY_AGAIN)


def _moved_parts(found: Sequence[Explained], schema: ModelSchema) -> Iterator[Cause]:
    """Yield parts of a module that are in each other's place: gate and up, k and v."""
    names = {one.tensor.name: one for one in found}
    groups: dict[tuple[CauseCode, Role, str], list[Explained]] = {}
    for one in found:
        assert one.origin is not None, one
        fuse = one.tensor.spec.fuse
        is_exchange = one.origin.name in names
        pair = sorted((part(one.tensor), part(one.origin)))
        if not is_exchange:
            code, words = CauseCode.COPIED, f"{part(one.tensor)} holds {part(one.origin)}"
        elif one.tensor.spec.role in (Role.EXPERT, Role.SHARED_EXPERT, Role.DENSE_MLP):
            code, words = CauseCode.GATE_UP_EXCHANGED, f"{' and '.join(pair)} are exchanged"
        else:
            code, words = CauseCode.QKV_ORDER, f"{' and '.join(pair)} are exchanged"
        assert fuse is not None, one
        groups.setdefault((code, one.tensor.spec.role, words), []).append(one)
    for (code, _, words), alike in groups.items():
        yield _cause(code, _module_subject([one.tensor for one in alike], schema), words, alike, _COPY_AGAIN)


def _module_subject(tensors: Sequence[Tensor], schema: ModelSchema) -> str:
    """Return whose parts these are: of an exchange, the parts need not be named twice."""
    layers = {tensor.layer for tensor in tensors if tensor.layer is not None}
    where = counted("layer", layers)
    role = tensors[0].spec.role
    if role is Role.EXPERT:
        experts = {tensor.expert for tensor in tensors if tensor.expert is not None}
        is_all = len(experts) == schema.config.n_routed_experts
        return f"{'all experts' if is_all else counted('expert', experts)} of {where}"
    return f"{role.value.replace('_', ' ')} of {where}"


def _moved_otherwise(found: Sequence[Explained]) -> Iterator[Cause]:
    for one in found:
        assert one.origin is not None, one
        tensor, origin = one.tensor, one.origin
        if tensor.spec.role is Role.HEAD and origin.spec.role is Role.EMBEDDING:
            words, remedy = "the head is the embedding: it was tied", "Copy the head from the source; it has its own."
            yield _cause(CauseCode.TIED_HEAD, tensor.name, words, [one], remedy)
        else:
            yield _cause(CauseCode.COPIED, tensor.name, one.statement, [one], _COPY_AGAIN)
