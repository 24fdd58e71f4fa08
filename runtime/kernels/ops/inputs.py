"""What kernels and their twins are given besides tensors.

Shapes: B sequences, T new tokens of all of them, N pages, S tokens of a page, G kv heads, P head dim, M pages of a
sequence.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """Weights (P,) of the norms of queries and keys, in their dtype, and what is added to the mean of squares."""

    query_P: torch.Tensor
    key_P: torch.Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class KvPages:
    """Keys and values of one layer in pages.

    Args:
        keys_NSGP: in the dtype of queries, or float8_e4m3fn.
        values_NSGP: the same.
        scales: fp32 (2,), what multiplies the codes of keys and of values; needed for float8_e4m3fn.
    """

    keys_NSGP: torch.Tensor
    values_NSGP: torch.Tensor
    scales: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """Which tokens belong to which sequence, and where their keys are.

    Args:
        cu_seqlens_q: int32 (B + 1), where each sequence's new tokens begin; they are the last ones of the sequence.
        seq_lens_B: int32, tokens of each sequence, the new ones included.
        block_table_BM: int32, the pages of each sequence in order.
        max_tokens_q: at least the new tokens of any sequence: 1 while decoding.
    """

    cu_seqlens_q: torch.Tensor
    seq_lens_B: torch.Tensor
    block_table_BM: torch.Tensor
    max_tokens_q: int
