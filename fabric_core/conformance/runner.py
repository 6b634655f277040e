"""Judges a plugin by a rule: draws examples, shrinks what fails, and turns a hang into a verdict."""

import re
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from fabric_core.conformance.bench import Bench
from fabric_core.conformance.numbers import computing_in
from fabric_core.conformance.pool import RankHang
from fabric_core.conformance.rule import Broken, Rule
from fabric_core.errors import NotInstalledError

__all__ = ["Outcome", "Verdict", "attempt", "judge", "why_not"]

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


class _Failed(Exception):  # noqa: N818 - the rule did, on the example
    def __init__(self, outcome: Outcome, detail: str, *example: Any) -> None:
        super().__init__(detail)
        self.outcome = outcome
        self.example = example


def why_not(rule: Rule, declared: dict[str, Any]) -> str | None:
    """Say why a rule does not apply to a plugin that declares this; ``None`` where it does."""
    for need in rule.needs:
        if need != "available" and not declared.get(need):
            if need == "detects":
                return "it needs a job that the plugin's own system started, and the kit's are like torchrun's"
            return f"it does not apply without {need!r}, which the plugin doesn't declare"
    for lack in rule.lacks:
        if declared.get(lack):
            return f"it does not apply with {lack!r}, which the plugin declares"
    return None


def _not_here(rule: Rule, bench: Bench) -> str | None:
    """Say which hardware a rule lacks; ``None`` where it is here."""
    if rule.kind == "accelerator":
        missing = "available" in rule.needs and not bench.declared["available"]
        return "it needs a device of the plugin's type, and none is here" if missing else None
    if rule.kind == "any":
        return None
    if bench.device_type is None:
        return f"no device of {bench.device!r} is here"
    types = bench.declared.get("device_types")
    if types is None or bench.device_type in types:
        return None
    return f"the plugin is for {' and '.join(sorted(types))}: device={min(types)!r}"


def judge(
    rule: Rule, bench: Bench, *, world_sizes: Sequence[int] = (1, 2), seed: int | None = None, shrink: bool = True
) -> Verdict:
    """Judge a plugin by a rule, on every asked number of processes that both take.

    Args:
        rule: The rule.
        bench: The bench with the plugin.
        world_sizes: The numbers of processes; a rule for plugins of every kind has its own.
        seed: The seed of the examples; ``None`` draws the same ones always.
        shrink: Look for a smaller example where one fails.
    """
    begin = time.perf_counter()
    if rule.check is None:
        return Verdict(rule.id, Outcome.UNTESTED, rule.reason)
    # What binds every kind is about making the plugin, and starts no training.
    sizes = [size for size in rule.world_sizes if rule.kind == "any" or size in world_sizes]
    try:
        reason = why_not(rule, bench.declared) or _not_here(rule, bench)
        if rule.kind != "any":
            sizes = [size for size in sizes if _takes(bench.declared, size)]
    except RankHang as error:
        # Every rule would wait as long for the same.
        return Verdict(rule.id, Outcome.HANGS, rule.broken(f"making the plugin hangs: {error}", 1), 1)
    except Broken as error:
        first_line = str(error).partition("\n")[0]
        reason = f"the plugin can't be made: {first_line}" if rule.needs or rule.lacks else None
    if reason is None and not sizes:
        reason = f"it is for {_counts(rule.world_sizes)}, and asked and declared leave none of them"
    if reason is not None:
        return Verdict(rule.id, Outcome.SKIPPED, reason)
    for size in sizes:
        bench.world_size = size
        try:
            _check(rule, bench, seed, shrink=shrink)
        except _Failed as error:
            message, shown = rule.broken(str(error), size), None
            if error.example:
                message += f"\n  again:\n{_snippet(rule, bench, size, *error.example)}"
                shown = repr(*error.example)
            return Verdict(rule.id, error.outcome, message, size, shown, time.perf_counter() - begin)
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
    for example in rule.first:
        failure = attempt(rule, bench, example)
        if failure is not None:
            raise failure
    if rule.examples is not None:
        _search(rule, bench, rule.examples, seed, shrink=shrink)
        return
    failure = attempt(rule, bench)
    if failure is not None:
        raise failure


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
    known: dict[str, _Failed | None] = {}
    deadline = float("inf")

    def judge(example: Any) -> None:
        nonlocal deadline
        key = repr(example)
        if key not in known:
            # Shrinking tries many examples. Once its time is over, those not tried yet count as kept.
            if time.monotonic() > deadline:
                return
            known[key] = attempt(rule, bench, example)
        failure = known[key]
        if failure is not None:
            # Each smaller example that hangs too would take as long again.
            hangs = failure.outcome == Outcome.HANGS
            deadline = min(deadline, time.monotonic() + (0 if hangs else _SHRINKING))
            raise _Failed(failure.outcome, str(failure), example)

    configured = hypothesis.settings(
        max_examples=rule.count,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate, *([hypothesis.Phase.shrink] if shrink else [])],
        report_multiple_bugs=False,
        print_blob=False,
        verbosity=hypothesis.Verbosity.quiet,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    # Not `derandomize`, which draws others whenever a line of `judge` is changed.
    hypothesis.seed(seed or 0)(configured(hypothesis.given(examples())(judge)))()


def attempt(rule: Rule, bench: Bench, *example: Any) -> _Failed | None:
    """Check a rule once, on an example where it has any; give the failure."""
    if rule.check is None:
        raise AssertionError("an untested rule has no check")
    try:
        if rule.inside and bench.world_size == 1:
            bench.check(rule.check, *example)
        else:
            with computing_in(bench.widest):
                rule.check(bench, *example)
    except Broken as broken:
        return _Failed(Outcome.BROKEN, str(broken), *example)
    except RankHang as error:
        return _Failed(Outcome.HANGS, str(error), *example)
    except Exception as error:  # noqa: BLE001 - what the ranks sent may be of any shape
        return _Failed(Outcome.BROKEN, f"{error!r}\n{traceback.format_exc()}", *example)
    return None


def _snippet(rule: Rule, bench: Bench, size: int, example: Any) -> str:
    subject = bench.subject
    name = f"{subject.distribution}/{subject.name}" if subject.distribution else subject.value
    more = f", options={dict(subject.options)!r}" if subject.options else ""
    more += f", device={bench.device!r}" if bench.device else ""
    lines = [
        # What a number shows that isn't finite.
        *(["from math import inf, nan"] if re.search(r"\b(inf|nan)\b", repr(example)) else []),
        "from fabric_core.conformance import cases, replay",
        "",
        'if __name__ == "__main__":',
        f"    example = {_expression(example)}",
        f"    replay({subject.kind!r}, {name!r}, {rule.id!r}, example, world_size={size}{more})",
    ]
    return "\n".join(f"    {line}" for line in lines)


def _expression(example: Any) -> str:
    """Write an example as an expression; those of the kit's own types need their module's name."""
    text = repr(example)
    return f"cases.{text}" if type(example).__module__.endswith("conformance.cases") else text
