"""What was asked and what there is become a plan with a reason for each choice, or an error with the way out."""

import json
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, ClassVar

import pytest
import torch

from fabric_core import Accelerator, Fabric, Launcher, Precision, Strategy, Wrapper
from fabric_core.choosing.offers import Offer
from fabric_core.choosing.registry import Registry, registered
from fabric_core.choosing.request import Request
from fabric_core.choosing.resolve import Candidate, resolve
from fabric_core.collectives import Collectives, SingleProcess
from fabric_core.contracts import (
    AcceleratorCapabilities,
    LaunchOrder,
    Plugin,
    PrecisionCapabilities,
    PrecisionPolicy,
    ProcessInfo,
    StrategyCapabilities,
    World,
    WrapperCapabilities,
)
from fabric_core.errors import (
    ConflictError,
    DeviceError,
    FabricError,
    FabricWarning,
    LaunchError,
    PlanError,
    QuarantinedError,
    RequestError,
    UnavailableError,
)


class Host(Accelerator):
    """A processor; computes in every type."""

    @property
    def device_type(self) -> str:
        return "cpu"

    @property
    def process_group_backend(self) -> str:
        return "none"

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 4

    def devices(self, indices: Sequence[int]) -> list[torch.device]:
        return [torch.device("cpu") for _ in indices]

    def supports(self, dtype: torch.dtype) -> bool:
        return True


class Board(Host):
    """A device without 16-bit floats, which a forked process can't use once this one has."""

    capabilities = AcceleratorCapabilities(start_methods=frozenset({"spawn"}))
    started: ClassVar[bool] = False

    @property
    def device_type(self) -> str:
        return "board"

    def supports(self, dtype: torch.dtype) -> bool:
        return dtype is not torch.float16

    def is_started(self) -> bool:
        return self.started


class Absent(Host):
    """A device that isn't in this machine."""

    def is_available(self) -> bool:
        return False


class _Strategy(Strategy):
    def connect(self, world: World, policy: PrecisionPolicy) -> Collectives:
        return SingleProcess()


class Alone(_Strategy):
    """One process."""

    capabilities = StrategyCapabilities(max_world_size=1)


class Copies(_Strategy):
    """Any number of processes."""

    capabilities = StrategyCapabilities(distributed=True)


class Forks(_Strategy):
    """Several processes, forked."""

    capabilities = StrategyCapabilities(distributed=True, min_world_size=2)

    @property
    def start_method(self) -> str | None:
        return "fork"


class Shards(_Strategy):
    """Carries out the policy itself, and can't scale a loss."""

    capabilities = StrategyCapabilities(
        distributed=True,
        sharded=True,
        applies_mixed_precision=True,
        loss_scaling=False,
        min_world_size=2,
        device_types=frozenset({"cpu", "board"}),
    )


class Singles(_Strategy):
    """Trains parameters of 32 bits alone."""

    capabilities = StrategyCapabilities(param_dtypes=frozenset({"float32"}))


class Full(Precision):
    """Nothing changes."""

    @property
    def policy(self) -> PrecisionPolicy:
        return PrecisionPolicy()


class Half(Precision):
    """16 bits with a scaled loss."""

    @property
    def policy(self) -> PrecisionPolicy:
        return PrecisionPolicy(compute_dtype=torch.float16, autocast=True, loss_scaling=True)


class Brain(Precision):
    """The other 16 bits."""

    @property
    def policy(self) -> PrecisionPolicy:
        return PrecisionPolicy(compute_dtype=torch.bfloat16, autocast=True)


class Tricky(Precision):
    """Computes in 16 bits in a way of its own."""

    @property
    def policy(self) -> PrecisionPolicy:
        return PrecisionPolicy(compute_dtype=torch.bfloat16)


class OnBoard(Precision):
    """For one device type."""

    capabilities = PrecisionCapabilities(device_types=frozenset({"board"}))

    @property
    def policy(self) -> PrecisionPolicy:
        return PrecisionPolicy()


