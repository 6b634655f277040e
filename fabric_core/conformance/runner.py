"""Judges a plugin by a rule: draws examples, shrinks what fails, and turns a hang into a verdict."""

import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from fabric_core.conformance.bench import Bench
from fabric_core.conformance.pool import RankHang
from fabric_core.conformance.rule import Broken, Rule
from fabric_core.errors import NotInstalledError

__all__ = ["Outcome", "Verdict", "judge", "why_not"]

_SHRINKING: Final = 20.0
"""How many seconds are spent on making a failing example smaller."""


class Outcome(StrEnum):
    """How a rule went."""

    KEPT = "kept"
    BROKEN = "broken"
    HANGS = "hangs"
    SKIPPED = "skipped"
    UNTESTED = "untested"


@dataclass(frozen=True)
class Verdict:
    """How one rule went for one plugin.

    Args:
        rule: The rule's id.
        outcome: How it went.
        message: What was seen, or why it was not checked.
        world_size: The number of processes on which it went so; 0 where it was not checked.
        example: The smallest failing example, as an expression.
        seconds: How long it took.
    """

    rule: str
    outcome: Outcome
    message: str = ""
    world_size: int = 0
    example: str | None = None
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        """Whether the plugin breaks the rule."""
        return self.outcome in {Outcome.BROKEN, Outcome.HANGS}


class _Failed(Exception):  # noqa: N818 - the example did
    def __init__(self, message: str, example: Any = None) -> None:
        super().__init__(message)
        self.example = example


def why_not(rule: Rule, declared: dict[str, Any]) -> str | None:
    """Say why a rule says nothing about a plugin that declares this; ``None`` where it does."""
    for need in rule.needs:
        if not declared.get(need):
            if need == "available":
                return "it needs a device of the plugin's type, and none is here"
            return f"it says nothing without {need!r}, which the plugin doesn't declare"
    for lack in rule.lacks:
        if declared.get(lack):
            return f"it says nothing with {lack!r}, which the plugin declares"
    return None


def judge(
    rule: Rule, bench: Bench, *, world_sizes: Iterable[int] = (1, 2), seed: int | None = None, shrink: bool = True
) -> Verdict:
    """Judge a plugin by a rule, on every asked number of processes that both take.

    Args:
        rule: The rule.
        bench: The bench with the plugin.
        world_sizes: The numbers of processes.
        seed: The seed of the examples; ``None`` draws the same ones always.
        shrink: Look for a smaller example where one fails.
    """
    begin = time.perf_counter()
    if rule.check is None:
        return Verdict(rule.id, Outcome.UNTESTED, rule.reason)
    try:
        declared = bench.declared
    except Exception as error:  # noqa: BLE001 - what can't be made can't be asked
        if rule.needs or rule.lacks:
            return Verdict(rule.id, Outcome.SKIPPED, f"the plugin can't be made: {error!r}")
        declared = {}
    reason = why_not(rule, declared)
    sizes = [size for size in world_sizes if size in rule.world_sizes and _takes(declared, size)]
    if reason is None and not sizes:
        reason = f"it is for {_counts(rule.world_sizes)}, and asked and declared leave none of them"
    if reason is not None:
        return Verdict(rule.id, Outcome.SKIPPED, reason)
    for size in sizes:
        bench.world_size = size
        example = None
        try:
            _check(rule, bench, seed, shrink=shrink)
            continue
        except RankHang as error:
            outcome, detail = Outcome.HANGS, str(error)
        except _Failed as error:
            outcome, detail, example = Outcome.BROKEN, str(error), error.example
        message = rule.broken(detail, size)
        if example is not None:
            message += f"\n  again:\n{_snippet(rule, bench, size, example)}"
        shown = None if example is None else repr(example)
        return Verdict(rule.id, outcome, message, size, shown, time.perf_counter() - begin)
    return Verdict(rule.id, Outcome.KEPT, "", sizes[-1], None, time.perf_counter() - begin)


def _takes(declared: dict[str, Any], size: int) -> bool:
    fits: bool = declared.get("min_world_size", 1) <= size <= (declared.get("max_world_size") or size)
    return fits


def _counts(sizes: Iterable[int]) -> str:
    return " or ".join(map(str, sizes)) + " processes"


def _check(rule: Rule, bench: Bench, seed: int | None, *, shrink: bool) -> None:
    """Check a rule on one number of processes.

    Raises:
        _Failed: It isn't kept.
    """
    if rule.examples is not None:
        _search(rule, bench, rule.examples, seed, shrink=shrink)
        return
    failure = _fails(rule, bench)
    if failure is not None:
        raise _Failed(failure)


def _search(rule: Rule, bench: Bench, examples: Callable[[], Any], seed: int | None, *, shrink: bool) -> None:
    """Draw examples until one fails, and look for a smaller one.

    Raises:
        _Failed: One fails.
        NotInstalledError: Hypothesis is missing.
    """
    try:
        import hypothesis
    except ImportError as error:
        raise NotInstalledError(
            "the conformance kit draws its examples with Hypothesis, which isn't installed",
            where="fabric_core.conformance",
            instead='pip install "fabric-registry[conformance]"',
        ) from error
    known: dict[str, str | None] = {}
    deadline = float("inf")

    def attempt(example: Any) -> None:
        nonlocal deadline
        key = repr(example)
        if key not in known:
            # Shrinking tries many examples. Once its time is over, those not tried yet count as kept.
            if time.monotonic() > deadline:
                return
            known[key] = _fails(rule, bench, example)
        failure = known[key]
        if failure is not None:
            deadline = min(deadline, time.monotonic() + _SHRINKING)
            raise _Failed(failure, example)

    configured = hypothesis.settings(
        max_examples=rule.count,
        derandomize=seed is None,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate, *([hypothesis.Phase.shrink] if shrink else [])],
        report_multiple_bugs=False,
        print_blob=False,
        verbosity=hypothesis.Verbosity.quiet,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    test = configured(hypothesis.given(examples())(attempt))
    if seed is not None:
        test = hypothesis.seed(seed)(test)
    test()


def _fails(rule: Rule, bench: Bench, *example: Any) -> str | None:
    if rule.check is None:
        raise AssertionError("an untested rule has no check")
    try:
        rule.check(bench, *example)
    except Broken as broken:
        return str(broken)
    except Exception as error:  # noqa: BLE001 - the plugin ran in the driver, and may raise anything
        return f"{error!r}\n{traceback.format_exc()}"
    return None


def _snippet(rule: Rule, bench: Bench, size: int, example: Any) -> str:
    subject = bench.subject
    name = f"{subject.distribution}/{subject.name}" if subject.distribution else subject.value
    options = f", options={dict(subject.options)!r}" if subject.options else ""
    lines = [
        "from fabric_core.conformance import cases, replay",
        "",
        'if __name__ == "__main__":',
        f"    example = {_expression(example)}",
        f"    replay({subject.kind!r}, {name!r}, {rule.id!r}, example, world_size={size}{options})",
    ]
    return "\n".join(f"    {line}" for line in lines)


def _expression(example: Any) -> str:
    """Write an example as an expression; those of the kit's own types need their module's name."""
    text = repr(example)
    return f"cases.{text}" if type(example).__module__.endswith("conformance.cases") else text
