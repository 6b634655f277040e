"""The built-in plugins keep every rule of their kind."""

from fabric_core.conformance import suite

test_cpu = suite("accelerator", "cpu")
test_full = suite("precision", "32-true")
test_bfloat16_mixed = suite("precision", "bf16-mixed")
