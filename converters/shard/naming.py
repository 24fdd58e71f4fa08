"""How the files of the ranks are called, and what their tensors are called in an engine's own layout.

rank           ours: rank-00003-of-00008-part-00001-of-00018.safetensors, tensors under their names in the source
tensorrt-llm   rank3.safetensors, as its checkpoints are cut; tensors under their names in the source
vllm           model-rank-3-part-0.safetensors, with the parameters that its sharded_state loader looks for
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from converters.errors import UsageError
from converters.layout import Piece, Stored, StoredLayout
from converters.schema import TABLE, ModelSchema, Role, Tensor, TensorSpec
from converters.shard.cut import is_mtp
from converters.shard.mapping import ParallelMapping, Placement, Rank, SharedExperts

# the one release whose loader the names below were held against
VLLM_VERSION = "0.32.0"
# vLLM pads the vocabulary to a multiple of this
_VLLM_VOCABULARY = 64
# buffers of its attention layers that it asks for although they are constants
_VLLM_SCALES = ("_k_scale", "_v_scale", "_q_scale", "_prob_scale")
TENSORRT_KEY = "mapping"
_EXPERT_NAME = next(spec.name for spec in TABLE if spec.role is Role.EXPERT)
_EXPERTS_PATH = _EXPERT_NAME.rsplit(".", 2)[0].removesuffix(".{expert}")


class ShardLayout(StrEnum):
    """What the files of the ranks are like."""

    RANK = "rank"
    TENSORRT_LLM = "tensorrt-llm"
    VLLM = "vllm"


@dataclass(frozen=True, slots=True)
class PartName:
    """Part `part` of `parts`, from 0, of what a rank holds; the MTP layer is apart where its loader cannot take it."""

    rank: Rank
    part: int
    parts: int
    apart: bool = False


def file_name(layout: ShardLayout, mapping: ParallelMapping, name: PartName) -> str:
    """Return what a file is called."""
    rank = name.rank
    match layout:
        case ShardLayout.RANK:
            part = f"part-{name.part + 1:05d}-of-{name.parts:05d}"
            return f"rank-{rank.index:05d}-of-{mapping.world_size:05d}-{part}.safetensors"
        case ShardLayout.TENSORRT_LLM:
            return f"rank{rank.index}.safetensors"
        case ShardLayout.VLLM:
            kind = "mtp" if name.apart else "model"
            place = f"rank-{rank.tp}" if mapping.pp == 1 else f"pp-{rank.stage}-tp-{rank.tp}"
            return f"{kind}-{place}-part-{name.part}.safetensors"


def tensorrt_mapping(mapping: ParallelMapping) -> dict[str, Any]:
    """Return the block that TensorRT-LLM's checkpoints have in config.json."""
    return {
        "world_size": mapping.world_size,
        "tp_size": mapping.tp,
        "pp_size": mapping.pp,
        "moe_tp_size": mapping.moe_tp,
        "moe_ep_size": mapping.ep,
    }


def whole_tensors(schema: ModelSchema, layout: StoredLayout, files: ShardLayout) -> dict[str, Stored]:
    """Return the tensors that are cut, by the name that they have in the files of the ranks.

    Args:
        schema: what is cut; it may lack the MTP layer that the layout has.
        layout: how it is stored whole.
        files: what the files of the ranks are like.
    """
    own = {
        name: stored for name, stored in layout.stored.items() if schema.has_mtp or not is_mtp(layout.schema, stored)
    }
    if files is not ShardLayout.VLLM:
        return own
    apart = {name: stored for name, stored in own.items() if is_mtp(schema, stored)}
    grouped: dict[str, dict[int | None, list[Piece]]] = {}
    for tensor in schema.tensors.values():
        if tensor.layer is None or tensor.layer != schema.mtp_layer:
            name = _vllm_name(tensor)
            element = tensor.expert if tensor.spec.role is Role.EXPERT else None
            columns = tensor.shape[1] if len(tensor.shape) > 1 else 1
            piece = Piece(tensor, (0, tensor.shape[0]), (0, columns))
            grouped.setdefault(name, {}).setdefault(element, []).append(piece)
    body = {
        name: Stored(name, None if None in elements else len(elements), tuple(map(tuple, elements.values())))
        for name, elements in grouped.items()
    }
    return body | apart


def _vllm_name(tensor: Tensor) -> str:
    return _vllm_template(tensor.spec).format(layer=tensor.layer)


def _vllm_template(spec: TensorSpec) -> str:
    """Return a parameter's name in vLLM's model; of two names for one, its loader keeps the one that sorts first."""
    parameter = spec.name.rpartition(".")[2]
    match spec.role:
        case Role.EXPERT:
            return f"{_EXPERTS_PATH}.routed_experts.{'w13' if spec.fuse else 'w2'}_{parameter}"
        case Role.ROUTER_BIAS:
            return f"{_EXPERTS_PATH}.routed_experts.{parameter}"
        case Role.SHARED_EXPERT:
            module = spec.fuse.group if spec.fuse else spec.part.partition(".")[0]
            return f"{_EXPERTS_PATH}._shared_experts._layer.{module}.{parameter}"
    return f"{spec.name.removesuffix(spec.part)}{spec.fuse.group}.{parameter}" if spec.fuse else spec.name


def vllm_constants(schema: ModelSchema) -> dict[str, int]:
    """Return the scales of attention layers, all 1, by name, with their layer."""
    found: dict[str, int] = {}
    for tensor in schema.tensors.values():
        is_output = tensor.spec.role is Role.ATTENTION and tensor.spec.tp_dim == 1
        if is_output and tensor.layer is not None and tensor.layer != schema.mtp_layer:
            path = tensor.module.rpartition(".")[0]
            found |= {f"{path}.attn.{scale}": tensor.layer for scale in _VLLM_SCALES}
    return found


def check_vllm(schema: ModelSchema, mapping: ParallelMapping, version: str, dtypes: set[str]) -> None:
    """Refuse what its loader was not seen to take.

    Args:
        schema: the model.
        mapping: the ranks.
        version: of vLLM, as the user says.
        dtypes: what the weights are stored in; more than BF16 means quantized or cast.
    Raises:
        UsageError: with what would work.
    """
    config, subject = schema.config, f"--layout {ShardLayout.VLLM}"
    if version != VLLM_VERSION:
        raise UsageError(
            f"--vllm-version {version}",
            expected=f"{VLLM_VERSION}, the one whose loader was seen to take these files",
            found=version,
            next_step="Names of parameters change between releases. Serve the unsharded folder, or use --layout rank.",
        )
    if dtypes != {"BF16"}:
        raise UsageError(
            subject, expected="bfloat16 weights", found=", ".join(sorted(dtypes)), next_step="Use --layout rank."
        )
    if mapping.ep not in (1, mapping.tp):
        raise UsageError(
            subject, expected=f"--ep 1 or {mapping.tp}, as --enable-expert-parallel has it", found=f"--ep {mapping.ep}"
        )
    if mapping.ep > 1 and (mapping.placement is not Placement.CONTIGUOUS or mapping.redundant_experts):
        raise UsageError(
            subject,
            expected="experts dealt contiguously, none twice",
            found="another placement",
        )
    if mapping.shared_experts is not SharedExperts.SPLIT:
        raise UsageError(subject, expected="--shared-experts split", found=str(mapping.shared_experts))
    if config.vocab_size % _VLLM_VOCABULARY:
        raise UsageError(
            subject,
            expected=f"a vocabulary that divides by {_VLLM_VOCABULARY}, to which vLLM pads it",
            found=str(config.vocab_size),
        )
