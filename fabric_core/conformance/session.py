"""One run of the kit: what is asked is checked first, the rules share the ranks, and a report ends it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from fabric_core.choosing.parsing import parse_plugin
from fabric_core.choosing.registry import Registry
from fabric_core.conformance.bench import Bench
from fabric_core.conformance.pool import RankPool
from fabric_core.conformance.report import Report
from fabric_core.conformance.rule import Level, Rule
from fabric_core.conformance.rules import RULES, rules_for
from fabric_core.conformance.runner import Outcome, Verdict, judge, why_not
from fabric_core.conformance.subject import Subject
from fabric_core.errors import RequestError

__all__ = ["Session", "run_rules"]


class Session:
    """Judges one plugin by rules of its kind, one after the other.

    Args:
        subject: The plugin.
        world_sizes: The numbers of processes.
        device: The name of the accelerator to run on; ``None`` is the kit's own, the CPU.
        expected: Rules that it is known to break, with the reasons.
        only: The ids of the rules to judge by; ``None`` is all.
        seed: The seed of the examples; ``None`` draws the same ones always.
        report: Where to write the report once all these rules were judged.
        shrink: Look for a smaller example where one fails.
        timeout: How many seconds one measurement may take.
        pools: Ranks by their number that other sessions use too, and that whoever made them ends.

    Raises:
        RequestError: A rule, a number of processes, the device, ``expected`` or ``report`` can't be as asked.
        UnknownPluginError: Nobody offers the device.
    """

    def __init__(
        self,
        subject: Subject,
        *,
        world_sizes: Sequence[int] = (1, 2),
        device: str | None = None,
        expected: Mapping[str, str] | None = None,
        only: Sequence[str] | None = None,
        seed: int | None = None,
        report: str | Path | None = None,
        shrink: bool = True,
        timeout: float = 20.0,
        pools: dict[int, RankPool] | None = None,
    ) -> None:
        self.subject = subject
        self.rules = _chosen(subject.kind, only)
        self.expected = _checked_expected(expected or {}, subject.kind)
        self.bench = Bench(subject, device=device, timeout=timeout, pools=pools)
        self._verdicts: dict[str, Verdict] = {}
        self._causes: dict[str, str] = {}
        self._world_sizes = _checked_sizes(world_sizes, subject.kind)
        self._seed = seed
        self._report = None if report is None else _checked_path(Path(report))
        self._shrink = shrink
        if device is not None:
            _check_device(device, subject.kind)

    def judge(self, rule: Rule) -> Verdict:
        """Judge by one rule; the last one ends the ranks, and writes the report.

        Raises:
            RequestError: The rule is in ``expected``, and does not apply to a plugin that declares what this one does.
        """
        if self._report is not None and not self._verdicts:
            _make_folder(self._report)
        verdict = judge(rule, self.bench, world_sizes=self._world_sizes, seed=self._seed, shrink=self._shrink)
        if rule.id in self.expected and verdict.outcome == Outcome.SKIPPED:
            stale = why_not(rule, self.bench.declared)
            if stale is not None:
                raise RequestError(f"{rule.id} can't be broken: {stale}", where=f"xfail[{rule.id!r}]",
                                   instead="take it out of xfail")  # fmt: skip
        verdict = self._told_once(verdict)
        self._verdicts[rule.id] = verdict
        if len(self._verdicts) == len(self.rules):
            self.close()
            if self._report is not None:
                self.report().write(self._report)
        return verdict

    def _told_once(self, verdict: Verdict) -> Verdict:
        """Tell one cause once: of a rule that is broken by the error that broke an earlier one, only say so."""
        cause = _cause(verdict.message) if verdict.failed else None
        if cause is None:
            return verdict
        first = self._causes.setdefault(cause, verdict.rule)
        if first == verdict.rule:
            return verdict
        head = verdict.message.partition("\n")[0]
        return replace(verdict, message=f"{head}\n  seen: the error that breaks {first} too; see there")

    def report(self) -> Report:
        """Give the report of what was judged."""
        verdicts = list(self._verdicts.values())
        return Report(self.subject, verdicts, self.expected, self._world_sizes, self.bench.device, self._seed)

    def close(self) -> None:
        """End the ranks."""
        self.bench.close()


def run_rules(
    subject: Subject,
    *,
    world_sizes: Sequence[int] = (1, 2),
    device: str | None = None,
    expected: Mapping[str, str] | None = None,
    only: Sequence[str] | None = None,
    seed: int | None = None,
    report: str | Path | None = None,
    shrink: bool = True,
    timeout: float = 20.0,
    pools: dict[int, RankPool] | None = None,
    progress: Callable[[Verdict, int, int], None] | None = None,
) -> Report:
    """Judge a plugin by every rule of its kind; gives the report.

    Takes what ``Session`` takes, and ``progress``, which is called after each rule with its verdict, how many were
    judged, and how many there are.
    """
    session = Session(
        subject,
        world_sizes=world_sizes,
        device=device,
        expected=expected,
        only=only,
        seed=seed,
        report=report,
        shrink=shrink,
        timeout=timeout,
        pools=pools,
    )
    try:
        for count, rule in enumerate(session.rules, 1):
            verdict = session.judge(rule)
            if progress is not None:
                progress(verdict, count, len(session.rules))
    finally:
        session.close()
    return session.report()


def _cause(message: str) -> str | None:
    """Give the last line of the error that a message shows, with where it was raised; ``None`` where it shows none."""
    _, there, trace = message.partition("Traceback (most recent call last):")
    if not there:
        return None
    lines = trace.partition("\n  instead: ")[0].strip().splitlines()
    places = [index for index, line in enumerate(lines) if line.startswith('  File "')]
    return "\n".join(lines[places[-1] :]) if places else None


def _chosen(kind: str, only: Sequence[str] | None) -> tuple[Rule, ...]:
    rules = rules_for(kind)
    if only is None:
        return rules
    unknown = sorted(set(only) - {rule.id for rule in rules})
    if unknown or not only:
        raise RequestError(f"there is no such rule for a plugin of the kind {kind}", where="rule",
                           got=", ".join(unknown) or "none", instead=_named(kind))  # fmt: skip
    return tuple(rule for rule in rules if rule.id in only)


def _named(kind: str) -> str:
    rules = [rule.id for rule in rules_for(kind)]
    own = [rule.id for rule in RULES if rule.kind == kind]
    return f"one of {rules[0]} to {rules[-len(own) - 1]}, {own[0]} to {own[-1]}"


def _checked_expected(expected: Mapping[str, str], kind: str) -> dict[str, str]:
    known = {rule.id: rule for rule in rules_for(kind)}
    for name, reason in expected.items():
        if name not in known:
            raise RequestError("xfail names no rule of this kind", where="xfail", got=name, instead=_named(kind))
        if known[name].level == Level.UNTESTED:
            raise RequestError("xfail names a rule that the kit doesn't check", where="xfail", got=name,
                               instead="take it out of xfail")  # fmt: skip
        if not reason.strip():
            raise RequestError("xfail gives no reason", where=f"xfail[{name!r}]",
                               instead="say why, best with a link to the issue")  # fmt: skip
    return dict(expected)


def _checked_sizes(world_sizes: Sequence[int], kind: str) -> tuple[int, ...]:
    every = {size for rule in RULES for size in rule.world_sizes}
    own = {size for rule in RULES if rule.kind == kind for size in rule.world_sizes}
    if not set(world_sizes) & own or not set(world_sizes) <= every:
        raise RequestError(f"no rule of the kind {kind} is for this number of processes", where="world_sizes",
                           got=", ".join(map(str, world_sizes)) or "none",
                           instead=" or ".join(map(str, sorted(own))))  # fmt: skip
    return tuple(world_sizes)


def _check_device(device: str, kind: str) -> None:
    if kind == "accelerator":
        raise RequestError("an accelerator runs on its own devices", where="device", got=device,
                           instead="no device")  # fmt: skip
    named = parse_plugin(device, "device")
    Registry().find("accelerator", named.name, named.distribution)


def _checked_path(path: Path) -> Path:
    if path.suffix != ".json":
        raise RequestError("the report is JSON, with Markdown and a badge beside it", where="report", got=str(path),
                           instead=str(path.with_suffix(".json")))  # fmt: skip
    return path


def _make_folder(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError("there can be no report", where="report", got=f"{path}: {error}",
                           instead="a file in a folder that can be written to") from error  # fmt: skip
