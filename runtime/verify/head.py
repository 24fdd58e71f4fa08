"""A model's head by itself: it turns stored hidden states into logits, and a digest says whether two heads are one."""

import hashlib

import torch

from runtime.model.linear import Linear
from runtime.model.loader import ModelLoader

# rows of fp32 that are hashed at a time: 4096 x 5120 fp32 = 80 MiB
_ROWS = 4096


def load_head(loader: ModelLoader) -> Linear:
    """Read the head alone, in the dtype that it is stored in, and return it; nothing else of the model is filled."""
    loader.place(loader.fetch(head_names(loader), as_stored=True))
    return loader.model.lm_head


def head_names(loader: ModelLoader) -> list[str]:
    """Return the names of the head's parameters in its model."""
    names = {id(parameter): name for name, parameter in loader.model.named_parameters()}
    return [names[id(parameter)] for parameter in loader.model.lm_head.parameters()]


def head_digest(head: Linear) -> str:
    """Return sha256 of a head's values (V, D) as little-endian fp32: equal digests give equal logits.

    bf16 and fp16 are part of fp32, so a head keeps its digest when it is widened.
    """
    digest = hashlib.sha256()
    for start in range(0, head.weight.shape[0], _ROWS):
        rows_VD = head.dequantized(torch.float32, start, start + _ROWS)
        digest.update(rows_VD.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def fits_bf16(head: Linear) -> bool:
    """Return whether every value of a head is a bf16 number, so that 2 bytes hold it."""
    blocks = (head.dequantized(torch.float32, start, start + _ROWS) for start in range(0, head.weight.shape[0], _ROWS))
    return all(torch.equal(rows_VD.bfloat16().float(), rows_VD) for rows_VD in blocks)
