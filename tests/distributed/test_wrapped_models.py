"""What a wrapped model promises holds on one process, on two that replicate the model, and on two that shard it."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_modules
from torch.utils.data import DataLoader

from fabric_core import Fabric, FabricDataLoader, FabricModule, FabricOptimizer, is_wrapped, unwrap
from fabric_core.conformance.pool import RankPool
from fabric_core.errors import MisuseError, SetupError

WHERE = [("single_device", 1), ("ddp", 2), ("fsdp", 2)]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 6)
        self.head = nn.Linear(6, 2)
        self.note = "kept"

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> Any:
        return self.head(torch.tanh(self.body(x))) * scale

    def generate(self, x: torch.Tensor, steps: int = 2) -> Any:
        for _ in range(steps):
            x = torch.cat([self(x), self.head(torch.tanh(self.body(x)))], dim=1)
        return x

    def fail(self, x: torch.Tensor) -> None:
        self.body(x)
        raise KeyError("inside")

    def training_step(self, x: torch.Tensor) -> Any:
        return self(x).sum()

    def both(self, x: torch.Tensor) -> Any:
        return self.generate(x) + self.generate(x)

    def describe(self) -> str:
        return f"a net of {self.head.out_features}"


def make(seed: int = 0) -> Net:
    """Give the same net on every rank."""
    torch.manual_seed(seed)
    return Net()


def batch(rows: int = 4) -> torch.Tensor:
    """Give the same batch on every rank."""
    return torch.linspace(-1, 1, rows * 4).reshape(rows, 4)


def whole(tensor: torch.Tensor | None) -> torch.Tensor:
    """Give all of a tensor that may be sharded."""
    assert tensor is not None
    full: torch.Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach()


def _on(strategy: str, devices: int, check: Callable[[Fabric], Any], precision: str) -> Any:
    with Fabric(accelerator="cpu", strategy=strategy, devices=devices, precision=precision) as fabric:
        fabric.launch()
        return check(fabric)


Everywhere = Callable[..., list[Any]]


@pytest.fixture(params=WHERE, ids=[f"{name}-{count}" for name, count in WHERE])
def everywhere(request: pytest.FixtureRequest, two_ranks: RankPool) -> Everywhere:
    """Give a function that runs a check on every rank, and gives what each returned."""
    strategy, devices = request.param

    def run(check: Callable[[Fabric], Any], precision: str = "32-true") -> list[Any]:
        if devices == 1:
            return [_on(strategy, devices, check, precision)]
        return two_ranks.run(_on, strategy, devices, check, precision)

    return run


def routed(fabric: Fabric) -> bool:
    """Say whether a method must pass through the strategy."""
    return fabric.strategy.capabilities.intercepts_forward


def _what_it_is(fabric: Fabric) -> None:
    net = make()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    model, stepper = fabric.setup(net, optimizer)
    loader = fabric.setup_dataloaders(DataLoader(list(batch()), batch_size=2))  # type: ignore[arg-type]
    assert type(model) is FabricModule
    assert isinstance(stepper, FabricOptimizer)
    assert isinstance(stepper, torch.optim.SGD)
    assert isinstance(loader, FabricDataLoader)
    assert model.module is net
    assert model.device == fabric.device
    assert all(is_wrapped(one) for one in (model, stepper, loader, torch.compile(model, backend="eager")))
    assert not any(is_wrapped(one) for one in (net, optimizer))
    assert unwrap({"a": [model, stepper]}) == {"a": [net, optimizer]}


def test_what_it_is(everywhere: Everywhere) -> None:
    """The types say so, device and original are remembered, ``is_wrapped`` and ``unwrap`` tell."""
    everywhere(_what_it_is)


def _attributes(fabric: Fabric) -> None:
    net = make()
    names = list(net.state_dict())
    model = fabric.setup(net)
    assert model.body is net.body
    assert model.body.weight is net.body.weight
    assert model.note == "kept"
    model.note = "written"
    assert net.note == "written"
    assert model.describe() == "a net of 2"
    assert list(model.state_dict()) == [name for name, _ in model.named_parameters()] == names
    assert [name for name, _ in model.named_modules()] == ["", "body", "head"]
    assert model.eval() is model
    assert not net.body.training
    assert hasattr(model, "training_step")
    assert not hasattr(model, "predict_step")
    with pytest.raises(SetupError):
        fabric.setup(model)
    with pytest.raises(SetupError):
        fabric.setup(net)


def test_attributes_are_the_originals(everywhere: Everywhere) -> None:
    """Reading, writing, naming, modes; and no second setup."""
    everywhere(_attributes)


def _forward(fabric: Fabric) -> dict[str, torch.Tensor]:
    net = make()
    reference = copy.deepcopy(net)
    model = fabric.setup(net)
    x = batch()
    torch.testing.assert_close(model(x, scale=2.0), reference(x, scale=2.0))
    torch.testing.assert_close(model.forward(x), reference(x))
    own = x[fabric.global_rank :: fabric.world_size]
    fabric.backward(model(own).pow(2).mean())
    reference(x).pow(2).mean().backward()
    for mine, bare in zip(net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(whole(mine.grad), whole(bare.grad))
    return {name: whole(parameter.grad) for name, parameter in net.named_parameters()}


def test_forward_is_the_strategys(everywhere: Everywhere) -> None:
    """Outputs are the bare model's; gradients of halves of the batch make those of the whole."""
    everywhere(_forward)


