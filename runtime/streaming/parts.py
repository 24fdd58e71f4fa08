"""A layer in parts that are loaded one after the other: attention, what every token passes, and each routed expert."""

from collections.abc import Iterator
from dataclasses import dataclass

from converters.quant.policy import is_quantized
from converters.schema import Role, Tensor, parse
from runtime.model.loader import ModelLoader

_MLP_ROLES = frozenset({Role.DENSE_MLP, Role.ROUTER, Role.ROUTER_BIAS, Role.SHARED_EXPERT})


@dataclass(frozen=True, slots=True)
class Part:
    """Parameters that are needed together, and the weights among them that are ever quantized."""

    names: tuple[str, ...]
    weights: tuple[Tensor, ...]

    @property
    def leaders(self) -> tuple[Tensor, ...]:
        """The weights without those whose input is that of another one: k and v see what q sees, up what gate sees."""
        return tuple(weight for weight in self.weights if weight.spec.fuse is None or weight.spec.fuse.position == 0)

    def fellows(self, leader: Tensor) -> tuple[Tensor, ...]:
        """Return all weights that have the input of this one, itself included."""
        if leader.spec.fuse is None:
            return (leader,)
        group = leader.spec.fuse.group
        return tuple(weight for weight in self.weights if weight.spec.fuse and weight.spec.fuse.group == group)


@dataclass(frozen=True, slots=True)
class LayerParts:
    """The parts of one layer. `attention` holds all norms too, and eh_proj; `mlp` the router and the shared expert."""

    attention: Part
    mlp: Part
    experts: tuple[Part, ...]

    def __iter__(self) -> Iterator[Part]:
        yield from (self.attention, self.mlp, *self.experts)


def layer_parts(loader: ModelLoader, layer: int) -> LayerParts:
    """Return the parts of a layer; together they are its parameters."""
    attention: list[str] = []
    mlp: list[str] = []
    experts: dict[int, list[str]] = {}
    for name in loader.layer_names(layer):
        parsed = parse(name)
        if parsed.expert is not None:
            experts.setdefault(parsed.expert, []).append(name)
        else:
            (mlp if parsed.spec.role in _MLP_ROLES else attention).append(name)
    slots = tuple(_part(loader, experts[expert]) for expert in sorted(experts))
    return LayerParts(_part(loader, attention), _part(loader, mlp), slots)


def _part(loader: ModelLoader, names: list[str]) -> Part:
    tensors = [loader.schema.tensors[name] for name in names if name in loader.schema.tensors]
    return Part(tuple(names), tuple(tensor for tensor in tensors if is_quantized(tensor)))
