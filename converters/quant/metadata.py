"""quantization_config of a result in each format, and the file that ModelOpt keeps beside it."""

from collections.abc import Mapping
from typing import Any

from converters.formats import compressed_tensors, deepseek, modelopt
from converters.formats.declared import MODELOPT_FILE
from converters.formats.ignore import compressed_tensors_ignore, deepseek_ignore, modelopt_ignore, role_targets
from converters.quant.choice import Choice
from converters.quant.scheme import Format, Recipe
from converters.schema import ModelSchema


def quantization_json(choice: Choice, schema: ModelSchema, recipes: Mapping[str, Recipe]) -> dict[str, Any]:
    """Return quantization_config of config.json.

    Args:
        choice: what is written.
        schema: the tensors of the result.
        recipes: of the quantized ones, by name.
    """
    match choice.format:
        case Format.DEEPSEEK:
            return deepseek.quantization_config(deepseek_ignore(schema, recipes))
        case Format.MODELOPT:
            (scheme,) = {recipe.scheme for recipe in recipes.values()}
            exclude = modelopt_ignore(schema, recipes)
            return modelopt.quantization_config(scheme, exclude, has_kv_scales=choice.has_kv_scales)
    ignore = compressed_tensors_ignore(schema, recipes)
    return compressed_tensors.quantization_config(_groups(schema, recipes), ignore, has_kv_scales=choice.has_kv_scales)


def quantization_file(choice: Choice, schema: ModelSchema, recipes: Mapping[str, Recipe]) -> dict[str, bytes]:
    """Return the files beside config.json, by name: none but in ModelOpt's format."""
    if choice.format is not Format.MODELOPT:
        return {}
    (scheme,) = {recipe.scheme for recipe in recipes.values()}
    exclude = modelopt_ignore(schema, recipes)
    return {MODELOPT_FILE: modelopt.quantization_file(scheme, exclude, has_kv_scales=choice.has_kv_scales)}


def _groups(schema: ModelSchema, recipes: Mapping[str, Recipe]) -> list[compressed_tensors.Group]:
    different = list(dict.fromkeys(recipes.values()))
    if len(different) == 1:
        return [compressed_tensors.Group(different[0].scheme, different[0].group)]
    groups = []
    for recipe in different:
        roles = {schema.tensors[name].spec.role for name, own in recipes.items() if own == recipe}
        groups.append(compressed_tensors.Group(recipe.scheme, recipe.group, tuple(role_targets(schema, roles))))
    return groups
