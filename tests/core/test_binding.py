"""One owner for each behaviour; everybody else goes round it, and only where asked for."""

import copyreg
import pickle
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from fabric_core import Fabric, around, hookimpl
from fabric_core.binding import Bindings, check_extension
from fabric_core.collectives import Collectives, SingleProcess
from fabric_core.contracts import PrecisionPolicy, Strategy, World
from fabric_core.errors import FabricError, MisuseError, QuarantinedError, RequestError


class Owner(Strategy):
    def connect(self, world: World, policy: PrecisionPolicy) -> Collectives:
        return SingleProcess()

    def backward(self, loss: torch.Tensor, module: nn.Module | None, arguments: Mapping[str, Any]) -> None:
        SAID.append("owner")

    def clip_grad_value(self, parameters: Sequence[torch.Tensor], clip_value: float) -> None:
        raise LookupError(clip_value)


SAID: list[str] = []


class Speaker:
    def __init__(self, name: str) -> None:
        self.name = name

    @around.strategy
    def backward(self) -> Generator[None, Any, Any]:
        SAID.append(f"{self.name} before")
        result = yield
        SAID.append(f"{self.name} after")
        return result


def bind(owner: Owner, *extensions: object) -> Bindings:
    """Bind a plugin for as long as the result lives."""
    bindings = Bindings(extensions)
    bindings.bind(owner)
    return bindings


def test_a_bound_plugin_is_the_plugin_and_only_what_is_wrapped_differs() -> None:
    """An unwrapped behaviour is the method itself; letting go restores the instance as it was."""
    owner = Owner()
    before = dict(vars(owner))
    bindings = bind(owner, Speaker("one"))
    assert owner.data_shard.__func__ is Strategy.data_shard  # type: ignore[attr-defined]
    assert "data_shard" not in vars(owner)
    assert "backward" in vars(owner)
    bindings.undo()
    assert vars(owner) == before


def test_extensions_go_round_the_owner_the_first_outermost() -> None:
    """Code before runs in the order given, code after in the other."""
    SAID.clear()
    owner = Owner()
    bindings = bind(owner, Speaker("one"), Speaker("two"))
    owner.backward(torch.ones(()), None, arguments={})
    assert SAID == ["one before", "two before", "owner", "two after", "one after"]
    assert bindings


class Twice(Owner):
    def optimizer_step(self, optimizer: Any, closure: Any) -> Any:
        self.backward(torch.ones(()), None, {})


def test_the_owners_own_calls_pass_through_the_extensions_too() -> None:
    """A behaviour that another behaviour of the same plugin calls is wrapped as for everybody else."""
    SAID.clear()
    owner = Twice()
    bindings = bind(owner, Speaker("one"))
    owner.optimizer_step(None, None)
    assert SAID == ["one before", "owner", "one after"]
    assert bindings


@pytest.mark.parametrize(
    "call",
    [
        lambda owner: owner.backward(),
        lambda owner: owner.backward(1, 2, 3, 4),
        lambda owner: owner.backward(1, loss=1),
        lambda owner: owner.backward(1, argument={}),
    ],
)
def test_wrong_arguments_are_a_type_error_wrapped_or_not(call: Callable[[Any], None]) -> None:
    """What a hook call would leave out is not ignored."""
    owner = Owner()
    bindings = bind(owner, Speaker("one"))
    with pytest.raises(TypeError):
        call(owner)
    bindings.undo()
    with pytest.raises(TypeError):
        call(owner)


def test_the_facade_gives_back_what_the_user_gave(in_memory: dict[str, Any]) -> None:
    """``fabric.strategy`` is the very instance, wrapped or not, and as before once it is torn down."""
    owner = Owner()
    with Fabric(**{**in_memory, "strategy": owner, "plugins": [Speaker("one")]}) as fabric:
        assert fabric.strategy is owner
        assert "backward" in vars(owner)
    assert set(vars(owner)) == {"options"}


def test_a_construction_that_fails_leaves_the_instance_as_it_was(in_memory: dict[str, Any]) -> None:
    """What was bound before the failure is undone."""
    owner = Owner()
    with pytest.raises(FabricError):
        Fabric(**{**in_memory, "strategy": owner, "precision": "absent", "plugins": [Speaker("one")]})
    assert set(vars(owner)) == {"options"}


