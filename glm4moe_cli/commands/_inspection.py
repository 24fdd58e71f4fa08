"""How `inspect` shows its report to people."""

from collections.abc import Iterator

from converters.config import Glm4MoeConfig
from converters.errors import InputError
from converters.inspect.catalog import CheckFinding
from converters.inspect.parallel import Fit, ParallelReport
from converters.inspect.quantization import PLAIN, Quantization
from converters.inspect.report import InspectReport, ModelFacts
from converters.inspect.totals import Totals
from glm4moe_cli._output import Output
from glm4moe_cli._text import format_bytes

# more of them say no more; --json has all
MAX_FINDINGS = 30


def show(output: Output, report: InspectReport, *, tensors: bool, missing: bool) -> None:
    """Print the headline first, then facts, then what was asked for, then findings with their remedies."""
    output.line(headline(report))
    if report.digest:
        output.line(f"content sha256:{report.digest}")
    if report.model:
        output.facts("Checkpoint", dict(_model_facts(report, report.model)))
        _show_parallel(output, report.model.parallel)
    dtype_rows = [(row.dtype, row.tensors, row.elements, row.bytes) for row in report.census]
    output.table("Dtypes", ("dtype", "tensors", "elements", "bytes"), dtype_rows)
    if tensors:
        columns = ("tensor", "dtype", "shape", "bytes", "file")
        entries = report.survey.entries.items()
        output.table("Tensors", columns, [(n, e.dtype, list(e.shape), e.nbytes, file) for n, (file, e) in entries])
    if missing:
        rows = [(name, "missing", why) for name, why in report.missing.items()]
        rows += [(name, "unexpected", report.survey.entries[name][0]) for name in report.unexpected]
        output.table("Missing and unexpected tensors", ("tensor", "is", "where"), rows)
    _show_findings(output, report.findings)


def headline(report: InspectReport) -> str:
    """Return what the checkpoint is, in one line."""
    nbytes = sum(row.bytes for row in report.census)
    num_files = len(report.survey.file_bytes)
    files = f"{num_files} file{'' if num_files == 1 else 's'}"
    held = f"{format_bytes(nbytes)} in {len(report.survey.entries):,} tensors, {files}"
    if report.model is None:
        return f"{report.label}: not a checkpoint that can be described, {held}"
    model = report.model
    scheme = "" if model.quantization.scheme == PLAIN else f" {model.quantization.scheme}"
    parameters = f"{model.totals.parameters:,} parameters"
    return f"{report.label}: {model.variant.name}{scheme}, {report.view.layout} layout, {parameters}, {held}"


def _model_facts(report: InspectReport, model: ModelFacts) -> Iterator[tuple[str, object]]:
    yield "model", model.variant.name
    yield "recognised by", "; ".join(model.variant.evidence)
    if model.variant.differences:
        yield "differs in", "; ".join(model.variant.differences)
    if report.survey.config:
        yield "architecture", _architecture(report.survey.config)
    yield "layout", report.view.layout
    yield from _format_facts(model.quantization)
    yield "MTP", model.mtp.style
    if model.mtp.layer is not None:
        yield "MTP size", f"{model.mtp.tensors:,} tensors, {format_bytes(model.mtp.bytes)}"
    yield from _total_facts(model.totals)
    if report.missing or report.unexpected:
        yield "differences", f"{len(report.missing)} tensors missing, {len(report.unexpected)} unexpected"


def _architecture(config: Glm4MoeConfig) -> str:
    layers = f"{config.num_hidden_layers} layers, {config.first_k_dense_replace} of them dense"
    experts = f"{config.num_experts_per_tok} of {config.n_routed_experts} experts and {config.n_shared_experts} shared"
    heads = f"{config.num_attention_heads} heads over {config.num_key_value_heads} key-value heads"
    return f"{layers}; {experts}; {heads}; context of {config.max_position_embeddings:,} tokens"


