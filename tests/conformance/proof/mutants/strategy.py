"""Wrong strategies."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from fabric_core.collectives import Collectives, ProcessGroup, SingleProcess
from fabric_core.conformance.references import Alone, Averaging, Routed, Sharding
from fabric_core.contracts import PrecisionPolicy, World
from fabric_core.errors import RequestError, SetupError
from proof.mutants import Mutants

MUTANTS = Mutants()
mutant = MUTANTS.mutant


# Gradients


@mutant(
    "sums gradients, and doesn't divide",
    "STR-301",
    "STR-303",
    "STR-304",
    "STR-305",
    "STR-308",
    "STR-309",
    "STR-310",
    "STR-321",
    "STR-323",
    "STR-324",
    "STR-325",
    "STR-326",
    "STR-328",
    "STR-330",
    "STR-340",
    "STR-341",
    "STR-344",
    "STR-372",
    "STR-373",
    "STR-385",
    "STR-396",
)
class Summing(Averaging):
    def average(self, parameters: Sequence[nn.Parameter]) -> None:
        super().average(parameters)
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(self.world.world_size)


@mutant(
    "never averages",
    "STR-301",
    "STR-302",
    "STR-303",
    "STR-304",
    "STR-305",
    "STR-308",
    "STR-309",
    "STR-310",
    "STR-321",
    "STR-323",
    "STR-324",
    "STR-325",
    "STR-326",
    "STR-328",
    "STR-330",
    "STR-340",
    "STR-341",
    "STR-344",
    "STR-372",
    "STR-373",
    "STR-385",
    "STR-396",
)
class Solitary(Averaging):
    def averages(self, module: nn.Module) -> bool:
        return False


@mutant(
    "leaves the last parameter out of the averaging",
    "STR-301",
    "STR-302",
    "STR-303",
    "STR-304",
    "STR-305",
    "STR-308",
    "STR-309",
    "STR-310",
    "STR-321",
    "STR-323",
    "STR-324",
    "STR-325",
    "STR-326",
    "STR-328",
    "STR-330",
    "STR-340",
    "STR-341",
    "STR-344",
    "STR-372",
    "STR-373",
    "STR-385",
    "STR-396",
)
class Forgetful(Averaging):
    def average(self, parameters: Sequence[nn.Parameter]) -> None:
        super().average(parameters[:-1])


@mutant(
    "averages in 16 bits",
    "STR-301",
    "STR-303",
    "STR-304",
    "STR-305",
    "STR-308",
    "STR-309",
    "STR-310",
    "STR-321",
    "STR-323",
    "STR-324",
    "STR-325",
    "STR-326",
    "STR-328",
    "STR-330",
    "STR-340",
    "STR-341",
    "STR-344",
    "STR-372",
    "STR-373",
    "STR-385",
    "STR-396",
)
class Coarse(Averaging):
    def average(self, parameters: Sequence[nn.Parameter]) -> None:
        super().average(parameters)
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.copy_(parameter.grad.bfloat16())


@mutant("adds a little of its own to each rank's gradients", "STR-302")
class Drifting(Averaging):
    def average(self, parameters: Sequence[nn.Parameter]) -> None:
        super().average(parameters)
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.add_(1e-13 * self.world.global_rank)


@mutant("lets every rank start with its own parameters", "STR-303")
class Unequal(Averaging):
    def setup_module(self, module: nn.Module) -> nn.Module:
        self._modules = (*self._modules, module)
        return module


@mutant("throws gathered gradients away before each pass", "STR-304", "STR-305", "STR-331", "STR-396")
class Wiping(Averaging):
    def backward(self, loss: torch.Tensor, module: nn.Module | None, arguments: Mapping[str, Any]) -> None:
        for one in self._modules:
            one.zero_grad()
        super().backward(loss, module, arguments)


@mutant("ignores what a backward pass is asked for", "STR-331")
class Deaf(Averaging):
    def backward(self, loss: torch.Tensor, module: nn.Module | None, arguments: Mapping[str, Any]) -> None:
        super().backward(loss, module, {})


@mutant("synchronises inside no_backward_sync", "STR-306")
class Chatty(Averaging):
    @contextmanager
    def no_backward_sync(self, module: nn.Module, enabled: bool) -> Iterator[None]:
        yield


@mutant("skips gradient synchronization, and doesn't declare it", "STR-307")
class Shy(Averaging):
    capabilities = Averaging.capabilities.model_copy(update={"no_backward_sync": False})


@mutant(
    "doesn't look whether no_backward_sync is enabled",
    "STR-301",
    "STR-302",
    "STR-303",
    "STR-304",
    "STR-305",
    "STR-308",
    "STR-321",
    "STR-323",
    "STR-324",
    "STR-325",
    "STR-326",
    "STR-328",
    "STR-385",
    "STR-396",
)
class Always(Averaging):
    @contextmanager
    def no_backward_sync(self, module: nn.Module, enabled: bool) -> Iterator[None]:
        with super().no_backward_sync(module, True):
            yield


@mutant("stays unsynchronized after an exception", "STR-309")
class Sulking(Averaging):
    @contextmanager
    def no_backward_sync(self, module: nn.Module, enabled: bool) -> Iterator[None]:
        before = self._skipping
        if enabled:
            self._skipping = before | {id(module)}
        yield
        self._skipping = before


@mutant("refuses a parameter without a gradient", "STR-326")
class Strict(Averaging):
    def average(self, parameters: Sequence[nn.Parameter]) -> None:
        if any(parameter.grad is None for parameter in parameters):
            raise RuntimeError("a parameter has no gradient")
        super().average(parameters)


@mutant("clips what a scaled loss makes large", "STR-385")
class Fearful(Averaging):
    def average(self, parameters: Sequence[nn.Parameter]) -> None:
        super().average(parameters)
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.clamp_(-10, 10)


@mutant("averages the gradients that a rank has, whatever the others have", "STR-310")
class Presuming(Averaging):
    def average(self, parameters: Sequence[nn.Parameter]) -> None:
        for parameter in parameters:
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= self.world.world_size


@mutant("skips synchronization of all models where it is asked for one", "STR-326")
class Sweeping(Averaging):
    @contextmanager
    def no_backward_sync(self, module: nn.Module, enabled: bool) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for one in self._modules:
                stack.enter_context(super().no_backward_sync(one, enabled))
            yield


@mutant("takes scaled losses, and declares that it doesn't", "STR-389")
class Fragile(Averaging):
    capabilities = Averaging.capabilities.model_copy(update={"loss_scaling": False})


@mutant("averages in its backward only, and doesn't declare it", "STR-332")
class Trapping(Averaging):
    capabilities = Averaging.capabilities.model_copy(update={"requires_strategy_backward": False})


@mutant("refuses loss.backward(), which would do", "STR-333")
class Needy(Alone):
    capabilities = Alone.capabilities.model_copy(update={"requires_strategy_backward": True})


# Modules


@mutant("gives no buffer of rank 0 to the others", "STR-303")
class Unbuffered(Averaging):
    def setup_module(self, module: nn.Module) -> nn.Module:
        for parameter in module.parameters():
            dist.broadcast(parameter.detach(), 0)
        self._modules = (*self._modules, module)
        return module


@mutant("ends the training mode", "STR-317")
class Sobering(Averaging):
    def setup_module(self, module: nn.Module) -> nn.Module:
        return super().setup_module(module.eval())


@mutant("calls layers past nn.Module.__call__, to save its microseconds", "STR-322")
class Hurried(Routed):
    def setup_module(self, module: nn.Module) -> nn.Module:
        for child in module.modules():
            if type(child) is nn.Linear:
                child.__class__ = _Fast
        return super().setup_module(module)


class _Fast(nn.Linear):
    __call__ = nn.Linear.forward


@mutant("refuses a model with nothing to train", "STR-312")
class Demanding(Averaging):
    def setup_module(self, module: nn.Module) -> nn.Module:
        if not any(parameter.requires_grad for parameter in module.parameters()):
            raise SetupError("nothing to train")
        return super().setup_module(module)


@mutant(
    "adds a module to the user's",
    "STR-301",
    "STR-303",
    "STR-304",
    "STR-305",
    "STR-306",
    "STR-310",
    "STR-312",
    "STR-313",
    "STR-314",
    "STR-315",
    "STR-316",
    "STR-317",
    "STR-318",
    "STR-320",
    "STR-321",
    "STR-323",
    "STR-324",
    "STR-325",
    "STR-326",
    "STR-328",
    "STR-330",
    "STR-370",
    "STR-372",
    "STR-373",
    "STR-374",
    "STR-377",
    "STR-385",
    "STR-392",
    "STR-393",
    "STR-396",
)
class Adding(Averaging):
    def setup_module(self, module: nn.Module) -> nn.Module:
        module.add_module("ours", nn.Linear(1, 1, dtype=torch.float64).requires_grad_(False))
        return super().setup_module(module)


@mutant("thaws what was frozen", "STR-314", "STR-325")
class Thawing(Averaging):
    def setup_module(self, module: nn.Module) -> nn.Module:
        return super().setup_module(module.requires_grad_(True))


@mutant("sets an attribute on the user's module", "STR-315")
class Marking(Averaging):
    def setup_module(self, module: nn.Module) -> nn.Module:
        module.__dict__["ours"] = True
        return super().setup_module(module)


@mutant(
    "converts the model to 32 bits",
    "STR-301",
    "STR-302",
    "STR-303",
    "STR-304",
    "STR-305",
    "STR-306",
    "STR-308",
    "STR-309",
    "STR-312",
    "STR-313",
    "STR-314",
    "STR-315",
    "STR-316",
    "STR-317",
    "STR-318",
    "STR-320",
    "STR-321",
    "STR-323",
    "STR-324",
    "STR-325",
    "STR-326",
    "STR-328",
    "STR-330",
    "STR-331",
    "STR-333",
    "STR-340",
    "STR-341",
    "STR-342",
    "STR-343",
    "STR-344",
    "STR-370",
    "STR-371",
    "STR-372",
    "STR-373",
    "STR-385",
    "STR-392",
    "STR-393",
    "STR-394",
    "STR-396",
)
class Converting(Averaging):
    def setup_module(self, module: nn.Module) -> nn.Module:
        return super().setup_module(module.float())


@mutant(
    "computes in 16 bits, whatever the precision asks",
    "STR-301",
    "STR-303",
    "STR-304",
    "STR-305",
    "STR-306",
    "STR-308",
    "STR-309",
    "STR-310",
    "STR-312",
    "STR-317",
    "STR-321",
    "STR-323",
    "STR-324",
    "STR-325",
    "STR-326",
    "STR-328",
    "STR-330",
    "STR-340",
    "STR-341",
    "STR-344",
    "STR-372",
    "STR-373",
    "STR-385",
    "STR-387",
    "STR-392",
    "STR-396",
)
class Squeezing(Averaging):
    def setup_module(self, module: nn.Module) -> nn.Module:
        super().setup_module(module)
        for child in module.modules():
            if isinstance(child, nn.Linear):
                child.register_forward_hook(_squeeze)
        return module


def _squeeze(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output.bfloat16().to(output.dtype) if output.dtype == torch.float64 else output.bfloat16()


@mutant("loses keyword arguments", "STR-306", "STR-317")
class Dropping(Averaging):
    def setup_module(self, module: nn.Module) -> nn.Module:
        return _Positional(super().setup_module(module))


class _Positional(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **_kwargs: Any) -> Any:
        return self.module(*args)


@mutant("draws random numbers when it sets up a model", "STR-318")
class Rolling(Averaging):
    def setup_module(self, module: nn.Module) -> nn.Module:
        torch.rand(1)
        return super().setup_module(module)


@mutant("declares to shard, and doesn't", "STR-319", "STR-343", "STR-380")
class Boasting(Averaging):
    capabilities = Averaging.capabilities.model_copy(update={"sharded": True})


@mutant("shards, and doesn't declare it", "STR-310", "STR-315", "STR-320", "STR-392")
class Secret(Sharding):
    capabilities = Sharding.capabilities.model_copy(update={"sharded": False, "loss_scaling": True})


@mutant("only synchronises what passes through its module, and doesn't declare it", "STR-321", "STR-323")
class Open(Routed):
    capabilities = Routed.capabilities.model_copy(update={"intercepts_forward": False})


@mutant("knows the last model only", "STR-326")
class Single(Averaging):
    def setup_module(self, module: nn.Module) -> nn.Module:
        self._modules = ()
        return super().setup_module(module)


@mutant("says that it carries out the policy, and doesn't", "STR-386")
class Careless(Averaging):
    capabilities = Averaging.capabilities.model_copy(update={"applies_mixed_precision": True})


@mutant("leaves the default device changed", "STR-388")
class Sticky(Averaging):
    @contextmanager
    def init_module(self, empty: bool) -> Iterator[None]:
        torch.set_default_device("meta" if empty else "cpu")
        yield


@mutant("declares that it makes room for a model, and doesn't", "STR-334")
class Roomless(Averaging):
    capabilities = Averaging.capabilities.model_copy(update={"handles_device_placement": True})


# Optimizers


@mutant(
    "leaves an optimizer the parameters that were replaced",
    "STR-301",
    "STR-303",
    "STR-304",
    "STR-305",
    "STR-310",
    "STR-321",
    "STR-324",
    "STR-326",
    "STR-328",
    "STR-330",
    "STR-340",
    "STR-341",
    "STR-342",
    "STR-343",
    "STR-344",
    "STR-372",
    "STR-373",
    "STR-396",
)
class Stale(Sharding):
    def setup_optimizer(self, optimizer: Optimizer, replaced: Mapping[torch.Tensor, torch.Tensor]) -> Optimizer:
        return optimizer


@mutant("only takes optimizers that were made before the model's setup", "STR-325", "STR-326")
class Early(Sharding):
    def setup_optimizer(self, optimizer: Optimizer, replaced: Mapping[torch.Tensor, torch.Tensor]) -> Optimizer:
        if not any(one in replaced for group in optimizer.param_groups for one in group["params"]):
            raise SetupError("too late")
        return super().setup_optimizer(optimizer, replaced)


@mutant("steps the first optimizer only", "STR-326", "STR-328")
class Favouring(Averaging):
    favourite: Optimizer | None = None

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any] | None) -> Any:
        self.favourite = self.favourite or optimizer
        return super().optimizer_step(optimizer, closure) if optimizer is self.favourite else None


@mutant("drops what a closure returned", "STR-330")
class Mute(Averaging):
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any] | None) -> Any:
        super().optimizer_step(optimizer, closure)


# Clipping


@mutant("gives the norm of its own shards", "STR-340", "STR-341", "STR-343", "STR-396")
class Narrow(Sharding):
    def clip_grad_norm(
        self, parameters: Sequence[torch.Tensor], max_norm: float, norm_type: float, error_if_nonfinite: bool
    ) -> torch.Tensor:
        shards: list[Any] = [one.grad for one in parameters if one.grad is not None]
        norm = nn.utils.get_total_norm([one.to_local() for one in shards], norm_type, error_if_nonfinite)
        for one in shards:
            one.mul_(min(1.0, max_norm / (norm.item() + 1e-6)))
        return norm


@mutant("gives the norm as it comes, distributed", "STR-340", "STR-342")
class Distributed(Sharding):
    def clip_grad_norm(
        self, parameters: Sequence[torch.Tensor], max_norm: float, norm_type: float, error_if_nonfinite: bool
    ) -> torch.Tensor:
        return nn.utils.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite)


@mutant("gives the norm, and doesn't clip", "STR-341", "STR-396")
class Looking(Averaging):
    def clip_grad_norm(
        self, parameters: Sequence[torch.Tensor], max_norm: float, norm_type: float, error_if_nonfinite: bool
    ) -> torch.Tensor:
        return super().clip_grad_norm(parameters, float("inf"), norm_type, error_if_nonfinite)


@mutant("only knows the norm of two", "STR-340", "STR-341")
class Euclidean(Averaging):
    def clip_grad_norm(
        self, parameters: Sequence[torch.Tensor], max_norm: float, norm_type: float, error_if_nonfinite: bool
    ) -> torch.Tensor:
        return super().clip_grad_norm(parameters, max_norm, 2.0, error_if_nonfinite)


@mutant("clips to an infinite norm", "STR-343")
class Trusting(Averaging):
    def clip_grad_norm(
        self, parameters: Sequence[torch.Tensor], max_norm: float, norm_type: float, error_if_nonfinite: bool
    ) -> torch.Tensor:
        return super().clip_grad_norm(parameters, max_norm, norm_type, False)


@mutant("doesn't clip values", "STR-344")
class Passive(Averaging):
    def clip_grad_value(self, parameters: Sequence[torch.Tensor], clip_value: float) -> None:
        pass


# Collectives


class _Inverted(ProcessGroup):
    def all_reduce(self, tensor: torch.Tensor, group: Any | None, reduce_op: str) -> torch.Tensor:
        return super().all_reduce(tensor, group, "min" if reduce_op == "max" else reduce_op)


@mutant("takes the minimum for the maximum", "STR-350")
class Inverted(Averaging):
    group_class = _Inverted


class _Skimming(ProcessGroup):
    def all_reduce(self, tensor: torch.Tensor, group: Any | None, reduce_op: str) -> torch.Tensor:
        return super().all_reduce(tensor, group, reduce_op) if tensor.numel() <= 1 else tensor.clone()


@mutant("reduces single numbers only", "STR-350")
class Skimming(Averaging):
    group_class = _Skimming


class _InPlace(ProcessGroup):
    def all_reduce(self, tensor: torch.Tensor, group: Any | None, reduce_op: str) -> torch.Tensor:
        return tensor.copy_(super().all_reduce(tensor, group, reduce_op))


@mutant("reduces in place", "STR-351")
class InPlace(Averaging):
    group_class = _InPlace


class _Floating(ProcessGroup):
    def all_reduce(self, tensor: torch.Tensor, group: Any | None, reduce_op: str) -> torch.Tensor:
        result = super().all_reduce(tensor, group, reduce_op)
        return result if result.is_floating_point() else result.float()


@mutant("gives every reduction as a floating-point number", "STR-352")
class Floating(Averaging):
    group_class = _Floating


class _Guessing(ProcessGroup):
    def all_reduce(self, tensor: torch.Tensor, group: Any | None, reduce_op: str) -> torch.Tensor:
        return super().all_reduce(tensor, group, reduce_op if reduce_op != "no such" else "sum")


@mutant("takes a reduction that it doesn't know for a sum", "STR-353")
class Guessing(Averaging):
    group_class = _Guessing


class _Reversed(ProcessGroup):
    def all_gather(self, tensor: torch.Tensor, group: Any | None, sync_grads: bool) -> list[torch.Tensor]:
        return super().all_gather(tensor, group, sync_grads)[::-1]


@mutant("gathers in the opposite order", "STR-354", "STR-355", "STR-356")
class Reversed(Averaging):
    group_class = _Reversed


class _Selfish(ProcessGroup):
    def all_gather(self, tensor: torch.Tensor, group: Any | None, sync_grads: bool) -> list[torch.Tensor]:
        parts = super().all_gather(tensor, group, sync_grads)
        return parts if sync_grads or tensor.numel() <= 3 else [tensor for _ in parts]


@mutant("gives its own tensor for every rank's where it is long", "STR-354", "STR-355")
class Selfish(Averaging):
    group_class = _Selfish


class _Cutting(ProcessGroup):
    def all_gather(self, tensor: torch.Tensor, group: Any | None, sync_grads: bool) -> list[torch.Tensor]:
        parts = super().all_gather(tensor, group, sync_grads)
        rows = min((len(one) for one in parts if one.ndim), default=0)
        return [one[:rows] if one.ndim else one for one in parts]


@mutant("cuts what it gathers to the smallest", "STR-355")
class Cutting(Averaging):
    group_class = _Cutting


class _Detached(ProcessGroup):
    def all_gather(self, tensor: torch.Tensor, group: Any | None, sync_grads: bool) -> list[torch.Tensor]:
        return [one.requires_grad_(sync_grads) for one in super().all_gather(tensor, group, False)]


@mutant("lets no gradient through a gather", "STR-356")
class Detached(Averaging):
    group_class = _Detached


class _Royal(ProcessGroup):
    def broadcast(self, obj: Any, src: int) -> Any:
        super().broadcast(obj, src)
        return super().broadcast(obj, 0)


@mutant("always sends from rank 0", "STR-357")
class Royal(Averaging):
    group_class = _Royal


class _Terse(ProcessGroup):
    def broadcast(self, obj: Any, src: int) -> Any:
        sent = super().broadcast(obj, src)
        return None if isinstance(sent, dict) else sent


@mutant("sends no dict", "STR-357")
class Terse(Averaging):
    group_class = _Terse


class _Wrapping(ProcessGroup):
    def broadcast(self, obj: Any, src: int) -> Any:
        return super().broadcast(obj, min(src, self.world_size - 1))


@mutant("takes a rank that there isn't for the last", "STR-358")
class Wrapping(Averaging):
    group_class = _Wrapping


class _Blunt(ProcessGroup):
    def broadcast(self, obj: Any, src: int) -> Any:
        try:
            return super().broadcast(obj, src)
        except RequestError as error:
            raise KeyError(src) from error


@mutant("raises what it likes for a rank that there isn't", "STR-358")
class Blunt(Averaging):
    group_class = _Blunt


class _Impatient(ProcessGroup):
    def barrier(self, name: str | None) -> None:
        pass


@mutant("waits for nobody", "STR-359")
class Impatient(Averaging):
    group_class = _Impatient


class _Waiting(ProcessGroup):
    def barrier(self, name: str | None) -> None:
        if self.rank == 0 and self.world_size > 1:
            threading.Event().wait()


@mutant("lets rank 0 wait for ever", "STR-359", "STR-391")
class Waiting(Averaging):
    group_class = _Waiting


class _Public(ProcessGroup):
    def all_reduce(self, tensor: torch.Tensor, group: Any | None, reduce_op: str) -> torch.Tensor:
        return super().all_reduce(tensor, None, reduce_op)


@mutant("reduces over all ranks, whatever the group", "STR-360")
class Public(Averaging):
    group_class = _Public


@mutant(
    "gives every rank the first part of the data",
    "STR-301",
    "STR-303",
    "STR-304",
    "STR-305",
    "STR-308",
    "STR-309",
    "STR-310",
    "STR-321",
    "STR-323",
    "STR-324",
    "STR-325",
    "STR-326",
    "STR-328",
    "STR-330",
    "STR-340",
    "STR-341",
    "STR-344",
    "STR-361",
    "STR-372",
    "STR-373",
    "STR-385",
    "STR-396",
)
class Repeating(Averaging):
    def data_shard(self) -> tuple[int, int]:
        return 0, self.world.world_size


class _Pretending(SingleProcess):
    """Says that there are others, and sends nothing."""

    def __init__(self, world: World) -> None:
        self.world_size = world.world_size
        self._rank = world.global_rank

    def broadcast(self, obj: Any, src: int) -> Any:
        time.sleep(0.5 * self._rank)  # else chance decides whether what rank 0 writes is there by now
        return super().broadcast(obj, src)


class _Strangers(Alone):
    """Any number of processes that don't know each other."""

    def connect(self, world: World, policy: PrecisionPolicy) -> Collectives:
        return _Pretending(world)


