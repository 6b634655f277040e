"""Wrong precisions."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim import Optimizer

from fabric_core.conformance.references import Doubled, Full, Mixed, Scaled
from fabric_core.contracts import DefaultDtype, PrecisionPolicy, map_tensors
from proof.mutants import Mutants

MUTANTS = Mutants()
mutant = MUTANTS.mutant


@mutant("changes its policy each time", "PRE-201")
class Wavering(Full):
    asked = 0

    @property
    def policy(self) -> PrecisionPolicy:
        self.asked += 1
        return PrecisionPolicy(reduce_dtype=torch.float64 if self.asked % 2 else None)


@mutant("asks for a type of integers", "PRE-202", "PRE-222", "PRE-223", "PRE-224", "PRE-228", "PRE-233")
class Counting(Full):
    @property
    def policy(self) -> PrecisionPolicy:
        return PrecisionPolicy(reduce_dtype=torch.int32)


@mutant(
    "leaves parameters as they are",
    "PRE-203",
    "PRE-213",
    "PRE-214",
    "PRE-215",
    "PRE-216",
    "PRE-222",
    "PRE-223",
    "PRE-224",
    "PRE-225",
    "PRE-228",
    "PRE-232",
    "PRE-233",
    "PRE-234",
)
class Idle(Doubled):
    def convert_module(self, module: nn.Module) -> nn.Module:
        return module


@mutant("converts buffers of integers too", "PRE-204")
class Sweeping(Doubled):
    def convert_module(self, module: nn.Module) -> nn.Module:
        for name, buffer in list(module.named_buffers()):
            module.get_submodule(name.rpartition(".")[0]).register_buffer(name.rpartition(".")[2], buffer.double())
        return module.to(torch.float64)


@mutant("sets parameters to zero as it converts them", "PRE-205", "PRE-222", "PRE-223", "PRE-224", "PRE-228", "PRE-233")
class Forgetful(Doubled):
    def convert_module(self, module: nn.Module) -> nn.Module:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.zero_()
        return module.to(torch.float64)


@mutant("thaws what was frozen", "PRE-206")
class Thawing(Full):
    def convert_module(self, module: nn.Module) -> nn.Module:
        return module.requires_grad_(True)


@mutant("takes shared weights apart", "PRE-203", "PRE-205", "PRE-206", "PRE-233")
class Parting(Full):
    def convert_module(self, module: nn.Module) -> nn.Module:
        again = getattr(module, "again", None)
        if isinstance(again, nn.Linear):
            again.weight = nn.Parameter(again.weight.detach().clone())
        return module


def _shallow(data: Any, dtype: torch.dtype) -> Any:
    return data.to(dtype) if isinstance(data, torch.Tensor) and data.is_floating_point() else data


@mutant("converts inputs that lie at the top only", "PRE-207")
class Shallow(Doubled):
    def convert_input(self, data: Any) -> Any:
        if isinstance(data, tuple) and len(data) == 2 and isinstance(data[1], dict):
            return tuple(_shallow(one, torch.float64) for one in data[0]), data[1]
        return _shallow(data, torch.float64)


@mutant("converts integers in inputs", "PRE-208", "PRE-209")
class Overeager(Doubled):
    def convert_input(self, data: Any) -> Any:
        return map_tensors(data, lambda one: one.to(torch.float64) if not one.is_complex() else one)


@mutant("copies inputs", "PRE-209")
class Copying(Full):
    def convert_input(self, data: Any) -> Any:
        return map_tensors(data, lambda one: one.clone() if one.is_floating_point() else one)


@mutant("leaves outputs as they come", "PRE-210", "PRE-214")
class Careless(Doubled):
    def convert_output(self, data: Any) -> Any:
        return data


@mutant("converts integers in outputs", "PRE-211", "PRE-212")
class Flooding(Doubled):
    def convert_output(self, data: Any) -> Any:
        return map_tensors(data, lambda one: one.to(torch.float32) if not one.is_complex() else one)


@mutant("copies outputs", "PRE-212")
class Echoing(Full):
    def convert_output(self, data: Any) -> Any:
        return map_tensors(data, lambda one: one.clone() if one.is_floating_point() else one)


@mutant("says autocast, and doesn't", "PRE-213", "PRE-218")
class Silent(Mixed):
    def forward_context(self, device_type: str) -> AbstractContextManager[Any] | None:
        return None


@mutant("autocasts to another type than it says", "PRE-213", "PRE-218")
class Mistyped(Mixed):
    def forward_context(self, device_type: str) -> AbstractContextManager[Any] | None:
        return torch.autocast(device_type, torch.float16)


@mutant("autocasts, and doesn't say so", "PRE-213", "PRE-219", "PRE-222", "PRE-223", "PRE-224", "PRE-228", "PRE-233")
class Secret(Full):
    def forward_context(self, device_type: str) -> AbstractContextManager[Any] | None:
        return torch.autocast(device_type, torch.bfloat16)


@contextmanager
def _forgotten(*, on_errors_only: bool) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    if on_errors_only:
        torch.set_float32_matmul_precision(before)


@mutant("doesn't undo what its forward context does", "PRE-215", "PRE-216", "PRE-217", "PRE-234")
class Leaking(Full):
    def forward_context(self, device_type: str) -> AbstractContextManager[Any] | None:
        return _forgotten(on_errors_only=False)


@mutant("undoes what its forward context does only where nothing raises", "PRE-216")
class Optimistic(Full):
    def forward_context(self, device_type: str) -> AbstractContextManager[Any] | None:
        return _forgotten(on_errors_only=True)


class _Plain:
    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: object) -> None:
        pass


@mutant("gives the same context again", "PRE-217")
class Reusing(Full):
    context: AbstractContextManager[Any] | None = None

    def forward_context(self, device_type: str) -> AbstractContextManager[Any] | None:
        self.context = self.context or _Plain()
        return self.context


@mutant("makes parameters in the default type", "PRE-220")
class Plain(Doubled):
    def init_context(self) -> AbstractContextManager[Any] | None:  # type: ignore[override]
        return None


@mutant("leaves the default type changed", "PRE-221")
class Sticky(Doubled):
    @contextmanager
    def init_context(self) -> Iterator[None]:
        torch.set_default_dtype(torch.float64)
        yield


@mutant(
    "divides by another number than it multiplied by", "PRE-222", "PRE-223", "PRE-224", "PRE-228", "PRE-230", "PRE-233"
)
class Unequal(Scaled):
    def unscale_gradients(self, optimizer: Optimizer) -> None:
        self.at[optimizer] *= 2
        super().unscale_gradients(optimizer)


@mutant("unscales again each time it is asked", "PRE-223")
class Repeating(Scaled):
    def unscale_gradients(self, optimizer: Optimizer) -> None:
        self.at[optimizer] = self.scale
        super().unscale_gradients(optimizer)


@mutant("scales, and never unscales", "PRE-222", "PRE-223", "PRE-224", "PRE-228", "PRE-230", "PRE-233")
class Oblivious(Scaled):
    def unscale_gradients(self, optimizer: Optimizer) -> None:
        pass


@mutant("says that it scales, and doesn't", "PRE-226", "PRE-229", "PRE-230", "PRE-231")
class Pretending(Full):
    @property
    def policy(self) -> PrecisionPolicy:
        return PrecisionPolicy(loss_scaling=True)


@mutant("scales, and doesn't say so", "PRE-222", "PRE-223", "PRE-224", "PRE-227", "PRE-228", "PRE-233")
class Hidden(Full):
    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        return loss * 8


@mutant("never steps", "PRE-223", "PRE-228", "PRE-233")
class Lazy(Full):
    def optimizer_step(
        self,
        optimizer: Optimizer,
        step: Callable[[Callable[[], Any] | None], Any],
        closure: Callable[[], Any] | None,
    ) -> Any:
        return None


@mutant("steps twice", "PRE-223", "PRE-228", "PRE-233")
class Hasty(Full):
    def optimizer_step(
        self,
        optimizer: Optimizer,
        step: Callable[[Callable[[], Any] | None], Any],
        closure: Callable[[], Any] | None,
    ) -> Any:
        step(closure)
        return step(closure)


@mutant("steps whatever the gradients are", "PRE-229", "PRE-230", "PRE-231")
class Reckless(Scaled):
    def finite(self, optimizer: Optimizer) -> bool:
        return True


@mutant("looks for infinities, and takes a NaN", "PRE-229")
class Partial(Scaled):
    def finite(self, optimizer: Optimizer) -> bool:
        return not any(bool(one.grad.isinf().any()) for one in _held(optimizer))


@mutant("looks at the first gradient only", "PRE-229")
class Glancing(Scaled):
    def finite(self, optimizer: Optimizer) -> bool:
        return bool(_held(optimizer)[0].grad.isfinite().all())


def _held(optimizer: Optimizer) -> list[Any]:
    return [one for group in optimizer.param_groups for one in group["params"] if one.grad is not None]


@mutant("unscales the first group of parameters only", "PRE-222", "PRE-223", "PRE-224", "PRE-233")
class Narrow(Scaled):
    def unscale_gradients(self, optimizer: Optimizer) -> None:
        scale, self.at[optimizer] = self.at[optimizer], 1.0
        for one in optimizer.param_groups[0]["params"]:
            one.grad = None if one.grad is None else one.grad / scale


@mutant("unscales in the step what was unscaled for clipping", "PRE-223")
class Redoing(Scaled):
    def optimizer_step(
        self,
        optimizer: Optimizer,
        step: Callable[[Callable[[], Any] | None], Any],
        closure: Callable[[], Any] | None,
    ) -> Any:
        self.at[optimizer] = self.scale
        return super().optimizer_step(optimizer, step, closure)


@mutant("doesn't unscale after a step that was skipped", "PRE-230")
class Bruised(Scaled):
    skipped = False

    def unscale_gradients(self, optimizer: Optimizer) -> None:
        if not self.skipped:
            super().unscale_gradients(optimizer)

    def optimizer_step(
        self,
        optimizer: Optimizer,
        step: Callable[[Callable[[], Any] | None], Any],
        closure: Callable[[], Any] | None,
    ) -> Any:
        result = super().optimizer_step(optimizer, step, closure)
        self.skipped = self.overflown
        return result


@mutant("scales anew, and leaves the gradients that wait as they are", "PRE-242")
class Mixing(Scaled):
    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        self.update()
        for optimizer in self.at:
            self.at[optimizer] = self.scale
        return loss * self.scale


@mutant("makes tensors in another type in forward than in backward", "PRE-244")
class Halfway(Full):
    def forward_context(self, device_type: str) -> AbstractContextManager[Any] | None:
        return DefaultDtype(torch.float64)


@mutant("takes a step whose infinity clipping by value has hidden", "PRE-242")
class Appeased(Scaled):
    def unscale_gradients(self, optimizer: Optimizer) -> None:
        super().unscale_gradients(optimizer)
        self.infinite.clear()


@mutant("makes its scale larger after two steps that it skips", "PRE-230")
class Growing(Scaled):
    skipped = 0

    def update(self) -> None:
        self.skipped += self.overflown
        self.overflown = False
        if self.skipped == 2:
            self.scale, self.skipped = self.scale * 2, 0


@mutant("returns for ever what its first step returned", "PRE-228")
class Parroting(Full):
    def optimizer_step(
        self,
        optimizer: Optimizer,
        step: Callable[[Callable[[], Any] | None], Any],
        closure: Callable[[], Any] | None,
    ) -> Any:
        returned = step(closure)
        return self.__dict__.setdefault("first", returned)


@mutant("evaluates closures in its caller's mode", "PRE-228")
class Modal(Full):
    def optimizer_step(
        self,
        optimizer: Optimizer,
        step: Callable[[Callable[[], Any] | None], Any],
        closure: Callable[[], Any] | None,
    ) -> Any:
        result = None if closure is None else closure()
        returned = step(None)
        return returned if closure is None else result


@mutant("unscales the first evaluation of a closure only", "PRE-243")
class Once(Scaled):
    def optimizer_step(
        self,
        optimizer: Optimizer,
        step: Callable[[Callable[[], Any] | None], Any],
        closure: Callable[[], Any] | None,
    ) -> Any:
        if closure is None:
            return super().optimizer_step(optimizer, step, None)
        evaluate = closure
        with torch.enable_grad():
            first = [evaluate()]
        self.unscale_gradients(optimizer)
        if not self.agreed(self.finite(optimizer)):
            self.overflown = True
            return None
        return step(lambda: first.pop() if first else evaluate())


@mutant("loses the closure", "PRE-228")
class Losing(Full):
    def optimizer_step(
        self,
        optimizer: Optimizer,
        step: Callable[[Callable[[], Any] | None], Any],
        closure: Callable[[], Any] | None,
    ) -> Any:
        return step(None)


@mutant("keeps its scale on the class", "PRE-235")
class Sharing(Scaled):
    common = 1024.0
    missed = False

    @property
    def scale(self) -> float:
        return self.common

    @scale.setter
    def scale(self, value: float) -> None:
        type(self).common = value

    @property
    def overflown(self) -> bool:
        return self.missed

    @overflown.setter
    def overflown(self, value: bool) -> None:
        type(self).missed = value


@mutant("makes its scale smaller for each optimizer", "PRE-231")
class Nervous(Scaled):
    def finite(self, optimizer: Optimizer) -> bool:
        fine = super().finite(optimizer)
        if not fine:
            self.update()
            self.overflown = True
        return fine


@mutant("forgets its scale", "PRE-232")
class Amnesic(Scaled):
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


@mutant("has a state that needs code to be read", "PRE-232")
class Coded(Scaled):
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "code": contextlib.nullcontext()}


@mutant("sets PyTorch's matmul precision for good", "PRE-234")
class Lasting(Full):
    def convert_module(self, module: nn.Module) -> nn.Module:
        torch.set_float32_matmul_precision("high")
        return module


@mutant("shares one scale among all its objects", "REG-014")
class Communal(Scaled):
    common: ClassVar[dict[str, float]] = {}

    def update(self) -> None:
        self.scale = self.common.get("scale", self.scale)
        super().update()
        self.common["scale"] = self.scale


@mutant(
    "gives a copy of the module",
    "PRE-213",
    "PRE-214",
    "PRE-215",
    "PRE-222",
    "PRE-223",
    "PRE-224",
    "PRE-225",
    "PRE-228",
    "PRE-233",
)
class Cloning(Full):
    def convert_module(self, module: nn.Module) -> nn.Module:
        return copy.deepcopy(module)
