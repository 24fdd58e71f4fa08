"""The report of a verification as files: JSON and CSV for programs, Markdown for cards, HTML for readers.

Equal reports give equal bytes. Each file is written atomically; those of a folder in the order of FOLDER_FILES, so that
report.json, which names the others, is the last.
"""

import csv
import dataclasses
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from converters.checkpoint.header import build_header
from converters.checkpoint.writer import disk_errors, write_file
from converters.errors import UsageError
from runtime.verify.report import VerifyReport
from runtime.verify.report_html.words import Decode, visible
from runtime.verify.report_markdown import render_markdown

if TYPE_CHECKING:
    from converters.quant.certificate import TensorFigures
    from runtime.verify.results import ExpertDifference, LayerDifference, TokenTable

SCHEMA = "glm4moe.verify/1"
REPORT_OPTION = "--report"
TOKENS_FILE, LAYERS_FILE, EXPERTS_FILE, TENSORS_FILE = "tokens.safetensors", "layers.csv", "experts.csv", "tensors.csv"
HTML_FILE, MARKDOWN_FILE, JSON_FILE = "report.html", "report.md", "report.json"
FOLDER_FILES = (TOKENS_FILE, LAYERS_FILE, EXPERTS_FILE, TENSORS_FILE, HTML_FILE, MARKDOWN_FILE, JSON_FILE)
_SINGLE = {".json": JSON_FILE, ".html": HTML_FILE, ".md": MARKDOWN_FILE}
# what looks like the name of a file; a folder may well be called GLM-4.6
_OTHER_FILES = frozenset({".csv", ".htm", ".markdown", ".pdf", ".safetensors", ".tsv", ".txt", ".xml", ".yaml", ".yml"})
_NON_FINITE = {math.inf: "Infinity", -math.inf: "-Infinity"}
# how a cell begins that spreadsheets would compute
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def check_report_path(path: Path) -> None:
    """Refuse a path that no report can be written to, before anything long is begun.

    Raises:
        UsageError: it names another kind of file, or something else stands where a folder is to be.
    """
    is_file = path.suffix in _SINGLE and not path.is_dir()
    if path.suffix in _OTHER_FILES or (path.exists() and not path.is_dir() and not is_file):
        raise UsageError(
            f"{REPORT_OPTION} {path}",
            expected=f"FILE{', FILE'.join(_SINGLE)} or a folder",
            found=f"a file{path.suffix and ' of kind ' + path.suffix}",
        )
    for parent in path.parents:
        if os.path.lexists(parent):
            if not parent.is_dir():
                raise UsageError(
                    f"{REPORT_OPTION} {path}", expected="a folder that can be made", found=f"{parent}, which is none"
                )
            break


def write_reports(path: Path, report: VerifyReport, *, decode: Decode | None = None) -> tuple[Path, ...]:
    """Write the report and return the files written.

    Args:
        path: FILE.json, FILE.html or FILE.md; or a folder, which gets those of FOLDER_FILES whose level was run.
        report: what was found.
        decode: token ids to text, for the tokens that changed most; without it their ids are shown.
    Raises:
        UsageError: see `check_report_path`. ResourceError: a file cannot be written.
    """
    check_report_path(path)
    if path.suffix in _SINGLE and not path.is_dir():
        chosen = {path: _page_writers(report, decode, ())[_SINGLE[path.suffix]]}
    else:
        writers = _table_writers(report)
        writers |= _page_writers(report, decode, (*writers, HTML_FILE, MARKDOWN_FILE, JSON_FILE))
        chosen = {path / name: writers[name] for name in FOLDER_FILES if name in writers}
    for file, build in chosen.items():
        with disk_errors(file):
            file.parent.mkdir(parents=True, exist_ok=True)
        write_file(file, build())
    return tuple(chosen)


def _table_writers(report: VerifyReport) -> dict[str, Callable[[], bytes]]:
    """Return what builds each table that the levels have something for."""
    models, weights = report.levels.layers, report.levels.weights
    writers: dict[str, Callable[[], bytes]] = {}
    if models is not None and models.tokens is not None:
        tokens = models.tokens
        writers[TOKENS_FILE] = lambda: tokens_file(tokens)
    if models is not None and models.layers:
        layers = models.layers
        writers[LAYERS_FILE] = lambda: _csv(map(_layer_row, layers))
        writers[EXPERTS_FILE] = lambda: _csv(_expert_row(layer, expert) for layer in layers for expert in layer.experts)
    if weights is not None:
        tensors = weights.tensors
        writers[TENSORS_FILE] = lambda: _csv(map(_tensor_row, tensors))
    return writers