@mutant(
    "declares to be distributed, and joins nobody",
    "STR-303",
    "STR-350",
    "STR-354",
    "STR-355",
    "STR-356",
    "STR-357",
    "STR-359",
    "STR-362",
    "STR-395",
)
class Hermit(_Strangers):
    capabilities = Alone.capabilities.model_copy(update={"distributed": True, "max_world_size": None})


@mutant(
    "takes several processes that don't know each other",
    "STR-303",
    "STR-350",
    "STR-354",
    "STR-355",
    "STR-356",
    "STR-357",
    "STR-359",
    "STR-363",
)
class Crowd(_Strangers):
    capabilities = Alone.capabilities.model_copy(update={"max_world_size": None})


# State


@mutant("gives its wrapper's names", "STR-370", "STR-372", "STR-373", "STR-379", "STR-396")
class Prefixed(Averaging):
    def module_state(self, module: nn.Module, full: bool) -> dict[str, Any]:
        return {f"module.{name}": value for name, value in super().module_state(module, full).items()}


@mutant("gives shards where the whole is asked", "STR-371", "STR-372")
class Partial(Sharding):
    def module_state(self, module: nn.Module, full: bool) -> dict[str, Any]:
        return super().module_state(module, False)


@mutant("gives the whole where shards are asked", "STR-379", "STR-380")
class Lavish(Sharding):
    def module_state(self, module: nn.Module, full: bool) -> dict[str, Any]:
        return {name: getattr(one, "full_tensor", lambda one=one: one)() for name, one in module.state_dict().items()}


