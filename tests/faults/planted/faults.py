"""The faults: what is damaged, in which copies, and what a verification should say of it.

Numbers 1 to 18 are those of an experiment on what a check of logits alone overlooks, 19 to 32 what else converters,
quantizers and servers get wrong; the rest is what a diagnosis should name besides. Layers 3 to 6 have experts, 7 is the
MTP layer.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass

import torch

from converters.diagnosis.cause import CauseCode
from converters.schema import Role
from tests.faults.planted.copies import (
    BF16,
    FP8,
    FP8_BLOCK,
    INT8,
    INT8_PACKED,
    NVFP4,
    SHARDED,
    SHARDED_FP8,
    Copy,
    layer_tensors,
    schema,
)

Names = list[str]
PLAIN_AND_QUANTIZED = (BF16, FP8, NVFP4)
EVERYWHERE = (*PLAIN_AND_QUANTIZED, SHARDED)
LAYER, OTHER_LAYER, MTP, NUM_LAYERS, NUM_EXPERTS, HEAD_DIM = 4, 5, 7, 7, 16, 32
GATE, UP, DOWN = "gate_proj.weight", "up_proj.weight", "down_proj.weight"


@dataclass(frozen=True)
class Fault:
    """One planted fault.

    Attributes:
        number: of the list.
        title: what went wrong, in words.
        forms: the copies that it is planted in.
        plant: does the damage; returns the official names of the tensors that are wrong afterwards.
        code: the cause that a diagnosis should prove.
        subject: a word that the named subject must have, where no tensor is wrong.
        path: how the damaged folder comes about, where it is not written as it is; a name of `run.PATHS`.
    """

    number: int
    title: str
    forms: tuple[str, ...]
    plant: Callable[[Copy], Names]
    code: CauseCode
    subject: str = ""
    path: str = ""


def expert(layer: int, index: int) -> Names:
    return [schema().tensor(Role.EXPERT, part, layer, index).name for part in (GATE, UP, DOWN)]


def attention(part: str, layer: int = LAYER, role: Role = Role.ATTENTION) -> str:
    return schema().tensor(role, part, layer).name


def gate_up_of_one_expert(copy: Copy) -> Names:
    gate, up, _ = expert(LAYER, 3)
    copy.exchange(gate, up)
    return [gate, up]


def gate_up_of_a_layer(copy: Copy) -> Names:
    names = []
    for index in range(NUM_EXPERTS):
        gate, up, _ = expert(LAYER, index)
        copy.exchange(gate, up)
        names += [gate, up]
    return names


def two_experts(copy: Copy) -> Names:
    first, second = expert(LAYER, 3), expert(LAYER, 7)
    for one, other in zip(first, second, strict=True):
        copy.exchange(one, other)
    return [*first, *second]


def bias_zeroed(copy: Copy) -> Names:
    name = copy.name(Role.ROUTER_BIAS, "gate.e_score_correction_bias", LAYER)
    copy.change(name, torch.zeros_like)
    return [name]


def bias_stored_as_bf16(copy: Copy) -> Names:
    name = copy.name(Role.ROUTER_BIAS, "gate.e_score_correction_bias", LAYER)
    copy.tensors[name] = copy.tensors[name].bfloat16()
    return [name]


def bias_rounded(copy: Copy) -> Names:
    """The dtype is kept, the values went through bf16."""
    name = copy.name(Role.ROUTER_BIAS, "gate.e_score_correction_bias", LAYER)
    copy.change(name, lambda value: value.bfloat16().float())
    return [name]


def shared_expert_dropped(copy: Copy) -> Names:
    names = [copy.name(Role.SHARED_EXPERT, part, LAYER) for part in (GATE, UP, DOWN)]
    for name in names:
        copy.blank(name)
    return names


def config(key: str, value: object) -> Callable[[Copy], Names]:
    def plant(copy: Copy) -> Names:
        copy.config[key] = value
        return []

    return plant


def q_interleaved(copy: Copy) -> Names:
    """Rotary dims of q in pairs, in weights and bias."""
    rotary = HEAD_DIM // 2
    within = torch.cat((torch.arange(rotary).view(2, -1).T.reshape(-1), torch.arange(rotary, HEAD_DIM)))
    names = [attention("q_proj.weight"), attention("q_proj.bias", role=Role.ATTENTION_BIAS)]
    for name in names:
        rows = schema().tensors[name].shape[0]
        copy.reorder(name, (torch.arange(rows // HEAD_DIM)[:, None] * HEAD_DIM + within).view(-1))
    return names


def k_over_all_dims(copy: Copy) -> Names:
    """A converter that takes all dims of a head for rotary ones."""
    names = [attention("k_proj.weight"), attention("k_proj.bias", role=Role.ATTENTION_BIAS)]
    within = torch.arange(HEAD_DIM).view(2, -1).T.reshape(-1)
    for name in names:
        rows = schema().tensors[name].shape[0]
        copy.reorder(name, (torch.arange(rows // HEAD_DIM)[:, None] * HEAD_DIM + within).view(-1))
    return names


def q_norm_lost(copy: Copy) -> Names:
    name = attention("q_norm.weight", role=Role.QK_NORM)
    copy.change(name, torch.ones_like)
    return [name]


def biases_lost(copy: Copy) -> Names:
    names = [attention(f"{x}_proj.bias", role=Role.ATTENTION_BIAS) for x in "qkv"]
    for name in names:
        copy.change(name, torch.zeros_like)
    return names


def expert_scaled(copy: Copy) -> Names:
    names = expert(LAYER, 5)
    for name in names:
        copy.multiply(name, 1.01)
    return names


def o_proj_scaled(copy: Copy) -> Names:
    name = attention("o_proj.weight")
    copy.multiply(name, 1.02)
    return [name]


def flip(bit: int) -> Callable[[Copy], Names]:
    """Flip a bit of one element: of a value, or of a code."""

    def plant(copy: Copy) -> Names:
        name = expert(LAYER, 2)[2]

        def damage(value: torch.Tensor) -> torch.Tensor:
            kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[value.element_size()]
            bits = value.clone().view(kind)
            place = _small_place(value) if bit > 4 else (11, 8)
            bits[place] ^= 1 << min(bit, 8 * value.element_size() - 2)
            return bits.view(value.dtype)

        copy.change(name, damage)
        return [name]

    return plant


def _small_place(value: torch.Tensor) -> tuple[int, int]:
    """Return where a small value stands that is not zero."""
    magnitudes = value.view(torch.uint8) & 0x77 if value.dtype == torch.uint8 else value.float().abs()
    flat = magnitudes.float().flatten()
    place = int(torch.where(flat > 0, flat, torch.inf).argmin())
    return divmod(place, value.shape[1])


def scales_transposed(copy: Copy) -> Names:
    name = copy.name(Role.DENSE_MLP, UP, 1)
    copy.change(name, lambda value: value.T.reshape(value.shape), "weight_scale")
    return [name]


def two_scales_exchanged(copy: Copy) -> Names:
    name = copy.name(Role.DENSE_MLP, UP, 1)

    def exchange(value: torch.Tensor) -> torch.Tensor:
        other = value.clone()
        flat, last = other.view(-1), other.numel() - 1
        flat[0], flat[last] = value.view(-1)[last], value.view(-1)[0]
        return other

    copy.change(name, exchange, "weight_scale")
    return [name]


def expert_zero(copy: Copy) -> Names:
    names = expert(LAYER, 6)
    for name in names:
        copy.blank(name)
    return names


def expert_copied(copy: Copy) -> Names:
    names = expert(LAYER, 6)
    for name, source in zip(names, expert(LAYER, 1), strict=True):
        copy.assign(name, source)
    return names


def head_shifted(copy: Copy) -> Names:
    name = copy.name(Role.HEAD, "lm_head.weight")
    copy.change(name, lambda value: torch.cat((value[:1] * 0, value[:-1])))
    return [name]


def scale_inverse(copy: Copy) -> Names:
    name = expert(LAYER, 4)[2]
    suffix = "weight_global_scale" if "weight_global_scale" in copy.parts(name) else "weight_scale"
    copy.tensors[copy.parts(name)[suffix]] = copy.tensors[copy.parts(name)[suffix]].float().reciprocal()
    if suffix == "weight_scale":
        copy.tensors[copy.parts(name)[suffix]] = copy.tensors[copy.parts(name)[suffix]].bfloat16()
    return [name]


def scale_lost(copy: Copy) -> Names:
    name = expert(LAYER, 4)[0]
    copy.change(name, torch.ones_like, "weight_scale")
    return [name]


def globals_differ(copy: Copy) -> Names:
    """Up gets the global scale of another one, its local scales do not."""
    gate, up, _ = expert(LAYER, 8)
    copy.change(up, lambda value: value * 1.5, "weight_global_scale")
    return [gate, up]


def nibbles(copy: Copy) -> Names:
    names = expert(LAYER, 8)
    for name in names:
        copy.change(name, lambda value: (value << 4) | (value >> 4), "weight_packed")
    return names


def zero_point(copy: Copy) -> Names:
    name = expert(LAYER, 8)[0]

    def add_one(value: torch.Tensor) -> torch.Tensor:
        return (value.view(torch.uint8) + 1).view(value.dtype)

    copy.change(name, add_one)
    return [name]


def unlisted_expert(copy: Copy) -> Names:
    names = expert(LAYER, 9)
    copy.unlisted = {stored for name in names for stored in copy.parts(name).values()}
    return names


def expert_gone(copy: Copy) -> Names:
    names = expert(LAYER, 9)
    for name in names:
        for stored in copy.parts(name).values():
            del copy.tensors[stored]
    return names


def layers_exchanged(copy: Copy) -> Names:
    names = []
    for one, other in zip(layer_tensors(LAYER), layer_tensors(OTHER_LAYER), strict=True):
        copy.exchange(one.name, other.name)
        names += [one.name, other.name]
    return names


def mtp_missing(copy: Copy) -> Names:
    names = [tensor.name for tensor in layer_tensors(MTP)]
    for stored in [stored for name in names for stored in copy.parts(name).values()]:
        del copy.tensors[stored]
    return names


def head_tied(copy: Copy) -> Names:
    name = copy.name(Role.HEAD, "lm_head.weight")
    copy.assign(name, copy.name(Role.EMBEDDING, "embed_tokens.weight"))
    return [name]


def head_left_out(copy: Copy) -> Names:
    name = copy.name(Role.HEAD, "lm_head.weight")
    del copy.tensors[name]
    copy.config["tie_word_embeddings"] = True
    return []


def vocabulary_padded(copy: Copy) -> Names:
    names = [copy.name(Role.EMBEDDING, "embed_tokens.weight"), copy.name(Role.HEAD, "lm_head.weight")]
    for name in names:
        copy.change(name, lambda value: torch.cat((value, value[:64] * 0)))
    copy.config["vocab_size"] += 64
    return names


def eos_of_generation(copy: Copy) -> Names:
    settings = json.loads(copy.files["generation_config.json"])
    settings["eos_token_id"] = settings["eos_token_id"][0]
    copy.files["generation_config.json"] = json.dumps(settings).encode()
    return []


def template(copy: Copy) -> Names:
    content = copy.files["chat_template.jinja"].decode()
    assert "<|assistant|>" in content
    copy.files["chat_template.jinja"] = content.replace("<|assistant|>", "<|user|>").encode()
    return []


def template_gone(copy: Copy) -> Names:
    del copy.files["chat_template.jinja"]
    return []


def ep_ranks(copy: Copy) -> Names:
    """All experts of the second EP rank in the place of the first one's, in all layers."""
    names, half = [], NUM_EXPERTS // 2
    for layer in range(3, NUM_LAYERS + 1):
        for index in range(half):
            for one, other in zip(expert(layer, index), expert(layer, index + half), strict=True):
                copy.exchange(one, other)
                names += [one, other]
    return names


