"""The table of Lightning Fabric's names says what the installed Lightning has, and what is so here."""

import importlib.util
import inspect
import re
import socket
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fabric_core import Fabric
from fabric_core.contracts import Plugin

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("lightning.fabric", reason="the extra bench installs it")

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's


def _names() -> Any:
    spec = importlib.util.spec_from_file_location("lightning_names", Path(__file__).with_name("lightning_names.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NAMES = _names()
ROWS = list(NAMES.rows())
SAME = [row for row in ROWS if row.verdict[0] == "same"]


def test_the_page_is_what_the_installed_lightning_says() -> None:
    """Every name stands there, once, with its verdict."""
    assert NAMES.PAGE.read_text(encoding="utf-8") == NAMES.page(), f"write it anew: python {NAMES.__file__}"


def test_most_of_what_programs_write_is_the_same() -> None:
    """At least 95 of 100; and every judgement is about a name that there is."""
    differs = [row for row in ROWS if row.verdict[0] == "differs"]
    assert len(SAME) >= 0.95 * (len(SAME) + len(differs))
    for judged in (NAMES.OUT_OF_SCOPE, NAMES.DIFFERS):
        for pattern in judged:
            assert any(NAMES.fnmatchcase(row.name, pattern) for row in ROWS), pattern


def ours(row: Any) -> Any:
    """Find a name here; of a property the property itself."""
    found: Any = importlib.import_module(NAMES.HOMES[row.module])
    for name in row.path:
        found = inspect.getattr_static(found, name) if inspect.isclass(found) else getattr(found, name)
    return getattr(found, "__func__", found)


def arguments(function: Any) -> list[str]:
    """List the names of what a function, or a class, takes, without what it is bound to."""
    function = inspect.unwrap(function.__init__ if inspect.isclass(function) else function)
    code = getattr(function, "__code__", None)
    if code is None:
        return list(inspect.signature(function).parameters)
    count = code.co_argcount + code.co_kwonlyargcount
    return [name for name in code.co_varnames[:count] if name not in {"self", "cls"}]


VALUES: dict[str, Any] = {
    "timeout": timedelta(seconds=5), "process_group_backend": "gloo", "start_method": "spawn", "cpu_offload": True,
    "activation_checkpointing_policy": {nn.Linear}, "sharding_strategy": "FULL_SHARD", "device_mesh": (1, 2),
    "data_parallel_size": 1, "tensor_parallel_size": 1,
}  # fmt: skip


@pytest.mark.parametrize("row", SAME, ids=[row.name for row in SAME])
def test_what_is_the_same_is_here(row: Any) -> None:
    """The name is there; an argument has its name, and its place where it can be given by position."""
    if row.name.startswith(("accelerator=", "strategy=", "precision=")):
        given = {"accelerator": "cpu", "devices": 1, row.argument: row.path[0]}
        if row.argument == "accelerator" and row.path[0] not in {"auto", "cpu"}:
            assert row.path[0] in {"cuda", "gpu", "mps"}  # whose devices this machine may not have
            return
        assert Fabric(**given).plan
        return
    if row.module.endswith("wrappers") and len(row.path) > 1:
        found = getattr(_wrapped()[row.path[0]], row.path[1])
        if row.argument and row.name != "_FabricOptimizer.load_state_dict(state_dict)":  # which passes all on
            assert row.argument in arguments(getattr(found, "__func__", found))
        return
    found = ours(row)
    if not row.argument or row.name == "rank_zero_info(stacklevel)":  # which it passes on with all other keywords
        return
    if inspect.isclass(found) and issubclass(found, Plugin) and row.module.endswith("strategies"):
        needed = {"parallelize_fn": print} if "Model" in row.name else {}
        assert found(**{**needed, row.argument: VALUES.get(row.argument, print)})
    elif inspect.isclass(found) and issubclass(found, Plugin):
        assert row.argument in {*found.Options.model_fields, *inspect.signature(found).parameters}
    else:
        names = arguments(found)
        assert row.argument in names
        assert row.positional is None or names.index(row.argument) == row.positional


def _wrapped() -> dict[str, Any]:
    fabric = Fabric(accelerator="cpu", devices=1)
    bare = nn.Linear(2, 1)
    model, optimizer = fabric.setup(bare, torch.optim.SGD(bare.parameters(), lr=0.1))
    loader = fabric.setup_dataloaders(DataLoader(TensorDataset(torch.ones(4, 2)), batch_size=2))
    return {"FabricModule": model, "FabricOptimizer": optimizer, "FabricDataLoader": loader}


def _apis(folder: Path) -> Iterator[SimpleNamespace]:
    """Give both libraries, with the same names."""
    for mine in (False, True):
        places = [home if mine else module for module, home in NAMES.HOMES.items()]
        found = SimpleNamespace(folder=folder / str(mine))
        for place in dict.fromkeys(places):
            module = importlib.import_module(place)
            vars(found).update({name: getattr(module, name) for name in dir(module) if not name.startswith("__")})
        found.folder.mkdir()
        yield found


def _model() -> nn.Module:
    torch.manual_seed(7)
    return nn.Linear(3, 2)


def _processes(api: Any) -> Any:
    fabric = api.Fabric(accelerator="cpu", devices=1, num_nodes=1, strategy="auto", precision=None, plugins=None)
    launched = fabric.launch()
    tensor = torch.arange(3.0)
    with fabric.rank_zero_first(local=True):
        fabric.barrier("here")
    fabric.print("said")
    return [
        launched, str(fabric.device), fabric.global_rank, fabric.local_rank, fabric.node_rank, fabric.world_size,
        fabric.is_global_zero, fabric.broadcast({"a": 1}, src=0), fabric.all_gather({"t": tensor}, sync_grads=False),
        fabric.all_reduce([tensor, 2.0], reduce_op="sum"), fabric.to_device({"t": tensor}), bool(fabric.accelerator),
        bool(fabric.strategy),
    ]  # fmt: skip


def _training(api: Any) -> Any:
    fabric = api.Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    assert fabric.seed_everything(3, workers=True, verbose=False) == api.seed_everything(3, verbose=False)
    bare = _model()
    model, optimizer, schedule = fabric.setup(
        bare,
        optimizer := torch.optim.SGD(bare.parameters(), lr=0.1, momentum=0.9),
        scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 1),
        move_to_device=True,
    )
    other = fabric.setup_module(_model(), move_to_device=True)
    second = fabric.setup_optimizers(torch.optim.Adam(other.parameters()))
    data = TensorDataset(torch.arange(12.0).reshape(4, 3))
    loader = fabric.setup_dataloaders(DataLoader(data, batch_size=2), use_distributed_sampler=True, move_to_device=True)
    seen = [str(loader.device), str(model.device), model.module is bare, api.is_wrapped(model), api.is_wrapped(bare)]
    for (batch,) in loader:
        with fabric.no_backward_sync(model, enabled=True):
            fabric.backward(model(batch).sum(), retain_graph=True)
        fabric.backward(model(batch).sum(), model=model)
        seen.append(fabric.clip_gradients(model, optimizer, max_norm=0.5, norm_type=2, error_if_nonfinite=True))
        fabric.clip_gradients(model, optimizer, clip_val=0.1)
        optimizer.step(lambda: None)
        optimizer.zero_grad()
        schedule.step()
        with fabric.autocast():
            seen.append((batch @ batch.T).dtype)
        fabric.backward(other(batch).sum())
        second.step()
    model.mark_forward_method("extra_repr")
    seen += [model.forward(batch).dtype, isinstance(optimizer.optimizer, torch.optim.SGD), optimizer.state_dict()]
    optimizer.load_state_dict(optimizer.state_dict())
    seen.append(model.load_state_dict(model.state_dict(destination={}, prefix="", keep_vars=False), strict=True))
    with fabric.init_module(empty_init=False), fabric.init_tensor():
        seen.append(nn.Linear(2, 2).weight.dtype)
    for move in (model.cpu, model.double, model.float, model.half):
        seen.append(next(move().parameters()).dtype)
    seen += [next(model.to(torch.float32).parameters()).dtype, next(model.type(torch.float64).parameters()).dtype]
    return [*seen, *(one.detach().float() for one in model.parameters()), *(one.detach() for one in other.parameters())]


def _saving(api: Any) -> Any:
    class Callback:
        def on_end(self, value: int, more: int = 0) -> None:
            seen.append((value, more))

    seen: list[Any] = []
    fabric = api.Fabric(accelerator="cpu", devices=1, callbacks=[Callback()])
    bare = _model()
    model, optimizer = fabric.setup(bare, torch.optim.SGD(bare.parameters(), lr=0.1))
    path = api.folder / "state.ckpt"
    fabric.save(path, {"model": model, "optimizer": optimizer, "step": 3}, filter={"model": lambda _, __: True})
    rest = fabric.load(path, {"model": model}, strict=True, weights_only=None)
    torch.save(bare.state_dict(), api.folder / "raw.pt")
    fabric.load_raw(api.folder / "raw.pt", model, strict=True)
    fabric.call("on_end", 1, more=2)
    fabric.call("on_nothing")
    return [sorted(rest), rest["step"], seen, sorted(fabric.load(path))]


def _running(api: Any) -> Any:
    class Own(api.Fabric):  # type: ignore[misc]
        def run(self, value: int) -> int:
            return value + 1

    return Own(accelerator="cpu", devices=1).run(2)


def _logging(api: Any) -> Any:
    csv = api.CSVLogger(api.folder, name="n", version=3, prefix="p", flush_logs_every_n_steps=1)
    board = api.TensorBoardLogger(
        api.folder, name="t", version=1, default_hp_metric=False, prefix="p", sub_dir="s", max_queue=5
    )
    seen: list[Any] = []
    for logger in (csv, board):
        logger.log_metrics({"a": 1.0, "b": torch.tensor(2)}, step=1)
        seen += [
            logger.name, logger.version, logger.group_separator, logger.LOGGER_JOIN_CHAR,
            str(Path(logger.log_dir).relative_to(api.folder)), Path(logger.root_dir).relative_to(api.folder),
            logger.experiment is not None,
        ]  # fmt: skip
    board.log_hyperparams(params={"lr": 0.1}, metrics={"best": 1.0}, step=0)
    board.log_graph(_model(), torch.ones(1, 3))
    seen += [board.sub_dir]
    for logger in (csv, board):
        logger.save()
        logger.finalize("success")
    fabric = api.Fabric(
        accelerator="cpu", devices=1, loggers=[api.CSVLogger(api.folder, "f", flush_logs_every_n_steps=1)]
    )
    fabric.log("one", 1, step=2)
    fabric.log_dict(metrics={"two": torch.tensor(2.0)}, step=2)
    fabric.logger.save()
    rows = (Path(fabric.loggers[0].log_dir) / "metrics.csv").read_text().splitlines()
    return [*seen, sorted(rows[0].split(",")), len(rows)]


def _utilities(api: Any) -> Any:
    throughput = api.Throughput(available_flops=100.0, world_size=2, window_size=2, separator="_")
    for step in range(1, 3):
        throughput.update(time=float(step), batches=step, samples=2 * step, lengths=8 * step, flops=10)
    fabric = api.Fabric(accelerator="cpu", devices=1)
    monitor = api.ThroughputMonitor(fabric, window_size=2)
    monitor.update(time=1.0, batches=1, samples=1)
    model = _model()
    words = api.AttributeDict(a=1)
    words.b = 2
    seen = [
        throughput.compute(), monitor.compute_and_log(step=1), monitor.compute(), dict(words), words.a,
        api.measure_flops(model, lambda: model(torch.ones(1, 3)), lambda out: out.sum()),
        api.move_data_to_device({"t": torch.ones(1)}, "cpu"), api.suggested_max_num_workers(1) > 0,
        api.is_shared_filesystem(fabric.strategy, path=api.folder, timeout=1),
        api.rank_zero_only(lambda: 3)(), api.rank_zero_only(lambda: 3, default=4)(),
    ]  # fmt: skip
    throughput.reset()
    monitor.reset()
    api.rank_zero_info("said", stacklevel=2)
    api.rank_zero_warn("warned", stacklevel=2)
    api.rank_zero_deprecation("old", stacklevel=2)
    return seen


def _collectives(api: Any) -> Any:
    tensor = torch.arange(2.0)
    seen: list[Any] = []
    alone = api.SingleDeviceCollective()
    seen += [
        alone.is_available(),
        alone.is_initialized(),
        alone.rank,
        alone.world_size,
        isinstance(alone, api.Collective),
    ]
    alone.setup().create_group()
    seen += [alone.all_reduce(tensor), alone.reduce(tensor), alone.broadcast(tensor), alone.gather(tensor)]
    seen += [
        alone.all_gather([tensor], tensor),
        alone.reduce_scatter(tensor, [tensor]),
        alone.scatter(tensor, [tensor]),
    ]
    seen += [alone.all_to_all([tensor], [tensor]), alone.recv(tensor), alone.send(tensor, 0), alone.barrier()]
    alone.teardown()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    one = api.TorchCollective()
    one.setup(main_address="127.0.0.1", main_port=port, backend="gloo", rank=0, world_size=1)
    one.create_group()
    objects: list[Any] = [None]
    seen += [one.is_available(), one.is_initialized(), one.rank, one.world_size, one.group is not None]
    seen += [one.all_reduce(tensor.clone(), op="sum"), one.reduce(tensor.clone(), dst=0, op="sum")]
    seen += [
        one.broadcast(tensor, src=0),
        one.all_gather([torch.zeros(2)], tensor),
        one.gather(tensor, [torch.zeros(2)]),
    ]
    seen += [one.scatter(torch.zeros(2), [tensor], src=0), one.all_gather_object(list(objects), {"a": 1})]
    seen += [one.broadcast_object_list([1], src=0), one.gather_object(2, list(objects), dst=0)]
    seen += [
        one.scatter_object_list(list(objects), [3], src=0),
        one.barrier(),
        one.monitored_barrier(wait_all_ranks=True),
    ]
    one.teardown()
    return seen


def _constructed(api: Any) -> Any:
    timeout = timedelta(seconds=30)
    made = [
        api.DDPStrategy(process_group_backend="gloo", timeout=timeout, start_method="popen", static_graph=True),
        api.FSDPStrategy(activation_checkpointing_policy={nn.Linear}, sharding_strategy="FULL_SHARD"),
        api.ModelParallelStrategy(parallelize_fn=print, data_parallel_size=1, tensor_parallel_size=1, timeout=timeout),
        api.SingleDeviceStrategy(),
        api.DoublePrecision(), api.HalfPrecision("bf16-true"), api.CPUAccelerator(),
        api.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8.0)),
    ]  # fmt: skip
    seen = [type(one.convert_input(torch.ones(1))) for one in made if hasattr(one, "convert_input")]
    with pytest.raises(ValueError, match="999"):
        api.find_usable_cuda_devices(999)
    return [*seen, api.CUDAAccelerator is not None]