class Whole(Wrapper):
    """Can't do shards."""

    capabilities = WrapperCapabilities(supports_sharded_parameters=False, after=frozenset({"early"}))


class Early(Wrapper):
    """Comes first."""


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stand in for a machine on which only these plugins are installed."""
    offers: dict[str, dict[str, Any]] = {
        "accelerator": {"host": Host, "board": Board, "absent": Absent},
        "strategy": {"alone": Alone, "copies": Copies, "forks": Forks, "shards": Shards},
        "precision": {"full": Full, "half": Half, "brain": Brain, "tricky": Tricky, "on_board": OnBoard},
        "wrapper": {"whole": Whole, "early": Early},
    }
    priorities = {"host": 1, "board": 2, "absent": 9, "alone": 3, "copies": 2, "shards": 1, "full": 5}
    nothing = Registry([])
    monkeypatch.setattr("fabric_core.assembly.Registry", lambda **_: nothing)
    with ExitStack() as stack:
        for kind, plugins in offers.items():
            for name, plugin in plugins.items():
                stack.enter_context(registered(kind, name, plugin, auto=priorities.get(name, 0)))
        yield


class Never(Launcher):
    """Starts nothing."""

    def detect(self, environment: Mapping[str, str]) -> ProcessInfo | None:
        return None

    def start(self, order: LaunchOrder) -> Any:
        raise AssertionError("it must not come to this")


CLASHES = {
    "too many devices for the strategy": (
        {"accelerator": "host", "strategy": "alone", "devices": 2},
        "it declares at most 1 process, and there would be 2",
        'strategy="copies" or strategy="shards" or devices=1',
    ),
    "too few devices for the strategy": (
        {"accelerator": "host", "strategy": "shards", "devices": 1},
        "it declares at least 2 processes, and there would be 1",
        'strategy="alone" or strategy="copies" or devices=2',
    ),
    "half precision on hardware without it": (
        {"accelerator": "board", "devices": 1, "precision": "half"},
        "it computes in torch.float16, which board doesn't support here",
        'precision="full" or precision="brain" or accelerator="host"',
    ),
    "a sharded strategy and a precision that it can't carry out": (
        {"accelerator": "host", "strategy": "shards", "devices": 2, "precision": "tricky"},
        "by other means than autocast, and the strategy shards declares to carry out the policy itself",
        'strategy="copies" or strategy="forks" or precision="full" or precision="brain"',
    ),
    "a strategy that can't scale the loss": (
        {"accelerator": "host", "strategy": "shards", "devices": 2, "precision": "half"},
        "it scales the loss, which the strategy shards declares not to support",
        'strategy="copies" or strategy="forks" or precision="full" or precision="brain"',
    ),
    "a precision for another device type": (
        {"accelerator": "host", "devices": 1, "precision": "on_board"},
        "it declares the device types board, and the accelerator's is cpu",
        'precision="full" or precision="brain" or accelerator="board"',
    ),
    "a wrapper that can't do shards": (
        {"accelerator": "host", "strategy": "shards", "devices": 2, "wrappers": ["early", "whole"]},
        "it declares not to work with a strategy that shards, and shards does",
        'strategy="copies" or strategy="forks" or wrappers without \'whole\'',
    ),
    "hardware that is not there": (
        {"accelerator": "absent", "devices": 1},
        "no cpu device can be used here",
        'accelerator="board" or accelerator="host"',
    ),
    "two things at once": (
        {"accelerator": "board", "strategy": "alone", "devices": 2, "precision": "half"},
        "it declares at most 1 process, and there would be 2",
        (
            'strategy="copies" with precision="full" or strategy="copies" with precision="brain"'
            ' or precision="full" with devices=1 or precision="brain" with devices=1'
        ),
    ),
}


@pytest.mark.parametrize(("request_", "clash", "way_out"), CLASHES.values(), ids=CLASHES)
def test_a_clash_names_the_declarations_and_the_nearest_requests_that_work(
    request_: dict[str, Any], clash: str, way_out: str
) -> None:
    """It fails at construction; what it proposes is computed by resolving it, and really works."""
    with pytest.raises((PlanError, UnavailableError)) as caught:
        Fabric(**request_)
    assert clash in str(caught.value.got)
    assert caught.value.instead == way_out
    for proposal in way_out.split(" or "):
        changed = dict(request_)
        for part in proposal.split(" with "):
            name, _, value = part.partition("=")
            if name.startswith("wrappers"):
                changed["wrappers"] = ["early"]
            else:
                changed[name] = int(value) if value.isdecimal() else value.strip('"')
        Fabric(**changed)


def test_a_proposal_names_nothing_that_was_left_to_the_automatic_choice() -> None:
    """An accelerator that only its name chooses would serve the strategy, but the user has named none."""

    class Aside(Host):
        @property
        def device_type(self) -> str:
            return "aside"

    class Only(_Strategy):
        capabilities = StrategyCapabilities(device_types=frozenset({"aside"}))

    with registered("strategy", "only", Only), registered("accelerator", "aside", Aside):
        with pytest.raises(PlanError) as caught:
            Fabric(strategy="only", devices=1)
        assert caught.value.instead == 'strategy="alone" or strategy="copies"'
        Fabric(accelerator="aside", strategy="only", devices=1).teardown()


def test_forking_after_the_device_started_is_refused_at_construction_and_at_launch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A device that this process has used can't be used by one that is forked from it."""
    early = Fabric(accelerator="board", strategy="forks", devices=2, plugins=[Never()])
    monkeypatch.setattr(Board, "started", True)
    with pytest.raises(PlanError) as caught:
        Fabric(accelerator="board", strategy="forks", devices=2)
    assert "it starts processes by fork, this process has used board already" in str(caught.value.got)
    assert caught.value.instead == 'strategy="copies" or strategy="shards" or accelerator="host"'
    Fabric(accelerator="host", strategy="forks", devices=2)
    with pytest.raises(LaunchError, match="this process has used board already"):
        early.launch()