def test_an_accelerator_strategy_or_precision_belongs_to_one_living_fabric(in_memory: dict[str, Any]) -> None:
    """A second one is an error that says so; one that is torn down, or gone, releases it."""
    owner = Owner()
    first = Fabric(**{**in_memory, "strategy": owner})
    with pytest.raises(MisuseError, match="belongs to another Fabric"):
        Fabric(**{**in_memory, "strategy": owner})
    first.teardown()
    second = Fabric(**{**in_memory, "strategy": owner})
    with pytest.raises(MisuseError, match="belongs to another Fabric"):
        first.launch()
    del second
    third = Fabric(**{**in_memory, "strategy": owner})
    cycle = [third]
    cycle.append(cycle)  # type: ignore[arg-type]
    del third, cycle
    Fabric(**{**in_memory, "strategy": owner})


class _Logging:
    @around.logger
    def log_metrics(self) -> Generator[None, Any, Any]:
        SAID.append("logged")
        return (yield)


def test_loggers_are_shared_unless_an_extension_wraps_them(in_memory: dict[str, Any]) -> None:
    """Only what is really wrapped belongs to one ``Fabric``."""
    logger = in_memory["loggers"]
    plain = [Fabric(**in_memory), Fabric(**in_memory)]
    wrapped = Fabric(**{**in_memory, "plugins": [_Logging()]})
    with pytest.raises(MisuseError, match="this logger belongs to another Fabric"):
        Fabric(**{**in_memory, "plugins": [_Logging()]})
    SAID.clear()
    wrapped.log("loss", 1.0)
    assert (SAID, logger.rows) == (["logged"], [({"loss": 1.0}, None)])
    assert plain


class Travelling(Owner):
    def __reduce__(self) -> Any:
        return copyreg.__newobj__, (type(self),), self.__getstate__()  # type: ignore[attr-defined]


@pytest.mark.parametrize("cls", [Owner, Travelling])
def test_a_pickled_plugin_leaves_its_bindings_behind(cls: type[Owner]) -> None:
    """It travels as its options, or as its attributes without those that lead through extensions."""
    owner = cls()
    bindings = bind(owner, Speaker("one"))
    again = pickle.loads(pickle.dumps(owner))  # noqa: S301 - made here
    assert set(vars(again)) == {"options"}
    assert bindings


def test_a_fabric_that_was_torn_down_binds_again_when_it_launches_again(in_memory: dict[str, Any]) -> None:
    """Its extensions are not lost in silence."""
    SAID.clear()
    owner = Owner()
    fabric = Fabric(**{**in_memory, "strategy": owner, "plugins": [Speaker("one")]})
    fabric.launch()
    fabric.teardown()
    fabric.launch()
    owner.backward(torch.ones(()), None, {})
    assert SAID == ["one before", "owner", "one after"]
    fabric.teardown()


class Changer:
    @around.strategy
    def data_shard(self) -> Generator[None, Any, Any]:
        index, count = yield
        return index + 1, count + 1

    @around.strategy
    def clip_grad_value(self, clip_value: float) -> Generator[None, Any, Any]:
        try:
            return (yield)
        except LookupError as error:
            return str(error)


def test_an_extension_may_change_the_result_and_catch_what_the_owner_raised() -> None:
    """What the generator returns is the result; what the owner raises comes out of ``yield``."""
    owner = Owner()
    owner.collectives = SingleProcess()
    bindings = bind(owner, Changer())
    assert owner.data_shard() == (1, 2)
    assert owner.clip_grad_value([], 3.0) == "3.0"  # type: ignore[func-returns-value]
    assert bindings


class _Misspelt:
    @around.strategy
    def bakward(self, loss: Any) -> Generator[None, Any, Any]:
        return (yield)


class _WrongArgument:
    @around.strategy
    def backward(self, los: Any) -> Generator[None, Any, Any]:
        return (yield)


class _Default:
    @around.strategy
    def backward(self, loss: Any = None) -> Generator[None, Any, Any]:
        return (yield)


