"""Random tiny models as transformers builds them, saved as checkpoints: what the runtime is held against."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Glm4MoeConfig as HfConfig
from transformers import Glm4MoeForCausalLM
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeDecoderLayer, Glm4MoeRMSNorm, Glm4MoeTopkRouter

from fixtures.recipe.names import official_names

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "use_qk_norm": True,
    "attention_bias": True,
    "max_position_embeddings": 128,
    "eos_token_id": [1, 2],
    "pad_token_id": 1,
}


class HfMtpLayer(nn.Module):
    """The MTP layer put together from transformers' own modules."""

    def __init__(self, config: HfConfig) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = Glm4MoeRMSNorm(size, eps)
        self.hnorm = Glm4MoeRMSNorm(size, eps)
        self.eh_proj = nn.Linear(2 * size, size, bias=False)
        self.layer = Glm4MoeDecoderLayer(config, config.num_hidden_layers)
        self.norm = Glm4MoeRMSNorm(size, eps)

    def forward(self, embedding_BTD: torch.Tensor, hidden_BTD: torch.Tensor, rope: tuple) -> torch.Tensor:
        joined = torch.cat([self.enorm(embedding_BTD), self.hnorm(hidden_BTD)], dim=-1)
        num_tokens = embedding_BTD.shape[1]
        mask = torch.full((num_tokens, num_tokens), float("-inf")).triu(1)[None, None]
        return self.norm(self.layer(self.eh_proj(joined), position_embeddings=rope, attention_mask=mask))

    def named(self, layer: int) -> dict[str, torch.Tensor]:
        """Return the tensors under the names of the official checkpoints."""
        named = official_names(self.state_dict(), {"layer.": "", "norm.": "shared_head.norm."})
        return {f"model.layers.{layer}.{name}": value for name, value in named.items()}


@dataclass
class RandomCheckpoint:
    """A folder and the transformers model it was saved from."""

    folder: Path
    hf: Glm4MoeForCausalLM
    hf_mtp: HfMtpLayer

    def edit(self, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
        """Change the stored tensors in place."""
        path = self.folder / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file({name: value.contiguous() for name, value in tensors.items()}, path)

    def save(self) -> None:
        self.hf.save_pretrained(self.folder)
        self.edit(lambda tensors: tensors.update(self.hf_mtp.named(self.hf.config.num_hidden_layers)))


def randomize(module: nn.Module, std: float) -> None:
    """Give every parameter and correction bias values that leave no term of the model without effect."""
    for name, parameter in module.named_parameters():
        is_norm = "norm" in name
        nn.init.normal_(parameter, mean=1.0 if is_norm else 0.0, std=0.3 if is_norm else std)
    for part in module.modules():
        if isinstance(part, Glm4MoeTopkRouter):
            # both signs, and large enough to change the choice and to make biased scores negative
            nn.init.normal_(part.e_score_correction_bias, std=0.5)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """On a busy machine, threads that wait for each other make these tiny models a hundred times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[..., RandomCheckpoint]:
    """Return a function that makes a random fp32 checkpoint with an MTP layer; keywords change the config."""

    def make(*, seed: int = 0, partial_rotary_factor: float = 0.5, **changes: Any) -> RandomCheckpoint:
        torch.manual_seed(seed)
        rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": partial_rotary_factor}
        config = HfConfig(**{**SIZES, **changes}, rope_parameters=rope, attn_implementation="eager")
        hf, mtp = Glm4MoeForCausalLM(config).eval(), HfMtpLayer(config).eval()
        randomize(hf, 0.2)
        randomize(mtp, 0.2)
        for parameter in [*hf.parameters(), *mtp.parameters()]:
            parameter.requires_grad_(False)
        checkpoint = RandomCheckpoint(tmp_path / f"checkpoint-{seed}", hf, mtp)
        checkpoint.save()
        return checkpoint

    return make
