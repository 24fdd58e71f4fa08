"""What was found of one tensor: the hypothesis that explains it, in terms that several tensors can have in common."""

from dataclasses import dataclass

from converters.diagnosis.cause import CauseCode
from converters.schema import Tensor


@dataclass(frozen=True, slots=True)
class Explained:
    """A tensor of the candidate and what explains it.

    Attributes:
        code: the kind of cause.
        statement: what it holds, without its own name: tensors with the same one are told together.
        evidence: numbers of this tensor.
        origin: the source's tensor whose values it has, where they are another tensor's.
        sampled: it was tested on a few rows only, because so many others had shown the same in full.
    """

    tensor: Tensor
    code: CauseCode
    statement: str
    evidence: str
    origin: Tensor | None = None
    sampled: bool = False
