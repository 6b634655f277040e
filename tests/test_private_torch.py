"""Private and undocumented parts of PyTorch stand in one file per package, and each is tried with this release.

A test here that fails with a new release names the function that used the part, why, and what would replace it.
"""

import ast
import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from fabric_core import _torch as core
from fabric_plugins import _torch as plugins

ROOT = Path(__file__).parents[1]
FILES = sorted({*ROOT.glob("fabric_core/**/*.py"), *ROOT.glob("fabric_plugins/**/*.py")})


@contextmanager
def process_group() -> Iterator[None]:
    """Give a process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _process_groups() -> None:
    with process_group():
        assert core.process_groups() == [dist.group.WORLD]


def _backends_of() -> None:
    with process_group():
        assert core.backends_of(dist.group.WORLD)


def _after_backward() -> None:
    seen: list[str] = []
    x = torch.ones(1, requires_grad=True)
    y = x * 2
    y.register_hook(lambda _: core.after_backward(lambda: seen.append("over")))
    torch.autograd.backward(y)
    assert seen == ["over"]


def _backward_state() -> None:
    assert core.backward_state() is None
    core.set_backward_state("here")
    try:
        assert core.backward_state() == "here"
    finally:
        core.set_backward_state(None)


def _run_backward() -> None:
    named: list[dict[str, Any]] = [
        {},
        {"grad_tensors": torch.ones(1)},
        {"gradient": torch.ones(1), "retain_graph": True},
    ]
    for given in named:
        x = torch.ones(1, requires_grad=True)
        core.run_backward(2 * x, **given)
        assert x.grad == torch.tensor(2.0)
    x, y = (torch.ones(1, requires_grad=True) for _ in range(2))
    core.run_backward((x * y, y), (torch.ones(1), torch.ones(1)), inputs=[y])
    assert x.grad is None
    assert y.grad == torch.tensor(2.0)


def _in_backward() -> None:
    seen: list[bool] = []
    x = torch.ones(1, requires_grad=True)
    y = x * 2
    y.register_hook(lambda _: seen.append(core.in_backward()))
    torch.autograd.backward(y)
    assert seen == [True]
    assert not core.in_backward()


def _has_hooks() -> None:
    one = nn.Parameter(torch.ones(1))
    assert not core.has_hooks(one)
    for register in (one.register_hook, one.register_post_accumulate_grad_hook):
        handle = register(print)
        assert core.has_hooks(one)
        handle.remove()
        assert not core.has_hooks(one)


def _loading_hooks() -> None:
    module = nn.Linear(1, 1)
    module.register_load_state_dict_pre_hook(print)
    assert core.loading_hooks(module) == [nn.Module.load_state_dict, nn.Module._load_from_state_dict, print]


def _compiled() -> None:
    module = nn.Linear(1, 1)
    assert core.original_of(module) is module
    compiled = torch.compile(module, backend="eager")
    assert core.original_of(compiled) is plugins.original_of(compiled) is module
    assert plugins.original_of(module) is module
    other = nn.Linear(1, 1)
    assert core.original_of(core.compile_like(compiled, other)) is other


def _compiler() -> None:
    assert __import__(core.compiler(), fromlist=["OptimizedModule"]).OptimizedModule


def _fake_mode() -> None:
    with core.fake_mode():
        large = torch.ones(2**50)
        assert (large + large).untyped_storage().nbytes() == 2**52
        assert not large.is_meta


def _global_hooks() -> None:
    before = sum(core.global_hooks())
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert sum(core.global_hooks()) == before + 1
    finally:
        handle.remove()


class _Counter(core.DispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def _dispatch_mode() -> None:
    with _Counter() as counter:
        torch.ones(1).add(1)
    assert counter.count == 2


def _trees() -> None:
    tree = {"a": [1, "b"], "c": (2,)}
    leaves, structure = core.tree_flatten(tree)
    assert leaves == [1, "b", 2]
    assert core.tree_unflatten(leaves, structure) == tree
    assert [core.tree_is_leaf(one) for one in (tree, "b")] == [False, True]
    for package in (core, plugins):
        assert package.tree_map_only(int, str, tree) == {"a": ["1", "b"], "c": ("2",)}


def _reducers() -> None:
    with process_group():
        wrapped = DistributedDataParallel(nn.Linear(1, 1), find_unused_parameters=True)
        torch.autograd.backward(wrapped(torch.ones(1, 1)).sum())
        assert plugins.reduction_finished(wrapped.reducer)
        plugins.leave_reducer(wrapped)
        assert not hasattr(wrapped, "reducer")


def _static_reducers() -> None:
    with process_group():
        original = DistributedDataParallel(nn.Linear(1, 1), static_graph=True)
        torch.autograd.backward(original(torch.ones(1, 1)).sum())
        copied = copy.deepcopy(original)
        assert copied._static_graph_delay_allreduce_enqueued, "PyTorch's copies reduce now: nothing is to be done"
        plugins.expect_static_reduction(copied)
        torch.autograd.backward(copied(torch.ones(1, 1)).sum())
        assert copied._static_graph_delay_allreduce_enqueued
        for one in (original, copied):
            assert plugins.reduction_finished(one.reducer)
            plugins.leave_reducer(one)


def _units() -> None:
    with process_group():
        unit: Any = fully_shard(nn.Linear(1, 1), mesh=dist.init_device_mesh("cpu", (1,)))
        unit.set_requires_gradient_sync(False)
        torch.autograd.backward(unit(torch.ones(1, 1)).sum())
        parameters = set(unit.parameters())
        assert len(parameters) == 2
        assert len(plugins.unsynchronized(unit)) == 2
        plugins.clear_unsynchronized(unit, {id(one) for one in plugins.unsynchronized(unit)})
        assert plugins.unsynchronized(unit) == []


def _clear_groups() -> None:
    with process_group():
        mesh = dist.init_device_mesh("cpu", (1,), mesh_dim_names=("only",))
        assert mesh._pg_registry
        plugins.clear_groups(mesh)
        assert mesh._pg_registry == {}


def _storage_info() -> None:
    info = plugins.storage_info()("file", 1, 2)
    assert (info.relative_path, info.offset, info.length) == ("file", 1, 2)


def _apply_to_tensors() -> None:
    for package in (core, plugins):
        module = nn.Linear(1, 1)
        package.apply_to_tensors(module, torch.Tensor.double)
        assert module.weight.dtype is torch.float64


def _was_written() -> None:
    tensor = torch.empty(1)
    assert not plugins.was_written(tensor)
    assert plugins.was_written(tensor.fill_(1))


def _initializers() -> None:
    for module in (nn.Linear(1, 1), nn.MultiheadAttention(1, 1)):
        assert len(plugins.initializers(module)) == 1
    assert plugins.initializers(nn.ReLU()) == []


def _checkpoint_activations() -> None:
    module, count = nn.Sequential(nn.Linear(1, 1), nn.Tanh()), []
    module[0].register_forward_hook(lambda *_: count.append(1))
    plugins.checkpoint_activations(module)
    torch.autograd.backward(module(torch.ones(1, 1, requires_grad=True)).sum())
    assert len(count) == 2
    assert list(module.state_dict()) == ["0.weight", "0.bias"]


def _attention_operators() -> None:
    assert all(isinstance(one, torch._ops.OpOverload) for one in plugins.attention_operators())


def _print_options() -> None:
    assert core.print_options()["precision"] == 4


def _loss_scaling() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    assert plugins.loss_scale(scaler) is None
    parameter = torch.ones(1, requires_grad=True)
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    torch.autograd.backward(scaler.scale(parameter * float("inf")))
    assert plugins.loss_scale(scaler) == 8
    scaler.unscale_(optimizer)
    assert [one.item() for one in plugins.found_inf(scaler, optimizer)] == [1.0]
    plugins.set_found_inf(scaler, None)
    plugins.set_found_inf(scaler, torch.ones(1))
    scaler.update()
    assert plugins.loss_scale(scaler) == 4


def _growth() -> None:
    scaler = plugins.LocalGradScaler("cpu", init_scale=8.0)
    assert plugins.growth_tracker(scaler) is None
    parameter = torch.ones(1, requires_grad=True)
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    for count in (1, 2):
        torch.autograd.backward(scaler.scale(parameter))
        scaler.step(optimizer)
        scaler.update()
        assert plugins.iterations_since_change(scaler) == count
    tracker = plugins.growth_tracker(scaler)
    assert tracker is not None
    assert tracker.add_(3).item() == plugins.iterations_since_change(scaler) == 5


def _local_scaler() -> None:
    with process_group():
        mesh = dist.init_device_mesh("cpu", (1,))
        spread = nn.Parameter(distribute_tensor(torch.ones(2), mesh))
        plain = torch.ones(1, requires_grad=True)
        scaler = plugins.LocalGradScaler("cpu", init_scale=8.0)
        optimizer = torch.optim.SGD([spread, plain], lr=0.1)
        torch.autograd.backward([scaler.scale(plain.sum()), cast("Any", spread * 8).sum().to_local()])
        scaler.unscale_(optimizer)
        assert plain.grad is not None
        local: Any = spread.grad
        assert [plain.grad.item(), *local.to_local().tolist()] == [1, 1, 1]


PROBES: dict[str, Callable[[], None]] = {
    "DispatchMode": _dispatch_mode,
    "LocalGradScaler": _local_scaler,
    "after_backward": _after_backward,
    "apply_to_tensors": _apply_to_tensors,
    "attention_operators": _attention_operators,
    "backends_of": _backends_of,
    "backward_state": _backward_state,
    "checkpoint_activations": _checkpoint_activations,
    "clear_groups": _clear_groups,
    "clear_unsynchronized": _units,
    "compile_like": _compiled,
    "compiler": _compiler,
    "expect_static_reduction": _static_reducers,
    "fake_mode": _fake_mode,
    "found_inf": _loss_scaling,
    "global_hooks": _global_hooks,
    "growth_tracker": _growth,
    "has_hooks": _has_hooks,
    "in_backward": _in_backward,
    "initializers": _initializers,
    "iterations_since_change": _growth,
    "leave_reducer": _reducers,
    "loading_hooks": _loading_hooks,
    "loss_scale": _loss_scaling,
    "original_of": _compiled,
    "print_options": _print_options,
    "process_groups": _process_groups,
    "reduction_finished": _reducers,
    "run_backward": _run_backward,
    "set_backward_state": _backward_state,
    "set_found_inf": _loss_scaling,
    "storage_info": _storage_info,
    "tree_flatten": _trees,
    "tree_is_leaf": _trees,
    "tree_map_only": _trees,
    "tree_unflatten": _trees,
    "unsynchronized": _units,
    "was_written": _was_written,
}
"""What uses each function, or class, of the two files, so that a part that is gone shows."""

USES = [(package, name) for package in (core, plugins) for name in package.__all__]


def _try(package: ModuleType, name: str) -> None:
    try:
        PROBES[name]()
    except Exception as error:  # noqa: BLE001 - whatever a release did to it
        pytest.fail(f"PyTorch {torch.__version__} breaks {package.__name__}.{name}: {error!r}\n{_line(package, name)}")


def _line(package: ModuleType, name: str) -> str:
    return inspect.getdoc(getattr(package, name)) or ""


@pytest.mark.parametrize(("package", "name"), USES, ids=[f"{one.__name__}.{name}" for one, name in USES])
def test_a_private_part_is_still_there(package: ModuleType, name: str) -> None:
    """It does what it is used for; where it doesn't, the failure says why it was used and what would replace it."""
    _try(package, name)


