"""The sentences of a report: what each level found, and what nobody looked at."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from converters.compare import Outcome, StructureReport
from converters.formats.inputs import FULL
from runtime.verify.check import counted, severity
from runtime.verify.further_checks import engine_words, text_words
from runtime.verify.limits import INDISTINGUISHABLE
from runtime.verify.siblings import ATTENTION, NORM, layer_name, mlp_name

if TYPE_CHECKING:
    from converters.contents import ContentsReport
    from converters.quant.certificate import Certificate
    from runtime.verify.report import Levels
    from runtime.verify.results import FloorSummary, ModelComparison, MtpDifference
    from runtime.verify.summary import LogitSummary

# of these, engines quantize the activations as well
_QUANTIZED_INPUTS = frozenset({"fp8", "int8", "nvfp4", "int4"})


def sentences(levels: "Levels") -> Iterator[str]:
    """Yield one part of a sentence for every level that was run."""
    if levels.structure is not None:
        yield structure_words(levels.structure)
    if levels.contents is not None and levels.contents.record:
        yield contents_words(levels.contents)
    if levels.weights is not None:
        yield weights_words(levels.weights)
    models = levels.layers
    if models is not None:
        if models.layers:
            yield layers_words(models)
        if models.summary is not None:
            yield logits_words(models.summary, models.floor)
        if models.mtp is not None:
            yield mtp_words(models.mtp)
    if levels.text is not None:
        yield text_words(levels.text)
    if levels.runtime is not None:
        yield engine_words(levels.runtime)


def not_checked(scheme: str, levels: "Levels") -> Iterator[str]:
    """Yield what the levels that were run leave open."""
    if levels.structure is None:
        yield "structure"
    if levels.contents is None or not levels.contents.record:
        yield "bytes of the files"
    if levels.weights is None:
        yield "weights element by element"
    models = levels.layers
    if models is None or not models.layers:
        yield "layers and routers"
    elif not any(layer.experts for layer in models.layers):
        yield "single experts"
    if models is None or models.tokens is None:
        yield "logits"
    if models is not None and scheme in _QUANTIZED_INPUTS and models.activations == FULL:
        yield "activations quantized at run time"
    if not _has_mtp(models):
        yield "outputs of the MTP layer"
    if levels.text is None:
        yield "generated text"
    if levels.runtime is None:
        yield "serving engines"


def _has_mtp(models: "ModelComparison | None") -> bool:
    return models is not None and (models.mtp is not None or any(layer.is_mtp for layer in models.layers))


def structure_words(structure: StructureReport) -> str:
    """Return what became of the tensors."""
    counts = [f"{structure.outcomes[outcome]} {outcome}" for outcome in Outcome if structure.outcomes.get(outcome)]
    return (
        f"{counted(sum(structure.outcomes.values()), 'source tensors')}: {', '.join(counts)}; MTP layer {structure.mtp}"
    )


def contents_words(contents: "ContentsReport") -> str:
    """Return what the files were held against."""
    return f"digests as in {contents.record}" if not contents.findings else f"held against {contents.record}"


def weights_words(weights: "Certificate") -> str:
    """Return how many tensors were compared and how far they are apart."""
    rounded = [summary for summary in weights.summaries if summary.largest_relative_error]
    worst_error = max((summary.largest_relative_error for summary in rounded), default=0.0)
    words = f"{counted(len(weights.tensors), 'tensors')} compared element by element"
    return f"{words}, relative error at most {worst_error:.3g}" if rounded else words


def layers_words(models: "ModelComparison") -> str:
    """Return the worst part of a layer, and how many tokens the routers send elsewhere."""
    parts = [
        (layer, part, error)
        for layer in models.layers
        for part, error in ((ATTENTION, layer.attention), (NORM, layer.mlp_norm), (mlp_name(layer), layer.mlp))
        if error is not None
    ]
    layer, part, error = max(parts, key=lambda found: severity(found[2].relative))
    floor = "" if error.floor_relative is None else f" (floor {error.floor_relative:.2g})"
    words = f"worst of {counted(len(models.layers), 'layers')} {layer_name(layer)} {part} {error.relative:.3g}{floor}"
    if not error.relative:
        where = " where they are finite" if any(layer.first_non_finite for layer in models.layers) else ""
        words = f"outputs of {counted(len(models.layers), 'layers')} equal{where}"
    routers = [layer.router for layer in models.layers if layer.router is not None]
    if not routers:
        return words
    changed = sum(router.changed for router in routers) / len(routers)
    return f"{words}; {changed:.2%} of expert sets changed on equal input"


def logits_words(summary: "LogitSummary", floor: "FloorSummary | None") -> str:
    """Return KL, agreement and perplexity with their errors."""
    kl, perplexity = summary.kl_nats.estimate, summary.perplexity
    kl_error = "" if kl.se is None else f" +- {kl.se:.1g}"
    ratio_error = "" if perplexity.ratio_se is None else f" +- {perplexity.ratio_se:.1g}"
    return (
        f"KL {kl.mean:.3g}{kl_error} nats{_floor_words(kl.mean, floor)}, top-1 {summary.top1.mean:.2%}, "
        f"PPL ratio {perplexity.ratio:.5f}{ratio_error} over {counted(summary.num_tokens, 'tokens')}"
    )


def _floor_words(kl: float, floor: "FloorSummary | None") -> str:
    """Return the floor beside a KL; within three floors models are not ranked."""
    if floor is None:
        return ""
    if 0 < kl < INDISTINGUISHABLE * floor.kl_mean:
        return f" (floor {floor.kl_mean:.2g}: indistinguishable from rounding)"
    return f" (floor {floor.kl_mean:.2g})"


def mtp_words(mtp: "MtpDifference") -> str:
    """Return how the drafts fare."""
    drafts = f"acceptance {mtp.acceptance_candidate:.2%} for {mtp.acceptance_reference:.2%}"
    return f"MTP {drafts}" if mtp.summary is None else f"MTP KL {mtp.summary.kl_nats.estimate.mean:.3g}, {drafts}"
