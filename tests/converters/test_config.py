"""Config: both spellings are read, nothing is guessed, the unsupported is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
from builders import small_config

from converters.config import Glm4MoeConfig, read_json
from converters.errors import ConfigError


def without(*names: str) -> dict[str, Any]:
    return {key: value for key, value in small_config().items() if key not in names}


def test_official_configs_are_read(fixtures_dir: Path) -> None:
    thetas = {}
    for path in sorted((fixtures_dir / "configs").glob("*.json")):
        config = Glm4MoeConfig.from_hf(json.loads(path.read_text()))
        thetas[path.stem] = (config.rope_theta, config.rotary_dim, config.dtype, config.routed_scaling_factor)
    assert thetas == {
        "GLM-4.5": (1e6, 64, "bfloat16", 2.5),
        "GLM-4.5-Air": (1e6, 64, "bfloat16", 1.0),
        "GLM-4.6": (1e6, 64, "bfloat16", 2.5),
        "GLM-4.7": (1e6, 64, "bfloat16", 2.5),
    }


def test_v5_rope_parameters_mean_the_same_as_the_top_level_fields() -> None:
    raw = without("rope_theta", "partial_rotary_factor", "rope_scaling", "torch_dtype")
    raw |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000, "partial_rotary_factor": 0.5}}
    assert Glm4MoeConfig.from_hf(raw | {"dtype": "bfloat16"}) == Glm4MoeConfig.from_hf(small_config())


def test_config_saved_by_transformers_is_read_back_equal(tmp_path: Path) -> None:
    from transformers import Glm4MoeConfig as HfConfig

    HfConfig(**small_config()).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps({**json.loads((tmp_path / "config.json").read_text()), "architectures": ["Glm4MoeForCausalLM"]})
    )
    assert Glm4MoeConfig.from_folder(tmp_path) == Glm4MoeConfig.from_hf(small_config())


@pytest.mark.parametrize(
    "name",
    [
        "head_dim",
        "rope_theta",
        "partial_rotary_factor",
        "use_qk_norm",
        "attention_bias",
        "routed_scaling_factor",
        "n_group",
    ],
)
def test_missing_field_is_refused_and_never_guessed(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"config\.json: {name}: expected .*, found nothing"):
        Glm4MoeConfig.from_hf(without(name))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"model_type": "glm4_moe_lite"}, "model_type"),
        ({"architectures": ["Glm4MoeLiteForCausalLM"]}, "architectures"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"scoring_func": "softmax"}, "scoring_func"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 10000}}, "rope_theta"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers"),
        ({"num_hidden_layers": 10_000_000}, "num_hidden_layers"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"use_qk_norm": 1}, "use_qk_norm"),
        ({"routed_scaling_factor": -1.0}, "routed_scaling_factor"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps"),
        ({"num_key_value_heads": 4}, "num_attention_heads"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok"),
        ({"n_group": 3}, "n_routed_experts"),
        ({"n_group": 4, "topk_group": 4}, "n_group"),
        ({"topk_group": 2}, "topk_group"),
        ({"first_k_dense_replace": 4}, "first_k_dense_replace"),
        ({"partial_rotary_factor": 0.05}, "partial_rotary_factor"),
        ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers"),
        ({"torch_dtype": "float8_e4m3fn"}, "dtype"),
        ({"eos_token_id": ["end"]}, "eos_token_id"),
    ],
)
def test_unsupported_value_is_refused_by_name(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=rf"^config\.json: {field}: expected "):
        Glm4MoeConfig.from_hf(small_config(**changes))


def test_message_names_subject_expected_found_and_next_step() -> None:
    with pytest.raises(ConfigError) as caught:
        Glm4MoeConfig.from_hf(without("head_dim"))
    assert str(caught.value) == (
        "config.json: head_dim: expected an integer from 1 to 1048576, found nothing. "
        "It is never guessed; add it as the original model has it."
    )
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1, "a": 2}', "'a' twice"),
        ("[1]", "found list"),
        ('{"a": ', "valid JSON"),
        ("[" * 100_000, "valid JSON"),
    ],
)
def test_malformed_json_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=reason):
        read_json(tmp_path / "config.json")


def test_oversized_json_is_not_parsed(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(17 << 20)
    with pytest.raises(ConfigError, match="at most 16 MB"):
        read_json(tmp_path / "config.json")


def test_absent_mtp_count_means_no_mtp_layer_and_v5_spelling_counts() -> None:
    assert Glm4MoeConfig.from_hf(without("num_nextn_predict_layers")).num_nextn_predict_layers == 0
    raw = {**without("num_nextn_predict_layers"), "num_mtp_layers": 1}
    assert Glm4MoeConfig.from_hf(raw).num_nextn_predict_layers == 1
