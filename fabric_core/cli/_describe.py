"""What a model's fields mean: the text that stands below each in the source."""

import ast
import inspect
import textwrap
from itertools import pairwise
from typing import Any

from pydantic import BaseModel

__all__ = ["field_type", "meanings"]


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
    """Show a type as one writes it."""
    shown = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    return shown.replace("typing.", "").replace("NoneType", "None")
