"""The decoder: layers, their stack, and the head.

Shapes: B batch, T tokens, D hidden, V vocab. Modules are named as the checkpoint names them, so that
`named_parameters()` of a CausalLM are the names of its tensors.
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from converters.config import Glm4MoeConfig
from runtime.cache.kv_cache import KVCache, KVShape, LayerCache
from runtime.cache.paged_kv_cache import PagedKVCache
from runtime.kernels.ops.inputs import KvPages
from runtime.model.attention import Attention
from runtime.model.linear import Linear, unfilled
from runtime.model.mlp import GatedMlp
from runtime.model.norm import RMSNorm
from runtime.model.ops import LayerOps
from runtime.model.step import Step, next_step
from runtime.moe.plan import VANILLA_PLAN, MoePlan
from runtime.moe.router import RoutingObserver
from runtime.moe.runner import MoE
from runtime.moe.workspace import Workspace

# a hidden state and its norm, (B, T, D) each
Pair = tuple[torch.Tensor, torch.Tensor]


class Embedding(nn.Module):
    """One row per token id, unscaled."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = unfilled(vocab_size, hidden_size)

    def forward(self, token_ids_BT: torch.Tensor) -> torch.Tensor:
        """Return the rows (B, T, D) of int64 ids (B, T)."""
        return F.embedding(token_ids_BT, self.weight)


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    Args:
        config: the model.
        layer: index; from first_k_dense_replace on the MLP is a mixture of experts.
        plan: what multiplies the experts.
    """

    def __init__(self, config: Glm4MoeConfig, layer: int, plan: MoePlan) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        # of layers on kernels; each writes there what the one before has left, which is used up by then
        self.workspace: Workspace | None = None
        self.mlp: GatedMlp | MoE
        if layer < config.first_k_dense_replace:
            self.mlp = GatedMlp(config.hidden_size, config.intermediate_size)
        else:
            self.mlp = MoE(config, layer, plan)

    def forward(self, hidden_BTD: torch.Tensor, step: Step, cache: LayerCache | KvPages | None = None) -> torch.Tensor:
        """Return the hidden state (B, T, D) behind this layer."""
        hidden_BTD, normed_BTD = self._attend(hidden_BTD, self.input_layernorm(hidden_BTD), step, cache)
        if isinstance(self.mlp, MoE):
            return hidden_BTD + self.mlp(normed_BTD, step.observer)
        return hidden_BTD + self.mlp(normed_BTD)

    def forward_normed(
        self,
        inputs: Pair,
        step: Step,
        cache: LayerCache | KvPages | None,
        following: RMSNorm,
        out: Pair,
    ) -> Pair:
        """Return the hidden state (B, T, D) behind this layer, and its norm, from one launch where there is one for it.

        On kernels nothing is allocated, once the workspace is large enough.

        Args:
            inputs: the hidden state in front of this layer, and its norm by this layer's input_layernorm.
            step: of the pass.
            cache: of this layer.
            following: the norm that comes next: of the layer behind this one, or the final one.
            out: contiguous, where both go, and what is returned; it may lie where the inputs do.
        """
        hidden_BTD, normed_BTD = self._attend(*inputs, step, cache)
        if isinstance(self.mlp, MoE):
            return self.mlp.forward_and_norm(normed_BTD, step.observer, hidden_BTD, following, out)
        assert self.workspace is not None, "kernels need a workspace"
        normed_TD = normed_BTD.flatten(0, 1)
        added_TD = self.workspace.take("mlp", tuple(normed_TD.shape), normed_TD.dtype)
        self.mlp.forward_into(normed_TD, self.workspace, added_TD)
        return following.add(hidden_BTD, added_TD.view(hidden_BTD.shape), out)

    def _attend(
        self, hidden_BTD: torch.Tensor, normed_BTD: torch.Tensor, step: Step, cache: LayerCache | KvPages | None
    ) -> Pair:
        """Return the hidden state in front of the MLP, and the norm of it."""
        out = None if self.workspace is None else room(self.workspace, ("attended", "attended_normed"), hidden_BTD)
        return self.post_attention_layernorm.add(hidden_BTD, self.self_attn(normed_BTD, step, cache), out)


def room(workspace: Workspace, names: tuple[str, str], hidden_BTD: torch.Tensor) -> Pair:
    """Return two buffers of the shape and dtype of a hidden state."""
    first, second = (workspace.take(name, tuple(hidden_BTD.shape), hidden_BTD.dtype) for name in names)
    return first, second


class Decoder(nn.Module):
    """Embedding, layers, final norm. `layers` may hold the MTP layer behind the last decoder layer."""

    def __init__(self, config: Glm4MoeConfig, plan: MoePlan) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer, plan) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class CausalLM(nn.Module):
    """The model. All sequences of a batch are equally long; there is no padding.

    Args:
        config: the model.
        plan: what multiplies the experts.
    """

    def __init__(self, config: Glm4MoeConfig, plan: MoePlan = VANILLA_PLAN) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config, plan)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.ops: LayerOps | None = None
        self.workspace: Workspace | None = None
        self.kv_scales_L2: torch.Tensor | None = None

    def use(
        self, ops: LayerOps | None, kv_scales_L2: torch.Tensor | None = None, workspace: Workspace | None = None
    ) -> None:
        """Have all layers, the MTP layer too, run on kernels or their twins.

        Args:
            ops: None: torch code over keys and values in one block.
            kv_scales_L2: fp32 (L, 2), what multiplies the codes of keys and of values in each layer, the MTP layer's
                last; None: they are stored in the dtype of compute. Needs ops.
            workspace: of all layers, and of the experts if these have one; None: a new one where the weights are.
        """
        assert ops is not None or kv_scales_L2 is None, "codes are kept in pages"
        self.ops, self.kv_scales_L2, self.workspace = ops, kv_scales_L2, None
        if ops is not None:
            self.workspace = workspace or Workspace(self.model.embed_tokens.weight.device)
        for module in self.modules():
            if isinstance(module, RMSNorm | Attention):
                module.ops = ops
            if isinstance(module, DecoderLayer | Attention):
                module.workspace = self.workspace

    @property
    def decoder_layers(self) -> Sequence[DecoderLayer]:
        """The layers of the main model in order, without the MTP layer."""
        return cast(Sequence[DecoderLayer], list(self.model.layers)[: self.config.num_hidden_layers])

    def embed(self, token_ids_BT: torch.Tensor) -> torch.Tensor:
        """Return the embeddings (B, T, D) of int64 ids (B, T), in the dtype of compute."""
        return self.model.embed_tokens(token_ids_BT)

    def forward(
        self,
        token_ids_BT: torch.Tensor,
        *,
        cache: KVCache | PagedKVCache | None = None,
        observer: RoutingObserver | None = None,
    ) -> torch.Tensor:
        """Return the hidden state (B, T, D) behind the final norm; feed it to `logits`.

        Args:
            token_ids_BT: (B, T) int64; they follow the tokens in the cache.
            cache: holds earlier tokens and takes up these; None = these are all.
            observer: called once per MoE layer.
        """
        hidden_BTD = self.embed(token_ids_BT)
        step = next_step(self.config, hidden_BTD, cache, is_paged=self.ops is not None, observer=observer)
        caches = [None if cache is None else cache.layer(index) for index in range(self.config.num_hidden_layers)]
        if self.ops is None:
            for layer, part in zip(self.decoder_layers, caches, strict=True):
                hidden_BTD = layer(hidden_BTD, step, part)
            normed_BTD = self.model.norm(hidden_BTD)
        else:
            normed_BTD = self._run_normed(hidden_BTD, step, caches)
        if cache is not None:
            cache.advance(token_ids_BT.shape[1])
        return normed_BTD

    def _run_normed(
        self, hidden_BTD: torch.Tensor, step: Step, caches: Sequence[LayerCache | KvPages | None]
    ) -> torch.Tensor:
        """Return the hidden state behind the final norm; each layer ends with the norm of the next.

        The stream goes from layer to layer in the workspace. The result is new: it outlasts the next pass.
        """
        assert self.workspace is not None, "kernels need a workspace"
        layers, result_BTD = self.decoder_layers, torch.empty_like(hidden_BTD)
        stream_BTD, normed_BTD = room(self.workspace, ("stream", "normed"), hidden_BTD)
        norms = [*(layer.input_layernorm for layer in layers), self.model.norm]
        found = hidden_BTD, norms[0](hidden_BTD, normed_BTD)
        for layer, part, following in zip(layers, caches, norms[1:], strict=True):
            out = stream_BTD, result_BTD if following is self.model.norm else normed_BTD
            found = layer.forward_normed(found, step, part, following, out)
        return result_BTD

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits (..., V) fp32 of normed hidden states (..., D); pass only the positions you need."""
        return self.lm_head.forward_fp32(hidden)


def new_cache(
    model: CausalLM, capacity_tokens: int, *, batch_size: int = 1, num_layers: int | None = None
) -> KVCache | PagedKVCache:
    """Return an empty cache that fits the model and what it runs on; `num_layers` = 1 for the MTP layer's own."""
    config, weight = model.config, model.model.embed_tokens.weight
    shape = KVShape(
        num_layers=config.num_hidden_layers if num_layers is None else num_layers,
        batch_size=batch_size,
        capacity_tokens=capacity_tokens,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
    )
    if model.ops is None:
        return KVCache(shape, weight.dtype, str(weight.device))
    scales_L2 = model.kv_scales_L2
    if scales_L2 is not None:
        scales_L2 = scales_L2[: shape.num_layers] if num_layers is None else scales_L2[-num_layers:]
    return PagedKVCache(shape, weight.dtype, weight.device, scales_L2=scales_L2)