def tp_slices(copy: Copy) -> Names:
    """Slices of two TP ranks of o_proj, side by side in the wrong order."""
    name = attention("o_proj.weight")

    def turn(value: torch.Tensor) -> torch.Tensor:
        half = value.shape[1] // 2
        return torch.cat((value[:, half:], value[:, :half]), dim=1)

    copy.change(name, turn)
    if "weight_scale" in copy.parts(name) and copy.tensors[copy.parts(name)["weight_scale"]].shape[1] > 1:
        copy.change(name, turn, "weight_scale")
    return [name]


def rows_cut_in_block(_: Copy) -> Names:
    """Planted while ranks are cut; see `run.PATHS`."""
    return [schema().tensor(Role.DENSE_MLP, DOWN, layer).name for layer in range(3)]


def shared_expert_scaled(copy: Copy) -> Names:
    name = copy.name(Role.SHARED_EXPERT, DOWN, LAYER)
    copy.multiply(name, 2.5)
    return [name]


def k_and_v(copy: Copy) -> Names:
    names = [attention("k_proj.weight"), attention("v_proj.weight")]
    copy.exchange(*names)
    return names


def qkv_by_group(copy: Copy) -> Names:
    """Rows by key-value head, as Megatron stores them, taken apart as if they were not."""
    names = [attention(f"{x}_proj.weight") for x in "qkv"]
    rows = [schema().tensors[name].shape[0] for name in names]
    ranges = torch.arange(sum(rows)).split(rows)
    index = torch.cat([part.view(2, -1) for part in ranges], dim=1).view(-1)
    suffixes = [suffix for suffix in copy.parts(names[0]) if len(copy.tensors[copy.parts(names[0])[suffix]]) == rows[0]]
    for suffix in suffixes:
        whole = torch.cat([copy.tensors[copy.parts(name)[suffix]] for name in names])[index]
        for name, part in zip(names, whole.split(rows), strict=True):
            copy.tensors[copy.parts(name)[suffix]] = part
    return names


