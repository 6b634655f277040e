"""Rules for precisions: what the policy says, and whether a model computes so."""

import contextlib
from typing import Final

import torch

from fabric_core.conformance.bench import Bench
from fabric_core.conformance.rule import Broken, Table
from fabric_core.conformance.rules.precision.measures import DTYPES, forward
from fabric_core.contracts import PrecisionPolicy

TABLE: Final = Table("precision")


@TABLE.rule(
    "PRE-201",
    "Its policy is the same whenever it is asked.",
    reason="A strategy reads it once, at setup; the plan shows it.",
    advice="return one constant PrecisionPolicy, made from the options alone",
)
def _policy_is_constant(bench: Bench) -> None:
    plugin = bench.plugin()
    first = plugin.policy
    with contextlib.ExitStack() as stack:
        context = plugin.forward_context("cpu")
        if context is not None:
            stack.enter_context(context)
        if plugin.policy != first or bench.plugin().policy != first:
            raise Broken(f"first {first}, then {plugin.policy}")


@TABLE.rule(
    "PRE-202",
    "The types of its policy are floating-point types or None.",
    reason="Parameters, products and gradients are real numbers.",
    advice="give torch.dtype objects, not their names",
)
def _policy_types(bench: Bench) -> None:
    policy = bench.plugin().policy
    if not isinstance(policy, PrecisionPolicy):
        raise Broken(f"policy is a {type(policy).__name__}")
    for name in DTYPES:
        value = getattr(policy, name)
        if value is not None and not (isinstance(value, torch.dtype) and value.is_floating_point):
            raise Broken(f"{name} is {value!r}")


def _inside(policy: PrecisionPolicy) -> torch.dtype:
    return policy.compute_dtype or policy.param_dtype or torch.float32


@TABLE.rule(
    "PRE-213",
    "Inside the model a matrix product comes out in compute_dtype, or in the parameters' type where there is none.",
    reason="The policy is what a sharding strategy carries out; without one the acts must do the same.",
    advice="let forward_context and convert_module do what compute_dtype says, and say there what they do",
)
def _computes(bench: Bench) -> None:
    expected = _inside(bench.plugin().policy)
    seen = bench.run(forward, False)[0]["inside"]
    if seen != expected:
        raise Broken(f"a linear layer gives {seen}, and the policy means {expected}")


@TABLE.rule(
    "PRE-214",
    "What the model returns has the type output_dtype, or the type that it was computed in where there is none.",
    reason="A loss in 16 bits loses what the parameters keep.",
    advice="set output_dtype, or leave convert_output as the contract has it",
)
def _returns(bench: Bench) -> None:
    policy = bench.plugin().policy
    seen = bench.run(forward, False)[0]
    # A product with a buffer promotes to the wider of two types.
    if seen["out"] not in {policy.output_dtype or seen["inside"], policy.output_dtype or torch.float32}:
        raise Broken(f"it has {seen['out']}, and the policy means {policy.output_dtype or seen['inside']}")


TABLE.untested(
    "PRE-236",
    "On every device type that it declares, matrix products run on the hardware's units for its types.",
    reason="Speed depends on the machine; the kit measures what is computed, not how fast.",
    advice="profile one step on that hardware",
)
