"""Ignore lists: which modules stay unquantized, in the words of each dialect and of the engines that read it.

vLLM and SGLang read compressed-tensors' list as exact names and `re:` patterns; they ask for q, k, v and gate, up by
their own names, for routed experts by those of expert 0. SGLang calls the MTP layer `model.decoder` and may take a name
for a part of a longer one. TensorRT-LLM matches every entry as a glob against its own module names, where all experts
of a layer are one module; to it, the MTP layer is unquantized if the layer's own name matches. ModelOpt's list is globs
everywhere. In DeepSeek's dialect entries are exact names, and transformers takes them for patterns that may match the
beginning of a name, which is why no glob stands there. An entry in the dialect of another engine never matches.
"""

import re
from collections.abc import Collection, Iterator

from converters.quant.policy import is_quantized, layer_module, parent
from converters.schema import ModelSchema, Role, Tensor

# what SGLang calls the MTP layer
SGLANG_MTP = "model.decoder"
_REGEX = "re:"


def regex_entry(module: str, rest: str) -> str:
    """Return the pattern of a module's name with a regular expression behind it."""
    return f"{_REGEX}{re.escape(module)}{rest}"


def compressed_tensors_ignore(schema: ModelSchema, quantized: Collection[str]) -> list[str]:
    """Return `ignore`: names, patterns for vLLM and SGLang, globs for TensorRT-LLM.

    Args:
        schema: the tensors of the result.
        quantized: names of those that are quantized.
    """
    entries: dict[str, None] = {}
    for tensor in _plain_matrices(schema, quantized):
        for module in _spellings(schema, tensor):
            if tensor.spec.role is Role.EXPERT:
                entries[regex_entry(module, r"\..*")] = None
                entries[f"{module}*"] = None
            else:
                entries[module] = None
    mtp = _plain_mtp(schema, quantized)
    if mtp is not None:
        everything = (regex_entry(mtp, r"\..*"), regex_entry(SGLANG_MTP, r"\..*"), f"{mtp}*")
        entries |= dict.fromkeys(everything)
    return list(entries)


def deepseek_ignore(schema: ModelSchema, quantized: Collection[str]) -> list[str]:
    """Return `modules_to_not_convert`: exact names, of all experts of a layer as one, and of the MTP layer itself."""
    entries: dict[str, None] = {}
    mtp = _plain_mtp(schema, quantized)
    for tensor in _plain_matrices(schema, quantized, with_mtp=True):
        entries |= dict.fromkeys(_spellings(schema, tensor))
    if mtp is not None:
        entries |= dict.fromkeys((mtp, SGLANG_MTP))
    return list(entries)


def modelopt_ignore(schema: ModelSchema, quantized: Collection[str]) -> list[str]:
    """Return `exclude_modules`: globs where all of a module stays unquantized, names elsewhere."""
    entries: dict[str, None] = {}
    partly = {parent(schema.tensors[name]) for name in quantized}
    for tensor in _plain_matrices(schema, quantized):
        above = parent(tensor)
        is_whole = is_quantized(tensor) and above not in partly
        for module in _spellings(schema, tensor):
            whole = module if tensor.spec.role is Role.EXPERT else module.rpartition(".")[0]
            entries[f"{whole}*" if is_whole else module] = None
    mtp = _plain_mtp(schema, quantized)
    if mtp is not None:
        entries |= dict.fromkeys((f"{mtp}*", f"{SGLANG_MTP}*"))
    elif schema.mtp_layer is not None:
        entries |= dict.fromkeys(_vllm_mtp_heads(schema))
    return list(entries)


def _plain_matrices(schema: ModelSchema, quantized: Collection[str], *, with_mtp: bool = False) -> Iterator[Tensor]:
    """Yield the matrices that stay as they are; an MTP layer that does so as a whole is left to its own entries."""
    skipped = None if with_mtp or _plain_mtp(schema, quantized) is None else schema.mtp_layer
    for tensor in schema.tensors.values():
        is_skipped = skipped is not None and tensor.layer == skipped
        if len(tensor.shape) == 2 and tensor.name not in quantized and not is_skipped:
            yield tensor


def _plain_mtp(schema: ModelSchema, quantized: Collection[str]) -> str | None:
    """Return the name of the MTP layer if nothing in it is quantized."""
    if schema.mtp_layer is None:
        return None
    tensors = [tensor for tensor in schema.tensors.values() if tensor.layer == schema.mtp_layer]
    return None if any(tensor.name in quantized for tensor in tensors) else layer_module(tensors[0])


def _vllm_mtp_heads(schema: ModelSchema) -> Iterator[str]:
    """Yield what vLLM calls the head of the MTP layer; it quantizes every head that ModelOpt's list does not name."""
    for tensor in schema.tensors.values():
        if tensor.spec.role is Role.MTP_PROJECTION:
            yield f"{layer_module(tensor)}.head"


def _spellings(schema: ModelSchema, tensor: Tensor) -> Iterator[str]:
    """Yield what a module, or all experts of the layer, is called; in the MTP layer by SGLang as well."""
    module = parent(tensor) if tensor.spec.role is Role.EXPERT else tensor.module
    yield module
    # engines never quantize the others, whatever they are called
    if schema.mtp_layer is not None and tensor.layer == schema.mtp_layer and is_quantized(tensor):
        yield SGLANG_MTP + module.removeprefix(layer_module(tensor))


def role_targets(schema: ModelSchema, roles: Collection[Role]) -> list[str]:
    """Return patterns for the modules of some roles, whatever an engine calls the layers."""
    found: dict[str, None] = {}
    for tensor in schema.tensors.values():
        if tensor.spec.role in roles and is_quantized(tensor):
            rest = tensor.module.removeprefix(layer_module(tensor)).split(".")
            spelled = [r"\d+" if part == str(tensor.expert) else re.escape(part) for part in rest]
            found[f"{_REGEX}.*" + r"\.".join(spelled) + "$"] = None
    return list(found)
