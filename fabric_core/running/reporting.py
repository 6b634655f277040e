"""What a script says of itself: metrics for loggers, calls of callbacks."""

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fabric_core.contracts import Logger
from fabric_core.errors import RequestError

__all__ = ["call", "finalize", "numbers"]


def numbers(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Give the numbers in tensors and arrays of one element; what else there is stays as it is, also in nested dicts.

    Raises:
        RequestError: A tensor or array has several elements, or none.
    """
    return {name: _number(value, name) for name, value in metrics.items()}


def _number(value: Any, name: str) -> Any:
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {key: _number(one, f"{name}.{key}") for key, one in value.items()}
    if isinstance(value, torch.Tensor):
        count, one = value.numel(), value.detach()
    elif callable(getattr(value, "item", None)) and hasattr(value, "dtype"):
        count, one = value.size, value
    else:
        return value
    if count != 1:
        raise RequestError(
            f"the metric {name!r} is not one number",
            where="fabric.log",
            got=f"a {type(value).__name__} of shape {tuple(value.shape)}",
            instead="one number, such as its mean(); or an entry for each",
        )
    return one.item()


def finalize(loggers: Sequence[Logger]) -> None:
    """Let loggers write out what they hold; one that raises keeps none of the others from it.

    They are told that the training failed while an exception is being handled, and when one ended the script.
    """
    ended_by_error = hasattr(sys, "last_value") and not hasattr(sys, "ps1")
    failed = ended_by_error or isinstance(sys.exception(), Exception | KeyboardInterrupt)
    first: Exception | None = None
    for logger in loggers:
        try:
            logger.finalize("failed" if failed else "success")
        except Exception as error:  # noqa: BLE001 - raised below, after the others
            first = first or error
    if first is not None:
        raise first


def call(callbacks: Sequence[Any], name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Call a method of every callback that has it, with the keywords that it takes.

    Raises:
        TypeError: A callback's attribute of that name can't be called.
    """
    for callback in callbacks:
        method = getattr(callback, name, None)
        if method is None:
            continue
        if not callable(method):
            raise TypeError(f"{type(callback).__name__}.{name} can't be called")
        method(*args, **_taken(method, kwargs))


def _taken(method: Callable[..., Any], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Give the keywords that a method takes."""
    if not kwargs:
        return kwargs
    try:
        parameters = inspect.signature(method).parameters.values()
    except (TypeError, ValueError):  # a builtin that doesn't tell
        return kwargs
    if any(one.kind is one.VAR_KEYWORD for one in parameters):
        return kwargs
    names = {one.name for one in parameters if one.kind in {one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY}}
    return {name: value for name, value in kwargs.items() if name in names}
