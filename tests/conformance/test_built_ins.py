"""The built-in plugins keep every rule of their kind."""

from typing import Any

import pytest

from fabric_core.conformance import suite

pytestmark = pytest.mark.sampled(0.2)


def leave_whole(_module: Any, _mesh: Any) -> None:
    """Spread nothing: over one rank of tensor parallelism there is nothing to spread."""


test_cpu = suite("accelerator", "cpu")
test_cuda = suite("accelerator", "cuda")
test_torch = suite("accelerator", "torch")
test_torch_on_cpu = suite("accelerator", "torch", options={"device_type": "cpu"})
test_mps = suite("accelerator", "mps")
test_xpu = suite("accelerator", "xpu")
test_32_true = suite("precision", "32-true")
test_64_true = suite("precision", "64-true")
test_16_true = suite("precision", "16-true")
test_bf16_true = suite("precision", "bf16-true")
test_16_mixed = suite("precision", "16-mixed")
test_bf16_mixed = suite("precision", "bf16-mixed")
test_single_device = suite("strategy", "single_device")
test_ddp = suite("strategy", "ddp")
test_fsdp = suite("strategy", "fsdp")
test_model_parallel = suite(
    "strategy",
    "model_parallel",
    options={"parallelize_fn": "tests.conformance.test_built_ins:leave_whole", "tensor_parallel_size": 1},
)
test_compile = suite("wrapper", "compile", options={"backend": "eager"})
test_compile_blocks = suite("wrapper", "compile_blocks", options={"backend": "eager", "blocks": ["Linear"]})
test_activation_checkpointing = suite(
    "wrapper",
    "activation_checkpointing",
    options={"blocks": ["Linear"]},
    xfail={"WRA-408": "PyTorch's own checkpointing puts closures into the module as hooks, which don't pickle"},
)
test_channels_last = suite("wrapper", "channels_last")
test_elastic = suite("launcher", "elastic")
test_environment = suite("launcher", "environment")
test_lsf = suite("launcher", "lsf")
test_mpi = suite("launcher", "mpi")
test_slurm = suite("launcher", "slurm")
test_single_file = suite("checkpoint", "single_file")
test_safetensors = suite("checkpoint", "safetensors")
test_distributed = suite("checkpoint", "distributed")
test_csv = suite("logger", "csv")
test_jsonl = suite("logger", "jsonl")
test_tensorboard = suite("logger", "tensorboard")
