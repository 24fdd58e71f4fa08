"""What the model card of a quantized result says, from the plan and the records of what was written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import converters
from converters.checkpoint.disk_read import read_file
from converters.checkpoint.journal import TensorRecord
from converters.checkpoint.manifest import source_digest
from converters.checkpoint.plan import OutputPlan
from converters.conversion import passthrough_files
from converters.inspect.variant import MtpFacts, detect_variant
from converters.model_card import CARD_FILE, CardFacts, Serving, Weights, build_card
from converters.quant.choice import Choice, QuantizeOptions
from converters.quant.engines import has_sglang_mtp, is_one_kind_of_experts, sglang_options
from converters.quant.quality import TensorQuality
from converters.quant.scheme import Recipe
from converters.schema import ModelSchema
from converters.source import Source

# facts of a calibration that a reader asks for
_CALIBRATION = ("num_tokens", "context_length", "seed")
_NOT_RUN = "Not run: the command follows from the formats that the engine's loader reads."
_NEXT_LINE = " \\\n  "
ORGANIZATION = "zai-org"
# released models by the parsers that their chat format needs
_PARSERS = {"GLM-4.5": "glm45", "GLM-4.5-Air": "glm45", "GLM-4.6": "glm45", "GLM-4.7": "glm47"}


@dataclass(frozen=True)
class Card:
    """The card of one quantization; called with the records of all tensors it returns README.md.

    Args:
        source: what is quantized.
        schema: the tensors of the result.
        options: as they were given.
        choice: what they mean.
        recipes: of the quantized tensors, by name.
        plan: what is written.
        engines: what loads it.
        tensor_parallel: sizes that fit, in words.
        notes: what engines are known to do, a sentence each.
    """

    source: Source
    schema: ModelSchema
    options: QuantizeOptions
    choice: Choice
    recipes: Mapping[str, Recipe]
    plan: OutputPlan
    engines: Sequence[str]
    tensor_parallel: str
    notes: Sequence[str]

    def __call__(self, records: Mapping[str, TensorRecord]) -> bytes:
        """Return README.md."""
        quality = {name: record.quality for name, record in records.items() if record.quality is not None}
        return build_card(self._facts(quality), _card_of(self.source))

    def _facts(self, quality: Mapping[str, TensorQuality]) -> CardFacts:
        config, schema = self.source.config, self.schema
        mtp = MtpFacts(schema.mtp_layer, schema.has_mtp_copies, own_file=False, tensors=0, bytes=0)
        variant = detect_variant(config, mtp, has_correction_bias=schema.has_router_bias)
        is_released = variant.name in _PARSERS
        return CardFacts(
            base=variant.name if variant.base else "",
            repository=f"{ORGANIZATION}/{variant.name}" if is_released else None,
            scheme=self.options.scheme,
            format=str(self.choice.format),
            options=_options(self.options, self.choice),
            version=converters.__version__,
            source_digest=source_digest(self.source.reader, self.source.raw_config),
            num_parameters=sum(tensor.numel for tensor in schema.tensors.values()),
            num_bytes=self.plan.total_bytes,
            weights=_weights(schema, self.recipes),
            calibration=_calibration(self.options),
            notes=self.notes,
            quality=quality,
            serving=self._serving(_PARSERS.get(variant.base, _PARSERS["GLM-4.5"])),
            tensor_parallel=self.tensor_parallel,
        )

    def _serving(self, parser: str) -> list[Serving]:
        """Return a command for each engine, or why there is none."""
        found = [
            Serving("vLLM", self._vllm(parser), _NOT_RUN),
            Serving("SGLang", self._sglang(parser), _NOT_RUN),
            Serving("TensorRT-LLM", "trtllm-serve . --backend pytorch --tp_size N", _NOT_RUN),
        ]
        refused = "Its loader does not read this scheme in this format."
        return [one if one.engine in self.engines else Serving(one.engine, "", refused) for one in found]

    def _vllm(self, parser: str) -> str:
        lines = [
            "vllm serve . --tensor-parallel-size N",
            f"--tool-call-parser {parser} --reasoning-parser {parser} --enable-auto-tool-choice",
        ]
        if self.choice.has_kv_scales:
            lines.append(f"--kv-cache-dtype {self.options.kv_cache}")
        if self.schema.has_mtp:
            lines.append('--speculative-config \'{"method": "mtp", "num_speculative_tokens": 1}\'')
        return _NEXT_LINE.join(lines)

    def _sglang(self, parser: str) -> str:
        lines = [
            "python3 -m sglang.launch_server --model-path . --tp-size N",
            f"--tool-call-parser {parser} --reasoning-parser {parser}",
        ]
        if not is_one_kind_of_experts(self.choice.roles):
            lines.append("--disable-shared-experts-fusion")
        recipes = tuple(self.recipes.values())
        if options := sglang_options(recipes):
            lines.append(options)
        if self.schema.has_mtp and has_sglang_mtp(recipes, self.choice.mtp):
            lines.append(
                "--speculative-algorithm EAGLE --speculative-num-steps 1 --speculative-eagle-topk 1 "
                "--speculative-num-draft-tokens 2"
            )
        return _NEXT_LINE.join(lines)


def _card_of(source: Source) -> str:
    """Return README.md of the source; empty if it has none. One that is fetched is there only when all is written."""
    if CARD_FILE not in passthrough_files(source.folder):
        return ""
    return read_file(source.folder / CARD_FILE).decode(errors="replace")


def _options(options: QuantizeOptions, choice: Choice) -> str:
    """Return the options that decide what is written, as they are typed."""
    typed = [f"--scheme {options.scheme}", f"--format {choice.format}", f"--arithmetic {choice.arithmetic}"]
    if any(scheme.startswith("nvfp4") for scheme in choice.roles.values()):
        typed.append(f"--scale-search {choice.search}")
    if options.group_size is not None:
        typed.append(f"--group-size {options.group_size}")
    if options.preset is not None:
        typed.append(f"--preset {options.preset}")
    typed += [f"--ignore '{pattern}'" for pattern in choice.ignore]
    if choice.mtp is not None:
        typed.append(f"--mtp {choice.mtp}")
    if choice.has_kv_scales:
        typed.append(f"--kv-cache {options.kv_cache}")
    if options.rounded:
        typed.append("--method gptq")
    return " ".join([*typed, *(["--stats STATS"] if options.stats or options.rounded else [])])


def _calibration(options: QuantizeOptions) -> list[str]:
    """Return what was calibrated on, a line each; none without calibration."""
    measured = options.stats or options.rounded
    if measured is None:
        return []
    facts = measured.provenance
    uses = ["scales of inputs or of the KV cache"] * (options.stats is not None)
    uses += ["codes, by GPTQ"] * (options.rounded is not None)
    known = [f"{name.replace('_', ' ')} {facts[name]}" for name in _CALIBRATION if name in facts]
    lines = [f"- Calibrated: {' and '.join(uses)}; {', '.join(known) or 'on what is not recorded'}"]
    if options.stats is not None and options.stats.filled:
        lines.append(f"- {len(options.stats.filled)} expert modules saw too few tokens of their own")
    texts = facts.get("texts")
    return lines + [_text(text) for text in (texts if isinstance(texts, list) else ()) if isinstance(text, Mapping)]


def _text(text: Mapping[str, Any]) -> str:
    """Return what is recorded of a text: a file of statistics may be older, or another's."""
    sizes = [f"{text[unit]:,} {unit}" for unit in ("bytes", "tokens") if type(text.get(unit)) is int]
    digest = f"sha256 `{text.get('sha256')}`"
    return f"- Text: {', '.join([digest, *sizes])}"


def _weights(schema: ModelSchema, recipes: Mapping[str, Recipe]) -> list[Weights]:
    """Return a line for each role and way of storing it, the MTP layer's apart."""
    found: dict[tuple[str, str], list[int]] = {}
    for tensor in schema.tensors.values():
        recipe = recipes.get(tensor.name)
        part = ", MTP layer" if tensor.layer is not None and tensor.layer == schema.mtp_layer else ""
        role = f"{tensor.spec.role.value.replace('_', ' ')}{part}"
        stored = recipe.label if recipe else "as in the source"
        found.setdefault((role, stored), []).append(prod(tensor.shape))
    return [Weights(role, len(sizes), sum(sizes), stored) for (role, stored), sizes in found.items()]
