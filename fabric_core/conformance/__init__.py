"""The conformance kit: whether a plugin keeps the contract of its kind, rule by rule."""

from typing import TYPE_CHECKING

from fabric_core.lazy import lazy

if TYPE_CHECKING:
    from fabric_core.conformance.pool import RankPool
    from fabric_core.conformance.report import Report
    from fabric_core.conformance.session import run_rules
    from fabric_core.conformance.subject import Subject
    from fabric_core.conformance.wiring import replay, suite

__all__ = ["RankPool", "Report", "Subject", "replay", "run_rules", "suite"]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "RankPool": "pool",
        "Report": "report",
        "Subject": "subject",
        "replay": "wiring",
        "run_rules": "session",
        "suite": "wiring",
    },
)