def _format_facts(quantization: Quantization) -> Iterator[tuple[str, object]]:
    if quantization.scheme == PLAIN:
        yield "format", "plain weights, not quantized"
    else:
        yield "format", f"{quantization.scheme}, {quantization.dialect}: {quantization.modules:,} modules"
    if quantization.evidence:
        yield "format seen in", "; ".join(quantization.evidence)
    if quantization.modules:
        left = ", ".join(f"{count} {role}" for role, count in quantization.plain_modules.items())
        yield "left unquantized", f"{left or 'nothing'}; the ignore list has {len(quantization.ignore)} entries"
    if quantization.kv_cache:
        yield "KV cache", quantization.kv_cache


def _total_facts(totals: Totals) -> Iterator[tuple[str, object]]:
    yield "parameters", _beside(totals.parameters, totals.expected_parameters)
    yield "tensors", _beside(totals.tensors, totals.expected_tensors)
    yield "bytes", _beside(totals.bytes, totals.expected_bytes)
    yield "main model, MTP", f"{totals.main_parameters:,} and {totals.mtp_parameters:,} parameters"
    active, without = totals.active_parameters, totals.active_parameters_without_embedding
    embedding = f"{without:,} ({without / 1e9:.2f} B) without the input embedding"
    yield "active per token", f"{active:,} ({active / 1e9:.2f} B) parameters, {embedding}"
    roles = sorted(totals.parameters_by_role.items(), key=lambda item: -item[1])
    yield "parameters by group", ", ".join(f"{role} {count:,}" for role, count in roles)
    yield "bits per weight", f"{totals.bits_per_weight:.2f}"
    yield (
        "KV cache per token",
        f"{totals.kv_bytes_per_token:,} bytes in 16 bits, {totals.kv_bytes_per_token_fp8:,} in 8",
    )


def _beside(found: int, expected: int | None) -> str:
    if expected is None:
        return f"{found:,}, the config does not decide it"
    return f"{found:,}, as the config expects" if found == expected else f"{found:,}, the config expects {expected:,}"


def _show_parallel(output: Output, parallel: ParallelReport) -> None:
    rows = [
        (tensor.size, _fit(tensor), _fit(with_ep), _fit(expert), _fit(pipeline))
        for tensor, with_ep, expert, pipeline in zip(
            parallel.tensor, parallel.tensor_with_ep, parallel.expert, parallel.pipeline, strict=True
        )
    ]
    columns = ("ranks", "tensor parallel", "tensor, experts whole", "expert parallel", "pipeline parallel")
    output.table("Parallel sizes", columns, rows)
    columns = ("stored as", "dense layers", "experts", "tensor parallel", "tensor, experts whole")
    limits = [(row.scheme, *map(_sizes, (row.dense, row.experts, row.model, row.with_ep))) for row in parallel.schemes]
    output.table("Sizes by scheme", columns, limits)


def _fit(fit: Fit) -> str:
    if not fit.fits:
        others = f", and {len(fit.reasons) - 1} more" if len(fit.reasons) > 1 else ""
        return f"no: {fit.reasons[0]}{others}"
    return f"fits ({fit.note})" if fit.note else "fits"


def _sizes(sizes: tuple[int, ...]) -> str:
    return " ".join(map(str, sizes)) or "none"


def _show_findings(output: Output, findings: tuple[CheckFinding, ...]) -> None:
    shown = findings[:MAX_FINDINGS]
    if not shown:
        return
    columns = ("finding", "severity", "what", "where", "expected", "found")
    rows = [(f.check.number, f.check.severity.value, f.check.title, f.subject, f.expected, f.found) for f in shown]
    output.table("Findings", columns, rows)
    remedies = {str(f.check.number): f"{f.check.reason} {f.check.remedy}" for f in shown}
    output.facts("Why, and what to do", remedies)
    if len(findings) > MAX_FINDINGS:
        output.hint(f"{len(findings) - MAX_FINDINGS} more findings; --json lists all of them.")


def raise_fatal(report: InspectReport) -> None:
    """End with exit code 4 if the checkpoint is corrupt or incomplete."""
    if report.fatal:
        first = report.fatal[0]
        count = f"{len(report.fatal)} findings, the first: " if len(report.fatal) > 1 else ""
        raise InputError(
            report.label,
            expected="a whole checkpoint that fits its config",
            found=f"{count}{first}",
            next_step=first.check.remedy,
        )