CALLS = (_processes, _training, _saving, _running, _logging, _utilities, _collectives, _constructed)


@pytest.mark.parametrize("call", CALLS, ids=[one.__name__.strip("_") for one in CALLS])
def test_what_is_the_same_gives_the_same(call: Callable[[Any], Any], tmp_path: Path) -> None:
    """Called on both libraries, the names give equal results."""
    theirs, mine = (call(api) for api in _apis(tmp_path))
    torch.testing.assert_close(_plain(mine), _plain(theirs), rtol=1e-5, atol=1e-6)


def _plain(value: Any) -> Any:
    """Leave numbers, tensors and containers; of the rest its text is compared."""
    if isinstance(value, dict):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value if isinstance(value, torch.Tensor | float | int) else torch.tensor(list(str(value).encode()))


def test_every_name_that_is_the_same_is_called() -> None:
    """A name that Lightning adds needs a call above."""
    source = "".join(inspect.getsource(one) for one in CALLS)
    names = {row.path[-1] for row in SAME if not row.argument and not row.path[-1].startswith("Fabric")}
    unseen = {name for name in names if not re.search(rf"\b{name}\b", source)}
    # What setup, create_group and teardown call; what needs a GPU; a base class.
    assert unseen == {"Logger", "cuda", "destroy_group", "init_group", "new_group"}
