"""New keys and values into their pages. Shapes: T tokens, G kv heads, P head dim."""

import torch

from runtime.kernels.ops.inputs import KvPages

_LARGEST = 448.0


def write_pages(key_TGP: torch.Tensor, value_TGP: torch.Tensor, slot_mapping_T: torch.Tensor, pages: KvPages) -> None:
    """Copy tokens' keys and values to their places; see `runtime.kernels.ops.write_pages.write_pages`."""
    is_kept_T = slot_mapping_T >= 0
    for number, (new_TGP, stored) in enumerate(((key_TGP, pages.keys_NSGP), (value_TGP, pages.values_NSGP))):
        if stored.dtype is torch.float8_e4m3fn:
            assert pages.scales is not None, stored.dtype
            new_TGP = (new_TGP.to(torch.float32) / pages.scales[number]).clamp(-_LARGEST, _LARGEST)
        stored.flatten(0, 1)[slot_mapping_T[is_kept_T]] = new_TGP[is_kept_T].to(stored.dtype)
