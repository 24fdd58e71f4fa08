"""Keys and values of the tokens seen so far in pages, as kernels read them.

Where the next tokens go is worked out on the device from how many tokens there are, so that a captured pass can be
replayed for any of them.

Shapes: B sequences, T new tokens of each, L layers, N pages, S tokens of a page, M pages of a sequence, G kv heads, P
head dim.
"""

from dataclasses import dataclass

import torch

from runtime.cache.kv_cache import KVShape
from runtime.kernels.ops.inputs import KvPages, PagedBatch

PAGE_TOKENS = 16
# while decoding, a long sequence is split into runs of so many tokens, which are attended to side by side
RUN_TOKENS = 512


@dataclass(frozen=True, slots=True)
class PagedStep:
    """Where the tokens of a pass go, and what they see; tokens of all sequences lie one after the other.

    Args:
        positions_T: int64, of the tokens of any sequence: all are equally long.
        angle_rows: int64 (B * T), which of these positions each token has.
        slot_mapping: int64 (B * T), page * tokens of a page + place in it.
        batch: lengths and pages of the sequences.
        run_tokens: split sequences into runs of so many tokens; 0: do not.
    """

    positions_T: torch.Tensor
    angle_rows: torch.Tensor
    slot_mapping: torch.Tensor
    batch: PagedBatch
    run_tokens: int

    def new_pages(self, key_TGP: torch.Tensor) -> KvPages:
        """Return pages for a pass without a cache, in the dtype of its keys (B * T, G, P)."""
        shape = (self.batch.block_table_BM.numel(), PAGE_TOKENS, *key_TGP.shape[1:])
        return KvPages(key_TGP.new_empty(shape), key_TGP.new_empty(shape))


@dataclass(frozen=True, slots=True)
class PageTable:
    """Which pages equally long sequences have.

    Args:
        block_table_BM: int32, the pages of each sequence in order.
        lengths_B: int32, tokens of each sequence that are counted.
    """

    block_table_BM: torch.Tensor
    lengths_B: torch.Tensor

    @classmethod
    def empty(cls, batch_size: int, capacity_tokens: int, device: torch.device | str) -> "PageTable":
        """Return a table with pages for `capacity_tokens` tokens of every sequence, of which none is counted."""
        width = -(-capacity_tokens // PAGE_TOKENS)
        pages = torch.arange(batch_size * width, dtype=torch.int32, device=device)
        return cls(pages.view(batch_size, width), torch.zeros(batch_size, dtype=torch.int32, device=device))

    def step(self, num_tokens: int) -> PagedStep:
        """Return where the next `num_tokens` tokens of every sequence go; the host waits for nothing."""
        device, (batch_size, width) = self.lengths_B.device, self.block_table_BM.shape
        offsets_T = torch.arange(num_tokens, device=device)
        positions_BT = self.lengths_B[:, None] + offsets_T
        pages_BT = self.block_table_BM.gather(1, positions_BT // PAGE_TOKENS)
        slots_BT = pages_BT.to(torch.int64) * PAGE_TOKENS + positions_BT % PAGE_TOKENS
        starts = torch.arange(batch_size + 1, dtype=torch.int32, device=device) * num_tokens
        batch = PagedBatch(starts, self.lengths_B + num_tokens, self.block_table_BM, num_tokens)
        is_split = num_tokens == 1 and width * PAGE_TOKENS > RUN_TOKENS
        return PagedStep(
            positions_BT[0],
            offsets_T.repeat(batch_size),
            slots_BT.flatten(),
            batch,
            RUN_TOKENS if is_split else 0,
        )


class PagedKVCache:
    """Room for `capacity_tokens` tokens of every sequence of a batch; all sequences are equally long.

    A forward pass writes to the pages of every layer and then calls `advance` once.

    Args:
        shape: sizes.
        dtype: of compute.
        device: where the pages are.
        scales_L2: fp32, what multiplies the codes of keys and of values in each layer; None: they are no codes.
    """

    def __init__(
        self,
        shape: KVShape,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        *,
        scales_L2: torch.Tensor | None = None,
    ) -> None:
        assert scales_L2 is None or scales_L2.shape == (shape.num_layers, 2), (scales_L2, shape)
        self.shape = shape
        self.length = 0
        self.table = PageTable.empty(shape.batch_size, shape.capacity_tokens, device)
        num_pages = self.table.block_table_BM.numel()
        size = (shape.num_layers, num_pages, PAGE_TOKENS, shape.num_key_value_heads, shape.head_dim)
        stored = dtype if scales_L2 is None else torch.float8_e4m3fn
        self._keys = torch.empty(size, dtype=stored, device=device)
        self._values = torch.empty(size, dtype=stored, device=device)
        self._scales_L2 = None if scales_L2 is None else scales_L2.to(device, torch.float32)

    @property
    def bytes_per_token(self) -> int:
        """Bytes one token of one sequence takes, keys and values of all layers."""
        shape = self.shape
        return 2 * shape.num_layers * shape.num_key_value_heads * shape.head_dim * self._keys.element_size()

    def step(self, num_tokens: int) -> PagedStep:
        """Return where the next `num_tokens` tokens of every sequence go."""
        assert self.length + num_tokens <= self.shape.capacity_tokens, (self.length, num_tokens, self.shape)
        return self.table.step(num_tokens)

    def layer(self, index: int) -> KvPages:
        """Return the pages of one layer."""
        scales = None if self._scales_L2 is None else self._scales_L2[index]
        return KvPages(self._keys[index], self._values[index], scales)

    def advance(self, num_tokens: int) -> None:
        """Count the tokens that all layers have written."""
        assert self.length + num_tokens <= self.shape.capacity_tokens, (self.length, num_tokens, self.shape)
        self.length += num_tokens
        self.table.lengths_B.add_(num_tokens)

    def truncate(self, length: int) -> None:
        """Forget all tokens from position `length` on, e.g. drafts that were rejected."""
        assert 0 <= length <= self.length, (length, self.length)
        self.length = length
        self.table.lengths_B.fill_(length)

    def reset(self) -> None:
        """Forget everything."""
        self.truncate(0)