def _page_writers(report: VerifyReport, decode: Decode | None, files: Iterable[str]) -> dict[str, Callable[[], bytes]]:
    from runtime.verify.report_html.page import render_page

    return {
        HTML_FILE: lambda: render_page(report, decode).encode(),
        MARKDOWN_FILE: lambda: render_markdown(report).encode(),
        JSON_FILE: lambda: report_json(report, files),
    }


def report_json(report: VerifyReport, files: Iterable[str] = ()) -> bytes:
    """Return everything but the figures of single tokens as JSON, one key a line.

    Args:
        report: what was found.
        files: names of the files that belong together; where TENSORS_FILE is none of them, the figures of every tensor
            stand here, as `weights.tensors`.
    """
    names = list(files)
    document = {"schema": SCHEMA, "files": names, **report.to_json()}
    weights = report.levels.weights
    if weights is not None and TENSORS_FILE not in names:
        document["weights"] = {**document["weights"], "tensors": list(map(_tensor_row, weights.tensors))}
    lines = (f" {json.dumps(name)}: {json.dumps(as_plain(value), allow_nan=False)}" for name, value in document.items())
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def as_plain(value: Any) -> Any:
    """Return the value as JSON has it: no infinities, enums, dataclasses, sets or paths."""
    if isinstance(value, Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: as_plain(item) for name, item in _fields(value).items()}
    if isinstance(value, Mapping):
        return {str(as_plain(key)): as_plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(as_plain, value), key=repr)
    if isinstance(value, list | tuple):
        return [as_plain(item) for item in value]
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return _NON_FINITE.get(value, "NaN")
    return value


def tokens_file(tokens: "TokenTable") -> bytes:
    """Return a safetensors file of T predictions and the N token ids of the text.

    fp32 (T,): kl_nats, nll_reference, nll_candidate, delta_p, NaN where a side has NaN or Inf logits. int64 (T,):
    positions (index in token_ids of the predicted token), windows. int64 (N,): token_ids.
    """
    import torch

    scores = tokens.scores
    values = {name: getattr(scores, name).float() for name in ("kl_nats", "nll_reference", "nll_candidate", "delta_p")}
    values |= {"positions": tokens.positions_T.long(), "windows": tokens.windows_T.long()}
    values["token_ids"] = torch.tensor(tokens.token_ids, dtype=torch.int64)
    kinds = {torch.float32: "F32", torch.int64: "I64"}
    ordered = sorted(values.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header, _ = build_header([(name, kinds[value.dtype], tuple(value.shape)) for name, value in ordered])
    return header + b"".join(value.contiguous().numpy().tobytes() for _, value in ordered)


def _layer_row(layer: "LayerDifference") -> dict[str, Any]:
    from runtime.verify.results import OutputError, RouterDifference

    row: dict[str, Any] = {"layer": layer.layer, "is_mtp": layer.is_mtp}
    for name in ("attention", "mlp_norm", "mlp", "residual"):
        row |= _prefixed(name, getattr(layer, name), OutputError)
    for name in ("router", "router_own"):
        row |= _prefixed(name, getattr(layer, name), RouterDifference)
    return {**row, "first_non_finite": layer.first_non_finite}


def _prefixed(name: str, value: Any, kind: type) -> dict[str, Any]:
    return {f"{name}_{field.name}": getattr(value, field.name, None) for field in dataclasses.fields(kind)}


def _expert_row(layer: "LayerDifference", expert: "ExpertDifference") -> dict[str, Any]:
    return {"layer": layer.layer, "is_mtp": layer.is_mtp, **_fields(expert)}


def _tensor_row(figures: "TensorFigures") -> dict[str, Any]:
    return {**_fields(figures), "sqnr_db": figures.sqnr_db}


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def _csv(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Return rows under the names of the first; no rows, no names."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for index, row in enumerate(rows):
        if index == 0:
            writer.writerow(row)
        writer.writerow(_cells(row.values()))
    return text.getvalue().encode()


def _cells(values: Iterable[Any]) -> Iterator[str]:
    for value in values:
        plain = as_plain(value)
        if isinstance(plain, str) and plain not in _NON_FINITE.values():
            yield f"'{visible(plain)}" if plain.startswith(_FORMULA) else visible(plain)
        else:
            yield "" if plain is None else str(int(plain) if isinstance(plain, bool) else plain)
