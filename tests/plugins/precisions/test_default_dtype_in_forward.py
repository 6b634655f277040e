"""The option of true precisions to make tensors of no given type in the precision's, as Lightning Fabric does."""

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fabric_core import Fabric
from fabric_core.conformance.pool import RankPool

TRUE = [("64-true", torch.float64), ("16-true", torch.float16), ("bf16-true", torch.bfloat16)]
OPTION = "default_dtype_in_forward=true"


class Block(nn.Module):
    """Makes tensors of no given type, and multiplies matrices that depend on them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, 4) to (batch, 4)."""
        made = torch.full((1,), 1.5) + torch.zeros(1) + torch.tensor(0.5) + torch.arange(4.0)
        result: Tensor = self.second((self.first(x) * made).sin()).cos()
        return result


class Checkpointing(nn.Module):
    """Computes its blocks' activations again by a call of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor, again: str) -> Tensor:
        """Map (batch, 4) to (batch, 4)."""
        for block in self.blocks:
            x = block(x) if again == "never" else checkpoint(block, x, use_reentrant=again == "reentrant")
        return x


def gradients(fabric: Fabric, again: str = "never", backward: Any = None) -> list[Tensor]:
    """Run one pass forward and back, and give the gradients."""
    torch.manual_seed(3)
    model = fabric.setup(Checkpointing())
    loss = model(torch.ones(2, 4, requires_grad=True), again).sum()
    (backward or fabric.backward)(loss)
    return [whole(one.grad) for one in model.parameters() if one.grad is not None]


def whole(gradient: Any) -> Tensor:
    """Give a copy of a gradient that may be sharded."""
    result: Tensor = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    return result.clone()


@pytest.mark.parametrize(("precision", "dtype"), TRUE)
def test_what_forward_makes_is_of_the_precisions_type(precision: str, dtype: torch.dtype) -> None:
    """A tensor without a type is of the precision's with the option, and of float32 without it; threads don't mix."""
    seen: list[torch.dtype] = []

    class Making(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(torch.zeros(1).dtype)
            other = threading.Thread(target=lambda: seen.append(torch.zeros(1).dtype))
            other.start()
            other.join()
            return super().forward(x)

    for given in (precision, f"{precision}:{OPTION}"):
        with Fabric(accelerator="cpu", devices=1, precision=given) as fabric:
            fabric.setup(Making(2, 2))(torch.ones(1, 2))
            assert torch.zeros(1).dtype is torch.float32
    assert seen == [torch.float32, torch.float32, dtype, torch.float32]


@pytest.mark.parametrize("again", ["reentrant", "not reentrant"])
@pytest.mark.parametrize("strategy", ["single_device", "ddp", "fsdp"])
def test_activations_are_computed_again_in_the_same_type(strategy: str, again: str) -> None:
    """`fabric.backward` gives the gradients of a model that keeps its activations, whoever checkpoints."""
    with Fabric(accelerator="cpu", devices=1, strategy=strategy, precision=f"bf16-true:{OPTION}") as fabric:
        fabric.launch()
        kept, computed = gradients(fabric), gradients(fabric, again)
    assert kept
    assert all(torch.equal(one, other) for one, other in zip(kept, computed, strict=True))


def test_activations_that_the_wrapper_checkpoints() -> None:
    """So it is with the wrapper `activation_checkpointing`."""
    arguments: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "precision": f"bf16-true:{OPTION}"}
    with Fabric(**arguments) as fabric:
        kept = gradients(fabric)
    with Fabric(**arguments, wrappers="activation_checkpointing") as fabric:
        computed = gradients(fabric)
    assert all(torch.equal(one, other) for one, other in zip(kept, computed, strict=True))


def test_backward_takes_what_pytorchs_takes() -> None:
    """The arguments of `backward` mean what they mean without the option."""
    with Fabric(accelerator="cpu", devices=1, precision=f"bf16-true:{OPTION}") as fabric:
        model = fabric.setup(nn.Sequential(Block(), Block()))
        output = model(torch.ones(2, 4))
        fabric.backward(output, torch.ones_like(output), retain_graph=True)
        fabric.backward(output.sum(), inputs=[model[1].first.weight])
        twice, once = model[1].first.weight.grad, model[1].second.weight.grad
        model.zero_grad()
        fabric.backward(model(torch.ones(2, 4)).sum())
        assert torch.equal(twice, 2 * model[1].first.weight.grad)
        assert torch.equal(once, model[1].second.weight.grad)


def test_a_raw_backward_pass_that_computes_again_fails_aloud() -> None:
    """Nothing is computed in another type quietly."""
    with (
        Fabric(accelerator="cpu", devices=1, precision=f"bf16-true:{OPTION}") as fabric,
        pytest.raises(RuntimeError, match="dtype"),
    ):
        gradients(fabric, "not reentrant", torch.Tensor.backward)


@pytest.mark.slow
@pytest.mark.parametrize("option", ["true", "false"])
def test_compilation_has_no_break(option: str) -> None:
    """A model that is compiled before or after it is set up is one graph, and computes what it computes otherwise."""
    x = torch.ones(2, 4)
    with Fabric(accelerator="cpu", devices=1, precision=f"bf16-true:default_dtype_in_forward={option}") as fabric:
        model = Block() if option == "true" else nn.Linear(4, 4)
        before = fabric.setup(torch.compile(model, fullgraph=True, backend="aot_eager"))
        fabric.backward(before(x).sum())
        after = torch.compile(fabric.setup(copy.deepcopy(model)), fullgraph=True, backend="aot_eager")
        plain = _plain(fabric, model, x).float()
        assert torch.allclose(before(x), plain)
        assert torch.allclose(after(x), plain)


def _plain(fabric: Fabric, model: nn.Module, x: Tensor) -> Tensor:
    with fabric.autocast():
        result: Tensor = model(x.bfloat16())
    return result


@pytest.mark.parametrize(("precision", "dtype"), TRUE)
def test_inside_autocast_the_type_holds(precision: str, dtype: torch.dtype) -> None:
    """In the user's own block tensors are made in the type, with the option and without it, and not after it."""
    for given in (precision, f"{precision}:{OPTION}"):
        with Fabric(accelerator="cpu", devices=1, precision=given) as fabric:
            with fabric.autocast():
                assert torch.zeros(1).dtype is dtype
            assert torch.zeros(1).dtype is torch.float32