def gate_up_in_turns(copy: Copy) -> Names:
    gate, up, _ = expert(LAYER, 10)
    for suffix, stored in copy.parts(gate).items():
        other = copy.parts(up)[suffix]
        if len(copy.tensors[stored]) == 64:
            both = torch.stack((copy.tensors[stored], copy.tensors[other]), dim=1).flatten(0, 1)
            copy.tensors[stored], copy.tensors[other] = both.split(64)
    return [gate, up]


def halves_of_eh(copy: Copy) -> Names:
    name = copy.name(Role.MTP_PROJECTION, "eh_proj.weight", MTP)
    half = copy.tensors[name].shape[1] // 2
    copy.change(name, lambda value: torch.cat((value[:, half:], value[:, :half]), dim=1))
    return [name]


def router_through_fp8(copy: Copy) -> Names:
    name = copy.name(Role.ROUTER, "gate.weight", LAYER)

    def through(value: torch.Tensor) -> torch.Tensor:
        scale = value.float().abs().amax(dim=1, keepdim=True) / 448
        return (value.float() / scale).to(torch.float8_e4m3fn).float() * scale

    copy.change(name, through)
    return [name]


def mtp_unscaled(_: Copy) -> Names:
    """Planted while codes are restored; see `run.PATHS`."""
    return expert(MTP, 0)


