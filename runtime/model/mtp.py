"""The multi-token-prediction layer: from h_t and the next token x_{t+1} to the token after it.

Shapes: B batch, T tokens, D hidden, V vocab. Embedding and head are the main model's, as in transformers, SGLang and
TensorRT-LLM; copies of its own that a checkpoint may carry are compared by the loader and not used.
"""

from dataclasses import dataclass

import torch
from torch import nn

from converters.config import Glm4MoeConfig
from runtime.cache.kv_cache import KVCache
from runtime.cache.paged_kv_cache import PagedKVCache
from runtime.model.decoder import CausalLM, DecoderLayer
from runtime.model.linear import Linear
from runtime.model.norm import RMSNorm
from runtime.model.step import next_step
from runtime.moe.plan import MoePlan
from runtime.moe.router import RoutingObserver

# positions whose logits are held at once: 256 x 151552 fp32 = 148 MiB
_LOGIT_POSITIONS = 256


class SharedHead(nn.Module):
    """The norm in front of the main model's head."""

    def __init__(self, config: Glm4MoeConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class MtpLayer(DecoderLayer):
    """norm(layer(eh_proj([enorm(embedding), hnorm(hidden)]))): a MoE decoder layer with the index num_hidden_layers."""

    def __init__(self, config: Glm4MoeConfig, plan: MoePlan) -> None:
        super().__init__(config, config.num_hidden_layers, plan)
        self.config = config
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(config.eh_size, config.hidden_size)
        self.shared_head = SharedHead(config)

    def draft(
        self,
        embedding_BTD: torch.Tensor,
        hidden_BTD: torch.Tensor,
        *,
        cache: KVCache | PagedKVCache | None = None,
        observer: RoutingObserver | None = None,
    ) -> torch.Tensor:
        """Return (B, T, D) behind the layer's norm; the main head turns position t into logits for x_{t+2}.

        Args:
            embedding_BTD: of x_{t+1}, from the main model's embedding.
            hidden_BTD: h_t of the main model behind its final norm; in a second draft step, this method's own result.
            cache: of one layer, this layer's own.
            observer: called with this layer's routing.
        """
        # embedding first, hidden second; some other families have it the other way round
        joined = torch.cat([self.enorm(embedding_BTD), self.hnorm(hidden_BTD)], dim=-1)
        is_paged = self.self_attn.ops is not None
        step = next_step(self.config, hidden_BTD, cache, is_paged=is_paged, observer=observer)
        out_BTD = self(self.eh_proj(joined), step, None if cache is None else cache.layer(0))
        if cache is not None:
            cache.advance(hidden_BTD.shape[1])
        return self.shared_head.norm(out_BTD)


@dataclass(frozen=True, slots=True)
class DraftAgreement:
    """How often the MTP layer's greedy draft is the main model's greedy token; counts of positions."""

    num_agreeing: int
    num_positions: int

    @property
    def share(self) -> float:
        """Agreeing positions out of all, 0 to 1: the expected acceptance rate of one greedy draft."""
        return self.num_agreeing / self.num_positions


def draft_agreement(model: CausalLM, mtp: MtpLayer, token_ids_BT: torch.Tensor) -> DraftAgreement:
    """Compare, at each t, the draft from (h_t, x_{t+1}) with the main model's greedy token from h_{t+1}.

    Args:
        model: with its own layer `mtp`.
        mtp: the layer that drafts.
        token_ids_BT: (B, T) int64 text, T >= 2; gives B * (T - 1) positions.
    """
    assert token_ids_BT.shape[1] >= 2, token_ids_BT.shape
    hidden_BTD = model(token_ids_BT)
    drafted_BTD = mtp.draft(model.embed(token_ids_BT[:, 1:]), hidden_BTD[:, :-1])
    pairs = zip(
        drafted_BTD.flatten(0, 1).split(_LOGIT_POSITIONS),
        hidden_BTD[:, 1:].flatten(0, 1).split(_LOGIT_POSITIONS),
        strict=True,
    )
    agreeing = [model.logits(draft).argmax(-1) == model.logits(target).argmax(-1) for draft, target in pairs]
    hits = torch.cat(agreeing)
    return DraftAgreement(int(hits.sum()), hits.numel())
