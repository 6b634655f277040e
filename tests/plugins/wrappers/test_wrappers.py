"""The built-in wrappers change how a model runs, and nothing that it computes."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fabric_core import Fabric
from fabric_core.errors import PlanError, SetupError
from fabric_plugins.wrappers import ChannelsLastWrapper, CompileWrapper

# The compiler looks at the gradient of whatever goes into a block.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


class Block(nn.Module):
    runs = 0

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.second = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> Any:
        if not torch.compiler.is_compiling():
            type(self).runs += 1
        return x + self.second(torch.relu(self.first(x)))


class Net(nn.Module):
    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.head = nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> Any:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Leave no compiled code behind, and count the blocks' runs from zero."""
    Block.runs = 0
    yield
    torch._dynamo.reset()


def gradients(run: Any, module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Give the output and every parameter's gradient."""
    output = run(x)
    result = [output, *torch.autograd.grad(output.sum(), list(module.parameters()))]
    return [one.detach() for one in result]


def graphs(seen: list[Any]) -> Any:
    """Give a compiler that keeps what it was given and runs it as it is."""

    def backend(graph: Any, _inputs: Any) -> Any:
        seen.append(graph)
        return graph.forward

    return backend


ALL = [
    "channels_last",
    "activation_checkpointing",
    "activation_checkpointing:every=3",
    "activation_checkpointing:selective=true",
    'activation_checkpointing:blocks=["Block"]',
    "compile:backend=eager",
    "compile_blocks:backend=eager,dynamic=false",
]


@pytest.mark.parametrize("wrapper", ALL)
def test_results_names_and_types_stay(wrapper: str) -> None:
    """Outputs and gradients agree with the bare model's; the model keeps its identity, names and classes."""
    torch.manual_seed(0)
    net = Net()
    reference = copy.deepcopy(net)
    x = torch.randn(5, 8)
    model = Fabric(accelerator="cpu", devices=1, wrappers=wrapper).setup(net)
    assert model.module is net
    assert list(model.state_dict()) == list(reference.state_dict())
    assert [type(one) for one in net.modules()] == [type(one) for one in reference.modules()]
    for mine, bare in zip(gradients(model, net, x), gradients(reference, reference, x), strict=True):
        torch.testing.assert_close(mine, bare)


@pytest.mark.parametrize(("every", "again"), [(1, 4), (2, 2), (3, 2), (9, 1)])
def test_every_nth_block_is_computed_again(every: int, again: int) -> None:
    """Beginning with the first, each n-th block runs once more in backward; without gradients none does."""
    model = Fabric(
        accelerator="cpu", devices=1, wrappers={"name": "activation_checkpointing", "options": {"every": every}}
    ).setup(Net())
    loss = model(torch.randn(2, 8)).sum()
    assert Block.runs == 4
    loss.backward()
    assert Block.runs == 4 + again
    with torch.no_grad():
        model(torch.randn(2, 8))
    assert Block.runs == 8 + again


def test_recomputing_keeps_less() -> None:
    """Fewer bytes are kept for backward: everything of a block without it, products with the selective kind."""

    def kept(wrappers: Any) -> int:
        model = Fabric(accelerator="cpu", devices=1, wrappers=wrappers).setup(Net())
        sizes: list[int] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(torch.randn(64, 8))
        return sum(sizes)

    plain, all_again = kept(None), kept("activation_checkpointing")
    assert all_again < plain / 3


def test_the_selective_kind_does_not_repeat_products() -> None:
    """In backward of a selective block no product of forward is computed again."""
    counts = {}
    for selective in (False, True):
        model = Fabric(
            accelerator="cpu", devices=1, wrappers=f"activation_checkpointing:selective={str(selective).lower()}"
        ).setup(Net())
        loss = model(torch.randn(2, 8)).sum()
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        counts[selective] = counter.get_total_flops()
    bare = Net()
    loss = bare(torch.randn(2, 8)).sum()
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    # The first product of each of the four blocks: 2 x 8 x 16 multiplications and as many additions. What the second
    # one needs is there before it is computed again.
    assert counts[True] == counter.get_total_flops()
    assert counts[False] == counts[True] + 4 * (2 * 2 * 8 * 16)


def test_compile_sees_the_whole_model_in_one_graph() -> None:
    """One graph, made by the compiler that was named with the arguments that were given."""
    seen: list[Any] = []
    model = Fabric(accelerator="cpu", devices=1, wrappers=CompileWrapper(backend=graphs(seen), fullgraph=True)).setup(
        Net()
    )
    model(torch.randn(2, 8))
    model(torch.randn(2, 8))
    assert len(seen) == 1
    assert len([node for node in seen[0].graph.nodes if node.op == "call_function"]) > 4


def test_compile_blocks_compiles_one_block_for_all() -> None:
    """The blocks share the code of the first; the rest of the model is left alone."""
    from fabric_plugins.wrappers import CompileBlocksWrapper

    seen: list[Any] = []
    model = Fabric(accelerator="cpu", devices=1, wrappers=CompileBlocksWrapper(backend=graphs(seen))).setup(Net(6))
    model(torch.randn(2, 8, requires_grad=True))
    assert len(seen) == 1


def test_channels_last_lays_out_convolutions() -> None:
    """Weights are laid out anew, in the same parameters; other shapes are left."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(2))
    net(torch.randn(1, 3, 8, 8))
    weight = net[0].weight
    model = Fabric(accelerator="cpu", devices=1, wrappers="channels_last").setup(net)
    assert model[0].weight is weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert model[0](torch.randn(1, 3, 8, 8)).is_contiguous(memory_format=torch.channels_last)


def test_channels_last_takes_convolutions_of_every_dimension() -> None:
    """Weights of five dimensions, which have no such layout, are left beside those that have it."""
    net = ChannelsLastWrapper().wrap_module(nn.Sequential(nn.Conv1d(2, 2, 2), nn.Conv2d(2, 2, 2), nn.Conv3d(2, 2, 2)))
    layouts = [one.stride() for name, one in net.named_parameters() if name.endswith("weight")]
    assert layouts == [(4, 2, 1), (8, 1, 4, 2), (16, 8, 4, 2, 1)]


@pytest.mark.parametrize("name", ["activation_checkpointing", "compile_blocks"])
@pytest.mark.parametrize(("option", "text"), [("", "no repeated blocks"), (':blocks=["Blok"]', "no Blok")])
def test_a_model_without_such_blocks_is_refused(name: str, option: str, text: str) -> None:
    """Doing nothing would be a silent fallback."""
    with pytest.raises(SetupError, match=rf"{text}(.|\n)*blocks=\["):
        Fabric(accelerator="cpu", devices=1, wrappers=name + option).setup(nn.Linear(1, 1))


def test_the_order_of_wrappers_is_checked() -> None:
    """Checkpointing must come before the compilation of blocks; both together compute what the model does."""
    with pytest.raises(PlanError, match="'activation_checkpointing' before 'compile_blocks'"):
        Fabric(accelerator="cpu", devices=1, wrappers=["compile_blocks", "activation_checkpointing"])
    torch.manual_seed(0)
    net = Net()
    reference, x = copy.deepcopy(net), torch.randn(3, 8)
    model = Fabric(
        accelerator="cpu",
        devices=1,
        wrappers=["channels_last", "activation_checkpointing:every=2", "compile_blocks:backend=aot_eager"],
    ).setup(net)
    for mine, bare in zip(gradients(model, net, x), gradients(reference, reference, x), strict=True):
        torch.testing.assert_close(mine, bare)
