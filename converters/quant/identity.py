"""Which model a checkpoint holds, whatever the layout it is stored in: what statistics of calibration belong to.

Statistics speak of official modules, so that every layout of the same weights can take them. A digest of all content
would need the whole checkpoint read before a plan is made, twenty minutes for 700 GB at 600 MB/s. Names, dtypes and
sizes alone cannot tell a fine-tuned model from its base. So the first bytes of what is small are read as well: norms,
router, attention and the dense MLP, about 1200 reads for the largest of the family, none of a routed expert. From the
hub near ones come together, and several requests are under way at once.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice

from converters.checkpoint.reader import Span
from converters.inspect.logical import SHAPE_SUFFIX, LogicalTensor, logical_view
from converters.schema import Role
from converters.source import Source

SAMPLE_BYTES = 4096
# samples held at once, 16 MiB of them: all of the largest of the family, and a bound for whatever else a folder has
_AT_ONCE = 4096
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
    counted = [tensor for tensor in view.tensors.values() if _is_counted(tensor)]
    samples = _samples(source, [tensor for tensor in counted if _role(tensor) not in _NOT_SAMPLED])
    lines = sorted(f"{tensor.name} {tensor.dtype} {tensor.nbytes} {samples.get(tensor.name, '')}" for tensor in counted)
    return hashlib.sha256(json.dumps([config, lines], sort_keys=True).encode()).hexdigest()


def _role(tensor: LogicalTensor) -> Role | None:
    return tensor.parsed.spec.role if tensor.parsed else None


def _is_counted(tensor: LogicalTensor) -> bool:
    # what repeats a shape as values has those of the layout
    return tensor.suffix != SHAPE_SUFFIX and _role(tensor) not in _COPIES


def _samples(source: Source, tensors: Sequence[LogicalTensor]) -> dict[str, str]:
    """Return sha256 of the first bytes of each tensor's data, by name.

    Many are read at once, since a hub answers a few large requests sooner than many small ones.
    """
    found: dict[str, str] = {}
    for some in (tensors[first : first + _AT_ONCE] for first in range(0, len(tensors), _AT_ONCE)):
        spans = [list(_first_spans(tensor)) for tensor in some]
        data = iter(source.reader.read_spans([span for of_tensor in spans for span in of_tensor]))
        for tensor, of_tensor in zip(some, spans, strict=True):
            found[tensor.name] = hashlib.sha256(b"".join(islice(data, len(of_tensor)))).hexdigest()
    return found


def _first_spans(tensor: LogicalTensor) -> Iterator[Span]:
    left = min(SAMPLE_BYTES, tensor.nbytes)
    for piece in tensor.spans():
        if not left:
            return
        count = min(piece.end - piece.begin, left)
        yield Span(piece.stored, piece.begin, piece.begin + count)
        left -= count


def described(found: object, digest: str) -> str:
    """Return what to say of statistics with the digest `found`, or with none, of a model with another."""
    if found is None:
        return "those of an earlier version, which do not say of which model they are"
    return f"those of a model with digest {str(found)[:12]}; this one has {digest[:12]}"