def test_wrappers_in_a_wrong_order_are_refused() -> None:
    """A declared order is kept; the message says which to move."""
    with pytest.raises(PlanError, match="'whole' must come after 'early'") as caught:
        Fabric(accelerator="host", devices=1, wrappers=["whole", "early"])
    assert caught.value.instead == "put 'early' before 'whole'"
    assert [choice.name for choice in Fabric(accelerator="host", wrappers=["early", "whole"]).plan.wrappers] == [
        "early",
        "whole",
    ]


def test_auto_takes_the_highest_priority_that_fits_and_says_why_not_the_others() -> None:
    """The plan has a reason for every choice, and one for everything that was not chosen."""
    plan = Fabric(devices=2).plan
    assert [choice.name for choice in plan.choices] == ["board", "copies", "full"]
    assert dict(plan.accelerator.rejected) == {
        "absent": "no cpu device can be used here",
        "host": "its priority is 1, and that of board is 2",
    }
    assert dict(plan.strategy.rejected) == {
        "alone": "it declares at most 1 process, and there would be 2",
        "shards": "its priority is 1, and that of copies is 2",
        "forks": "its priority is 0, and that of copies is 2",
    }
    assert plan.strategy.reason == "the highest priority that fits, for 2 processes on board"
    assert Fabric(devices=2, strategy="shards").plan.strategy.reason == "named in the request"


def test_a_plan_is_the_same_whatever_the_order_of_the_offers() -> None:
    """Ranks see their folders in different orders, and must come to the same plan."""
    request = Request.of(devices=1)
    made = {
        "accelerator": [Candidate.of("accelerator", "host", "core", Host())],
        "strategy": [Candidate.of("strategy", name, "core", Alone()) for name in "cab"],
        "precision": [Candidate.of("precision", name, "core", Full()) for name in "ba"],
    }
    backwards = {kind: candidates[::-1] for kind, candidates in made.items()}
    assert resolve(request, made)[0].as_dict()["choices"][1]["name"] == "a"
    assert resolve(request, made)[0] == resolve(request, backwards)[0]


