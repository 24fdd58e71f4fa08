"""Small checkpoints for tests, built from the table of tensors and saved by the safetensors library, not by us."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from converters.config import Glm4MoeConfig
from converters.formats.compressed_tensors import Group, quantization_config
from converters.quant.policy import is_quantized
from converters.schema import DtypePolicy, ModelSchema, expand

SMALL_CONFIG: dict[str, Any] = {
    "architectures": ["Glm4MoeForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "pad_token_id": 0,
    "eos_token_id": [0, 1, 2],
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 48,
    "partial_rotary_factor": 0.5,
    "initializer_range": 0.02,
    "intermediate_size": 80,
    "max_position_embeddings": 512,
    "model_type": "glm4_moe",
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "num_attention_heads": 6,
    "n_group": 1,
    "topk_group": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "routed_scaling_factor": 2.5,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "num_nextn_predict_layers": 1,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_qk_norm": True,
    "vocab_size": 64,
}


def small_config(**changes: Any) -> dict[str, Any]:
    """Return a config.json value of a very small model, with fields changed."""
    return {**SMALL_CONFIG, **changes}


def random_tensors(schema: ModelSchema, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Return every tensor of a schema, normally distributed, the router's correction bias in fp32."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, tensor in schema.tensors.items():
        value = torch.randn(tensor.shape, generator=generator) * 0.2
        tensors[name] = value if tensor.spec.dtype is DtypePolicy.KEEP_FP32 else value.to(dtype)
    return tensors


def write_checkpoint(
    folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any], num_shards: int = 2
) -> Path:
    """Save tensors over num_shards files with an index, config.json, and a few files that are no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").write_text('{"_from_model_config": true}\n')
    (folder / "LICENSE").write_text("a licence\n")
    names = list(tensors)
    if num_shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    per_shard = -(-len(names) // num_shards)
    for number in range(num_shards):
        file = f"model-{number + 1:05d}-of-{num_shards:05d}.safetensors"
        chunk = names[number * per_shard : (number + 1) * per_shard]
        save_file({name: tensors[name] for name in chunk}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(chunk, file)
    write_index(folder, weight_map, sum(t.numel() * t.element_size() for t in tensors.values()))
    return folder


def write_index(folder: Path, weight_map: dict[str, str], total_size: int) -> None:
    """Write model.safetensors.index.json."""
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def small_checkpoint(
    folder: Path, *, num_shards: int = 2, mtp: bool = True, mtp_copies: bool = True, seed: int = 0, **changes: Any
) -> Path:
    """Write a complete random checkpoint of `small_config(**changes)` and return its folder."""
    config = small_config(**changes)
    schema = expand(Glm4MoeConfig.from_hf(config), mtp=mtp, mtp_copies=mtp_copies)
    return write_checkpoint(folder, random_tensors(schema, seed), config, num_shards)


def write_byte_tokenizer(folder: Path) -> None:
    """Write a tokenizer.json that gives each byte its own token, for a vocabulary of at least 256."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: rank for rank, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a folder through the safetensors library."""
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def assert_same_tensors(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """Compare names, dtypes, shapes and bits."""
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value.dtype == right[name].dtype, name
        assert value.shape == right[name].shape, name
        assert torch.equal(value.reshape(-1).view(torch.uint8), right[name].reshape(-1).view(torch.uint8)), name


def fp8_channel_config(ignore: Iterable[str]) -> dict[str, Any]:
    """Return quantization_config for FP8 per output channel; `ignore` names the modules that stay unquantized."""
    return quantization_config([Group("fp8")], ignore)


def ignored_modules(schema: ModelSchema) -> list[str]:
    """Return the modules with a matrix that is never quantized, by exact name, in checkpoint order."""
    return [tensor.module for tensor in schema.tensors.values() if len(tensor.shape) == 2 and not is_quantized(tensor)]
