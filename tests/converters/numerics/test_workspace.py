"""Buffers that stay are good for whoever asks next."""

import torch

from converters.numerics.workspace import Workspace


def test_a_buffer_first_taken_in_inference_mode_can_be_written_to_outside_of_it() -> None:
    workspace, like = Workspace(), torch.empty(1)
    for count in (4, 2, 4):
        with torch.inference_mode():
            workspace.take("values", (count,), torch.float32, like).zero_()
        taken = workspace.take("values", (count,), torch.float32, like)
        assert taken.add_(1).tolist() == [1.0] * count
