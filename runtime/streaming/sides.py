"""The models of a run, and the order in which their weights are needed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from converters.schema import Role
from converters.source import Source
from runtime.config import EngineConfig
from runtime.model.decoder import DecoderLayer
from runtime.model.linear import Linear
from runtime.model.loader import ModelLoader
from runtime.model.mtp import MtpLayer
from runtime.moe.plan import VANILLA
from runtime.streaming.embedding import names_of
from runtime.streaming.options import StreamOptions
from runtime.streaming.parts import LayerParts, Part, layer_parts
from runtime.streaming.reading import Batch

# weights of all sides that are read together, if several experts have so little
GROUP_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Side:
    """One model of a run; its loader is filled part by part."""

    name: str
    source: Source
    loader: ModelLoader

    @classmethod
    def of(cls, name: str, source: Source, options: StreamOptions) -> "Side":
        """Plan a model from its headers; see `ModelLoader`."""
        engine = EngineConfig(
            dtype=options.dtype, device=options.device, moe_backend=VANILLA, activations=options.activations
        )
        loader = ModelLoader(source, engine, with_mtp=options.with_mtp)
        for module in loader.model.modules():
            if isinstance(module, Linear):
                module.in_blocks = not options.deterministic and options.device == "cpu"
        return cls(name, source, loader)

    @property
    def num_layers(self) -> int:
        """Layers without the MTP layer, whose index this is."""
        return self.source.config.num_hidden_layers

    def layer(self, layer: int) -> DecoderLayer:
        """Return a layer's modules."""
        module = self.loader.model.model.layers[layer]
        assert isinstance(module, DecoderLayer), module
        return module

    @property
    def mtp(self) -> MtpLayer | None:
        """The MTP layer, if it is to be run."""
        return self.loader.mtp

    def parts(self) -> list[LayerParts]:
        """Return the parts of every layer, the MTP layer last."""
        return [layer_parts(self.loader, layer) for layer in range(len(self.loader.model.model.layers))]

    def head_names(self) -> tuple[str, ...]:
        """Return the head's parameters."""
        heads = set(names_of(self.source, Role.HEAD))
        modules = {name.rpartition(".")[0] for name in heads}
        return tuple(name for name in self.loader.parameter_names if name.rpartition(".")[0] in modules)


def runs_mtp(sides: Sequence[Side]) -> bool:
    """Return whether the MTP layer is run: all sides must have it."""
    return all(side.mtp is not None for side in sides)


def plan_batches(sides: Sequence[Side]) -> list[Batch]:
    """Return what is read, in order: the layers, the final norm, and the MTP layer if it is run."""
    parts = [side.parts() for side in sides]
    batches: list[Batch] = []
    for layer in range(sides[0].num_layers):
        batches += _layer_batches(sides, layer, [found[layer] for found in parts])
    batches.append(Batch("final norm", tuple(tuple(names_of(side.source, Role.NORM)) for side in sides)))
    if runs_mtp(sides):
        layer = sides[0].num_layers
        batches += _layer_batches(sides, layer, [found[layer] for found in parts])
    return batches


def _layer_batches(sides: Sequence[Side], layer: int, parts: Sequence[LayerParts]) -> Iterator[Batch]:
    def batch(what: str, chosen: Sequence[Sequence[Part]], experts: range = range(0)) -> Batch:
        names = tuple(tuple(name for part in side for name in part.names) for side in chosen)
        return Batch(f"layer {layer}: {what}", names, experts, layer)

    yield batch("attention", [[found.attention] for found in parts])
    yield batch("mlp", [[found.mlp] for found in parts])
    count = len(parts[0].experts)
    if count:
        first = [found.experts[0].names for found in parts]
        size = sum(side.loader.held_bytes(names, as_stored=True) for side, names in zip(sides, first, strict=True))
        step = max(1, GROUP_BYTES // size)
        for start in range(0, count, step):
            group = range(start, min(start + step, count))
            yield batch("experts", [[found.experts[expert] for expert in group] for found in parts], group)
