"""What several tensors have in common, in words: an expert, the experts of a layer, one part of several layers."""

from collections.abc import Iterable, Sequence

from converters.schema import ModelSchema, Role, Tensor

_MOST_LISTED = 12
_FEW_PARTS = 3


def listed(numbers: Iterable[int]) -> str:
    """Return numbers as a reader would say them: `3`, `3 and 7`, `0 to 7`, `1, 4 and 6`."""
    found = sorted(set(numbers))
    if len(found) > 2 and found[-1] - found[0] == len(found) - 1:
        return f"{found[0]} to {found[-1]}"
    if len(found) > _MOST_LISTED:
        return f"{', '.join(map(str, found[:_MOST_LISTED]))} and {len(found) - _MOST_LISTED} more"
    return " and ".join(filter(None, (", ".join(map(str, found[:-1])), str(found[-1]))))


def counted(word: str, numbers: Iterable[int]) -> str:
    """Return `layer 3`, `layers 3 and 7`."""
    found = set(numbers)
    return f"{word} {listed(found)}" if len(found) == 1 else f"{word}s {listed(found)}"


def part(tensor: Tensor) -> str:
    """Return what a tensor is called within its module, `down_proj` of an expert."""
    return tensor.spec.part.removesuffix(".weight")


def subject(tensors: Sequence[Tensor], schema: ModelSchema) -> str:
    """Return the shortest name that says which tensors these are."""
    if len(tensors) == 1:
        return tensors[0].name
    layers = {tensor.layer for tensor in tensors if tensor.layer is not None}
    roles = {tensor.spec.role for tensor in tensors}
    where = f" of {_layers(layers, schema)}" if layers else ""
    parts = list(dict.fromkeys(part(tensor) for tensor in tensors))
    if len(roles) > 1 and len(parts) <= _FEW_PARTS:
        return f"{', '.join(parts)}{where}"
    if len(roles) > 1:
        return where.removeprefix(" of ") if layers else f"{len(tensors)} tensors"
    (role,) = roles
    what = ", ".join(parts) if len(parts) < _parts_of(role, schema) else ""
    if role is Role.EXPERT:
        experts = {tensor.expert for tensor in tensors if tensor.expert is not None}
        is_all = len(experts) == schema.config.n_routed_experts
        which = "all experts" if is_all else counted("expert", experts)
        return f"{what} of {which}{where}" if what else f"{which}{where}"
    words = what or f"{role.value.replace('_', ' ')}{'s' * (role is Role.NORM)}"
    return f"{words}{where}"


def _parts_of(role: Role, schema: ModelSchema) -> int:
    return len({tensor.spec.part for tensor in schema.tensors.values() if tensor.spec.role is role})


def _layers(layers: Iterable[int], schema: ModelSchema) -> str:
    found = set(layers)
    words = counted("layer", found)
    return f"{words} (MTP)" if found == {schema.mtp_layer} else words
