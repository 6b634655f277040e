"""The built-in plugins keep every rule of their kind."""

from fabric_core.conformance import suite

test_cpu = suite("accelerator", "cpu")
test_32_true = suite("precision", "32-true")
test_64_true = suite("precision", "64-true")
test_16_true = suite("precision", "16-true")
test_bf16_true = suite("precision", "bf16-true")
test_16_mixed = suite("precision", "16-mixed")
test_bf16_mixed = suite("precision", "bf16-mixed")
test_single_device = suite("strategy", "single_device")
test_ddp = suite("strategy", "ddp")
test_fsdp = suite("strategy", "fsdp")
