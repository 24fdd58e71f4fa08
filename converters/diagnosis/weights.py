"""Causes in the weights themselves: every tensor that was found wrong is held against all that is known to go wrong."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from converters.diagnosis.cause import Cause, CauseCode
from converters.diagnosis.combine import combine
from converters.diagnosis.explained import Explained
from converters.diagnosis.hypothesis import Hypothesis, is_proved
from converters.diagnosis.orders import first_proved, order_guesses
from converters.diagnosis.origins import OriginSearch
from converters.diagnosis.scales import ideal_scale_guesses, scale_guesses
from converters.diagnosis.values import FEW, constant, few_elements, gain, rounding_guesses
from converters.formats.weights import Coding
from converters.quant.certificate import Certificate, TensorFigures
from converters.quant.certify import pair_up
from converters.quant.judge import Pair, judge_tensor
from converters.quant.tiles import shares_tensor_scale, tiles
from converters.schema import DtypePolicy, Role, Tensor
from converters.source import Source

# when so many tensors are as no hypothesis has it, others are hardly better: the search is the long part
MOST_UNEXPLAINED = 64
_NVFP4 = (Coding.NVFP4_DIVISOR, Coding.NVFP4_FACTOR)


@dataclass(frozen=True, slots=True)
class _Case:
    """Two open checkpoints, and where tensors of one may come from in the other."""

    source: Source
    candidate: Source
    search: OriginSearch
    pairs: Mapping[str, Pair]


def weight_causes(
    source: Source, candidate: Source, weights: Certificate | None, layers: Iterable[int]
) -> tuple[Cause, ...]:
    """Return what explains the tensors that are not what they should be.

    Args:
        source: what the candidate was made from.
        candidate: the result.
        weights: the certificate, if there is one: only the tensors with findings are read.
        layers: layers that are suspected otherwise; their tensors are judged here where no certificate is given.
    """
    shapes = {name: tensor.shape for name, tensor in source.schema.tensors.items()}
    every = pair_up(source, candidate, None)
    pairs = {pair.tensor.name: pair for pair in every if pair.tensor.shape == shapes[pair.tensor.name]}
    case = _Case(source, candidate, OriginSearch(source), pairs)
    figures = {found.tensor: found for found in weights.tensors} if weights else _judged(pairs, set(layers))
    explained = list(_kept_policies(pairs.values()))
    told = {one.tensor.name for one in explained}
    unexplained = 0
    for name, found in figures.items():
        if unexplained < MOST_UNEXPLAINED and name in pairs and name not in told and found.findings():
            one = _explain(case, pairs[name], found)
            explained += [one] if one else []
            unexplained += one is None
    causes = combine(explained, source.schema)
    has_findings = bool(weights and weights.findings)
    return (*causes, *(_differing_globals(candidate) if has_findings else ()))


def _judged(pairs: dict[str, Pair], layers: set[int]) -> dict[str, TensorFigures]:
    suspects = (pair for pair in pairs.values() if pair.tensor.layer in layers)
    return {pair.tensor.name: judge_tensor(pair, lambda: None) for pair in suspects}


def _kept_policies(pairs: Iterable[Pair]) -> Iterator[Explained]:
    """Yield tensors whose dtype says enough: a rounded correction bias, a router as codes."""
    for pair in pairs:
        spec = pair.tensor.spec
        is_rounded = spec.dtype is DtypePolicy.KEEP_FP32 and pair.source_dtype == "F32" != pair.dtype
        if is_rounded and is_proved(pair, Hypothesis()):
            words = f"it is stored as {pair.dtype}"
            told = f"all {pair.tensor.numel} values are the source's F32, rounded to {pair.dtype}"
            yield Explained(pair.tensor, CauseCode.BIAS_ROUNDED, words, told)
        if spec.role is Role.ROUTER and pair.before[0].format.is_plain and not pair.after[0].format.is_plain:
            words, told = (
                f"it is quantized, as {pair.scheme}",
                f"codes of {pair.dtype} for weights of {pair.source_dtype}",
            )
            yield Explained(pair.tensor, CauseCode.ROUTER_QUANTIZED, words, told)


def _explain(case: _Case, pair: Pair, figures: TensorFigures) -> Explained | None:
    """Return the first explanation that holds; cheap ones and those that explain most come first."""
    if figures.outside == 0:
        return _only_scales(pair, figures)
    source = case.source
    tries: tuple[Callable[[], Explained | None], ...] = (
        lambda: few_elements(pair) if figures.outside <= FEW else None,
        lambda: constant(pair),
        lambda: case.search.find(pair),
        lambda: first_proved(pair, scale_guesses(case.candidate, pair)),
        lambda: first_proved(pair, order_guesses(source, pair, case.pairs)),
        lambda: gain(pair, source.config.routed_scaling_factor),
        lambda: first_proved(pair, rounding_guesses(pair)) if pair.after[0].format.is_plain else None,
        lambda: first_proved(pair, ideal_scale_guesses(pair)),
    )
    for attempt in tries:
        found = attempt()
        if found is not None:
            return found
    return None


def _only_scales(pair: Pair, figures: TensorFigures) -> Explained:
    """Return that codes fit their scales, but the scales do not follow from the source."""
    words = "its scales do not follow from the source, though its codes fit them"
    told = f"{figures.wrong_scales} of {figures.scales} scales, the first {figures.first_scale}"
    if not figures.wrong_scales:
        words, told = "it is scaled on the whole", f"<w, w'> / <w, w> is {figures.slope:.4g}"
        return Explained(pair.tensor, CauseCode.GAIN, words, told)
    return Explained(pair.tensor, CauseCode.SCALE_WRONG, words, told)


def _differing_globals(candidate: Source) -> Iterator[Cause]:
    """Yield weights that engines multiply as one, with one global scale, but that have several."""
    groups: dict[object, list[Tensor]] = {}
    for tensor in candidate.schema.tensors.values():
        fuse = tensor.spec.fuse
        if fuse is not None and len(tensor.shape) > 1:
            groups.setdefault((tensor.layer, tensor.expert, tensor.spec.role, fuse.group), []).append(tensor)
    for group in groups.values():
        found = {}
        for tensor in group:
            tile = tiles(candidate, tensor)[0]
            if tile.format.coding in _NVFP4 and shares_tensor_scale(tile):
                found[tensor.name] = float(tile.scale(tile.scales[-1], 0, 1).float())
        if len(set(found.values())) > 1:
            told = ", ".join(f"{value:.6g}" for value in found.values())
            parts = " and ".join(name.rsplit(".", 2)[-2] for name in found)
            yield Cause(
                CauseCode.GLOBAL_SCALES_DIFFER,
                next(iter(found)).rsplit(".", 2)[0],
                f"global scales of {parts} differ, and engines take one for all",
                f"global scales {told}",
                "Quantize the weights of a fused group with the scale of the largest magnitude among them.",
                tuple(found),
            )
