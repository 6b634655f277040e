"""A JSON Schema of the request, with the options of the plugins that are installed."""

import re
from typing import Any, Final

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

from fabric_core.choosing.registry import Registry
from fabric_core.choosing.request import file_arguments
from fabric_core.cli._describe import meanings
from fabric_core.errors import FabricError
from fabric_core.kinds import EXTENSION, KINDS, Count

__all__ = ["make_schema"]

_OPTIONS: Final = r"(:.*)?"


class _Generator(GenerateJsonSchema):
    """Leaves open what only code can say, such as a function."""

    def handle_invalid_for_json_schema(self, *_: Any) -> JsonSchemaValue:
        return {"description": "can only be given in code"}


def make_schema(registry: Registry) -> dict[str, Any]:
    """Make the schema that a configuration file must fulfil; imports every plugin.

    A plugin that can't be loaded is named in it, with a comment that says why, and with any options.
    """
    properties: dict[str, Any] = {}
    for name in file_arguments():
        kind = next((kind for kind in KINDS.values() if kind.argument == name), None)
        if name == "devices":
            properties[name] = {"anyOf": [{"type": "integer"}, {"type": "string"}, _list({"type": "integer"})]}
        elif name == "num_nodes":
            properties[name] = {"type": "integer", "minimum": 1}
        elif name == "check":
            properties[name] = {"type": "boolean"}
        elif name == "warn_after":
            properties[name] = {"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "null"}]}
        elif name == "lock":
            properties[name] = {"type": "string"}
        elif name == "plugins":
            parts = [_reference(registry, one.name, False, f"{one.name}=") for one in KINDS.values() if one.in_plugins]
            properties[name] = _list({"anyOf": [*parts, _extensions(registry)]})
        elif kind is not None:
            one = _reference(registry, kind.name, kind.count is Count.ONE)
            properties[name] = one if kind.count is Count.ONE else {"anyOf": [one, _list(one)]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "The arguments of Fabric",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
    }


def _extensions(registry: Registry) -> dict[str, Any]:
    names = "|".join(re.escape(offer.name) for offer in registry.offers(EXTENSION))
    return {"type": "string", "pattern": f"^{EXTENSION}=([^/:]+/)?({names})$"}


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _reference(registry: Registry, kind: str, automatic: bool, prefix: str = "") -> dict[str, Any]:
    offers = registry.offers(kind)
    names = "|".join(re.escape(name) for name in [*["auto"][: int(automatic)], *(offer.name for offer in offers)])
    text = {"type": "string", "pattern": f"^{prefix}([^/:]+/)?({names}){_OPTIONS}$"}
    numbers = [int(offer.name) for offer in offers if offer.name.isdecimal()]
    forms: list[dict[str, Any]] = [text, *([{"enum": numbers}] if numbers and not prefix else [])]
    for offer in offers:
        options: dict[str, Any] = {"type": "object"}
        comment: dict[str, str] = {}
        try:
            model = offer.load().plugin.Options
            options = model.model_json_schema(schema_generator=_Generator)
            for name, meaning in meanings(model).items():
                options["properties"][name]["description"] = meaning
        except FabricError as error:
            comment = {"$comment": str(error)}
        properties: dict[str, Any] = {
            "name": {"const": offer.name},
            "distribution": {"type": "string"},
            "options": options,
        }
        if prefix:
            properties["kind"] = {"const": kind}
        forms.append(
            {
                **comment,
                "type": "object",
                "properties": properties,
                "required": ["name", *(["kind"] if prefix else [])],
                "additionalProperties": False,
            }
        )
    return {"anyOf": forms}
