"""Hold the tensors that the headers show against the ones that the config asks for."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from converters.checkpoint.dtypes import FLOAT_DTYPES
from converters.checkpoint.header import TensorEntry
from converters.config import CONFIG_FILE
from converters.errors import InputError
from converters.formats.weights import match_scheme
from converters.inspect import catalog
from converters.inspect.catalog import Check, CheckFinding
from converters.inspect.logical import CODES_SUFFIX, SCALES, LogicalTensor, LogicalView
from converters.inspect.quantization import Declared, modules_of, stored_scheme
from converters.layout import Layout, Stored, StoredLayout
from converters.schema import CACHE_SCALES, DtypePolicy, ModelSchema, Role, Tensor

_EMBEDDINGS = frozenset({Role.EMBEDDING, Role.MTP_EMBEDDING})


@dataclass(slots=True)
class Structure:
    """The result: the layout and schema that fit what is there, and where the two differ.

    Attributes:
        modules: stored parts of every weight, see `quantization.modules_of`.
        missing: official tensors that are nowhere, with why ("absent", or the file that cannot be read).
        unexpected: stored tensors that the config does not ask for.
    """

    layout: StoredLayout
    modules: dict[str, dict[str, LogicalTensor]]
    missing: dict[str, str] = field(default_factory=dict)
    unexpected: tuple[str, ...] = ()
    findings: list[CheckFinding] = field(default_factory=list)

    @property
    def schema(self) -> ModelSchema:
        """The official tensors of the model."""
        return self.layout.schema

    def report(self, check: Check, subject: str, expected: str, found: str) -> None:
        """Add a finding."""
        self.findings.append(CheckFinding(check, subject, expected, found))


def compare_with_config(
    layout: StoredLayout, view: LogicalView, unreadable: Mapping[str, str], declared: Declared
) -> Structure:
    """Return what is missing, unexpected or of the wrong kind.

    Args:
        layout: the layout and schema that fit the names.
        view: what the readable files hold.
        unreadable: tensors that the index places in a file that cannot be read, with that file.
        declared: what the config says about quantization.
    """
    result = Structure(layout, modules_of(view.tensors))
    _report_layout(result, view)
    _find_missing(result, unreadable)
    _find_unexpected(result, view)
    for name, tensor in result.schema.tensors.items():
        if name in result.modules:
            _check_module(result, tensor, result.modules[name], declared)
    for name, parts in view.parts.items():
        _check_scheme(result, layout.stored[name], parts, declared)
    _check_declaration(result, declared)
    return result


def _report_layout(result: Structure, view: LogicalView) -> None:
    names = list(view.foreign)
    if names:
        found = f"{names[0]}, of layout {' or '.join(sorted(view.foreign[names[0]]))}{_more(names)}"
        result.report(catalog.LAYOUTS_MIXED, "layout", f"{view.layout} throughout, as most tensors are", found)
    for name, (expected, found) in view.misfits.items():
        result.report(catalog.SHAPE, f"tensor {name}", expected, found)


def _find_missing(result: Structure, unreadable: Mapping[str, str]) -> None:
    schema = result.schema
    places = {name: _place(result, name, unreadable) for name in schema.tensors if name not in result.modules}
    result.missing = {name: why or "absent" for name, why in places.items()}
    by_layer: dict[int | None, list[str]] = {}
    for name, why in places.items():
        # those of an unreadable file are reported with the file
        if why is None:
            by_layer.setdefault(schema.tensors[name].layer, []).append(name)
    sizes: dict[int | None, int] = {}
    for tensor in schema.tensors.values():
        sizes[tensor.layer] = sizes.get(tensor.layer, 0) + 1
    for layer, names in by_layer.items():
        _report_missing(result, layer, names, sizes[layer])
    if schema.config.num_nextn_predict_layers and not schema.has_mtp and not unreadable:
        result.report(catalog.MTP_ABSENT, "MTP layer", "present, as num_nextn_predict_layers says", "no tensor of it")
    if not schema.has_router_bias:
        result.report(catalog.NO_CORRECTION_BIAS, "routers", "a correction bias in each MoE layer", "none in any")


def _place(result: Structure, name: str, unreadable: Mapping[str, str]) -> str | None:
    """Return the unreadable file that an official tensor is stored in, if it is."""
    stored = (place.stored for place in result.layout.places(result.schema.tensors[name]))
    return next((unreadable[each.name] for each in stored if each.name in unreadable), None)


def _report_missing(result: Structure, layer: int | None, names: list[str], num_tensors: int) -> None:
    subject = "model" if layer is None else f"layer {layer}"
    expected, found = f"all {num_tensors} tensors", f"{names[0]} missing{_more(names)}"
    if layer is not None and layer == result.schema.mtp_layer:
        result.report(catalog.MTP_INCOMPLETE, f"MTP {subject}", expected, found)
    elif len(names) == num_tensors and layer is not None:
        result.report(catalog.LAYER_MISSING, subject, expected, "none of them")
    else:
        result.report(catalog.TENSOR_MISSING, subject, expected, found)


def _find_unexpected(result: Structure, view: LogicalView) -> None:
    """Report tensors of a layer that is too many by layer, the others by what they are."""
    extra = [
        tensor
        for tensor in view.tensors.values()
        if tensor.weight_name not in result.schema.tensors and tensor.name not in view.foreign
    ]
    result.unexpected = (*(tensor.name for tensor in extra), *view.foreign)
    last = result.schema.config.num_hidden_layers - 1 + (1 if result.schema.has_mtp else 0)
    layers: dict[int, list[str]] = {}
    unknown, others = [], []
    for tensor in extra:
        if tensor.parsed is None:
            unknown.append(tensor.name)
        elif tensor.parsed.layer is not None and tensor.parsed.layer > last:
            layers.setdefault(tensor.parsed.layer, []).append(tensor.name)
        else:
            others.append(tensor.name)
    for layer, names in sorted(layers.items()):
        expected = f"layers 0 to {last}, as {CONFIG_FILE} says"
        result.report(catalog.LAYER_ADDITIONAL, f"layer {layer}", expected, f"{names[0]}{_more(names)}")
    if unknown:
        found = f"{unknown[0]}{_more(unknown)}"
        result.report(catalog.TENSOR_UNEXPECTED, "names", "names that GLM-4 MoE checkpoints have", found)
    if others:
        found = f"{others[0]}{_more(others)}"
        result.report(catalog.TENSOR_UNEXPECTED, CONFIG_FILE, "only tensors that the config asks for", found)


def _check_module(result: Structure, tensor: Tensor, parts: Mapping[str, LogicalTensor], declared: Declared) -> None:
    """Check shape, dtype and scale of one official weight."""
    found = stored_scheme(parts, tensor.shape)
    subject = f"tensor {tensor.name}"
    if found is None:
        suffixes = sorted(parts.keys() - {""} - CACHE_SCALES)
        if "" not in parts:
            if suffixes:
                expected = "codes or a plain weight beside its scales"
                result.report(catalog.SCALE_MISSING, subject, expected, f"only {', '.join(suffixes)}")
            else:
                result.report(catalog.TENSOR_MISSING, subject, "the weight", "only scales of the KV cache")
        elif suffixes:
            result.report(catalog.SCALE_MISSING, subject, "no scale beside a plain weight", ", ".join(suffixes))
        else:
            _check_plain(result, tensor, parts[""], declared)
    elif not found.has_scale:
        result.report(catalog.SCALE_MISSING, subject, "a scale beside its codes", "none")
    elif tensor.spec.dtype is not DtypePolicy.QUANTIZABLE:
        result.report(catalog.HEAD_QUANTIZED, subject, "plain weights", found.storage)
    elif _rule_says_plain(result, tensor, declared):
        expected = "plain weights, as quantization_config says"
        result.report(catalog.QUANTIZATION_DISAGREES, subject, expected, found.storage)


def _check_plain(result: Structure, tensor: Tensor, weight: LogicalTensor, declared: Declared) -> None:
    subject = f"tensor {tensor.name}"
    covered = declared.rule is not None and result.layout.layout is Layout.SPLIT and declared.rule.covers(tensor)
    if weight.dtype not in FLOAT_DTYPES:
        result.report(catalog.DTYPE, subject, " or ".join(FLOAT_DTYPES), weight.dtype)
    elif weight.pieces and weight.shape != tensor.shape:
        expected = f"{list(tensor.shape)}, from {CONFIG_FILE}"
        result.report(catalog.SHAPE, subject, expected, f"{list(weight.shape)}")
    elif tensor.spec.dtype is DtypePolicy.KEEP_FP32 and weight.dtype != "F32":
        result.report(catalog.CORRECTION_BIAS_ROUNDED, subject, "F32", weight.dtype)
    elif covered and tensor.spec.dtype is DtypePolicy.QUANTIZABLE:
        expected = "codes and a scale, as quantization_config says"
        result.report(catalog.QUANTIZATION_DISAGREES, subject, expected, weight.dtype)
    elif covered and tensor.spec.role not in _EMBEDDINGS:
        result.report(catalog.IGNORE_INCOMPLETE, "quantization_config.ignore", tensor.module, "no such entry")


def _rule_says_plain(result: Structure, tensor: Tensor, declared: Declared) -> bool:
    # rules are given by official names
    return declared.rule is not None and result.layout.layout is Layout.SPLIT and not declared.rule.covers(tensor)


def _check_scheme(result: Structure, stored: Stored, parts: Mapping[str, TensorEntry], declared: Declared) -> None:
    """Hold a quantized weight as stored, down to the shapes of its parts, against the schemes that are declared."""
    own = parts.get("")
    is_plain = own is not None and own.dtype in FLOAT_DTYPES
    # codes without a scale, and a scale without codes, are reported with the module
    if is_plain or not declared.schemes or not parts.keys() & SCALES or not parts.keys() & {"", CODES_SUFFIX}:
        return
    try:
        match_scheme(stored.name, parts, declared.schemes, stored.stack, (stored.rows, stored.columns))
    except InputError as error:
        result.report(catalog.QUANTIZATION_DISAGREES, error.subject, error.expected, error.found)


def _check_declaration(result: Structure, declared: Declared) -> None:
    quantized = [
        name
        for name, tensor in result.schema.tensors.items()
        if name in result.modules and stored_scheme(result.modules[name], tensor.shape)
    ]
    if declared.problem is not None:
        subject = declared.problem.subject.removeprefix(f"{CONFIG_FILE}: ")
        result.report(catalog.QUANTIZATION_UNKNOWN, subject, declared.problem.expected, declared.problem.found)
    if quantized and declared.block is None:
        found = f"codes in {quantized[0]}{_more(quantized)}"
        expected = "plain weights: it has no quantization_config"
        result.report(catalog.QUANTIZATION_DISAGREES, CONFIG_FILE, expected, found)
    if declared.block is not None and not quantized and result.modules:
        result.report(catalog.QUANTIZATION_DISAGREES, CONFIG_FILE, "quantized weights", "plain weights only")


def _more(names: list[str]) -> str:
    return f", and {len(names) - 1} more" if len(names) > 1 else ""
