"""Which tensor of the source a tensor of the candidate was made from, if it was not its own."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from converters.diagnosis.cause import CauseCode
from converters.diagnosis.explained import Explained
from converters.diagnosis.hypothesis import Hypothesis, is_proved, rows_of
from converters.diagnosis.orders import members
from converters.quant.judge import Pair
from converters.schema import Role, Tensor
from converters.source import Source

# tensors that are tested in full; when so many others showed the same, a few rows of each are
_PROVED_IN_FULL = 64
_VOCABULARY = (Role.EMBEDDING, Role.HEAD, Role.MTP_EMBEDDING, Role.MTP_HEAD)
# from a tensor to where its values came from: experts further on, layers further on, or that part of the same module
_Move = tuple[int, int, str]


@dataclass(slots=True)
class OriginSearch:
    """Looks for origins; what explained one tensor is tried first on the next, so that long searches are rare.

    Attributes:
        source: where tensors may come from.
    """

    source: Source
    _seen: dict[_Move, int] = field(default_factory=dict)
    _by_place: dict[tuple[str, int | None, int | None], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Index the source's tensors by row of the table, layer and expert."""
        self._by_place = {
            (tensor.spec.name, tensor.layer, tensor.expert): tensor for tensor in self.source.schema.tensors.values()
        }

    def find(self, pair: Pair) -> Explained | None:
        """Return the first tensor of the source, other than its own, that explains a tensor; None if none does."""
        tested: set[str] = {pair.tensor.name}
        for other in self._others(pair.tensor):
            if other.name in tested or other.shape != pair.tensor.shape:
                continue
            tested.add(other.name)
            hypothesis = Hypothesis(rows_of(self.source, other))
            if not is_proved(pair, hypothesis, sampled=True):
                continue
            move = _move(pair.tensor, other)
            sampled = self._seen.get(move, 0) >= _PROVED_IN_FULL
            if sampled or is_proved(pair, hypothesis):
                self._seen[move] = self._seen.get(move, 0) + 1
                return _explained(pair.tensor, other, sampled=sampled)
        return None

    def _others(self, tensor: Tensor) -> Iterator[Tensor]:
        """Yield where it may come from, likely places first."""
        for experts, layers, part in sorted(self._seen, key=lambda move: -self._seen[move]):
            layer = None if tensor.layer is None else tensor.layer + layers
            expert = None if tensor.expert is None else tensor.expert + experts
            found = self._by_place.get((part or tensor.spec.name, layer, expert))
            if found is not None and (not part or found in members(self.source, tensor)):
                yield found
        yield from members(self.source, tensor)
        config = self.source.config
        if tensor.expert is not None:
            yield from self._at(tensor, ((tensor.layer, expert) for expert in range(config.n_routed_experts)))
        if tensor.layer is not None:
            every = range(config.num_hidden_layers + 1)
            yield from self._at(tensor, ((layer, tensor.expert) for layer in every))
        if tensor.spec.role in _VOCABULARY:
            yield from (other for other in self._by_place.values() if other.spec.role in _VOCABULARY)

    def _at(self, tensor: Tensor, places: Iterator[tuple[int | None, int | None]]) -> Iterator[Tensor]:
        found = (self._by_place.get((tensor.spec.name, layer, expert)) for layer, expert in places)
        return (other for other in found if other is not None)


def _move(tensor: Tensor, other: Tensor) -> _Move:
    part = "" if other.spec == tensor.spec else other.spec.name
    return (other.expert or 0) - (tensor.expert or 0), (other.layer or 0) - (tensor.layer or 0), part


def _explained(tensor: Tensor, origin: Tensor, *, sampled: bool) -> Explained:
    how = "its first, middle and last rows are" if sampled else f"all {tensor.numel} elements are"
    return Explained(
        tensor, CauseCode.COPIED, f"it holds {origin.name}", f"{how} those of {origin.name}", origin, sampled
    )
