"""Rules."""

from fabric_core.conformance.rule import Table

LAUNCHER = Table("launcher")
CHECKPOINT = Table("checkpoint")
LOGGER = Table("logger")
