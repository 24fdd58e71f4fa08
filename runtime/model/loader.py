"""From a checkpoint folder to a model: every parameter filled exactly once, every tensor accounted for.

The modules' parameters bear the official names; `converters.official` finds each of them in the layout and format that
the checkpoint has. What is wrong with it is found from the headers, before any weight is read.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from converters.checkpoint.dtypes import BY_CONFIG_NAME, itemsize
from converters.checkpoint.plan import Unit
from converters.errors import InputError
from converters.formats.inputs import AS_SERVED
from converters.formats.weights import Use
from converters.layout import Place
from converters.official import OfficialTensors, read_bytes, read_unit, scale_name
from converters.schema import MTP_COPIES, Role, Tensor
from converters.source import Source, open_source
from runtime.cache.kv_scales import read_kv_scales
from runtime.config import FP8, EngineConfig
from runtime.model.activations import input_quantizers
from runtime.model.decoder import CausalLM
from runtime.model.expert_loader import ExpertLoader, unit_bytes
from runtime.model.linear import Linear
from runtime.model.mtp import MtpLayer
from runtime.model.ops import plan_ops

# the router decides in fp32
_FP32_ROLES = frozenset({Role.ROUTER, Role.ROUTER_BIAS})
# rows of an MTP copy compared at a time: 8192 x 5120 bf16 = 80 MiB
_COPY_ROWS = 8192

Fetched = dict[str, torch.Tensor]
Empty = Callable[[torch.Size, torch.dtype], torch.Tensor]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run.

    Args:
        model: the main model; the MTP layer, if loaded, is also the last entry of its layers.
        mtp: the MTP layer, or None.
        differing_mtp_copies: names of the MTP layer's own embedding or head that are not what the main model has.
            They are not used either way; see `runtime.model.mtp`.
        notes: what was accepted although it is unusual, and what was chosen, a sentence each.
    """

    model: CausalLM
    mtp: MtpLayer | None
    differing_mtp_copies: tuple[str, ...]
    notes: tuple[str, ...] = ()


def load_model(folder: Path, engine: EngineConfig, *, with_mtp: bool = True) -> LoadedModel:
    """Load the checkpoint in `folder`.

    Args:
        folder: config.json and safetensors in any layout, plain or in any format that `open_source` takes.
        engine: dtype, device and backend to run with.
        with_mtp: load the MTP layer, if the checkpoint has it.
    Raises:
        InputError: a tensor is missing, unknown, misshapen, or stored in a way this runtime does not read.
    Peak memory: the model in the dtype of compute (FP8 with one scale per output row stays FP8) plus one tensor.
    """
    with open_source(folder) as source:
        loader = ModelLoader(source, engine, with_mtp=with_mtp)
        loader.fill(loader.parameter_names)
        return LoadedModel(loader.model, loader.mtp, loader.differing_mtp_copies(), (*loader.notes, *loader.choices))