@mutant("leaves buffers out of the state", "STR-370", "STR-373", "STR-379")
class Bare(Averaging):
    def module_state(self, module: nn.Module, full: bool) -> dict[str, Any]:
        return {name: one for name, one in module.state_dict().items() if name in dict(module.named_parameters())}


@mutant("forgets the optimizer's state", "STR-372", "STR-373", "STR-396")
class Amnesic(Averaging):
    def optimizer_state(self, optimizer: Optimizer, full: bool) -> dict[str, Any]:
        return {**super().optimizer_state(optimizer, full), "state": {}}


@mutant("doesn't load the optimizer's state", "STR-373", "STR-396")
class Fresh(Averaging):
    def load_optimizer_state(self, optimizer: Optimizer, state: Mapping[str, Any], full: bool) -> None:
        pass


@mutant("forgets momentum as it loads", "STR-373", "STR-396")
class Halting(Averaging):
    def load_optimizer_state(self, optimizer: Optimizer, state: Mapping[str, Any], full: bool) -> None:
        kept = {} if isinstance(optimizer, torch.optim.SGD) else state["state"]
        super().load_optimizer_state(optimizer, {**state, "state": kept}, full)


@mutant("never looks whether keys fit", "STR-375", "STR-376")
class Lenient(Averaging):
    def load_module_state(self, module: nn.Module, state: Mapping[str, Any], full: bool, strict: bool) -> None:
        super().load_module_state(module, state, full, False)


