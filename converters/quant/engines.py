"""Which engines load what a scheme writes in a format, and what they are known to do with it otherwise.

Read in the sources of vLLM 0.33, SGLang 0.5.23, TensorRT-LLM of 2026 and tried with transformers 5.23.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from converters.quant.scheme import Format, MtpPolicy, Recipe
from converters.schema import Role

_VLLM, _SGLANG, _TRT, _HF = "vLLM", "SGLang", "TensorRT-LLM", "transformers"
_MODELOPT_FIRST = "for TensorRT-LLM, write --format modelopt"
_NVFP4_IN_HF = "transformers 5.23 loads the experts and gives wrong values without a word"
# SGLang's own loader of such files, in place of the one that the config names
W8A8_INT8 = "--quantization w8a8_int8"
_CODES_IN_HF = "transformers 5.23 takes the codes for weights, without a word"


@dataclass(frozen=True, slots=True)
class Support:
    """Engines that load a result; `note` says what others do with it, or what is to be known, as a sentence."""

    engines: tuple[str, ...]
    note: str = ""


_QUANTIZED_MTP = (MtpPolicy.QUANTIZE, MtpPolicy.QUANTIZE_EXPERTS)
_CT, _MODELOPT = Format.COMPRESSED_TENSORS, Format.MODELOPT
_SUPPORT: dict[tuple[Format, str], Support] = {
    (_CT, "fp8"): Support((_VLLM, _SGLANG, _TRT, _HF)),
    (_CT, "fp8-block"): Support((_VLLM, _SGLANG, _TRT), "transformers 5.23 does not load it; --format deepseek does."),
    (_CT, "fp8-static"): Support((_VLLM, _SGLANG, _HF), f"{_MODELOPT_FIRST}."),
    (_CT, "int8"): Support(
        (_VLLM, _SGLANG),
        f"SGLang reads it on CUDA with {W8A8_INT8} only, and all routed experts with it; TensorRT-LLM takes the codes "
        "for FP8, and transformers 5.23 does not load it.",
    ),
    (_CT, "int8-weight-only"): Support((_VLLM, _SGLANG, _HF), "TensorRT-LLM does not read packed int8."),
    (_CT, "nvfp4"): Support((_VLLM, _SGLANG), f"{_MODELOPT_FIRST}: it does not find these names; {_NVFP4_IN_HF}."),
    (_CT, "nvfp4-weight-only"): Support(
        (_VLLM, _SGLANG),
        f"{_NVFP4_IN_HF}; TensorRT-LLM does not read it.",
    ),
    (_MODELOPT, "fp8"): Support(
        (_TRT,), f"vLLM has no experts for FP8_PER_CHANNEL_PER_TOKEN; the default format has. {_CODES_IN_HF}."
    ),
    (_MODELOPT, "fp8-block"): Support(
        (),
        "No engine is known to load experts as FP8_PB_WO; the other formats of fp8-block are read by all. "
        f"{_CODES_IN_HF}.",
    ),
    (_MODELOPT, "fp8-static"): Support((_VLLM, _SGLANG, _TRT), f"{_CODES_IN_HF}."),
    (_MODELOPT, "nvfp4"): Support((_VLLM, _SGLANG, _TRT)),
    (_MODELOPT, "nvfp4-weight-only"): Support((_VLLM,)),
    (Format.DEEPSEEK, "fp8-block"): Support((_VLLM, _SGLANG, _TRT, _HF)),
}


def engines_of(recipes: Sequence[Recipe], roles: Mapping[Role, str]) -> tuple[str, ...]:
    """Return the engines that load a result with these recipes, given the scheme of each role that is quantized."""
    found = [_SUPPORT[recipe.format, recipe.scheme].engines for recipe in recipes]
    # the decoder of TensorRT-LLM refuses several groups, and transformers was not tried with them
    left = found[0] if len(found) == 1 else (_VLLM, _SGLANG)
    if any(map(_needs_w8a8_int8, recipes)) and (len(recipes) > 1 or roles.get(Role.EXPERT) != "int8"):
        left = tuple(engine for engine in left if engine != _SGLANG)
    return tuple(engine for engine in left if all(engine in engines for engines in found))


def sglang_options(recipes: Sequence[Recipe]) -> str:
    """Return what SGLang has to be told beside what the config says; empty if nothing."""
    return W8A8_INT8 if any(map(_needs_w8a8_int8, recipes)) else ""


def has_sglang_mtp(recipes: Sequence[Recipe], mtp: MtpPolicy | None) -> bool:
    """Return whether SGLang loads the MTP layer as it is stored, if there is one.

    Its loader of int8 files builds every stack of experts for int8, and that of ModelOpt's NVFP4 no MTP layer for it.
    """
    is_quantized = mtp in _QUANTIZED_MTP
    if any(map(_needs_w8a8_int8, recipes)):
        return is_quantized
    return not (is_quantized and any(recipe.format is _MODELOPT and recipe.scheme == "nvfp4" for recipe in recipes))


def _needs_w8a8_int8(recipe: Recipe) -> bool:
    return recipe.scheme == "int8"


def is_one_kind_of_experts(roles: Mapping[Role, str]) -> bool:
    """Return whether routed and shared experts are stored alike, given the scheme of each role that is quantized."""
    return roles.get(Role.EXPERT) == roles.get(Role.SHARED_EXPERT)


def engine_notes(
    recipes: Sequence[Recipe], roles: Mapping[Role, str], mtp: MtpPolicy | None, *, has_kv_scales: bool = False
) -> list[str]:
    """Return what engines are known to do otherwise than one may expect, a sentence each.

    Args:
        recipes: the different ones in use.
        roles: the scheme of each role that is quantized.
        mtp: what becomes of the MTP layer, if there is one.
        has_kv_scales: scales of an FP8 KV cache are written.
    """
    notes = [
        f"{recipe.scheme} as {recipe.format}: {note}"
        for recipe in recipes
        if (note := _SUPPORT[recipe.format, recipe.scheme].note)
    ]
    if len(recipes) > 1:
        notes.append("TensorRT-LLM does not take several schemes in one GLM model.")
    if not is_one_kind_of_experts(roles):
        notes.append(
            "Routed and shared experts are stored differently; SGLang wants --disable-shared-experts-fusion for that."
        )
    if mtp not in (None, MtpPolicy.DROP) and not has_sglang_mtp(recipes, mtp):
        why = f"{W8A8_INT8} takes it for int8" if mtp is MtpPolicy.KEEP else "it takes that of ModelOpt for unquantized"
        notes.append(f"SGLang does not load the MTP layer of this result: {why}.")
    if has_kv_scales:
        notes.append("SGLang skips the scales of the KV cache in this model, and takes 1.")
    return notes
