"""What lies in front of the layers and behind them, read by rows or by name."""

import torch

from converters.schema import Role
from converters.source import Source


def embed(source: Source, ids_T: torch.Tensor, out_TD: torch.Tensor, dtype: torch.dtype = torch.float32) -> int:
    """Write the embeddings of ids (T,) into (T, D), each row of the table read once and rounded to a dtype.

    Returns:
        The bytes read.
    """
    tensor = next(tensor for tensor in source.schema.tensors.values() if tensor.spec.role is Role.EMBEDDING)
    places, read = source.stored_layout.places(tensor), 0
    for token in ids_T.unique().tolist():
        # several where the table is cut for ranks
        for place in places:
            (first, stop), columns = place.piece.rows, slice(*place.piece.columns)
            if first <= token < stop:
                row = place.row + token - first
                row_1D = source.reader.read_rows(place.stored.name, row, row + 1)
                out_TD[ids_T == token, columns] = row_1D.to(device=out_TD.device, dtype=dtype).to(out_TD.dtype)
                read += row_1D.nbytes
    return read


def names_of(source: Source, role: Role) -> list[str]:
    """Return the tensors of a role that belong to no layer: the final norm, or the head."""
    return [
        tensor.name for tensor in source.schema.tensors.values() if tensor.spec.role is role and tensor.layer is None
    ]
