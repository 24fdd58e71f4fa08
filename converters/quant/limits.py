"""What the shapes of a model allow a scheme: whole groups in every weight, and in every slice of tensor parallelism."""

from collections.abc import Mapping

from converters.config import Glm4MoeConfig
from converters.errors import UsageError
from converters.inspect.parallel import SIZES, cut_reason, tensor_fit
from converters.quant.scheme import BLOCK, GROUP_SIZES, GROUPED_SCHEME, ROLES, SCHEMES, Recipe, scheme_info
from converters.schema import ModelSchema, Role, Tensor

BLOCK_SCHEME = "fp8-block"
_NAMES = {role: name for name, role in ROLES.items()}


def check_columns(schema: ModelSchema, recipes: Mapping[str, Recipe]) -> None:
    """Refuse weights whose columns are not whole groups, and say what would work.

    Args:
        schema: the model.
        recipes: by the name of the tensor.
    Raises:
        UsageError: with the first such weight.
    """
    for name, recipe in recipes.items():
        tensor = schema.tensors[name]
        need = recipe.info.columns
        if tensor.shape[1] % need:
            raise UsageError(
                f"--scheme {recipe.label}: {tensor.module}",
                expected=f"columns in multiples of {need}",
                found=f"{tensor.shape[1]}, which is {tensor.shape[1] / need:g} of them",
                next_step=_what_works(schema, recipes, tensor, recipe),
            )


def row_notes(schema: ModelSchema, recipes: Mapping[str, Recipe]) -> list[str]:
    """Return a sentence for each role whose fused weights end within a block: written, but vLLM does not load them."""
    ragged: dict[Role, Tensor] = {}
    for name, recipe in recipes.items():
        tensor = schema.tensors[name]
        if recipe.scheme == BLOCK_SCHEME and tensor.spec.fuse is not None and tensor.shape[0] % BLOCK:
            ragged.setdefault(tensor.spec.role, tensor)
    return [
        f"{BLOCK_SCHEME}: {tensor.spec.part.removesuffix('.weight')} of {_NAMES[role]} has {tensor.shape[0]} rows, "
        f"{tensor.shape[0] / BLOCK:g} blocks; vLLM refuses that in weights that it multiplies as one. "
        f"{_without_role(schema, recipes, tensor)}or choose a scheme without blocks."
        for role, tensor in ragged.items()
    ]


def _what_works(schema: ModelSchema, recipes: Mapping[str, Recipe], tensor: Tensor, recipe: Recipe) -> str:
    """Return the ways out, as sentences."""
    columns = {schema.tensors[name].shape[1] for name in recipes}
    found = []
    if recipe.scheme == GROUPED_SCHEME:
        sizes = [name for name, size in GROUP_SIZES.items() if all(width % (size or 4) == 0 for width in columns)]
        if sizes:
            found.append(f"choose --group-size {', '.join(sizes)}")
    misfits = {
        schema.tensors[name].spec.role
        for name, own in recipes.items()
        if schema.tensors[name].shape[1] % own.info.columns
    }
    if Role.EXPERT not in misfits and any(schema.tensors[name].spec.role is Role.EXPERT for name in recipes):
        found.append(f"leave {_NAMES[tensor.spec.role]} out with --preset experts-only")
    pattern, is_block = _pattern(tensor), recipe.scheme == BLOCK_SCHEME
    if is_block:
        found += [text.rstrip(", ") for text in (_without_role(schema, recipes, tensor),) if text]
    elif tensor.spec.fuse is None and tensor.spec.role is not Role.EXPERT:
        found.append(f"leave it out with --ignore '{pattern}'")
    fitting = [
        scheme
        for scheme in SCHEMES
        if scheme != recipe.scheme and all(width % scheme_info(scheme).columns == 0 for width in columns)
    ]
    found.append(f"{'or ' if found else ''}use a scheme that fits every weight: {', '.join(fitting)}")
    text = "; ".join(found)
    return f"{text[0].upper()}{text[1:]}."


def _without_role(schema: ModelSchema, recipes: Mapping[str, Recipe], tensor: Tensor) -> str:
    """Return how to quantize all roles but that of a weight, with a comma behind it; empty if there is no other."""
    rest = dict.fromkeys(schema.tensors[name].spec.role for name in recipes)
    rest.pop(tensor.spec.role)
    schemes = ",".join(f"{_NAMES[role]}={BLOCK_SCHEME}" for role in rest)
    return f"Leave {_NAMES[tensor.spec.role]} out with --scheme {schemes}, " if schemes else ""


def _pattern(tensor: Tensor) -> str:
    """Return a regular expression for a weight's module in every layer."""
    parts = tensor.module.split(".")
    return r"\.".join(r"\d+" if part.isdecimal() else part for part in parts)


def parallel_table(config: Glm4MoeConfig, schema: ModelSchema, recipes: Mapping[str, Recipe]) -> dict[str, str]:
    """Return which sizes of tensor parallelism fit, by part of the model and of the whole, from widths alone.

    Kernels may ask for more. The MTP layer has the widths of the body.
    """
    cuts: dict[Role, int] = dict.fromkeys(ROLES.values(), 1)
    for name, recipe in recipes.items():
        role = schema.tensors[name].spec.role
        cuts[role] = max(cuts[role], recipe.info.cut)
    widths = {
        Role.EXPERT: config.moe_intermediate_size,
        Role.SHARED_EXPERT: config.shared_intermediate_size,
        Role.ATTENTION: config.q_size,
    }
    if config.first_k_dense_replace:
        widths[Role.DENSE_MLP] = config.intermediate_size
    fitting = {role: _fitting(width, cuts[role]) for role, width in widths.items()}
    plain = [size for size in SIZES if tensor_fit(config, 1, size, split_experts=False).fits]
    rest = [role for role in widths if role is not Role.EXPERT]
    with_ep = [size for size in plain if all(size in fitting[role] for role in rest)]
    table = {_NAMES[role]: _line(widths[role], cuts[role], fitting[role]) for role in widths if cuts[role] > 1}
    table["tensor parallel"] = _sizes([size for size in with_ep if size in fitting[Role.EXPERT]])
    table["with expert parallel"] = _sizes(with_ep)
    return table


def _fitting(width: int, cut: int) -> list[int]:
    return [size for size in SIZES if not cut_reason(width, cut, size)]


def _line(width: int, cut: int, fitting: list[int]) -> str:
    largest = 2 * max((size for size in fitting if size & (size - 1) == 0), default=1)
    reason = cut_reason(width, cut, largest) if fitting else ""
    return f"{_sizes(fitting)} of {width} in groups of {cut}" + (f"; {reason}" if reason else "")


def _sizes(sizes: list[int]) -> str:
    return ", ".join(map(str, sizes)) or "none"
