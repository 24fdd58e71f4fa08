"""Which model a checkpoint holds, whatever the layout it is stored in: what statistics of calibration belong to.

Statistics speak of official modules, so that every layout of the same weights can take them. A digest of all content
would need the whole checkpoint read before a plan is made, twenty minutes for 700 GB at 600 MB/s. Names, dtypes and
sizes alone cannot tell a fine-tuned model from its base. So the first bytes of what is small are read as well: norms,
router, attention and the dense MLP, about 1200 reads for the largest of the family, none of a routed expert.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict

from converters.inspect.logical import SHAPE_SUFFIX, LogicalTensor, logical_view
from converters.schema import Role
from converters.source import Source

SAMPLE_BYTES = 4096
# fields of the config that change no number of a layer
_NOT_COMPUTED = frozenset({"eos_token_id", "pad_token_id", "dtype", "max_position_embeddings"})
# copies of the embedding and of the head, which a checkpoint may leave out
_COPIES = frozenset({Role.MTP_EMBEDDING, Role.MTP_HEAD})
# of these, name, dtype and size alone count
_NOT_SAMPLED = frozenset({Role.EXPERT, Role.SHARED_EXPERT, Role.EMBEDDING, Role.HEAD})


def model_digest(source: Source) -> str:
    """Return sha256 over config, official names, dtypes, sizes and samples: equal in all layouts of the same weights.

    A quantized copy is another model, and so is one without the MTP layer.

    Raises:
        InputError: a file ends early, or cannot be read.
    """
    index = source.reader.index
    own = {name: place for name, place in index.entries.items() if place[0] not in index.elsewhere}
    view = logical_view(own, source.config)
    config = {name: value for name, value in asdict(source.config).items() if name not in _NOT_COMPUTED}
    lines = sorted(line for tensor in view.tensors.values() for line in _lines(source, tensor))
    return hashlib.sha256(json.dumps([config, lines], sort_keys=True).encode()).hexdigest()


def _lines(source: Source, tensor: LogicalTensor) -> Iterator[str]:
    role = tensor.parsed.spec.role if tensor.parsed else None
    # what repeats a shape as values has those of the layout
    if tensor.suffix != SHAPE_SUFFIX and role not in _COPIES:
        sample = "" if role in _NOT_SAMPLED else hashlib.sha256(_sample(source, tensor)).hexdigest()
        yield f"{tensor.name} {tensor.dtype} {tensor.nbytes} {sample}"


def _sample(source: Source, tensor: LogicalTensor) -> bytes:
    """Return the first bytes of a tensor's data."""
    data = bytearray(min(SAMPLE_BYTES, tensor.nbytes))
    filled = 0
    for piece in tensor.spans():
        if filled == len(data):
            break
        count = min(piece.end - piece.begin, len(data) - filled)
        source.reader.read_into(piece.stored, piece.begin, memoryview(data)[filled : filled + count])
        filled += count
    return bytes(data)


def described(found: object, digest: str) -> str:
    """Return what to say of statistics with the digest `found`, or with none, of a model with another."""
    if found is None:
        return "those of an earlier version, which do not say of which model they are"
    return f"those of a model with digest {str(found)[:12]}; this one has {digest[:12]}"
