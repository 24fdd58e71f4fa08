"""What a stored reference keeps of the layers, so that a candidate's can be judged one by one without the source.

Kept are, in fp32, the embeddings, what both halves of every layer make, and what the routers decide. What each layer is
given is the sum of what came before, added up in the order of the run: the same numbers bit by bit. Outputs of single
experts are not kept: they would be as many more rows as a token has experts.

Shape suffixes: R rows, one for every token of every window, window after window; D hidden, E experts, K experts per
token.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from converters.errors import InputError, UsageError
from runtime.config import EngineConfig
from runtime.model.loader import ModelLoader
from runtime.model.norm import RMSNorm
from runtime.moe.router import Routing
from runtime.moe.runner import MoE
from runtime.streaming.one import ATTENTION, INPUT, MLP, ROUTER_LOGITS, ROUTING_WEIGHTS, OnPart
from runtime.verify.store_file import RowReader, RowWriter, TensorSpec
from runtime.verify.store_layout import HIDDEN, routing_name

EMBEDDED, NORM_EPS = "embedded", "norm_eps"
_MLP_NORM, _BIAS = "mlp_norm", "router_bias"
_HALVES, _ROUTER = (ATTENTION, MLP), (ROUTER_LOGITS, ROUTING_WEIGHTS)


def part_name(part: str, layer: int) -> str:
    """Return the tensor of a part of a layer."""
    return f"{part}.{layer}"


class Sizes(Protocol):
    """Sizes of a model, from its config or from a reference."""

    @property
    def hidden_size(self) -> int:
        """D."""

    @property
    def num_hidden_layers(self) -> int:
        """Layers without the MTP layer."""

    @property
    def first_k_dense_replace(self) -> int:
        """Layers without experts."""

    @property
    def n_routed_experts(self) -> int:
        """E."""

    @property
    def num_experts_per_tok(self) -> int:
        """K."""


def layer_specs(config: Sizes, num_rows: int) -> Iterator[TensorSpec]:
    """Yield what is kept of the layers; about 40 KiB a token and layer at full size."""
    yield EMBEDDED, "F32", (num_rows, config.hidden_size)
    yield NORM_EPS, "F64", (1,)
    for layer in range(config.num_hidden_layers):
        for half in _HALVES:
            yield part_name(half, layer), "F32", (num_rows, config.hidden_size)
        yield part_name(_MLP_NORM, layer), "F32", (config.hidden_size,)
        if layer >= config.first_k_dense_replace:
            yield part_name(ROUTER_LOGITS, layer), "F32", (num_rows, config.n_routed_experts)
            yield part_name(ROUTING_WEIGHTS, layer), "F32", (num_rows, config.num_experts_per_tok)
            yield part_name(_BIAS, layer), "F32", (config.n_routed_experts,)


def keep_parts(writer: RowWriter) -> OnPart:
    """Return what a run tells its layers' parts, to be written."""

    def keep(part: str, layer: int, first_row: int, rows: torch.Tensor) -> None:
        if part == INPUT:
            if layer == 0:
                writer.write(EMBEDDED, rows, first_row)
            return
        writer.write(part_name(part, layer), rows, first_row)

    return keep


def write_gains(writer: RowWriter, loader: ModelLoader) -> None:
    """Write the norms in front of the MLPs and the routers' biases, read one layer at a time.

    Raises:
        InputError: one cannot be read.
    """
    names = {id(parameter): name for name, parameter in loader.model.named_parameters()}
    for layer, module in enumerate(loader.model.decoder_layers):
        kept = {_MLP_NORM: module.post_attention_layernorm.weight}
        if isinstance(module.mlp, MoE):
            kept[_BIAS] = module.mlp.gate.e_score_correction_bias
        for part, parameter in kept.items():
            name = names[id(parameter)]
            writer.write(part_name(part, layer), loader.fetch([name])[name])
    writer.write(NORM_EPS, torch.tensor([module.post_attention_layernorm.eps], dtype=torch.float64))


@dataclass(frozen=True, slots=True)
class KeptLayers:
    """The kept layers of an open reference, as lanes of a run take them; see `runtime.streaming.replay.Replay`.

    Args:
        reader: the open file.
        engine: dtype and device of compute.
    """

    reader: RowReader
    engine: EngineConfig

    def embedded(self, first: int, stop: int) -> torch.Tensor:
        """Return what the first layer was given (R, D)."""
        return self._rows(EMBEDDED, first, stop)

    def attention(self, layer: int, first: int, stop: int) -> torch.Tensor:
        """Return attention's output (R, D) before the residual sum."""
        return self._rows(part_name(ATTENTION, layer), first, stop)

    def mlp(self, layer: int, first: int, stop: int) -> torch.Tensor:
        """Return the MLP's output (R, D) before the residual sum."""
        return self._rows(part_name(MLP, layer), first, stop)

    def mlp_norm(self, layer: int) -> RMSNorm:
        """Return the norm in front of the MLP."""
        weight_D = self._rows(part_name(_MLP_NORM, layer))
        norm = RMSNorm(len(weight_D), float(self.reader.read(NORM_EPS)))
        norm.weight = torch.nn.Parameter(weight_D, requires_grad=False)
        return norm

    def routing(self, layer: int, first: int, stop: int) -> Routing:
        """Return what the router decided for R rows."""
        logits_RE, weights_RK = (
            self.reader.read(part_name(part, layer), first, stop).to(self.engine.device) for part in _ROUTER
        )
        ids_RK = self.reader.read(routing_name(layer), first, stop).to(self.engine.device, torch.int64)
        return Routing(layer, logits_RE, ids_RK, weights_RK)

    def bias(self, layer: int) -> torch.Tensor:
        """Return the router's correction bias (E,) fp32."""
        return self.reader.read(part_name(_BIAS, layer)).to(self.engine.device)

    def final(self, first: int, stop: int) -> torch.Tensor:
        """Return what stood behind the final norm (R, D)."""
        return self._rows(HIDDEN, first, stop)

    def _rows(self, name: str, first: int = 0, stop: int | None = None) -> torch.Tensor:
        return self.reader.read(name, first, stop).to(self.engine.device, self.engine.torch_dtype)


def kept_layers(reader: RowReader, sizes: Sizes, num_rows: int, engine: EngineConfig) -> KeptLayers:
    """Return the layers of an open reference.

    Args:
        reader: the open file.
        sizes: of its model.
        num_rows: of its text.
        engine: dtype and device of compute.
    Raises:
        UsageError: it was saved without them. InputError: a part of them is missing or misshapen.
    """
    if EMBEDDED not in reader.entries:
        raise UsageError(
            f"--reference {reader.path}",
            expected="one with its layers, to compare layers with",
            found="one without",
            next_step="Save it again with --save-inputs, or take --level logits.",
        )
    for name, dtype, shape in layer_specs(sizes, num_rows):
        entry = reader.entries.get(name)
        if entry is None or (entry.dtype, entry.shape) != (dtype, shape):
            found = "none" if entry is None else f"{entry.dtype} {list(entry.shape)}"
            raise InputError(
                f"{reader.path}: {name}",
                expected=f"{dtype} {list(shape)}",
                found=found,
                next_step="Save the reference again.",
            )
    return KeptLayers(reader, engine)
