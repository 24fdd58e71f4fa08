"""Causes that headers and the index show: tensors that are gone, layers and experts among them, a longer vocabulary."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from converters.checkpoint.index import INDEX_FILE
from converters.compare_side import Side
from converters.config import read_json
from converters.diagnosis.cause import Cause, CauseCode
from converters.diagnosis.hypothesis import rows_of
from converters.diagnosis.naming import counted, subject
from converters.errors import ConfigError, InputError
from converters.inspect.survey import survey
from converters.layout import parse_known
from converters.schema import ModelSchema, Role, Tensor
from converters.source import Source

_FETCH_AGAIN = "Convert or fetch the checkpoint again; these tensors are in none of its files."
_ROWS = 4096


def missing_causes(source: Side, candidate: Side) -> Iterator[Cause]:
    """Yield what the candidate lacks of the source's tensors, as large wholes."""
    gone = [
        tensor
        for tensor in source.schema.tensors.values()
        if source.held(tensor) is not None and candidate.held(tensor) is None
    ]
    mtp = source.schema.mtp_layer
    if mtp is not None and not candidate.schema.has_mtp:
        gone = [tensor for tensor in gone if tensor.layer != mtp]
        if candidate.config.num_nextn_predict_layers:
            yield _mtp_cause(source.schema)
    yield from _groups(gone, source.schema, "it is missing", _FETCH_AGAIN)


def _mtp_cause(schema: ModelSchema) -> Cause:
    names = tuple(name for name, tensor in schema.tensors.items() if tensor.layer == schema.mtp_layer)
    return Cause(
        CauseCode.MTP_MISSING,
        f"layer {schema.mtp_layer} (MTP)",
        "the MTP layer is missing, though config.json announces it",
        f"none of its {len(names)} tensors is there; num_nextn_predict_layers is 1",
        "Convert again with the MTP layer, or set num_nextn_predict_layers to 0.",
        names,
    )


def _groups(gone: Sequence[Tensor], schema: ModelSchema, words: str, remedy: str) -> Iterator[Cause]:
    """Yield causes for tensors that are gone: whole layers, whole experts, then one by one."""
    rest = list(gone)
    for layer in sorted({tensor.layer for tensor in gone if tensor.layer is not None}):
        own = [tensor for tensor in rest if tensor.layer == layer]
        if len(own) == sum(tensor.layer == layer for tensor in schema.tensors.values()):
            yield _gone(CauseCode.LAYER_MISSING, own, f"layer {layer}", words, remedy)
            rest = [tensor for tensor in rest if tensor.layer != layer]
    by_expert: dict[tuple[int | None, int | None], list[Tensor]] = {}
    for tensor in rest:
        by_expert.setdefault((tensor.layer, tensor.expert), []).append(tensor)
    parts = len({tensor.spec for tensor in schema.tensors.values() if tensor.spec.role is Role.EXPERT})
    for (where, expert), own in by_expert.items():
        if expert is not None and len(own) == parts:
            about = f"{counted('expert', [expert])} of layer {where}"
            yield _gone(CauseCode.EXPERT_MISSING, own, about, words, remedy)
            rest = [tensor for tensor in rest if tensor not in own]
    by_role: dict[tuple[Role, int | None], list[Tensor]] = {}
    for tensor in rest:
        by_role.setdefault((tensor.spec.role, tensor.layer), []).append(tensor)
    for own in by_role.values():
        yield _gone(CauseCode.MISSING, own, subject(own, schema), words, remedy)


def _gone(code: CauseCode, tensors: Sequence[Tensor], about: str, words: str, remedy: str) -> Cause:
    told = f"{len(tensors)} tensors, the first {tensors[0].name}"
    return Cause(code, about, words, told, remedy, tuple(tensor.name for tensor in tensors))


def refused_causes(source: Side, folder: Path) -> Iterator[Cause]:
    """Yield what is wrong with a candidate whose headers and index do not fit each other, so that it is not opened."""
    found = survey(folder)
    weight_map = _weight_map(folder)
    if not weight_map:
        return
    in_files, in_index = _by_official(found.entries, source), _by_official(weight_map, source)
    unlisted = [
        source.schema.tensors[name]
        for name, stored in in_files.items()
        if name in source.schema.tensors and not any(part in weight_map for part in stored)
    ]
    remedy = f"Write {INDEX_FILE} anew from the headers of the files: engines load only what it lists."
    words = f"it is in the files, but {INDEX_FILE} does not list it"
    for cause in _groups(unlisted, source.schema, words, remedy):
        yield Cause(CauseCode.INDEX_INCOMPLETE, cause.subject, words, cause.evidence, remedy, cause.tensors)
    nowhere = in_index.keys() - in_files.keys()
    gone = [tensor for name, tensor in source.schema.tensors.items() if name in nowhere]
    yield from _groups(gone, source.schema, f"{INDEX_FILE} lists it, but no file has it", _FETCH_AGAIN)


def _weight_map(folder: Path) -> Mapping[str, object]:
    try:
        found = read_json(folder / INDEX_FILE).get("weight_map")
    except ConfigError:
        return {}
    return found if isinstance(found, dict) else {}


def _by_official(names: Iterable[str], source: Side) -> dict[str, list[str]]:
    """Return the stored names of each official tensor, of its parts too, in a layout of single experts."""
    found: dict[str, list[str]] = {}
    for name, (parsed, _) in parse_known(names, source.config).items():
        found.setdefault(parsed.spec.name.format(layer=parsed.layer, expert=parsed.expert), []).append(name)
    return found


def open_side(label: str, folder: Path) -> Side | InputError:
    """Return a checkpoint's headers, or why they cannot be used."""
    try:
        return Side.open(label, folder)
    except InputError as error:
        return error


def vocabulary_causes(source: Source, candidate: Source) -> Iterator[Cause]:
    """Yield that embedding and head have more rows than the source's, and whether its rows are among them."""
    before, after = source.config.vocab_size, candidate.config.vocab_size
    if before == after:
        return
    common = min(before, after)
    tensors = [tensor for tensor in source.schema.tensors.values() if tensor.shape[0] == before]
    same = [
        tensor.name
        for tensor in tensors
        if tensor.name in candidate.schema.tensors and _same_rows(source, candidate, tensor, common)
    ]
    change = f"{after - before} rows more" if after > before else f"{before - after} rows less"
    yield Cause(
        CauseCode.VOCABULARY_PADDED,
        "vocabulary",
        f"the vocabulary has {change} than the source's: {after} instead of {before}",
        f"the first {common} rows are the source's in {len(same)} of {len(tensors)} tensors with a row for each token",
        f"Cut embedding and head to {before} rows, or pad them only inside of an engine.",
        tuple(tensor.name for tensor in tensors),
    )


def _same_rows(source: Source, candidate: Source, tensor: Tensor, count: int) -> bool:
    ours, theirs = rows_of(source, tensor), rows_of(candidate, candidate.schema.tensors[tensor.name])
    spans = ((start, min(start + _ROWS, count)) for start in range(0, count, _ROWS))
    return all(bool((ours(*span).float() == theirs(*span).float()).all()) for span in spans)
