"""Two mutants in one: ``Summing__Deaf`` is a class made of both, when it is asked for."""

from typing import Any

from fabric_core.conformance.mutants import accelerator, precision, strategy

__all__: list[str] = []


def __getattr__(name: str) -> Any:
    first, separator, second = name.partition("__")
    for home in (accelerator, precision, strategy):
        one, other = getattr(home, first, None), getattr(home, second, None)
        if separator and isinstance(one, type) and isinstance(other, type):
            pair = type(name, (one, other), {"__module__": __name__, "__doc__": "Two mutants in one."})
            globals()[name] = pair
            return pair
    raise AttributeError(name)
