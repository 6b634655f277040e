"""The kit in a plugin's own tests: two lines, one test for each rule."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fabric_core.conformance.rule import Broken, Rule
from fabric_core.conformance.runner import Outcome, attempt
from fabric_core.conformance.session import Session
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
        RequestError: There is no such kind, rule or number of processes, ``xfail`` gives no reason, or ``report`` isn't
            named ``.json``.
        UnknownPluginError: Nobody offers the plugin, or the device.
    """
    import pytest

    session = Session(
        Subject.of(kind, plugin, options),
        world_sizes=world_sizes,
        device=device,
        expected=xfail,
        seed=seed,
        report=report,
    )

    def test_rules(rule: Rule, request: pytest.FixtureRequest) -> None:
        """The plugin keeps the rule."""
        # The session ends with its last rule; not all of them may have been chosen.
        module = request.node.getparent(pytest.Module)
        if module is not None:
            module.addfinalizer(session.close)
        verdict = session.judge(rule)
        reason = session.expected.get(rule.id)
        if verdict.outcome in {Outcome.SKIPPED, Outcome.UNTESTED}:
            pytest.skip(verdict.message)
        if verdict.failed and reason is not None:
            pytest.xfail(reason)
        if verdict.failed:
            pytest.fail(verdict.message, pytrace=False)
        if reason is not None:
            pytest.fail(f"{rule.id} is kept: take it out of xfail ({reason})", pytrace=False)

    marked: Callable[..., None] = pytest.mark.parametrize("rule", session.rules, ids=lambda rule: rule.id)(test_rules)
    return marked


def replay(
    kind: str,
    plugin: str | type[Plugin],
    rule: str,
    example: Any,
    *,
    world_size: int = 1,
    options: Mapping[str, Any] | None = None,
    device: str | None = None,
) -> None:
    """Check one rule on one example again, as a failure's snippet does.

    Raises:
        Broken: The rule isn't kept, or hangs.
        RequestError: There is no such rule.
    """
    session = Session(Subject.of(kind, plugin, options), world_sizes=(world_size,), device=device, only=[rule])
    session.bench.world_size = world_size
    try:
        failure = attempt(session.rules[0], session.bench, example)
    finally:
        session.close()
    if failure is not None:
        raise Broken(str(failure))