def _precision(fabric: Fabric) -> None:
    seen: list[tuple[torch.dtype, torch.dtype]] = []

    class Looking(Net):
        def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> Any:
            result = super().forward(x, scale=scale)
            seen.append((x.dtype, result.dtype))
            return result

    torch.manual_seed(0)
    model = fabric.setup(Looking())
    model.mark_forward_method("generate")
    assert model(batch().double()).dtype == torch.float32
    assert model.generate(batch().double()).dtype == torch.float32
    assert {result for _, result in seen} == {torch.bfloat16}
    assert torch.float64 not in {given for given, _ in seen}


def test_precision_goes_round_every_run(everywhere: Everywhere) -> None:
    """Under bf16-mixed, forward and marked methods compute in 16 bits and give 32."""
    everywhere(_precision, "bf16-mixed")


def _unmarked(fabric: Fabric) -> None:
    model = fabric.setup(make())
    for name in ("generate", "fail", "both"):
        if routed(fabric):
            with pytest.raises(MisuseError, match=rf"Net\.{name}(.|\n)*mark_forward_method\('{name}'\)"):
                getattr(model, name)(batch())
        assert not torch_modules._global_forward_pre_hooks
    model(batch())


def test_an_unmarked_method_is_refused(everywhere: Everywhere) -> None:
    """The error names class, method and cure, nothing is left behind, and the model still runs."""
    everywhere(_unmarked)


def _marked(fabric: Fabric) -> None:
    net = make()
    reference = copy.deepcopy(net)
    model = fabric.setup(net)
    x = batch()
    model.mark_forward_method(model.generate)
    model.mark_forward_method("both")
    model.mark_forward_method(net.fail)
    with torch.no_grad():
        torch.testing.assert_close(model.generate(x), reference.generate(x))
        torch.testing.assert_close(model.both(x), reference.both(x))
        torch.testing.assert_close(model.training_step(x), reference.training_step(x))
    for _ in range(2):
        with pytest.raises(KeyError, match="inside"):
            model.fail(x)
    own = x[fabric.global_rank :: fabric.world_size]
    fabric.backward(model.training_step(own) / len(own))
    (reference.training_step(x) / len(x)).backward()
    for mine, bare in zip(net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(whole(mine.grad), whole(bare.grad))


def test_a_marked_method_is_the_strategys(everywhere: Everywhere) -> None:
    """Results are the bare model's, gradients are synchronised, and an exception leaves everything usable."""
    everywhere(_marked)


def _wrong_marks(fabric: Fabric) -> None:
    model = fabric.setup(make())
    for mark, error in (
        ("forward", ValueError),
        ("note", AttributeError),
        ("body", AttributeError),
        ("nothing", AttributeError),
    ):
        with pytest.raises(error):
            model.mark_forward_method(mark)


def test_wrong_marks(everywhere: Everywhere) -> None:
    """``forward``, what is no method, and a missing name are refused, each with its own error."""
    everywhere(_wrong_marks)


def _compiled(fabric: Fabric) -> None:
    x = batch()
    expected = make()(x)
    before: Any = fabric.setup(torch.compile(make(), backend="eager"))
    after: Any = torch.compile(fabric.setup(make()), backend="eager")
    try:
        for model in (before, after):
            torch.testing.assert_close(model(x), expected)
            fabric.backward(model(x).sum())
            assert unwrap(model).body.weight.grad is not None
        assert list(before.state_dict()) == list(make().state_dict())
    finally:
        torch._dynamo.reset()


def test_compiled_before_or_after_setup(everywhere: Everywhere) -> None:
    """Both run under the strategy, with the bare model's names."""
    everywhere(_compiled)


def _parts(fabric: Fabric) -> list[list[float]]:
    loader = fabric.setup_dataloaders(DataLoader(list(range(8)), batch_size=2, shuffle=True))  # type: ignore[arg-type]
    return [[float(one) for part in loader for one in part] for _ in range(2)]


def test_loaders_divide_the_data(everywhere: Everywhere) -> None:
    """In each epoch the ranks read all of it, nothing twice, in an order that changes."""
    ranks = everywhere(_parts)
    for epoch in range(2):
        assert sorted(one for rank in ranks for one in rank[epoch]) == list(range(8))
    assert ranks[0][0] != ranks[0][1]


def _side_by_side(fabric: Fabric) -> None:
    first, second = fabric.setup(make(1)), fabric.setup(make(2))
    one = fabric.setup_optimizers(torch.optim.SGD(first.parameters(), lr=0.5))
    before = whole(second.head.weight).clone()
    for _ in range(2):
        fabric.backward(first(batch()).sum() + second(batch()).sum())
        one.step()
        one.zero_grad()
    assert torch.equal(whole(second.head.weight), before)
    assert not torch.equal(whole(first.head.weight), make(1).head.weight)


def test_models_live_side_by_side(everywhere: Everywhere) -> None:
    """Two models in one graph, an optimizer for one of them."""
    everywhere(_side_by_side)


def _copied(fabric: Fabric, kept: list[Any]) -> list[float]:
    net = make()
    model = fabric.setup(net)
    clone = copy.deepcopy(model)
    kept.append(clone)
    fabric.backward(clone(batch()[fabric.global_rank :: fabric.world_size]).sum())
    assert net.head.bias.grad is None
    return [float(one) for one in whole(clone.head.bias.grad)]


def _copied_and_kept(strategy: str) -> list[float]:
    kept: list[Any] = []
    return _on(strategy, 2, lambda fabric: _copied(fabric, kept), "32-true")  # type: ignore[no-any-return]


def test_a_copy_trains_with_the_others_and_outlives_the_processes_group(two_ranks: RankPool) -> None:
    """A deep copy is synchronised as its original is, and ends with the ranks although somebody still holds it."""
    for _ in range(3):
        assert two_ranks.run(_copied_and_kept, "ddp") == [[2.0, 2.0]] * 2