class Conv(nn.Module):
    """Gives a convolution an input of float32."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv1d(1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Leave the input out."""
        return self.layer(torch.zeros(1, 1, len(x)))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Gives attention a mask of float32, or a query."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, 4) to (batch, 4)."""
        y = self.layer(x)[None]
        return nn.functional.scaled_dot_product_attention(torch.zeros(1, 2, 4), y, y)


class Product(nn.Module):
    """Multiplies a matrix of float32 and one of the precision's type."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, 4) to (2, batch)."""
        return torch.zeros(2, 4) @ self.layer(x).T  # type: ignore[no-any-return]


@pytest.mark.parametrize("precision", [name for name, _ in TRUE])
@pytest.mark.parametrize("model", [Conv, Attention, Product])
def test_the_error_of_types_that_do_not_fit_names_the_option(model: type[nn.Module], precision: str) -> None:
    """A product, a convolution or attention over float32 and the precision's type says what would help; and it does."""
    x = torch.ones(2, 4)
    with (
        Fabric(accelerator="cpu", devices=1, precision=precision) as fabric,
        pytest.raises(RuntimeError) as caught,
    ):
        fabric.setup(model())(x)
    assert "default_dtype_in_forward" in caught.value.__notes__[0]
    with Fabric(accelerator="cpu", devices=1, precision=f"{precision}:{OPTION}") as fabric:
        assert fabric.setup(model())(x).dtype is torch.float32


def test_other_errors_are_left_alone() -> None:
    """An error of the model's own has no note."""

    class Failing(nn.Linear):
        def forward(self, _x: Tensor) -> Tensor:
            raise RuntimeError("a float too many")

    with Fabric(accelerator="cpu", devices=1, precision="bf16-true") as fabric, pytest.raises(RuntimeError) as caught:
        fabric.setup(Failing(2, 2))(torch.ones(1, 2))
    assert not hasattr(caught.value, "__notes__")


@pytest.mark.parametrize("precision", ["64-true", "16-true", "bf16-true"])
def test_complex_numbers_stay_complex(precision: str) -> None:
    """Complex parameters and buffers come through as they are, without PyTorch's warning."""

    class Turning(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, dtype=torch.complex64))
            self.register_buffer("turns", torch.polar(torch.ones(2), torch.ones(2)))
            self.layer = nn.Linear(2, 2)

    with Fabric(accelerator="cpu", devices=1, precision=precision) as fabric:
        model = fabric.setup(before := Turning())
    assert model.module is before
    assert model.turns.dtype is model.weight.dtype is torch.complex64
    assert torch.equal(model.turns, torch.polar(torch.ones(2), torch.ones(2)))


def seen_by(strategy: str, precision: str) -> list[torch.dtype]:
    """Give the types that a model's inputs have in forward."""
    model = nn.Linear(2, 2)
    seen: list[torch.dtype] = []
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    with Fabric(accelerator="cpu", devices=2, strategy=strategy, precision=precision) as fabric:
        fabric.launch()
        fabric.setup(model)(torch.ones(1, 2))
        fabric.setup(nn.Linear(2, 2))(torch.ones(1, 2))
    return seen


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_inputs_are_of_the_computing_type_on_two_ranks(strategy: str, two_ranks: RankPool) -> None:
    """A mixed precision gives forward its computing type under every strategy."""
    for precision, dtype in (("bf16-mixed", torch.bfloat16), ("16-mixed", torch.float16)):
        assert two_ranks.run(seen_by, strategy, precision) == [[dtype]] * 2
