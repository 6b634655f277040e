"""The kit in a plugin's own tests: two lines, one test for each rule."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fabric_core.conformance.bench import Bench
from fabric_core.conformance.report import Report, check_expected
from fabric_core.conformance.rule import Rule
from fabric_core.conformance.rules import RULES_BY_ID, rules_for
from fabric_core.conformance.runner import Outcome, Verdict, judge
from fabric_core.conformance.subject import Subject
from fabric_core.contracts import Plugin

__all__ = ["replay", "suite"]


def suite(
    kind: str,
    plugin: str | type[Plugin],
    *,
    world_sizes: Sequence[int] = (1, 2),
    options: Mapping[str, Any] | None = None,
    xfail: Mapping[str, str] | None = None,
    device: str | None = None,
    seed: int | None = None,
    report: str | Path | None = None,
) -> Callable[..., None]:
    """Make a pytest test of a plugin, with one case for each rule of its kind.

    Write ``test_rules = suite("strategy", "my_strategy")`` into a test file.

    Args:
        kind: The plugin's kind.
        plugin: Its name, ``module:Class``, or the class itself.
        world_sizes: The numbers of processes to check on.
        options: The options to make it with.
        xfail: Rules that it is known to break, with the reasons; one of them that is kept fails.
        device: The name of the accelerator to run on; the CPU by default.
        seed: The seed of the examples; the same ones always by default.
        report: Where to write the JSON report, when all rules were judged; Markdown and badge lie beside it.

    Raises:
        RequestError: There is no such kind, or ``xfail`` names no rule or gives no reason.
    """
    import pytest

    rules = rules_for(kind)
    expected = check_expected(xfail or {}, rules)
    session = _Session(kind, plugin, options, expected, tuple(world_sizes), device, seed, report)

    def test_rules(rule: Rule, request: pytest.FixtureRequest) -> None:
        """The plugin keeps the rule."""
        session.test(rule, request)

    marked: Callable[..., None] = pytest.mark.parametrize("rule", rules, ids=lambda rule: rule.id)(test_rules)
    return marked


@dataclass
class _Session:
    """One plugin's tests: they share the ranks, and end with the report."""

    kind: str
    plugin: str | type[Plugin]
    options: Mapping[str, Any] | None
    expected: Mapping[str, str]
    world_sizes: Sequence[int]
    device: str | None
    seed: int | None
    report: str | Path | None
    bench: Bench | None = None
    verdicts: list[Verdict] = field(default_factory=list)

    def test(self, rule: Rule, request: Any) -> None:
        import pytest

        if self.bench is None:
            self.bench = Bench(Subject.of(self.kind, self.plugin, self.options), device=self.device)
            request.node.getparent(pytest.Module).addfinalizer(self.finish)
        verdict = judge(rule, self.bench, world_sizes=self.world_sizes, seed=self.seed)
        self.verdicts.append(verdict)
        if verdict.outcome in {Outcome.SKIPPED, Outcome.UNTESTED}:
            pytest.skip(verdict.message)
        if verdict.failed and rule.id in self.expected:
            pytest.xfail(self.expected[rule.id])
        if verdict.failed:
            pytest.fail(verdict.message, pytrace=False)
        if rule.id in self.expected:
            pytest.fail(f"{rule.id} is kept: take it out of xfail ({self.expected[rule.id]})", pytrace=False)

    def finish(self) -> None:
        bench = self.bench
        if bench is None:
            raise AssertionError("there is a bench once there was a test")
        bench.close()
        self.bench = None
        if self.report is not None:
            report = Report(bench.subject, self.verdicts, self.expected, self.world_sizes, self.device, self.seed)
            report.write(Path(self.report))


def replay(
    kind: str,
    plugin: str | type[Plugin],
    rule: str,
    example: Any,
    *,
    world_size: int = 1,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Check one rule on one example again, as a failure's snippet does; raises what the check raises.

    Raises:
        Broken: The rule isn't kept.
    """
    check = RULES_BY_ID[rule].check
    if check is None:
        raise AssertionError(f"{rule} can't be checked")
    bench = Bench(Subject.of(kind, plugin, options))
    bench.world_size = world_size
    try:
        check(bench, example)
    finally:
        bench.close()