@mutant("takes keys that it doesn't know", "STR-376")
class Welcoming(Averaging):
    def load_module_state(self, module: nn.Module, state: Mapping[str, Any], full: bool, strict: bool) -> None:
        own = module.state_dict()
        super().load_module_state(module, {name: one for name, one in state.items() if name in own}, full, strict)


@mutant("is strict always", "STR-377")
class Pedantic(Averaging):
    def load_module_state(self, module: nn.Module, state: Mapping[str, Any], full: bool, strict: bool) -> None:
        super().load_module_state(module, state, full, True)


@mutant("leaves tensors out that don't fit", "STR-378")
class Skipping(Averaging):
    def load_module_state(self, module: nn.Module, state: Mapping[str, Any], full: bool, strict: bool) -> None:
        own = module.state_dict()
        fitting = {
            name: own[name] if name in own and own[name].shape != one.shape else one for name, one in state.items()
        }
        super().load_module_state(module, fitting, full, strict)


@mutant("loads nothing", "STR-373", "STR-374", "STR-377", "STR-379", "STR-396")
class Idle(Averaging):
    def load_module_state(self, module: nn.Module, state: Mapping[str, Any], full: bool, strict: bool) -> None:
        before = {name: one.clone() for name, one in module.state_dict().items()}
        super().load_module_state(module, state, full, strict)
        module.load_state_dict(before)