def test_auto_refuses_two_equals_of_one_name() -> None:
    """Which of two distributions' plugins of one name and one priority it would be, nobody could say."""
    twins = [Candidate.of("strategy", "alone", owner, Alone()) for owner in ("one 1.0", "two 1.0")]
    made = {
        "accelerator": [Candidate.of("accelerator", "host", "core", Host())],
        "strategy": twins,
        "precision": [Candidate.of("precision", "full", "core", Full())],
    }
    with pytest.raises(ConflictError, match="2 distributions offer the strategy 'alone'"):
        resolve(Request.of(devices=1), made)


def test_auto_never_skips_a_broken_plugin_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """What can't be loaded is warned of and stands in the plan; as an error where warnings are errors."""
    broken = Registry([Offer("accelerator", "broken", "acme", "1.0", "gone.away:Thing", auto=50)])
    monkeypatch.setattr("fabric_core.assembly.Registry", lambda **_: broken)
    with pytest.warns(FabricWarning, match="the accelerator 'broken' of acme 1.0 was left out"):
        plan = Fabric(devices=1).plan
    assert "No module named 'gone'" in dict(plan.accelerator.rejected)["broken"]
    with pytest.raises(FabricWarning):
        Fabric(devices=1)


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        ({"strategy": "auto:speed=1"}, RequestError, "takes no options"),
        ({"plugins": ["strategy=alone"]}, RequestError, "Fabric(strategy=...)"),
        ({"plugins": ["launcher=a", "launcher=b"]}, RequestError, "given twice"),
        ({"plugins": [{"kind": "lancher", "name": "a"}]}, RequestError, "no such kind"),
        ({"devices": [0, 0]}, DeviceError, "twice"),
        ({"devices": 5}, DeviceError, "there are 4"),
        ({"devices": 100_000_000}, DeviceError, "at most 65,536"),
        ({"devices": 10**30}, DeviceError, "at most 65,536"),
        ({"devices": range(10**12)}, DeviceError, "at most 65,536"),
        ({"devices": range(10**30)}, DeviceError, "at most 65,536"),
        ({"devices": "0," * 10**6}, DeviceError, "twice"),
        ({"devices": b"1"}, RequestError, "devices can't be parsed"),
        ({"num_nodes": 10**9}, RequestError, "at most 1,000,000"),
        ({"num_nodes": 10**30}, RequestError, "at most 1,000,000"),
        ({"strategy": Full()}, RequestError, "is no Strategy"),
    ],
)
def test_a_wrong_request_says_what_to_write(request_: dict[str, Any], error: type[FabricError], message: str) -> None:
    """Each fails at construction."""
    with pytest.raises(error) as caught:
        Fabric(**{"accelerator": "host", **request_})
    assert message in str(caught.value)
    assert len(str(caught.value)) < 1_000


def test_plugins_may_name_a_kind_without_an_argument_of_its_own() -> None:
    """A precision in ``plugins``, as text, as a mapping, and as an instance, is the precision."""
    for precision in ("precision=brain", {"kind": "precision", "name": "brain"}, Brain()):
        fabric = Fabric(accelerator="host", devices=1, plugins=[precision])
        assert fabric.precision.policy.compute_dtype is torch.bfloat16


def test_a_plan_is_data() -> None:
    """It pickles, compares, and holds no plugin; options are plain values, alike on every rank."""
    made = [Fabric(accelerator="host", devices=2, strategy="shards", precision=Full()).plan for _ in range(2)]
    assert made[0] == made[1] == pickle.loads(pickle.dumps(made[0]))  # noqa: S301 - made here
    assert made[0] != Fabric(accelerator="host", devices=3, strategy="shards").plan
    assert json.loads(json.dumps(made[0].as_dict())) == made[0].as_dict()
    assert not any(isinstance(value, Plugin) for choice in made[0].choices for value in vars(choice).values())


