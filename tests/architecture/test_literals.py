"""Tensor names stand in `converters/schema.py` and nowhere else."""

import ast
import re
from collections.abc import Iterator

import pytest

from converters.schema import TABLE
from tests.architecture.sources import Module, docstring_nodes, modules

SCHEMA = "converters/schema.py"
# words of tensor names that other things are called as well
COMMON = {"bias", "experts", "gate", "head", "layers", "mlp", "model", "norm", "weight", "{expert}", "{layer}"}
WORDS = {word for spec in TABLE for word in spec.name.split(".")} - COMMON
PAIRS = {"model.layers", "model.norm", "mlp.experts", "mlp.gate"}
NAMES = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, sorted(WORDS | PAIRS)))})(?!\w)")


def tensor_names(module: Module) -> Iterator[str]:
    """Yield string literals, f-string parts included, that spell a part of a tensor name; docstrings are prose."""
    docstrings = docstring_nodes(module.tree)
    literals = (node for node in ast.walk(module.tree) if isinstance(node, ast.Constant) and node not in docstrings)
    for node in literals:
        # regular expressions escape their dots
        if isinstance(node.value, str) and NAMES.search(node.value.replace("\\", "")):
            yield f"{module.path}:{node.lineno}: {node.value!r}"


def test_schema_is_the_only_module_with_tensor_names() -> None:
    assert [line for module in modules() if module.path != SCHEMA for line in tensor_names(module)] == []


def test_schema_is_seen_to_hold_them() -> None:
    (schema,) = (module for module in modules() if module.path == SCHEMA)
    assert len(list(tensor_names(schema))) > len(TABLE) / 2


@pytest.mark.parametrize(
    "code",
    [
        "name = 'model.layers.3.input_layernorm.weight'",
        "name = f'model.layers.{layer}.mlp'",
        "if name.endswith('gate_proj.weight'): pass",
        "bias = 'e_score_correction_bias'",
        "pattern = r'.*\\.mlp\\.experts\\.\\d+'",
    ],
)
def test_a_tensor_name_is_seen(code: str) -> None:
    assert list(tensor_names(Module("converters/a.py", code))) != []


def test_prose_and_config_fields_pass() -> None:
    code = '"""Shape of gate_proj."""\nfields = ["n_routed_experts", "num_hidden_layers", "model_type"]\n'
    assert list(tensor_names(Module("converters/a.py", code))) == []