def test_each_says_what_would_replace_it() -> None:
    """Every function of the two files is tried, and has the line that the failure shows."""
    assert {name for _, name in USES} == PROBES.keys()
    assert [name for package, name in USES if "replace" not in _line(package, name)] == []


def test_a_name_that_a_release_takes_away_fails_with_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``Module._apply`` gone, the failure names our function, and what would replace it."""
    monkeypatch.delattr(nn.Module, "_apply")
    with pytest.raises(pytest.fail.Exception, match=r"fabric_plugins\._torch\.apply_to_tensors: AttributeError") as hit:
        _try(plugins, "apply_to_tensors")
    assert "would replace it" in str(hit.value)


def _own_names() -> set[str]:
    """Collect the private names that our own classes have."""
    own: set[str] = set()
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                own.update(getattr(one, "name", "") for one in node.body)
                own.update(
                    str(getattr(one.target, "id", "")) for one in ast.walk(node) if isinstance(one, ast.AnnAssign)
                )
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                own.add(node.attr)
    # Those of the standard library, where they are part of its public face, or where it has no public one.
    return (
        own
        | {"_fields", "_replace", "_asdict", "_getframe", "_current_frames", "_forkserver", "_preload_modules"}
        | {
            "_config",
            "_exit",
        }
    )


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def _private_uses(text: str, own: set[str]) -> Iterator[tuple[int, str]]:
    """Find imports, attributes and look-ups by name that are PyTorch's and private."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            names = [*str(node.module).split("."), *(one.name for one in node.names)]
            if any(map(_is_private, names)):
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Import):
            found = [one.name for one in node.names if one.name.startswith("torch")]
            if any(_is_private(part) for name in found for part in name.split(".")):
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Attribute) and _is_private(node.attr) and node.attr not in own:
            yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in {"getattr", "hasattr", "setattr"}:
            name = node.args[1]
            if isinstance(name, ast.Constant) and _is_private(str(name.value)) and name.value not in own:
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Constant) and str(node.value).startswith(("torch._", "_global_")):
            yield node.lineno, ast.unparse(node)


def test_no_private_part_is_used_elsewhere() -> None:
    """Outside of the two files, neither package reaches into PyTorch."""
    own = _own_names()
    found = [
        f"{file.relative_to(ROOT)}:{line}: {use}"
        for file in FILES
        if file.name != "_torch.py"
        for line, use in _private_uses(file.read_text(encoding="utf-8"), own)
    ]
    assert found == []


@pytest.mark.parametrize(
    "text",
    [
        "from torch.utils import _pytree",
        "from torch.utils._pytree import tree_map",
        "import torch._dynamo",
        "tensor._version",
        "getattr(tensor, '_local_tensor', tensor)",
        "sys.modules.get('torch._dynamo')",
    ],
)
def test_such_a_use_is_seen(text: str) -> None:
    """The search above finds each way of reaching into PyTorch."""
    assert len(list(_private_uses(text, set()))) == 1