class ModelLoader:
    """An empty model, held against the checkpoint's headers and filled part by part.

    Args:
        source: open for as long as the loader fills.
        engine: dtype, device and backend to run with.
        with_mtp: include the MTP layer, if the checkpoint has it.
    Raises:
        InputError: a tensor is quantized that no linear layer has.
        UsageError: a tensor is stored in parts that do not go together, or kernels were asked for that cannot run it.
    """

    def __init__(self, source: Source, engine: EngineConfig, *, with_mtp: bool = True) -> None:
        self.reader = source.reader
        self.engine = engine
        self.schema = source.schema
        self._official = OfficialTensors.of(source, BY_CONFIG_NAME[engine.dtype])
        self._experts = ExpertLoader(source, self._official, engine, with_mtp=with_mtp)
        plan = self._experts.plan
        self.model = CausalLM(source.config, plan)
        self.mtp = MtpLayer(source.config, plan) if with_mtp and self.schema.has_mtp else None
        if self.mtp is not None:
            self.model.model.layers.append(self.mtp)
        ops = plan_ops(source.config, engine)
        kv_scales_L2, scale_notes = read_kv_scales(source) if engine.kv_cache_dtype == FP8 else (None, ())
        self.model.use(ops.ops, kv_scales_L2, self._experts.workspace)
        self._modules = dict(self.model.named_modules())
        self._experts.bind(self._modules)
        # each parameter with the tensor that it is, or whose scale it is; without a unit it is zero
        self._tensors: dict[str, Tensor] = {}
        self._units: dict[str, Unit] = {}
        self._plan()
        if engine.activations == AS_SERVED:
            self._quantize_inputs(source)
        self.parameter_names = tuple(name for name, _ in self.model.named_parameters())
        assert set(self.parameter_names) == self._tensors.keys(), "a parameter or a tensor without its counterpart"
        self.notes = source.notes
        self.choices = (*plan.notes, *ops.notes, *scale_notes)
        self._by_layer: dict[int | None, list[str]] = {}
        for name in self.parameter_names:
            self._by_layer.setdefault(self._tensors[name].layer, []).append(name)

    def layer_names(self, layer: int) -> tuple[str, ...]:
        """Return the parameters of one layer, scales included, for `fill` and `release`."""
        return tuple(self._by_layer.get(layer, ()))

    @property
    def total_bytes(self) -> int:
        """What `fill` reads for all parameters."""
        return self.stored_bytes(self.parameter_names)

    def stored_bytes(self, names: Iterable[str]) -> int:
        """Return what `fill` reads for these parameters."""
        return sum(self._read_bytes(name) for name in names)

    def _read_bytes(self, name: str) -> int:
        if self._experts.takes(name):
            return unit_bytes(self.reader, self._experts.units(name))
        return read_bytes(self.reader, self._units[name]) if name in self._units else 0

    def held_bytes(self, names: Iterable[str], *, as_stored: bool = False) -> int:
        """Return what these parameters take once `fetch` has read them; codes not `as_stored` as if multiplied out."""
        return sum(self._parameter(name).numel() * self._held_itemsize(name, as_stored) for name in names)

    def numel(self, name: str) -> int:
        """Return how many values a parameter has."""
        return self._parameter(name).numel()

    def _held_itemsize(self, name: str, as_stored: bool) -> int:
        unit = self._units.get(name)
        if as_stored and unit is not None and self._is_widened(name):
            return itemsize(unit.outputs[0].dtype)
        is_wide = name != self._tensors[name].name or self._tensors[name].spec.role in _FP32_ROLES
        return (torch.float32 if is_wide else self.engine.torch_dtype).itemsize

    def fill(self, names: Iterable[str], advance: Callable[[int], None] | None = None) -> None:
        """Read these parameters from the checkpoint, in order.

        Args:
            names: some of parameter_names.
            advance: told the bytes read for each parameter.
        Raises:
            InputError: a code or scale that must be decoded is NaN or Inf.
        """
        for name in names:
            if self._experts.takes(name):
                self._experts.read(self.reader, name)
            else:
                self.place(self.fetch((name,)))
            if advance is not None and self._read_bytes(name):
                advance(self._read_bytes(name))

    def fetch(self, names: Iterable[str], *, as_stored: bool = False, empty: Empty | None = None) -> Fetched:
        """Read these parameters and return them on the CPU, for `place`; the model is not changed.

        Safe in another thread, also while other parameters are placed.

        Args:
            names: some of parameter_names; a scale together with its weight.
            as_stored: keep the dtype of the checkpoint for weights of linear layers, which widen what they use.
            empty: makes the tensors that are read into, of a shape and dtype.
        Raises:
            InputError: a code or scale that must be decoded is NaN or Inf.
        """
        values: Fetched = {}
        for name in names:
            unit = self._units.get(name)
            shape = self._parameter(name).shape
            is_kept = as_stored and self._is_widened(name)
            value = torch.zeros(shape) if unit is None else read_unit(self.reader, unit, empty if is_kept else None)
            assert value.shape == shape, (name, value.shape, shape)
            values[name] = value if is_kept else value.to(self._dtype(name, value))
        return values

    def _is_widened(self, name: str) -> bool:
        """Whether a parameter is the weight of a linear layer, which takes any dtype."""
        module_name, _, attribute = name.rpartition(".")
        return attribute == "weight" and isinstance(self._modules[module_name], Linear)

    def place(self, values: Fetched) -> None:
        """Put parameters into the model, on its device."""
        for name, value in values.items():
            self._replace(name, value.to(self.engine.device))

    def release(self, names: Iterable[str]) -> None:
        """Give the memory of these parameters back; `fill` brings them in again."""
        for name in names:
            self._replace(name, torch.empty_like(self._parameter(name), device="meta"))

    def differing_mtp_copies(self) -> tuple[str, ...]:
        """Return which of the MTP layer's own embedding and head differ from what the main model computes with.

        The main model's must have been filled. Without MTP layer there is nothing to compare.
        """
        mains = {Role.MTP_EMBEDDING: self.model.model.embed_tokens.weight, Role.MTP_HEAD: self.model.lm_head.weight}
        copies = [tensor for tensor in self.schema.tensors.values() if tensor.spec.role in MTP_COPIES]
        if self.mtp is None:
            return ()
        return tuple(tensor.name for tensor in copies if not self.equals(tensor, mains[tensor.spec.role]))

    def equals(self, tensor: Tensor, main_VD: torch.Tensor) -> bool:
        """Return whether the checkpoint has exactly these values (V, D) for a matrix; read in blocks of rows."""
        # an FP8 copy of a bf16 head is another head, however close
        if not self._official.format(tensor).is_plain:
            return False
        return all(self._equals(place, main_VD) for place in self._official.source.stored_layout.places(tensor))

    def _equals(self, place: Place, main_VD: torch.Tensor) -> bool:
        first, last = place.piece.rows
        for start in range(first, last, _COPY_ROWS):
            stop, shift = min(start + _COPY_ROWS, last), place.row - first
            copy = self.reader.read_rows(place.stored.name, start + shift, stop + shift)
            main = main_VD[start:stop, slice(*place.piece.columns)]
            if not torch.equal(copy.to(main), main):
                return False
        return True

    def _plan(self) -> None:
        """Find out how each parameter is read; a linear layer whose FP8 codes are kept gets a place for its scale."""
        # without correction bias an expert is chosen by its score alone, which is what zeros mean
        complete = replace(self.schema, has_router_bias=True)
        for tensor in complete.tensors.values():
            if self._left_out(tensor):
                continue
            if self._experts.takes(tensor.name):
                self._tensors[tensor.name] = tensor
                continue
            units = self._official.units(tensor) if tensor.name in self.schema.tensors else {}
            module = self._modules[tensor.module]
            if units and not isinstance(module, Linear) and not self._official.format(tensor).is_plain:
                found = self._official.format(tensor).used(Use.CODES)[0].dtype
                raise InputError(f"tensor {tensor.name}", expected="an unquantized tensor", found=found)
            if isinstance(module, Linear) and scale_name(tensor) in units:
                module.add_weight_scale()
            self._units |= units
            self._tensors |= dict.fromkeys((tensor.name, *units), tensor)

    def _quantize_inputs(self, source: Source) -> None:
        for name, quantizer in input_quantizers(source).items():
            module = self._modules.get(name)
            if isinstance(module, Linear):
                module.quantize_input = quantizer

    def _left_out(self, tensor: Tensor) -> bool:
        """Whether no parameter takes this tensor by design: the MTP copies, and the MTP layer when not loaded."""
        is_mtp = tensor.layer == self.schema.mtp_layer is not None
        return tensor.spec.role in MTP_COPIES or (is_mtp and self.mtp is None)

    def _dtype(self, name: str, value: torch.Tensor) -> torch.dtype:
        """Return the dtype that a parameter is held in."""
        if value.dtype is torch.float8_e4m3fn:
            return value.dtype
        is_scale = name != self._tensors[name].name
        return torch.float32 if is_scale or self._tensors[name].spec.role in _FP32_ROLES else self.engine.torch_dtype

    def _parameter(self, name: str) -> nn.Parameter:
        module_name, _, attribute = name.rpartition(".")
        found = getattr(self._modules[module_name], attribute)
        assert isinstance(found, nn.Parameter), name
        return found

    def _replace(self, name: str, value: torch.Tensor) -> None:
        module_name, _, attribute = name.rpartition(".")
        setattr(self._modules[module_name], attribute, nn.Parameter(value, requires_grad=False))
