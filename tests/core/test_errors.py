"""Errors say what, where, what was got and what to write instead, and travel between processes."""

import builtins
import inspect
import pickle
import re

import pytest

from fabric_core import errors

_CLASSES = [
    value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, errors.FabricError)
]


@pytest.mark.parametrize("cls", _CLASSES, ids=lambda cls: cls.__name__)
def test_error_travels_with_its_fields(cls: type[errors.FabricError]) -> None:
    """Pickling keeps the message and the fields."""
    error = cls("it failed", where="here", got=3, instead="write 4", rank=1)
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own
    assert type(again) is cls
    assert str(again) == str(error) == "it failed\n  where:   here\n  got:     3\n  instead: write 4"
    assert again.fields == {"rank": 1}
    assert vars(again)["rank"] == 1


def test_tree_in_the_docstring_is_the_tree() -> None:
    """The docstring draws every class, under its parent, with the builtin that it also is."""
    drawn = re.findall(r"^[│├└─ ]*(\w+Error)(?: \((\w+)\))?(?: |$)", errors.__doc__ or "", re.MULTILINE)
    assert {name for name, _ in drawn} == {cls.__name__ for cls in _CLASSES}
    for name, builtin in drawn:
        if builtin:
            assert issubclass(getattr(errors, name), getattr(builtins, builtin))