# Life


@mutant("can't be torn down before it was connected", "STR-390", "STR-391")
class Clinging(Averaging):
    def teardown(self) -> None:
        self.world  # noqa: B018 - raises
        super().teardown()


@mutant("leaves its process group behind", "STR-392")
class Leaking(Averaging):
    def connect(self, world: World, policy: PrecisionPolicy) -> Collectives:
        if world.open_store is not None:
            store = dist.PrefixStore("leaking", world.open_store())
            dist.init_process_group(
                world.backend, store=store, rank=world.global_rank, world_size=world.world_size, timeout=world.timeout
            )
        return super().connect(world, policy)


@mutant("averages in hooks of the user's parameters, and leaves them there", "STR-310", "STR-392")
class Hooked(Averaging):
    capabilities = Averaging.capabilities.model_copy(
        update={"no_backward_sync": False, "requires_strategy_backward": False}
    )

    def average(self, parameters: Sequence[nn.Parameter]) -> None:
        """Nothing is left to do."""

    def setup_module(self, module: nn.Module) -> nn.Module:
        for parameter in super().setup_module(module).parameters():
            if parameter.requires_grad:
                parameter.register_hook(_mean)
        return module


def _mean(gradient: torch.Tensor) -> torch.Tensor:
    whole = gradient.clone()
    dist.all_reduce(whole)
    return whole / dist.get_world_size()


