"""``fabric.call`` calls what callbacks have, with what they take."""

from functools import partial
from typing import Any

import pytest

from fabric_core import Fabric


class All:
    def __init__(self) -> None:
        self.got: list[Any] = []

    def on_step(self, *args: Any, **kwargs: Any) -> None:
        self.got.append((args, kwargs))


class Some(All):
    def on_step(self, loss: Any, *, step: int = 0) -> None:
        self.got.append((loss, step))


class Nothing(All):
    def on_step(self) -> None:
        self.got.append(())


class Lacking:
    pass


class ByPosition(All):
    def on_step(self, loss: Any, /) -> None:
        self.got.append(loss)


def test_each_gets_the_keywords_that_it_takes(in_memory: dict[str, Any]) -> None:
    """Keywords that a method lacks are left out; who has no such method is skipped; positions are everyone's."""
    everything, some, nothing = All(), Some(), Nothing()
    fabric = Fabric(**in_memory, callbacks=[everything, Lacking(), some, nothing])
    fabric.call("on_step", loss=1, step=2, model=None)
    assert everything.got == [((), {"loss": 1, "step": 2, "model": None})]
    assert some.got == [(1, 2)]
    assert nothing.got == [()]
    fabric.call("on_other", 1)
    with pytest.raises(TypeError):
        fabric.call("on_step", 1)  # Nothing takes no position


def test_what_is_taken_by_position_alone_is_no_keyword(in_memory: dict[str, Any]) -> None:
    """A method's positional-only argument comes by position; a keyword of that name isn't its."""
    by_position = ByPosition()
    fabric = Fabric(**in_memory, callbacks=by_position)
    fabric.call("on_step", 3, loss=4)
    assert by_position.got == [3]


def test_anything_that_can_be_called_is_a_method(in_memory: dict[str, Any]) -> None:
    """Attributes that are functions, partial ones and builtins too; what can't be called is an error."""
    got: list[Any] = []
    callback = Lacking()
    callback.on_step = partial(lambda into, loss: into.append(loss), got)  # type: ignore[attr-defined]
    callback.on_end = got.append  # type: ignore[attr-defined]
    callback.number = 3  # type: ignore[attr-defined]
    fabric = Fabric(**in_memory, callbacks=[callback])
    fabric.call("on_step", loss=1, other=2)
    fabric.call("on_end", 5)
    assert got == [1, 5]
    with pytest.raises(TypeError, match="number can't be called"):
        fabric.call("number")
