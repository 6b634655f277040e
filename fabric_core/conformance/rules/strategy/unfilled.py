"""Rules for strategies: models that have no values yet when they are set up."""

from typing import Final

import torch
from torch import nn

from fabric_core.conformance import cases
from fabric_core.conformance.bench import Bench, Place
from fabric_core.conformance.cases import Training, Weights, distance
from fabric_core.conformance.numbers import widest
from fabric_core.conformance.rule import Broken, Table
from fabric_core.conformance.rules.strategy.measures import ALWAYS, refused, set_up_module, whole

TABLE: Final = Table("strategy", inside=False)


def _from_meta(place: Place) -> float:
    case = Training(seed=5)
    expected = cases.copied(cases.build(case))
    with place.fabric() as fabric:
        with torch.device("meta"):
            model = cases.build(case)
        set_up_module(fabric, model)
        fabric.strategy.load_module_state(model, expected, True, True)
        return distance(whole(fabric, model), expected)


@TABLE.rule(
    "STR-334",
    "Who declares handles_device_placement: a model on the meta device is set up, and takes a state.",
    reason="The core moves no such model; it may never fit on one device.",
    advice="make room on the device as you shard, or take handles_device_placement out of the capabilities",
    needs=("handles_device_placement",),
    world_sizes=ALWAYS,
)
def _takes_meta(bench: Bench) -> None:
    for rank, off in enumerate(bench.run(_from_meta)):
        if off != 0:
            raise Broken(f"rank {rank}'s parameters are off the state by {off:.3g}")


class _Ramp(nn.Module):
    """A layer that fills its own with values that tell their place."""

    weight: nn.Parameter
    counts: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(5, 3, dtype=widest()))
        self.bias = nn.Parameter(torch.empty(5, dtype=widest()), requires_grad=False)
        self.register_buffer("counts", torch.empty(2, dtype=torch.int64))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill them."""
        with torch.no_grad():
            self.weight.copy_(torch.arange(1.0, 16.0).view(5, 3))
            nn.init.constant_(self.bias, 2.0)
            self.counts.copy_(torch.tensor([3, 5]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class _Scaling(nn.Module):
    """Scales the weights of its layers when they are filled, as residual networks do, and shares one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = _Ramp(), _Ramp()
        self.gain = nn.Parameter(torch.empty(1, dtype=widest()))
        self.shared = _Ramp()
        self.shared.weight = self.first.weight
        self.head = nn.Linear(5, 2, dtype=widest())
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Halve what the last layer has, fill the head, and set the own one."""
        with torch.no_grad():
            self.last.weight.mul_(0.5)
            self.last.bias.mul_(1 / self.last.weight.size(1))
            nn.init.constant_(self.head.weight, 0.25)
            nn.init.zeros_(self.head.bias)
            self.gain.fill_(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head((self.first(x) + self.last(x)) * self.gain + self.shared(x))
        return y


class _Unfillable(nn.Module):
    """Nothing fills its parameter after the constructor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layer(x) * self.weight
        return y


def _fill(place: Place) -> tuple[Weights, list[bool], bool]:
    """Set up what has no values; give the values, what is trained, and whether what is shared is shared."""
    with place.fabric() as fabric:
        with torch.device("meta"):
            model = _Scaling()
        set_up_module(fabric, model)
        state = whole(fabric, model)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        tied = parameters["shared.weight"] is parameters["first.weight"]
        return state, [one.requires_grad for one in model.parameters()], tied


def _fill_unfillable(place: Place) -> str:
    with place.fabric() as fabric:
        with torch.device("meta"):
            model = _Unfillable()
        try:
            set_up_module(fabric, model)
        except Exception as error:  # noqa: BLE001 - how it is refused is looked at
            return refused(error)
    return "set up"


@TABLE.rule(
    "STR-400",
    "Who declares handles_device_placement: a model on the meta device gets the values that its modules' "
    "`reset_parameters` make, children before parents, each once; what has none is refused on every rank.",
    reason="What is trained from memory that nobody has set ends anywhere.",
    advice="call reset_parameters of each module that holds such tensors, and let it work on whole tensors",
    needs=("handles_device_placement",),
    world_sizes=ALWAYS,
)
def _fills(bench: Bench) -> None:
    plain = _Scaling()
    expected, trained = cases.copied(plain), [one.requires_grad for one in plain.parameters()]
    for rank, (state, seen, tied) in enumerate(bench.run(_fill)):
        off = [name for name in expected if name not in state or distance({name: state[name]}, {name: expected[name]})]
        if off or len(state) != len(expected):
            raise Broken(f"rank {rank} has other values than the model's own in {', '.join(off) or 'some'}")
        if seen != trained or not tied:
            raise Broken(f"rank {rank} {'trains other parameters' if tied else 'has made two of a shared parameter'}")
    for rank, outcome in enumerate(bench.run(_fill_unfillable)):
        if not outcome.startswith("refused"):
            raise Broken(f"rank {rank}: a parameter that nothing fills is {outcome}")
