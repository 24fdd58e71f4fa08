"""Rounds the weights of a part while its inputs are at hand, and puts what the codes stand for in their place.

The layers above then see the error that is made, as in llm-compressor's sequential pipeline; within a layer, attention
is rounded before its MLP sees anything.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from converters.checkpoint.dtypes import torch_dtype
from converters.checkpoint.plan import OutputTensor
from converters.errors import UsageError
from converters.quant.choice import QuantizeOptions, choose
from converters.quant.limits import check_columns
from converters.quant.policy import assign
from converters.quant.quality import SAMPLE_EVERY, TensorQuality
from converters.quant.rounded_writer import RoundedWriter
from converters.quant.scheme import Recipe
from converters.quant.storage import transform_of, weight_unit
from converters.schema import Tensor
from converters.source import Source
from converters.transforms.restore import Sampler
from runtime.calibrate.gptq import Hessian, gptq, weighted_error
from runtime.calibrate.grid import GPTQ_SCHEMES, Grid
from runtime.calibrate.parts import Part
from runtime.model.loader import ModelLoader


def rounding_recipes(source: Source, options: QuantizeOptions) -> dict[str, Recipe]:
    """Return how each weight is to be stored, by the tensor's name, as a quantization with these options stores it.

    Raises:
        UsageError: a quantized source, options that do not go together, or a scheme that GPTQ is not made for.
    """
    if source.is_quantized:
        raise UsageError(
            f"--method gptq: {source.folder}", expected="an unquantized source", found="quantization_config in it"
        )
    choice = choose(source.schema, options)
    for scheme in choice.roles.values():
        if scheme not in GPTQ_SCHEMES:
            raise UsageError("--method gptq", expected=f"--scheme {' or '.join(GPTQ_SCHEMES)}", found=scheme)
    recipes = {name: choice.recipe(scheme) for name, scheme in assign(source.schema, choice.policy).items()}
    check_columns(source.schema, recipes)
    return recipes


@dataclass(slots=True)
class Rounder:
    """Rounds weights, and writes them.

    Args:
        loader: of the model whose parts are filled.
        source: what it is loaded from.
        recipes: how each weight is stored, by the tensor's name.
        writer: takes codes and scales.
    Attributes:
        errors: by module, what plain rounding would have cost on the text, and what it costs now; see `weighted_error`.
        quality: errors of the codes themselves, by the name of the tensor that holds them.
    """

    loader: ModelLoader
    source: Source
    recipes: Mapping[str, Recipe]
    writer: RoundedWriter
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    quality: dict[str, TensorQuality] = field(default_factory=dict)

    def begin(self, layer: int) -> bool:
        """Make room for a layer's codes; return whether it has any."""
        tensors = [self.source.schema.tensors[name] for name in self.recipes]
        outputs = [output for tensor in tensors if tensor.layer == layer for output in self._outputs(tensor)]
        if outputs:
            self.writer.begin(layer, outputs)
        return bool(outputs)

    def end(self) -> None:
        """Finish the layer."""
        self.writer.end()

    def wants(self, part: Part) -> bool:
        """Return whether a part has a weight to round."""
        return any(weight.name in self.recipes for weight in part.weights)

    @contextmanager
    def rounding(self, part: Part) -> Iterator[None]:
        """Gather what the modules of a part are given, and round their weights at the end."""
        leaders = [leader for leader in part.leaders if any(w.name in self.recipes for w in part.fellows(leader))]
        hessians = {leader.name: Hessian(leader.shape[1], self.loader.engine.device) for leader in leaders}
        handles = [_watch(self.loader.model.get_submodule(one.module), hessians[one.name]) for one in leaders]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        for leader in leaders:
            self._round(part.fellows(leader), hessians.pop(leader.name))

    def _round(self, fellows: tuple[Tensor, ...], hessian: Hessian) -> None:
        """Round the weights that share an input; those of one recipe share the per-tensor scale too."""
        weights = {one.name: self._weight(one) for one in fellows if one.name in self.recipes}
        largest_11 = torch.stack([weight.abs().max() for weight in weights.values()]).max().float().view(1, 1)
        hessian_II = hessian.value()
        for tensor in fellows:
            if tensor.name in weights:
                grid = Grid.of(weights[tensor.name], largest_11, self.recipes[tensor.name])
                codes_OI = self._choose(tensor, weights[tensor.name].float(), hessian_II, grid)
                self._replace(tensor, grid.values(codes_OI))
                self._store(tensor, weights[tensor.name].cpu(), [value.cpu() for value in grid.stored(codes_OI)])

    def _store(self, tensor: Tensor, weight_OI: torch.Tensor, stored: Sequence[torch.Tensor]) -> None:
        """Write codes and scales, and measure them as those of plain rounding are measured."""
        outputs = self._outputs(tensor)
        for output, value in zip(outputs, stored, strict=True):
            self.writer.write(output.name, value)
        sampler = Sampler(transform_of(self.recipes[tensor.name]))
        sampler.add(0, weight_OI, tuple(stored), SAMPLE_EVERY)
        self.quality[outputs[0].name] = sampler.quality

    def _choose(self, tensor: Tensor, weight_OI: torch.Tensor, hessian_II: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Return the codes of GPTQ; the plain ones where nothing was seen, or where they cost no more."""
        plain = weighted_error(weight_OI, grid.values(grid.plain_OI), hessian_II)
        self.errors[tensor.module] = (plain, plain)
        if not plain:
            return grid.plain_OI
        codes_OI = gptq(weight_OI, hessian_II, grid)
        cost = weighted_error(weight_OI, grid.values(codes_OI), hessian_II)
        if cost >= plain:
            return grid.plain_OI
        self.errors[tensor.module] = (plain, cost)
        return codes_OI

    def _outputs(self, tensor: Tensor) -> tuple[OutputTensor, ...]:
        return weight_unit(tensor, self._stored_dtype(tensor), (), (), self.recipes[tensor.name]).outputs

    def _stored_dtype(self, tensor: Tensor) -> str:
        return self.source.reader.entry(self.source.stored_layout.places(tensor)[0].stored.name).dtype

    def _weight(self, tensor: Tensor) -> torch.Tensor:
        """Return a weight in the dtype it is stored in, which the loader has widened."""
        return self.loader.model.get_parameter(tensor.name).to(torch_dtype(self._stored_dtype(tensor)))

    def _replace(self, tensor: Tensor, value_OI: torch.Tensor) -> None:
        module = self.loader.model.get_submodule(tensor.module)
        module.weight = nn.Parameter(value_OI, requires_grad=False)


def _watch(module: nn.Module, hessian: Hessian) -> torch.utils.hooks.RemovableHandle:
    def take(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        hessian.add(args[0])

    return module.register_forward_pre_hook(take)
