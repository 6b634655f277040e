"""True precisions make tensors in their type, in the thread that asked, and nowhere else."""

import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fabric_core import Fabric

TRUE = [("64-true", torch.float64), ("16-true", torch.float16), ("bf16-true", torch.bfloat16)]

MAKERS: list[Callable[[], Tensor]] = [
    lambda: torch.zeros(2),
    lambda: torch.ones((2, 3), dtype=None),
    lambda: torch.empty(2).fill_(1.5),
    lambda: torch.rand(3),
    lambda: torch.randn(3, generator=torch.Generator().manual_seed(1)),
    lambda: torch.eye(2),
    lambda: torch.linspace(0, 1, 5),
    lambda: torch.full((2,), 0.1),
    lambda: torch.full((2,), 1),
    lambda: torch.full((2,), fill_value=True),
    lambda: torch.arange(3),
    lambda: torch.arange(0, 1, 0.25),
    lambda: torch.arange(start=0.0, end=2),
    lambda: torch.tensor(0.1),
    lambda: torch.tensor([[1, 2.5], [3, True]]),
    lambda: torch.tensor([1, 2]),
    lambda: torch.tensor([]),
    lambda: torch.tensor([True]),
    lambda: torch.tensor(0.1, dtype=torch.float32),
    lambda: torch.tensor(np.array([0.5], np.float32)),
    lambda: torch.tensor([np.float32(0.5)]),
    lambda: torch.as_tensor(np.ones(2)),
    lambda: torch.as_tensor([0.1]),
    lambda: torch.asarray(0.1),
    lambda: torch.as_tensor(torch.ones(1, dtype=torch.float32)),
    lambda: torch.scalar_tensor(2),
    lambda: torch.randint(5, (2,)),
    lambda: torch.normal(0.0, 1.0, (3,)),
    lambda: torch.normal(mean=0.0, std=1, size=(3,)),
    lambda: torch.normal(mean=torch.zeros(2, dtype=torch.float32), std=1.0),
    lambda: torch.normal(mean=1.0, std=torch.ones(2, dtype=torch.float32)),
    lambda: torch.arange(start=0, end=2, step=0.5),
    lambda: torch.tensor(data=0.5),
    lambda: torch.asarray(obj=[1, 0.5]),
    lambda: torch.zeros(2, dtype=torch.complex64),
    lambda: torch.zeros(2, out=torch.zeros(2, dtype=torch.float32)),
    lambda: next(nn.Linear(3, 4).parameters()),
    lambda: next(nn.Embedding(3, 4).parameters()),
    lambda: next(nn.BatchNorm1d(3).buffers()),
    lambda: next(nn.LSTM(2, 3).parameters()),
    lambda: next(nn.MultiheadAttention(4, 2).parameters()),
]


@pytest.mark.parametrize(("precision", "dtype"), TRUE)
@pytest.mark.parametrize("number", range(len(MAKERS)))
def test_what_is_made_equals_what_the_default_type_would_make(number: int, precision: str, dtype: torch.dtype) -> None:
    """`init_tensor` gives, number by number, what PyTorch gives under `torch.set_default_dtype`."""
    make = MAKERS[number]
    torch.manual_seed(4)
    with Fabric(accelerator="cpu", devices=1, precision=precision) as fabric, fabric.init_tensor():
        ours = make()
        assert torch.get_default_dtype() is torch.float32
    torch.manual_seed(4)
    torch.set_default_dtype(dtype)
    try:
        reference = make()
    finally:
        torch.set_default_dtype(torch.float32)
    assert ours.dtype == reference.dtype
    assert torch.equal(ours, reference)


@pytest.mark.parametrize("context", ["init_module", "init_tensor"])
def test_another_thread_sees_nothing(context: str) -> None:
    """While one thread makes parameters in bfloat16, another makes them in 32 bits."""
    inside, done = threading.Event(), threading.Event()
    seen = []

    def other() -> None:
        inside.wait(10)
        seen.append(nn.Linear(2, 2).weight.dtype)
        seen.append(torch.get_default_dtype())
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with Fabric(accelerator="cpu", devices=1, precision="bf16-true") as fabric, getattr(fabric, context)():
        inside.set()
        assert done.wait(10)
        assert nn.Linear(2, 2).weight.dtype is torch.bfloat16
    thread.join()
    assert seen == [torch.float32, torch.float32]


@pytest.mark.parametrize("context", ["init_module", "init_tensor"])
def test_a_context_ends_with_an_exception(context: str) -> None:
    """After an error inside it, tensors are made as before."""
    with Fabric(accelerator="cpu", devices=1, precision="bf16-true") as fabric:
        with pytest.raises(ZeroDivisionError), getattr(fabric, context)():
            1 / 0  # noqa: B018 - raises
        assert torch.zeros(1).dtype is torch.float32


@pytest.mark.parametrize(("precision", "dtype"), [("16-mixed", torch.float16), ("bf16-mixed", torch.bfloat16)])
def test_autocast_is_for_computations_outside_a_model(precision: str, dtype: torch.dtype) -> None:
    """`fabric.autocast()` autocasts inside the block, and not after it, on an exception neither."""
    a = torch.ones(2, 2)
    with Fabric(accelerator="cpu", devices=1, precision=precision) as fabric:
        with fabric.autocast():
            assert (a @ a).dtype is dtype
        with pytest.raises(ZeroDivisionError), fabric.autocast():
            1 / 0  # noqa: B018 - raises
        assert (a @ a).dtype is torch.float32
    with Fabric(accelerator="cpu", devices=1, precision="32-true") as fabric, fabric.autocast():
        assert (a @ a).dtype is torch.float32


def test_only_floating_point_is_converted() -> None:
    """Integer, boolean and complex buffers and inputs keep their types."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))
            for name, value in {"i": torch.ones(1, dtype=torch.int32), "b": torch.ones(1, dtype=torch.bool)}.items():
                self.register_buffer(name, value)

        def forward(self, *inputs: Tensor) -> list[torch.dtype]:
            return [one.dtype for one in inputs]

    with Fabric(accelerator="cpu", devices=1, precision="bf16-true") as fabric:
        model = fabric.setup(Model())
        types = [torch.float64, torch.float32, torch.float16, torch.int64, torch.uint8, torch.bool, torch.complex64]
        seen = model(*(torch.ones(1, dtype=dtype) for dtype in types))
    assert seen == [torch.bfloat16] * 3 + types[3:]
    assert {name: buffer.dtype for name, buffer in model.named_buffers()} == {"i": torch.int32, "b": torch.bool}


@pytest.mark.parametrize(
    ("alias", "name"), [("32", "32-true"), ("64", "64-true"), ("16", "16-mixed"), ("bf16", "bf16-mixed")]
)
def test_an_alias_is_the_same_precision(alias: str, name: str) -> None:
    """The short names mean what they mean in Lightning Fabric; options can be given with them too."""
    named = Fabric(accelerator="cpu", devices=1, precision=name)
    short = Fabric(accelerator="cpu", devices=1, precision=alias)
    assert type(short.precision) is type(named.precision)
    assert short.precision.options == named.precision.options
    assert Fabric(accelerator="cpu", devices=1, precision=int(alias) if alias.isdigit() else alias)


def test_the_default_is_32_true_under_its_full_name() -> None:
    """An alias is never chosen automatically, though it names the same plugin."""
    assert Fabric(accelerator="cpu", devices=1).plan.precision.name == "32-true"