def test_a_plan_prints_itself() -> None:
    """One line for each choice, with distribution and reason, then the devices."""
    lines = str(Fabric(accelerator="host", devices=[1, 3], strategy="shards", precision="brain").plan).splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["accelerator", "host"],
        ["strategy", "shards"],
        ["precision", "brain"],
        ["devices", "1,"],
    ]
    assert lines[1].endswith("named in the request")
    assert lines[3].endswith("2 processes on 1 node")


def test_a_plan_is_a_table_in_a_notebook() -> None:
    """With the same rows, and nothing that a page would take for markup."""
    html = Fabric(accelerator="host", devices=1, precision="full").plan._repr_html_()
    assert "<td>strategy</td><td>alone</td>" in html
    assert "(this process)" in html
    assert html.count("<tr>") == 5


def test_a_variable_and_a_file_fill_what_code_leaves_at_its_default(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code beats variables, variables beat the file; the plan says where each choice was named."""
    path = tmp_path / "run.toml"
    path.write_text('accelerator = "host"\nstrategy = "copies"\nprecision = "brain"\ndevices = 2\n')
    monkeypatch.setenv("FABRIC_STRATEGY", "shards")
    plan = Fabric.from_config(path, precision="full").plan
    assert [choice.name for choice in plan.choices] == ["host", "shards", "full"]
    assert plan.strategy.reason == "named in FABRIC_STRATEGY"
    assert plan.accelerator.reason == f"named in {path}: accelerator"
    assert plan.precision.reason == "named in the request"
    assert Fabric(accelerator="host", devices=2).plan.strategy.name == "shards"


class _Wrong(Host):
    device_type = 3  # type: ignore[assignment]


class _Raising(Host):
    @property
    def process_group_backend(self) -> str:
        raise LookupError("no driver")


class _Starts(Alone):
    start_method = 3  # type: ignore[assignment]


class _Policy(Full):
    policy = "half"  # type: ignore[assignment]


class _Capable(Alone):
    capabilities = {"sharded": True}  # type: ignore[assignment] # noqa: RUF012 - what is wrong with it


class _Indices(Host):
    def parse_devices(self, spec: Any) -> Any:
        return ["0"]


class _Perhaps(Host):
    def is_available(self) -> Any:
        return "perhaps"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"accelerator": _Wrong()}, "_Wrong.device_type is 3, and must be of the type str"),
        ({"accelerator": _Raising()}, "its process_group_backend failed: LookupError('no driver')"),
        ({"strategy": _Starts()}, "_Starts.start_method is 3, and must be of the type str or NoneType"),
        ({"precision": _Policy()}, "_Policy.policy is 'half', and must be of the type PrecisionPolicy"),
        ({"strategy": _Capable()}, "_Capable.capabilities is {'sharded': True}"),
        ({"accelerator": _Indices()}, "parse_devices gave ['0'], and must give at least one whole number"),
        ({"accelerator": _Perhaps()}, "is_available() gave 'perhaps', and no bool"),
    ],
)
def test_an_instance_that_declares_what_is_of_the_wrong_type_fails_by_name(given: dict[str, Any], message: str) -> None:
    """The error names the instance, the property and the type."""
    with pytest.raises(QuarantinedError) as caught:
        Fabric(**{"accelerator": "host", "devices": 1, **given})
    assert message in str(caught.value)


class Wide(Precision):
    """Parameters of 64 bits."""

    @property
    def policy(self) -> PrecisionPolicy:
        return PrecisionPolicy(param_dtype=torch.float64)


def test_a_strategy_that_does_not_train_the_types_of_a_precision() -> None:
    """It is refused when it is made; the message names both and what goes instead."""
    with registered("strategy", "singles", Singles), registered("precision", "wide", Wide):
        with pytest.raises(PlanError) as caught:
            Fabric(accelerator="host", strategy="singles", devices=1, precision="wide")
        assert (
            "its parameters are of the type torch.float64, and the strategy singles declares to train float32 alone"
            in str(caught.value)
        )
        assert 'precision="full"' in str(caught.value.instead)
        Fabric(accelerator="host", strategy="singles", devices=1, precision="full").teardown()
