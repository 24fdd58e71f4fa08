"""The parts of a layer, and what the linear modules of one are given."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from runtime.calibrate.meter import InputMeter
from runtime.calibrate.record import Record
from runtime.model.linear import Linear
from runtime.model.loader import ModelLoader
from runtime.streaming.parts import LayerParts as LayerParts
from runtime.streaming.parts import Part as Part
from runtime.streaming.parts import layer_parts as layer_parts


@contextmanager
def metered(loader: ModelLoader, part: Part, record: Record) -> Iterator[None]:
    """Measure what the linear modules of a part are given, and record it at the end."""
    meters = {leader.name: InputMeter(leader.module, loader.engine.device) for leader in part.leaders}
    handles = [_watch(loader.model.get_submodule(leader.module), meters[leader.name]) for leader in part.leaders]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    for leader in part.leaders:
        measured = meters[leader.name].result()
        for weight in part.fellows(leader):
            record.measured[weight.module] = measured


def _watch(module: torch.nn.Module, meter: InputMeter) -> torch.utils.hooks.RemovableHandle:
    def take(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        meter.add(args[0])

    assert isinstance(module, Linear), module
    return module.register_forward_pre_hook(take)