_C = CauseCode
FAULTS = (
    Fault(1, "gate and up exchanged, one expert", EVERYWHERE, gate_up_of_one_expert, _C.GATE_UP_EXCHANGED),
    Fault(2, "gate and up exchanged, whole layer", (BF16, FP8), gate_up_of_a_layer, _C.GATE_UP_EXCHANGED),
    Fault(3, "two experts exchanged", (*EVERYWHERE, SHARDED_FP8), two_experts, _C.EXCHANGED),
    Fault(4, "correction bias zeroed", (BF16, FP8, SHARDED), bias_zeroed, _C.ZERO),
    Fault(5, "correction bias stored as bf16", (BF16, FP8), bias_stored_as_bf16, _C.BIAS_ROUNDED),
    Fault(6, "shared expert dropped", (BF16, NVFP4, SHARDED), shared_expert_dropped, _C.ZERO),
    Fault(
        7, "routed_scaling_factor 1 for 2.5", (BF16, SHARDED), config("routed_scaling_factor", 1.0), _C.CONFIG,
        "routed_scaling_factor",
    ),
    Fault(8, "rotary dims of q interleaved", EVERYWHERE, q_interleaved, _C.ROPE_ORDER),
    Fault(9, "q norm lost", (BF16, FP8), q_norm_lost, _C.IDENTITY_GAIN),
    Fault(10, "q, k, v biases lost", (BF16, FP8), biases_lost, _C.ZERO),
    Fault(11, "norm epsilon 1e-6 for 1e-5", (BF16, FP8), config("rms_norm_eps", 1e-6), _C.CONFIG, "rms_norm"),
    Fault(12, "one expert times 1.01", EVERYWHERE, expert_scaled, _C.GAIN),
    Fault(13, "o_proj times 1.02", EVERYWHERE, o_proj_scaled, _C.GAIN),
    Fault(14, "lowest bit of one element flipped", (*EVERYWHERE, INT8), flip(0), _C.FEW_ELEMENTS),
    Fault(15, "high exponent bit of a small element flipped", (BF16, NVFP4), flip(14), _C.FEW_ELEMENTS),
    Fault(16, "block scales transposed", (FP8_BLOCK,), scales_transposed, _C.SCALE_TRANSPOSED),
    Fault(17, "one expert zero", EVERYWHERE, expert_zero, _C.ZERO),
    Fault(18, "rows of the head shifted by one", (BF16, SHARDED), head_shifted, _C.ROWS_SHIFTED),
    Fault(19, "scales stored by columns", (NVFP4,), scales_transposed, _C.SCALE_TRANSPOSED),
    Fault(20, "inverse of the scale stored", (FP8, FP8_BLOCK, NVFP4, INT8), scale_inverse, _C.SCALE_INVERTED),
    Fault(21, "global scales of gate and up differ", (NVFP4,), globals_differ, _C.GLOBAL_SCALES_DIFFER),
    Fault(22, "order of nibbles", (NVFP4,), nibbles, _C.NIBBLE_ORDER),
    Fault(23, "zero point off by one", (INT8, INT8_PACKED), zero_point, _C.ZERO_POINT),
    Fault(24, "expert dropped from the index", (BF16, NVFP4), unlisted_expert, _C.INDEX_INCOMPLETE),
    Fault(25, "two layers exchanged", EVERYWHERE, layers_exchanged, _C.EXCHANGED),
    Fault(26, "MTP layer missing", (BF16, FP8), mtp_missing, _C.MTP_MISSING),
    Fault(27, "head tied to the embedding", (BF16, FP8), head_tied, _C.TIED_HEAD),
    Fault(28, "vocabulary padded", (BF16, SHARDED), vocabulary_padded, _C.VOCABULARY_PADDED),
    Fault(29, "end tokens lost", (BF16, FP8), config("eos_token_id", 984), _C.EOS_LOST, "eos_token"),
    Fault(30, "chat template changed", (BF16, SHARDED), template, _C.TEMPLATE_CHANGED, "chat_template.jinja"),
    Fault(31, "TP slice cut inside of a block", (SHARDED_FP8,), rows_cut_in_block, _C.SLICE_CUT_IN_BLOCK, path="cut"),
    Fault(32, "EP ranks permuted", (FP8, SHARDED), ep_ranks, _C.EP_RANKS_PERMUTED),
    Fault(33, "correction bias went through bf16", (BF16,), bias_rounded, _C.BIAS_ROUNDED),
    Fault(34, "expert copied twice", (BF16, FP8, NVFP4), expert_copied, _C.COPIED),
    Fault(35, "expert missing", (BF16, FP8), expert_gone, _C.EXPERT_MISSING),
    Fault(36, "shared expert times the routed factor", (BF16, FP8, NVFP4), shared_expert_scaled, _C.FACTOR_BAKED_IN),
    Fault(37, "k and v exchanged", (BF16, FP8), k_and_v, _C.QKV_ORDER),
    Fault(38, "q, k, v by key-value head", (BF16, FP8), qkv_by_group, _C.QKV_ORDER),
    Fault(39, "gate and up rows in turns", (BF16, FP8), gate_up_in_turns, _C.GATE_UP_INTERLEAVED),
    Fault(40, "all dims of k taken for rotary ones", (BF16, FP8), k_over_all_dims, _C.ROPE_ORDER),
    Fault(41, "halves of the MTP projection exchanged", (BF16, FP8), halves_of_eh, _C.HALVES_EXCHANGED),
    Fault(42, "router rounded to FP8", (BF16, FP8), router_through_fp8, _C.ROUTER_QUANTIZED),
    Fault(43, "TP slices exchanged", (BF16, FP8), tp_slices, _C.TP_SLICES_PERMUTED),
    Fault(44, "two block scales exchanged", (FP8_BLOCK,), two_scales_exchanged, _C.SCALES_EXCHANGED),
    Fault(45, "scales lost", (FP8, INT8), scale_lost, _C.SCALE_LOST),
    Fault(46, "rope_theta 10000", (BF16,), config("rope_theta", 10000), _C.CONFIG, "rope_theta"),
    Fault(47, "all dims rotary in the config", (BF16,), config("partial_rotary_factor", 1.0), _C.CONFIG, "rotary"),
    Fault(48, "MTP weights restored without scales", (BF16,), mtp_unscaled, _C.UNSCALED, path="restored"),
    Fault(49, "head left out, as if tied", (BF16,), head_left_out, _C.CONFIG, "tie_word_embeddings"),
    Fault(50, "end tokens lost, generation_config.json", (BF16,), eos_of_generation, _C.EOS_LOST, "generation_co"),
    Fault(51, "chat template lost", (BF16,), template_gone, _C.TEMPLATE_CHANGED, "chat_template.jinja"),
)  # fmt: skip
