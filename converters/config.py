"""The model's config.json as one frozen value; what the code does not implement is refused by name."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.checkpoint.disk_read import check_link, read_file
from converters.config_fields import Fields
from converters.errors import ConfigError

ARCHITECTURE = "Glm4MoeForCausalLM"
MODEL_TYPE = "glm4_moe"
CONFIG_FILE = "config.json"
MAX_JSON_BYTES = 16 << 20

# fields that exist in other members of the family or in hand-edited files, with the one meaning implemented here
_ONLY_VALUE: dict[str, Any] = {
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "mlp_bias": False,
    "sliding_window": None,
    "moe_layer_freq": 1,
}
_MAX_EXPERTS = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Glm4MoeConfig:
    """What the model is. Field names are those of config.json; sizes count elements, not bytes."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    first_k_dense_replace: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    max_position_embeddings: int
    norm_topk_prob: bool
    attention_bias: bool
    use_qk_norm: bool
    routed_scaling_factor: float
    rms_norm_eps: float
    rope_theta: float
    partial_rotary_factor: float
    num_nextn_predict_layers: int
    eos_token_id: tuple[int, ...]
    pad_token_id: int | None
    dtype: str

    def __post_init__(self) -> None:
        """Refuse sizes that contradict each other."""
        self._require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            "num_attention_heads",
            f"a multiple of num_key_value_heads ({self.num_key_value_heads})",
        )
        self._require(
            self.n_routed_experts % self.n_group == 0, "n_routed_experts", f"a multiple of n_group ({self.n_group})"
        )
        self._require(self.topk_group <= self.n_group, "topk_group", f"at most n_group ({self.n_group})")
        candidates = self.n_routed_experts // self.n_group * self.topk_group
        self._require(
            self.num_experts_per_tok <= candidates,
            "num_experts_per_tok",
            f"at most the {candidates} experts that the group limit leaves",
        )
        self._require(
            self.n_group == 1 or self.n_routed_experts >= 2 * self.n_group,
            "n_group",
            "at least two experts in each group",
        )
        self._require(
            self.first_k_dense_replace <= self.num_hidden_layers,
            "first_k_dense_replace",
            f"at most num_hidden_layers ({self.num_hidden_layers})",
        )
        # the largest of the family has 14,720 experts; a table of tensors for 1024 layers of 4096 would fill the memory
        experts = self.num_hidden_layers * self.n_routed_experts
        self._require(experts <= _MAX_EXPERTS, "n_routed_experts", f"at most {_MAX_EXPERTS} experts in all layers")
        self._require(self.partial_rotary_factor <= 1, "partial_rotary_factor", "at most 1")
        self._require(
            self.rotary_dim > 0 and self.rotary_dim % 2 == 0,
            "partial_rotary_factor",
            f"an even, positive number of rotary dims out of head_dim {self.head_dim}",
        )

    def _require(self, holds: bool, field: str, expected: str) -> None:
        if not holds:
            raise ConfigError(f"config.json: {field}", expected=expected, found=repr(getattr(self, field)))

    @property
    def q_size(self) -> int:
        """Rows of q_proj, columns of o_proj."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Rows of k_proj and v_proj."""
        return self.num_key_value_heads * self.head_dim

    @property
    def shared_intermediate_size(self) -> int:
        """Intermediate width of the shared expert, all n_shared_experts side by side."""
        return self.moe_intermediate_size * self.n_shared_experts

    @property
    def eh_size(self) -> int:
        """Columns of the MTP layer's eh_proj: embedding and hidden side by side."""
        return 2 * self.hidden_size

    @property
    def rotary_dim(self) -> int:
        """Leading dims of each head that RoPE turns."""
        return int(self.head_dim * self.partial_rotary_factor)

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> "Glm4MoeConfig":
        """Build from a parsed config.json, in the 4.x spelling or in the one transformers 5 saves.

        Raises:
            ConfigError: wrong model type, a missing or mistyped field, a value that is not implemented.
        """
        _check_identity(raw)
        fields = Fields(raw)
        rope = _rope_fields(raw)
        return cls(
            vocab_size=fields.size("vocab_size"),
            hidden_size=fields.size("hidden_size"),
            intermediate_size=fields.size("intermediate_size"),
            moe_intermediate_size=fields.size("moe_intermediate_size"),
            num_hidden_layers=fields.size("num_hidden_layers"),
            first_k_dense_replace=fields.size("first_k_dense_replace", low=0),
            num_attention_heads=fields.size("num_attention_heads"),
            num_key_value_heads=fields.size("num_key_value_heads"),
            head_dim=fields.size("head_dim"),
            n_routed_experts=fields.size("n_routed_experts"),
            n_shared_experts=fields.size("n_shared_experts"),
            num_experts_per_tok=fields.size("num_experts_per_tok"),
            n_group=fields.size("n_group"),
            topk_group=fields.size("topk_group"),
            max_position_embeddings=fields.size("max_position_embeddings", high=1 << 30),
            norm_topk_prob=fields.flag("norm_topk_prob"),
            attention_bias=fields.flag("attention_bias"),
            use_qk_norm=fields.flag("use_qk_norm"),
            routed_scaling_factor=fields.positive("routed_scaling_factor"),
            rms_norm_eps=fields.positive("rms_norm_eps"),
            rope_theta=Fields(rope).positive("rope_theta"),
            partial_rotary_factor=Fields(rope).positive("partial_rotary_factor"),
            num_nextn_predict_layers=_num_mtp_layers(raw),
            eos_token_id=_token_ids(raw.get("eos_token_id"), "eos_token_id"),
            pad_token_id=next(iter(_token_ids(raw.get("pad_token_id"), "pad_token_id")), None),
            dtype=_dtype(raw),
        )

    @classmethod
    def from_folder(cls, folder: Path) -> "Glm4MoeConfig":
        """Read config.json of a checkpoint folder."""
        return cls.from_hf(read_json(folder / CONFIG_FILE))


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Return the object in a JSON file; double keys, other types, bad syntax, larger files, links out are refused."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value: dict[str, Any] = {}
        for key, item in pairs:
            if key in value:
                raise ConfigError(str(path), expected="each key once", found=f"{key!r} twice")
            value[key] = item
        return value

    check_link(path)
    if not path.is_file():
        raise ConfigError(str(path), expected="a JSON file", found="none", next_step="Is this a checkpoint folder?")
    if path.stat().st_size > max_bytes:
        raise ConfigError(str(path), expected=f"at most {max_bytes >> 20} MB", found=f"{path.stat().st_size} bytes")
    try:
        value = json.loads(read_file(path), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ConfigError(str(path), expected="valid JSON", found=str(error)) from error
    if not isinstance(value, dict):
        raise ConfigError(str(path), expected="a JSON object", found=type(value).__name__)
    return value


def _check_identity(raw: Mapping[str, Any]) -> None:
    if raw.get("model_type") != MODEL_TYPE:
        raise ConfigError(
            "config.json: model_type",
            expected=MODEL_TYPE,
            found=repr(raw.get("model_type")),
            next_step="This tool converts GLM-4.5, 4.6 and 4.7 (Glm4MoeForCausalLM) only.",
        )
    architectures = raw.get("architectures")
    if architectures is not None and architectures != [ARCHITECTURE]:
        raise ConfigError("config.json: architectures", expected=repr([ARCHITECTURE]), found=repr(architectures))
    for name, only in _ONLY_VALUE.items():
        if name in raw and raw[name] != only:
            raise ConfigError(
                f"config.json: {name}", expected=f"{only!r}, the only value implemented", found=repr(raw[name])
            )


def _rope_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Merge top-level rope fields with v5 `rope_parameters`; two spellings that disagree are refused."""
    merged = {key: raw[key] for key in ("rope_theta", "partial_rotary_factor") if raw.get(key) is not None}
    for block_name in ("rope_parameters", "rope_scaling"):
        block = raw.get(block_name)
        if block is None:
            continue
        if not isinstance(block, Mapping):
            raise ConfigError(f"config.json: {block_name}", expected="an object", found=repr(block))
        kind = block.get("rope_type", block.get("type", "default"))
        extra = set(block) - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
        if kind != "default" or extra:
            raise ConfigError(
                f"config.json: {block_name}",
                expected="rope_type 'default' without further parameters",
                found=repr(dict(block)),
                next_step="Scaled RoPE is not implemented.",
            )
        for key in ("rope_theta", "partial_rotary_factor"):
            if block.get(key) is None:
                continue
            if merged.setdefault(key, block[key]) != block[key]:
                raise ConfigError(
                    f"config.json: {key}",
                    expected="one value in all spellings",
                    found=f"{merged[key]!r} and {block[key]!r}",
                )
    return merged


def _num_mtp_layers(raw: Mapping[str, Any]) -> int:
    """Return how many MTP layers follow the body: 0 or 1; transformers also spells it num_mtp_layers."""
    spellings = ("num_nextn_predict_layers", "num_mtp_layers")
    values = [raw[key] for key in spellings if raw.get(key) is not None]
    if not values:
        return 0
    if any(type(value) is not int or value not in (0, 1) or value != values[0] for value in values):
        raise ConfigError("config.json: num_nextn_predict_layers", expected="0 or 1", found=repr(values))
    return int(values[0])


def _token_ids(value: Any, name: str) -> tuple[int, ...]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(type(item) is not int or item < 0 for item in ids):
        raise ConfigError(f"config.json: {name}", expected="token ids", found=repr(value))
    return tuple(ids)


def _dtype(raw: Mapping[str, Any]) -> str:
    value = raw.get("dtype", raw.get("torch_dtype", "bfloat16"))
    if value not in ("bfloat16", "float16", "float32"):
        raise ConfigError("config.json: dtype", expected="bfloat16, float16 or float32", found=repr(value))
    return str(value)