@mutant("keeps every model for ever", "STR-392")
class Hoarding(Averaging):
    kept: tuple[nn.Module, ...] = ()

    def setup_module(self, module: nn.Module) -> nn.Module:
        type(self).kept = (*self.kept, module)
        return super().setup_module(module)


@mutant("takes others' process group down", "STR-394")
class Greedy(Averaging):
    def teardown(self) -> None:
        super().teardown()
        if dist.is_initialized():
            dist.destroy_process_group()


@mutant("waits for all ranks as it leaves", "STR-395")
class Polite(Averaging):
    def teardown(self) -> None:
        if dist.is_initialized():
            with contextlib.suppress(RuntimeError):
                dist.barrier()
        super().teardown()


@mutant(
    "sets an option of PyTorch as it connects",
    "STR-301",
    "STR-303",
    "STR-304",
    "STR-305",
    "STR-312",
    "STR-321",
    "STR-323",
    "STR-324",
    "STR-325",
    "STR-326",
    "STR-328",
    "STR-340",
    "STR-341",
    "STR-344",
    "STR-372",
    "STR-373",
    "STR-377",
    "STR-385",
    "STR-392",
    "STR-396",
)
class Meddling(Averaging):
    def connect(self, world: World, policy: PrecisionPolicy) -> Collectives:
        torch.set_default_dtype(torch.float64)
        return super().connect(world, policy)
