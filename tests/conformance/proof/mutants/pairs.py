"""Two mutants in one: ``strategy__Summing__Deaf`` is a class made of both, when it is asked for."""

from typing import Any

from proof.mutants import accelerator, precision, strategy

__all__: list[str] = []


def __getattr__(name: str) -> Any:
    kind, _, names = name.partition("__")
    home = {"accelerator": accelerator, "precision": precision, "strategy": strategy}.get(kind)
    if home is None:
        raise AttributeError(name)
    bases = tuple(getattr(home, one) for one in names.split("__"))
    pair = type(name, bases, {"__module__": __name__, "__doc__": "Two mutants in one."})
    globals()[name] = pair
    return pair
