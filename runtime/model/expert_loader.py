"""Experts of a checkpoint into grouped layout, weight by weight, as the loader comes past their names."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from converters.checkpoint.plan import Unit
from converters.checkpoint.reader import CheckpointReader
from converters.errors import InputError, UsageError
from converters.formats.inputs import AS_SERVED, InputScheme, input_scheme
from converters.formats.weights import Coding
from converters.official import OfficialTensors, read_bytes, read_unit
from converters.schema import Role, Tensor
from converters.source import Source
from runtime.config import EngineConfig
from runtime.model.activations import InputQuantizer
from runtime.model.expert_plan import StoredExperts, plain_scheme, plan_experts, scheme_of
from runtime.model.linear import Linear
from runtime.model.mlp import GatedMlp
from runtime.moe.experts import CalibratedInputs, LocalExperts
from runtime.moe.packing import ExpertPacker, Matrix, Sizes
from runtime.moe.plan import VANILLA, VANILLA_PLAN, MoePlan
from runtime.moe.runner import MoE
from runtime.moe.weights import ExpertScheme
from runtime.moe.workspace import Workspace

_ROLES = frozenset({Role.EXPERT, Role.SHARED_EXPERT})


@dataclass(frozen=True, slots=True)
class _Stored:
    """A weight as it lies in the checkpoint; `parts` read codes and scales, None: it has to be decoded."""

    tensor: Tensor
    scheme: ExpertScheme | None
    parts: tuple[Unit, ...] | None
    inputs: InputScheme | None


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a weight goes, and how it is read; `divides`: its global scale is the divisor of its values."""

    layer: int
    expert: int
    matrix: Matrix
    units: tuple[Unit, ...]
    divides: bool


class ExpertLoader:
    """Reads the experts that are held in grouped layout.

    Args:
        source: open for as long as it reads.
        official: of the source.
        engine: choices.
        with_mtp: the MTP layer is among the layers.
    Attributes:
        plan: of the model.
        workspace: of all its layers.
    Raises:
        UsageError: the backend cannot do what the checkpoint asks for.
    """

    def __init__(self, source: Source, official: OfficialTensors, engine: EngineConfig, *, with_mtp: bool) -> None:
        self.plan: MoePlan = VANILLA_PLAN
        self._engine, self._config = engine, source.config
        self.workspace = Workspace(torch.device(engine.device))
        self._packers: dict[int, ExpertPacker] = {}
        self._modules: dict[int, MoE] = {}
        self._places: dict[str, _Place] = {}
        # what the oracle runs on stays as it was
        if engine.moe_backend == VANILLA:
            return
        layers = self._survey(source, official, with_mtp=with_mtp)
        stored = {layer: self._summary(found) for layer, found in layers.items()}
        self.plan = plan_experts(stored, source.config, engine)
        if self.plan.backend != VANILLA:
            for layer, found in layers.items():
                self._place(layer, found, official)

    def takes(self, name: str) -> bool:
        """Whether a parameter of this name goes into grouped layout."""
        return name in self._places

    def units(self, name: str) -> tuple[Unit, ...]:
        """Return what is read for it, codes first."""
        return self._places[name].units

    def bind(self, modules: Mapping[str, nn.Module]) -> None:
        """Remember the MoE blocks, by layer; their linear modules know what happens to inputs."""
        self._modules |= {module.gate.layer: module for module in modules.values() if isinstance(module, MoE)}

    def read(self, reader: CheckpointReader, name: str) -> None:
        """Read a weight into its layer; with the last one, the layer's MoE block gets its experts.

        Raises:
            InputError: a code or scale that must be decoded is NaN or Inf, or gate and up have different global scales,
                of weights or of inputs.
        """
        place = self._places[name]
        packer = self._packers[place.layer]
        codes_OI, *scales = (read_unit(reader, unit) for unit in place.units)
        if place.divides:
            scales[-1] = scales[-1].to(torch.float32).reciprocal()
        packer.put(place.expert, place.matrix, codes_OI, *scales)
        if packer.is_complete:
            self._finish(place.layer, packer)

    def _finish(self, layer: int, packer: ExpertPacker) -> None:
        moe = self._modules[layer]
        first = moe.experts[0]
        assert isinstance(first, GatedMlp), first
        rounding = _rounding(first.gate_proj), _rounding(first.down_proj)
        multiplies, weights = self.plan.layers[layer].multiplies_codes, packer.weights()
        if multiplies and weights.scheme is ExpertScheme.NVFP4:
            calibrated = _calibrated(moe, weights.num_experts, weights.device)
            moe.load(LocalExperts(weights, multiplies_codes=True, calibrated=calibrated), self.workspace)
            return
        moe.load(LocalExperts(weights, *rounding, multiplies_codes=multiplies), self.workspace)

    def _survey(self, source: Source, official: OfficialTensors, *, with_mtp: bool) -> dict[int, list[_Stored]]:
        plain, layers = plain_scheme(self._engine), dict[int, list[_Stored]]()
        for tensor in source.schema.tensors.values():
            is_left_out = tensor.layer == source.schema.mtp_layer and not with_mtp
            if tensor.spec.role in _ROLES and tensor.layer is not None and not is_left_out:
                layers.setdefault(tensor.layer, []).append(self._found(source, official, tensor, plain))
        return layers

    def _found(self, source: Source, official: OfficialTensors, tensor: Tensor, plain: ExpertScheme) -> _Stored:
        found = official.format(tensor)
        if found.is_plain:
            return _Stored(tensor, plain, None, None)
        assert source.quantization is not None, tensor.name
        is_served = self._engine.activations == AS_SERVED
        inputs = input_scheme(source.quantization, tensor.module) if is_served else None
        scheme = scheme_of(found, plain)
        parts = None if scheme is None else _parts(official, tensor)
        return _Stored(tensor, scheme if parts else None, parts, inputs)

    def _summary(self, found: list[_Stored]) -> StoredExperts:
        schemes: dict[Role, set[ExpertScheme | None]] = {role: set() for role in _ROLES}
        for one in found:
            schemes[one.tensor.spec.role].add(one.scheme)
        routed, shared = (schemes[role] for role in (Role.EXPERT, Role.SHARED_EXPERT))
        inputs = {role: frozenset(one.inputs for one in found if one.tensor.spec.role is role) for role in _ROLES}
        return StoredExperts(_only(routed), _only(shared), inputs[Role.EXPERT], inputs[Role.SHARED_EXPERT])

    def _place(self, layer: int, found: list[_Stored], official: OfficialTensors) -> None:
        plan, config = self.plan.layers[layer], self._config
        sizes = Sizes(config.n_routed_experts, plan.num_shared, config.hidden_size, config.moe_intermediate_size)
        self._packers[layer] = ExpertPacker(plan.scheme, sizes, torch.device(self._engine.device))
        for stored in found:
            tensor = stored.tensor
            expert = config.n_routed_experts if tensor.expert is None else tensor.expert
            if expert >= sizes.num_experts:
                continue
            keeps = stored.parts is not None and not plan.scheme.is_plain
            units = stored.parts if keeps and stored.parts is not None else (official.decoded(tensor),)
            divides = keeps and official.format(tensor).coding is Coding.NVFP4_DIVISOR
            fuse = tensor.spec.fuse
            matrix = Matrix.DOWN if fuse is None else Matrix(fuse.position)
            self._places[tensor.name] = _Place(layer, expert, matrix, units, divides)