class _NoYield:
    @around.strategy
    def backward(self, loss: Any) -> None:
        pass


class _UnknownHook:
    @hookimpl
    def launchd(self, world: World) -> None:
        pass


class _HookArgument:
    @hookimpl
    def launched(self, word: World) -> None:
        pass


class _Silent:
    def backward(self, loss: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("extension", "error", "message"),
    [
        (_Misspelt(), QuarantinedError, "did you mean backward(self, loss, module, arguments)?"),
        (_WrongArgument(), QuarantinedError, "arguments that the behaviour doesn't have: los"),
        (_Default(), QuarantinedError, "has default values"),
        (_NoYield(), QuarantinedError, "doesn't yield"),
        (_UnknownHook(), QuarantinedError, "launched(self, fabric, world)"),
        (_HookArgument(), QuarantinedError, "word"),
        (_Silent(), RequestError, "@around.<kind> or @hookimpl"),
        (_Silent, RequestError, "_Silent()"),
        ("launcher", RequestError, "the kind before the name"),
        (3, RequestError, "neither a plugin nor an extension"),
    ],
)
def test_a_wrong_extension_fails_at_construction(
    in_memory: dict[str, Any], extension: Any, error: type[FabricError], message: str
) -> None:
    """Misspelt, wrong arguments, nothing marked, no object: each says what to write instead."""
    with pytest.raises(error) as caught:
        Fabric(**{**in_memory, "plugins": [*in_memory["plugins"], extension]})
    assert message in str(caught.value)


def test_an_extension_given_twice_is_an_error(in_memory: dict[str, Any]) -> None:
    """The same object would go round twice, which nobody means."""
    one = Changer()
    with pytest.raises(RequestError, match="one extension twice"):
        Fabric(**{**in_memory, "plugins": [one, one]})


def test_a_kind_that_is_not_there_cannot_be_wrapped() -> None:
    """``@around.stratgy`` fails where it is written."""
    with pytest.raises(AttributeError, match="there is no kind 'stratgy' to wrap; there are: accelerator, strategy"):
        around.stratgy  # noqa: B018


class _Few(Owner):
    def backward(self, loss: torch.Tensor) -> None:  # type: ignore[override]
        pass


def test_an_instance_that_breaks_the_signature_is_refused(in_memory: dict[str, Any]) -> None:
    """An instance never passed the registry, so that binding checks it."""
    with pytest.raises(QuarantinedError) as caught:
        Fabric(**{**in_memory, "strategy": _Few()})
    assert "got:     backward(self, loss" in str(caught.value)
    assert "instead: backward(self, loss, module, arguments), without default values" in str(caught.value)


class _Devices:
    @around.accelerator
    def parse_devices(self) -> Generator[None, Any, Any]:
        yield
        return [1]


def test_an_extension_goes_round_what_the_plan_asks_too(in_memory: dict[str, Any]) -> None:
    """Behaviours that resolution calls are wrapped as all others are."""
    fabric = Fabric(**{**in_memory, "plugins": [*in_memory["plugins"], _Devices()]})
    assert fabric.plan.device_indices == (1,)
    assert [choice.name for choice in fabric.plan.extensions] == ["_Devices"]


def test_a_sound_extension_passes_the_check() -> None:
    """Nothing is refused that keeps the rules."""
    check_extension(Speaker("one"))


