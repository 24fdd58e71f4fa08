"""Why a candidate is not what its source was: every cause that its files prove, the largest first.

Nothing is guessed: config and headers are compared, and what is said of weights was tested on their bytes. Only
tensors that were found wrong are read, block by block.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from converters.compare import StructureReport
from converters.compare_side import Side
from converters.diagnosis.cause import Cause
from converters.diagnosis.config_causes import config_causes, file_causes
from converters.diagnosis.headers import missing_causes, open_side, refused_causes, vocabulary_causes
from converters.diagnosis.weights import weight_causes
from converters.errors import InputError
from converters.quant.certificate import Certificate
from converters.shard.whole import open_whole
from converters.source import Source


def diagnose_folders(
    source: Path,
    candidate: Path,
    structure: StructureReport | None = None,
    weights: Certificate | None = None,
    layers: Sequence[int] = (),
) -> tuple[Cause, ...]:
    """Return the causes that two folders prove.

    Args:
        source: what the candidate was made from, whole or cut for ranks.
        candidate: the result, which may be one that no command opens.
        structure: what headers and config showed; None: not compared, or refused.
        weights: the certificate, if weights were compared.
        layers: layers that running the models found wrong, looked at where there is no certificate.
    Raises:
        InputError, ConfigError: the source cannot be opened.
    """
    found = [*config_causes(source, candidate), *file_causes(source, candidate)]
    if structure is None or structure.findings:
        before, after = Side.open("source", source), open_side("candidate", candidate)
        if isinstance(after, InputError):
            return (*found, *refused_causes(before, candidate))
        found += missing_causes(before, after)
    if structure is not None and not structure.findings and weights is None and not layers:
        return tuple(found)
    with open_whole(source) as ours:
        try:
            theirs = open_whole(candidate)
        except InputError:
            # findings of headers and config say why
            return tuple(found)
        with theirs:
            return (*found, *diagnose(ours, theirs, weights, layers))


def diagnose(
    source: Source, candidate: Source, weights: Certificate | None = None, layers: Iterable[int] = ()
) -> tuple[Cause, ...]:
    """Return the causes that the weights of two open checkpoints prove; see `diagnose_folders`."""
    return tuple(_in_weights(source, candidate, weights, layers))


def _in_weights(
    source: Source, candidate: Source, weights: Certificate | None, layers: Iterable[int]
) -> Iterator[Cause]:
    yield from vocabulary_causes(source, candidate)
    if source.config.vocab_size == candidate.config.vocab_size:
        yield from weight_causes(source, candidate, weights, layers)
