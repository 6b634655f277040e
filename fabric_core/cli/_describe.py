"""Contracts and options in words: taken from what stands in the source."""

import ast
import inspect
import re
import textwrap
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Final

from pydantic import BaseModel

from fabric_core.contracts import (
    API_VERSION,
    Collectives,
    FabricActs,
    LaunchOrder,
    LifeCycle,
    Plugin,
    PrecisionPolicy,
    ProcessGroup,
    ProcessInfo,
    World,
)
from fabric_core.contracts._spec import behaviours
from fabric_core.kinds import EXTENSION, KINDS

__all__ = ["contract_page", "field_type", "meanings"]


def meanings(model: type[BaseModel]) -> dict[str, str]:
    """Give the meaning of each field that says one, in one line; nothing where there is no source."""
    found = {name: info.description for name, info in model.model_fields.items() if info.description}
    for cls in reversed(model.__mro__[: model.__mro__.index(BaseModel)]):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
        except (OSError, TypeError, SyntaxError):
            continue
        body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
        for field, text in pairwise(body):
            match field, text:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(meaning))):
                    found[name] = " ".join(meaning.split())
    return found


def field_type(annotation: Any) -> str:
    """Show a type as one writes it: a class without its module, ``torch.device`` and the like with it."""
    shown = f"{annotation.__module__}.{annotation.__qualname__}" if isinstance(annotation, type) else str(annotation)
    shown = re.sub(r"\b(?:[a-z_]\w*\.)+(?=[A-Z])", "", shown).replace("NoneType", "None")
    return shown.removeprefix("builtins.")


def contract_page(kind: str) -> str:
    """Give the reference page of a contract, or of extensions, as Markdown, from the contract itself."""
    contract = LifeCycle if kind == EXTENSION else KINDS[kind].contract
    lines = [
        f"# The contract of {'an' if kind[0] in 'aeiou' else 'a'} {kind}",
        "",
        f"Written by `fabric-core contract {kind}` from version {API_VERSION} of the contracts; a test keeps it true.",
        "",
        *_prose(inspect.getdoc(contract) or ""),
        "",
    ]
    declared = getattr(contract, "capabilities", None)
    if declared is not None and type(declared).model_fields:
        lines += [
            f"## What it declares: `{type(declared).__name__}`",
            "",
            "| name | default | meaning |",
            "|---|---|---|",
        ]
        said = meanings(type(declared))
        for name, info in type(declared).model_fields.items():
            lines.append(f"| `{name}` | `{_cell(info.default)}` | {_code(said.get(name, ''))} |")
        lines.append("")
    properties = _properties(contract)
    lines += ["## Properties", "", *properties] if properties else []
    lines += ["## Life-cycle hooks" if kind == EXTENSION else "## Behaviours", ""]
    for name, arguments in behaviours(contract).items():
        lines += _method(name, arguments, vars(contract)[name])
    for cls in _ALSO.get(kind, ()):
        lines += [f"## `{cls.__name__}`", "", *_prose(inspect.getdoc(cls) or ""), "", *_properties(cls)]
        for name, arguments in behaviours(cls).items():
            lines += _method(name, arguments, vars(cls)[name])
    if kind != EXTENSION:
        lines += ["## What plugins of every kind keep", "", *_prose(inspect.getdoc(Plugin) or ""), ""]
    return "\n".join(lines)


def _method(name: str, arguments: tuple[str, ...], method: Any) -> list[str]:
    """Give a method's name, the types of its arguments and of what it returns, and its docstring."""
    signature = inspect.signature(method)
    typed = [f"{one}: {field_type(signature.parameters[one].annotation)}" for one in arguments]
    return [
        f"### `{name}({', '.join(arguments)})`{_must(method)}",
        "",
        f"`({', '.join(typed)}) -> {field_type(signature.return_annotation)}`",
        "",
        *_prose(inspect.getdoc(method) or ""),
        "",
    ]


_ALSO: Final[Mapping[str, tuple[type[Any], ...]]] = {
    "strategy": (Collectives, World, ProcessInfo, ProcessGroup),
    "precision": (PrecisionPolicy,),
    "launcher": (LaunchOrder, ProcessInfo),
    EXTENSION: (FabricActs,),
}
"""What the behaviours of a contract take and return, and an author must know too."""


def _properties(cls: type[Any]) -> list[str]:
    """Give the properties of a class, with their types and docstrings."""
    lines: list[str] = []
    for name, one in vars(cls).items():
        if isinstance(one, property) and one.fget is not None:
            typed = field_type(inspect.signature(one.fget).return_annotation)
            said = _prose(inspect.getdoc(one) or "")
            lines += [f"### `{name}`{_must(one.fget)}", "", f"`{typed}`", "", *said, ""]
    return lines


def _must(method: Any) -> str:
    return ": required" if getattr(method, "__isabstractmethod__", False) else ""


def _cell(value: Any) -> str:
    return str(sorted(value) if isinstance(value, frozenset) else value)


def _code(text: str) -> str:
    return text.replace("``", "`").replace("|", "\\|")


def _prose(docstring: str) -> list[str]:
    """Turn a docstring into Markdown: its sections become lists."""
    lines: list[str] = []
    section = ""
    for line in _code(docstring).splitlines():
        heading = re.fullmatch(r"(Args|Returns|Raises):", line)
        if heading is not None:
            section = {"Args": "Arguments", "Returns": "Returns", "Raises": "Raises"}[heading[1]]
            lines += [f"{section}:", ""]
        elif not section:
            lines.append(line)
        elif re.match(r"    \w+: ", line) and section != "Returns":
            name, _, text = line.strip().partition(": ")
            lines.append(f"- `{name}`: {text}")
        elif section == "Returns" and re.match(r"    \S", line) and lines[-1] == "":
            lines.append(f"- {line.strip()}")
        else:
            lines.append(f"  {line.strip()}" if line.strip() else "")
    return [line.rstrip() for line in lines]
