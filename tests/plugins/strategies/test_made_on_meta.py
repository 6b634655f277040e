"""A model without memory gets the values that it would have had, or an error that says why it can't."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fabric_core import Fabric
from fabric_core.conformance.pool import RankPool, RankRaised


class Reaching(nn.Module):
    """Has a parameter, and fills its children's too."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.scale = nn.Linear(4, 4), nn.Parameter(torch.empty(4))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.inner.weight, std=0.02)
        nn.init.xavier_uniform_(self.inner.weight)
        self.inner.weight.data.add_(torch.randn(4, 4))
        self.inner.bias.data.uniform_(-3, 3)
        nn.init.normal_(self.scale)


class Container(nn.Module):
    """Has none of its own, and fills its children's."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Reaching() for _ in range(2))
        self.head = nn.Linear(4, 4)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        nn.init.trunc_normal_(self.head.weight, std=100.0)
        nn.init.orthogonal_(self.blocks[0].get_parameter("inner.weight"))
        for block in self.blocks:
            nn.init.normal_(block.get_parameter("inner.bias"), mean=7.0)
            with torch.no_grad():
                block.get_parameter("inner.bias")[1] = 5.0


class Tied(nn.Module):
    """Its head is drawn, and then is the embedding; what comes later is drawn after both."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(4, 4), nn.Linear(4, 4)
        self.head.weight = self.embedding.weight
        self.last = nn.Linear(4, 4)


class Buffered(nn.Module):
    """Makes its buffers anew."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4))
        self.register_buffer("places", torch.empty(4))
        self.register_buffer("count", torch.empty(1, dtype=torch.long))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)
        self.places = torch.arange(4.0)
        self.get_buffer("count").zero_()


class Forgets(nn.Module):
    """Fills one of its two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.one)


class Counts(nn.Module):
    """Does not fill its buffer of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("places", torch.arange(4))

    def reset_parameters(self) -> None:
        """Forget."""


MODELS: dict[str, Callable[[], nn.Module]] = {
    "own and children's": lambda: nn.Sequential(Reaching(), nn.Linear(4, 4)),
    "children's alone": Container,
    "PyTorch's attention": lambda: nn.Sequential(nn.MultiheadAttention(4, 2), nn.Linear(4, 4)),
    "tied": Tied,
    "buffers": lambda: nn.Sequential(Buffered(), nn.BatchNorm1d(4)),
}
INCOMPLETE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "parameter": (lambda: nn.Sequential(Forgets()), r"leaves other without values[\s\S]*0 \(Forgets\)"),
    "integers": (lambda: nn.Sequential(Counts(), nn.Linear(4, 4)), r"leaves places without values"),
}


def _made(name: str) -> dict[str, Any]:
    with Fabric(accelerator="cpu", strategy="fsdp", devices=2) as fabric:
        fabric.launch()
        with fabric.init_module(empty_init=True):
            model = {**MODELS, **{key: make for key, (make, _) in INCOMPLETE.items()}}[name]()
        torch.manual_seed(3 + fabric.global_rank)  # rank 0's values count
        fabric.setup(model)
        state = fabric.strategy.module_state(model, full=True)
        return {key: value.numpy() for key, value in state.items()}


@pytest.mark.parametrize("name", MODELS)
def test_values_are_those_of_a_model_made_whole(name: str, two_ranks: RankPool) -> None:
    """Whoever fills a parameter, its own module or one above, and whatever else it fills."""
    torch.manual_seed(3)
    expected = MODELS[name]().state_dict()
    got = two_ranks.run(_made, name)[0]
    assert list(got) == list(expected)
    for key, value in expected.items():
        torch.testing.assert_close(torch.from_numpy(got[key]), value, msg=key)


@pytest.mark.parametrize("name", INCOMPLETE)
def test_what_would_be_garbage_is_named(name: str, two_ranks: RankPool) -> None:
    """What nobody fills, or what can't be filled where it is divided, is an error with its name."""
    with pytest.raises(RankRaised, match=INCOMPLETE[name][1]):
        two_ranks.run(_made, name)
