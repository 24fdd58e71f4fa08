"""What the interpreter of triton 3.6 lacks beside numpy 2.4: ranges whose bounds are numbers that a kernel computed.

Triton 3.7 has it; compiled kernels are not concerned.
"""

from typing import Any

import triton
from triton.runtime import interpreter


def mend() -> None:
    """Let a tensor of one value be an index, as triton 3.7 does; a version that can is left alone."""
    if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7):
        return
    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch_with_index
