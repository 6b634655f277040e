"""Rules for precisions: how batches are converted."""

from typing import Any, Final

import torch

from fabric_core._torch import tree_flatten, tree_map_only
from fabric_core.conformance import cases
from fabric_core.conformance.bench import Bench, Place
from fabric_core.conformance.rule import Broken, Table

TABLE: Final = Table("precision")


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()


def _open(data: Any) -> Any:
    # The kit's dataclass is no registered container; the kit opens it itself.
    return tree_map_only(cases.Record, lambda one: {"value": _open(one.value), "label": one.label}, data)


def _conversion(bench: Bench, payload: cases.Payload, which: str) -> tuple[Any, Any, list[tuple[Any, Any]]]:
    data = payload.make()
    result = getattr(bench.plugin(), f"convert_{which}")(data)
    before, structure = tree_flatten(_open(data))
    after, again = tree_flatten(_open(result))
    if structure != again or type(result) is not type(data):
        raise Broken(f"{data!r} becomes {result!r}: another structure")
    return data, result, list(zip(before, after, strict=True))


def _check_floats(bench: Bench, payload: cases.Payload, which: str) -> None:
    dtype = getattr(bench.plugin().policy, f"{which}_dtype")
    _, _, leaves = _conversion(bench, payload, which)
    for before, after in leaves:
        if _is_float(before) and after.dtype != (dtype or before.dtype):
            raise Broken(f"a tensor of {before.dtype} becomes {after.dtype}, and the policy means {dtype}")


def _check_others(bench: Bench, payload: cases.Payload, which: str) -> None:
    _, _, leaves = _conversion(bench, payload, which)
    for before, after in leaves:
        if not _is_float(before) and after is not before:
            raise Broken(f"{before!r} becomes {after!r}")


def _check_same(bench: Bench, payload: cases.Payload, which: str) -> None:
    dtype = getattr(bench.plugin().policy, f"{which}_dtype")
    data, result, leaves = _conversion(bench, payload, which)
    if all(not _is_float(one) or one.dtype == (dtype or one.dtype) for one, _ in leaves) and result is not data:
        raise Broken(f"nothing in {data!r} had to change, and another object comes back")


@TABLE.rule(
    "PRE-207",
    "`convert_input` converts every floating-point tensor to the policy's input_dtype, however deep it lies.",
    reason="A batch may be a tuple, a dict, a dataclass; one that is left out fails in the first matrix product.",
    advice="use fabric_core.contracts.convert_tensors",
    examples=cases.payloads,
    count=40,
)
def _inputs(bench: Bench, payload: cases.Payload) -> None:
    _check_floats(bench, payload, "input")


@TABLE.rule(
    "PRE-208",
    "`convert_input` leaves integers, booleans, complex numbers and all that is no tensor alone.",
    reason="Token ids and masks are not quantities.",
    advice="convert where tensor.is_floating_point(), and nothing else",
    examples=cases.payloads,
    count=40,
)
def _other_inputs(bench: Bench, payload: cases.Payload) -> None:
    _check_others(bench, payload, "input")


@TABLE.rule(
    "PRE-209",
    "`convert_input` returns the very same object where nothing had to change.",
    reason="Copying every batch costs time, and breaks a batch that is compared by identity.",
    advice="use fabric_core.contracts.convert_tensors",
    examples=cases.payloads,
    count=40,
)
def _same_input(bench: Bench, payload: cases.Payload) -> None:
    _check_same(bench, payload, "input")


@TABLE.rule(
    "PRE-210",
    "`convert_output` converts every floating-point tensor to the policy's output_dtype, however deep it lies.",
    reason="The loss is computed from it, in the type that the policy promises.",
    advice="use fabric_core.contracts.convert_tensors",
    examples=cases.payloads,
    count=40,
)
def _outputs(bench: Bench, payload: cases.Payload) -> None:
    _check_floats(bench, payload, "output")


@TABLE.rule(
    "PRE-211",
    "`convert_output` leaves integers, booleans, complex numbers and all that is no tensor alone.",
    reason="Predicted classes are not quantities.",
    advice="convert where tensor.is_floating_point(), and nothing else",
    examples=cases.payloads,
    count=40,
)
def _other_outputs(bench: Bench, payload: cases.Payload) -> None:
    _check_others(bench, payload, "output")


@TABLE.rule(
    "PRE-212",
    "`convert_output` returns the very same object where nothing had to change.",
    reason="A model may return an object that its caller knows.",
    advice="use fabric_core.contracts.convert_tensors",
    examples=cases.payloads,
    count=40,
)
def _same_output(bench: Bench, payload: cases.Payload) -> None:
    _check_same(bench, payload, "output")


def _given(place: Place) -> list[str]:
    """Hand things over; name those that are others afterwards."""
    plugin, found = place.plugin(), []
    x = torch.ones(2, 3)
    batch = {"x": x, "more": [torch.zeros(1, dtype=torch.float64), (torch.tensor([1]), "text")]}
    before = repr(batch)
    plugin.convert_input(batch)
    plugin.convert_output(batch)
    if repr(batch) != before or batch["x"] is not x:
        found.append("a batch that was converted")
    plugin.scale_loss(torch.ones((), requires_grad=True))
    state = plugin.state_dict()
    before = repr(state)
    plugin.load_state_dict(state)
    if repr(state) != before:
        found.append("a state that was loaded")
    return found


@TABLE.rule(
    "PRE-237",
    "What it is given is as it was afterwards: batches that it converts, a state that it loads.",
    reason="A batch is cached by its loader, and a state is loaded into several.",
    advice="make new containers and tensors; take nothing out of what is given",
)
def _keeps_arguments(bench: Bench) -> None:
    found = bench.run(_given)[0]
    if found:
        raise Broken(f"changed: {', '.join(found)}")