def test_tracing_prints_each_call(
    in_memory: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With FABRIC_TRACE=1 each contract call is a line with rank, plugin and time; what raised says so."""
    monkeypatch.setenv("FABRIC_TRACE", "1")
    with Fabric(**in_memory) as fabric:
        fabric.launch()
        fabric.backward(torch.ones((), requires_grad=True))
        with pytest.raises(RuntimeError):
            fabric.backward(torch.ones(()))
    lines = [line for line in capsys.readouterr().err.splitlines() if "Alone.backward" in line]
    assert len(lines) == 2
    assert lines[0].startswith("[fabric, rank 0] strategy Alone.backward: ")
    assert lines[0].endswith(" ms")
    assert lines[1].endswith(", raised RuntimeError")


class _Everything:
    """Goes round the façade's acts and collectives, and listens to all that happens."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    @around.fabric
    def setup(self, module: nn.Module) -> Generator[None, Any, Any]:
        self.seen.append(f"setup {type(module).__name__}")
        return (yield)

    @around.fabric
    def backward(self, tensor: torch.Tensor) -> Generator[None, Any, Any]:
        self.seen.append(f"backward {tensor.item():g}")
        return (yield)

    @around.fabric
    def step(self) -> Generator[None, Any, Any]:
        self.seen.append("step")
        result = yield
        self.seen.append("after step")
        return result

    @around.fabric
    def save(self, path: Any) -> Generator[None, Any, Any]:
        self.seen.append(f"save {path}")
        return (yield)

    @around.fabric
    def load(self) -> Generator[None, Any, Any]:
        self.seen.append("load")
        return (yield)

    @around.collectives
    def barrier(self, name: str | None) -> Generator[None, Any, Any]:
        self.seen.append(f"barrier {name}")
        return (yield)

    @hookimpl
    def optimizer_set_up(self, optimizer: Any) -> None:
        self.seen.append(f"set up {type(optimizer).__name__}")

    @hookimpl
    def stepped(self, fabric: Fabric) -> None:
        self.seen.append(f"stepped on rank {fabric.global_rank}")

    @hookimpl
    def checkpoint_loaded(self, path: Any) -> None:
        self.seen.append(f"loaded {path}")

    @hookimpl
    def failed(self, error: BaseException) -> None:
        self.seen.append(f"failed by {error!r}")

    @hookimpl
    def torn_down(self) -> None:
        self.seen.append("torn down")


def test_an_extension_goes_round_the_facades_acts_and_hears_what_happens(in_memory: dict[str, Any]) -> None:
    """Setup, backward, step, save, load and collectives; a failure and the end too."""
    extension = _Everything()
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    plugins = [*in_memory["plugins"], extension]
    with pytest.raises(ZeroDivisionError), Fabric(**{**in_memory, "plugins": plugins}) as fabric:  # noqa: PT012
        wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.5))
        fabric.backward(wrapped(torch.ones(1, 1)).sum())
        optimizer.step()
        assert model.weight.item() == 0.5
        fabric.barrier("here")
        fabric.save("there", {"model": wrapped})
        fabric.load("there", {"model": wrapped})
        raise ZeroDivisionError("at last")
    assert extension.seen == [
        "setup Linear", "set up FabricSGD", "backward 1", "step", "stepped on rank 0", "after step", "barrier here",
        "save there", "load", "loaded there", "failed by ZeroDivisionError('at last')", "torn down",
    ]  # fmt: skip


class Everywhere:
    """Goes round all behaviours."""

    @around.every
    def call(self, behaviour: str) -> Generator[None, None, None]:
        SAID.append(f"{behaviour} begins")
        try:
            yield
        finally:
            SAID.append(f"{behaviour} ends")


def test_one_method_goes_round_every_behaviour() -> None:
    """It is told the name, outside of what wraps the one behaviour, also where that raises; letting go restores all."""
    owner = Owner()
    before = dict(vars(owner))
    SAID.clear()
    bindings = bind(owner, Everywhere(), Speaker("one"))
    owner.backward(torch.ones(()), None, {})
    assert SAID == ["strategy.backward begins", "one before", "owner", "one after", "strategy.backward ends"]
    with pytest.raises(LookupError):
        owner.clip_grad_value([], 1.0)
    assert SAID[-2:] == ["strategy.clip_grad_value begins", "strategy.clip_grad_value ends"]
    bindings.undo()
    assert vars(owner) == before


def test_a_method_round_everything_takes_the_name_alone() -> None:
    """Other arguments, or no `yield`, are errors at once."""

    class Strange:
        @around.every
        def call(self, module: nn.Module) -> Generator[None, None, None]:
            yield

    class Plain:
        @around.every
        def call(self, behaviour: str) -> None: ...

    for extension, said in ((Strange(), "behaviour"), (Plain(), "yield")):
        with pytest.raises(QuarantinedError, match=said):
            check_extension(extension)