def _rounding(linear: Linear) -> InputQuantizer | None:
    """Return what happens to the inputs of a layer."""
    found = linear.quantize_input
    assert found is None or isinstance(found, InputQuantizer), found
    return found


def _calibrated(moe: MoE, num_experts: int, device: torch.device) -> tuple[CalibratedInputs, CalibratedInputs]:
    """Return the scales of the inputs of gate and up, and of down, of each expert.

    Raises:
        InputError: gate and up of an expert have different ones.
    """
    factors: dict[Matrix, list[float]] = {matrix: [] for matrix in Matrix}
    for expert, mlp in enumerate([*moe.experts, moe.shared_experts][:num_experts]):
        assert isinstance(mlp, GatedMlp), mlp
        for matrix, linear in zip(Matrix, (mlp.gate_proj, mlp.up_proj, mlp.down_proj), strict=True):
            rounding = _rounding(linear)
            assert rounding is not None, linear
            factors[matrix].append(rounding.scale)
        gate, up = (factors[matrix][-1] for matrix in (Matrix.GATE, Matrix.UP))
        if gate != up:
            name = "the shared expert" if mlp is moe.shared_experts else f"expert {expert}"
            raise InputError(
                f"{name} of layer {moe.gate.layer}",
                expected="one calibrated scale for the inputs of gate and up",
                found=f"{gate} and {up}",
                next_step=f"Use --moe-backend {VANILLA}.",
            )
    return CalibratedInputs.of(factors[Matrix.UP], device), CalibratedInputs.of(factors[Matrix.DOWN], device)


def unit_bytes(reader: CheckpointReader, units: tuple[Unit, ...]) -> int:
    """Return the bytes that these units read."""
    return sum(read_bytes(reader, unit) for unit in units)


def _parts(official: OfficialTensors, tensor: Tensor) -> tuple[Unit, ...] | None:
    try:
        return official.stored_parts(tensor)
    except UsageError:
        # it ends within a block of scales, for example: it can be decoded all the same
        return None


def _only(schemes: set[ExpertScheme | None]) -> ExpertScheme | None:
    """Return the one scheme of all, or None."""
    return next(iter(schemes)) if len(schemes) == 1 else None
