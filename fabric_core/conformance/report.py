"""The report: JSON with a published schema, Markdown for people, and a badge."""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import torch

from fabric_core.conformance.rule import Level, Rule
from fabric_core.conformance.runner import Outcome, Verdict
from fabric_core.conformance.subject import Subject
from fabric_core.contracts import API_VERSION

__all__ = ["SCHEMA", "Report", "profile_of"]

_PROFILES: Final = ("Core", "Distributed", "Sharded")


@dataclass(frozen=True)
class Report:
    """How a plugin went, rule by rule.

    Args:
        subject: The plugin.
        verdicts: How each rule went.
        expected: The rules that its author says it breaks, with the reasons.
        world_sizes: The numbers of processes that were asked for.
        device: The accelerator that it ran on.
        seed: The seed of the examples; ``None`` is the fixed choice.
        versions: What it ran with.
    """

    subject: Subject
    verdicts: Sequence[Verdict]
    expected: Mapping[str, str] = field(default_factory=dict)
    world_sizes: Sequence[int] = (1, 2)
    device: str | None = None
    seed: int | None = None
    versions: Mapping[str, str] = field(
        default_factory=lambda: _versions()  # noqa: PLW0108 - defined below
    )

    def status(self, verdict: Verdict) -> str:
        """Say how a rule counts: as its outcome, or ``"expected"`` or ``"unexpectedly kept"`` where it is in xfail."""
        if verdict.rule in self.expected:
            if verdict.failed:
                return "expected"
            if verdict.outcome == Outcome.KEPT:
                return "unexpectedly kept"
        return str(verdict.outcome)

    @property
    def failures(self) -> list[Verdict]:
        """The rules that are broken and not expected to be, or expected to be and kept."""
        return [one for one in self.verdicts if self.status(one) in {"broken", "hangs", "unexpectedly kept"}]

    @property
    def passed(self) -> bool:
        """Whether a rule was checked, and there is no failure."""
        return not self.failures and any(_was_checked(one) for one in self.verdicts)

    @property
    def complete(self) -> bool:
        """Whether every rule of the kind was judged."""
        from fabric_core.conformance.rules import rules_for

        return {one.rule for one in self.verdicts} == {rule.id for rule in rules_for(self.subject.kind)}

    def profiles(self) -> dict[str, bool]:
        """Say for each profile whether every rule of it is kept, those in xfail not excused.

        A profile is left out of which no rule of the plugin's own kind was checked; a report that isn't complete has
        none.
        """
        from fabric_core.conformance.rules import RULES_BY_ID

        if not self.complete:
            return {}
        checked = [(RULES_BY_ID[one.rule], one) for one in self.verdicts if _was_checked(one)]
        own = {profile_of(rule) for rule, _ in checked if rule.kind != "any"}
        broken = {profile_of(rule) for rule, one in checked if one.failed and rule.level != Level.SHOULD}
        return {name: name not in broken for name in _PROFILES if name in own}

    @property
    def summary(self) -> str:
        """Say in a few words how it went."""
        from fabric_core.conformance.rules import rules_for

        if self.failures:
            return "breaks the contract"
        if not self.complete:
            return f"judged by {len(self.verdicts)} of {len(rules_for(self.subject.kind))} rules"
        if not self.profiles():
            return "could not be checked here"
        return "keeps the contract" if all(self.profiles().values()) else "breaks the contract where it says so"

    def as_dict(self) -> dict[str, Any]:
        """Give the report as JSON data, as ``SCHEMA`` describes it."""
        counts: dict[str, int] = {}
        for verdict in self.verdicts:
            status = self.status(verdict)
            counts[status] = counts.get(status, 0) + 1
        return {
            "plugin": {
                **{name: getattr(self.subject, name) for name in ("kind", "name", "value", "distribution", "version")},
                "options": {name: repr(value) for name, value in self.subject.options.items()},
            },
            "contract": API_VERSION,
            "versions": dict(self.versions),
            "device": self.device or "the kit's own accelerator",
            "world_sizes": list(self.world_sizes),
            "seed": self.seed,
            "passed": self.passed,
            "complete": self.complete,
            "profiles": self.profiles(),
            "counts": counts,
            "expected": dict(self.expected),
            "rules": [
                {**asdict(verdict), "outcome": str(verdict.outcome), "status": self.status(verdict),
                 "seconds": round(verdict.seconds, 3)}
                for verdict in self.verdicts
            ],
        }  # fmt: skip

    def badge(self) -> dict[str, Any]:
        """Give the badge, as shields.io's endpoint badge reads it."""
        profiles = self.profiles()
        kept = " + ".join(name for name, whole in profiles.items() if whole)
        if self.failures:
            message, color = f"{len(self.failures)} rules broken", "red"
        elif not profiles:
            message, color = self.summary, "lightgrey"
        else:
            message, color = kept or self.summary, "brightgreen" if all(profiles.values()) else "yellow"
        return {"schemaVersion": 1, "label": "fabric contract", "message": message, "color": color}

    def markdown(self) -> str:
        """Give the report for people."""
        from fabric_core.conformance.rules import RULES_BY_ID

        data = self.as_dict()
        named = f"{self.subject.kind} `{self.subject.name}`"
        lines = [
            f"# {named[0].upper()}{named[1:]}: {self.summary}",
            "",
            f"{self.subject.distribution or self.subject.value} {self.subject.version}".strip()
            + f", contract {API_VERSION}, on {data['device']}, with "
            + ", ".join(f"{name} {number}" for name, number in self.versions.items())
            + ".",
            "",
            ", ".join(f"{count} {status}" for status, count in sorted(data["counts"].items())) + ".",
            "",
            *(f"- Profile {name}: {'kept' if whole else 'broken'}" for name, whole in self.profiles().items()),
            "",
            "| rule | level | status | sentence |",
            "|---|---|---|---|",
        ]
        for verdict in self.verdicts:
            rule = RULES_BY_ID[verdict.rule]
            lines.append(f"| {rule.id} | {rule.level} | {self.status(verdict)} | {rule.sentence} |")
        for verdict in self.failures:
            lines += ["", f"## {verdict.rule}", "", "```text", verdict.message or "expected to fail, and kept", "```"]
        return "\n".join(lines) + "\n"

    def write(self, path: Path) -> None:
        """Write the JSON report, and beside it the Markdown (``.md``) and the badge (``.badge.json``)."""
        path.write_text(json.dumps(self.as_dict(), indent=2) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(self.markdown(), encoding="utf-8")
        path.with_suffix(".badge.json").write_text(json.dumps(self.badge()) + "\n", encoding="utf-8")


def _was_checked(verdict: Verdict) -> bool:
    return verdict.outcome not in {Outcome.SKIPPED, Outcome.UNTESTED}


def profile_of(rule: Rule) -> str:
    """Name the profile that a rule belongs to."""
    if "sharded" in rule.needs:
        return "Sharded"
    return "Core" if 1 in rule.world_sizes else "Distributed"


def _versions() -> dict[str, str]:
    try:
        core = version("fabric-registry")
    except PackageNotFoundError:
        core = "unknown"
    return {"fabric-registry": core, "torch": torch.__version__, "python": platform.python_version()}


_TEXT: Final = {"type": "string"}
_NUMBER: Final = {"type": "number"}

SCHEMA: Final[Mapping[str, Any]] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "A conformance report",
    "type": "object",
    "required": ["plugin", "contract", "versions", "device", "world_sizes", "seed", "passed", "complete", "profiles",
                 "counts", "expected", "rules"],
    "additionalProperties": False,
    "properties": {
        "plugin": {
            "type": "object",
            "required": ["kind", "name", "value", "distribution", "version", "options"],
            "additionalProperties": False,
            "properties": {
                **dict.fromkeys(("kind", "name", "value", "distribution", "version"), _TEXT),
                "options": {"type": "object", "additionalProperties": _TEXT},
            },
        },
        "contract": {"type": "integer"},
        "versions": {"type": "object", "additionalProperties": _TEXT},
        "device": _TEXT,
        "world_sizes": {"type": "array", "items": {"type": "integer"}},
        "seed": {"type": ["integer", "null"]},
        "passed": {"type": "boolean"},
        "complete": {"type": "boolean"},
        "profiles": {"type": "object", "additionalProperties": {"type": "boolean"}},
        "counts": {"type": "object", "additionalProperties": {"type": "integer"}},
        "expected": {"type": "object", "additionalProperties": _TEXT},
        "rules": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["rule", "outcome", "status", "message", "world_size", "example", "seconds"],
                "additionalProperties": False,
                "properties": {
                    **dict.fromkeys(("rule", "outcome", "status", "message"), _TEXT),
                    "world_size": {"type": "integer"},
                    "example": {"type": ["string", "null"]},
                    "seconds": _NUMBER,
                },
            },
        },
    },
}  # fmt: skip
"""The JSON schema of the report."""
