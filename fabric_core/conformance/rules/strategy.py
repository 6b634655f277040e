"""Rules."""

from fabric_core.conformance.rule import Table

TABLE = Table("strategy")
