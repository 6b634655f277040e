"""``fabric-core estimate`` says what each rank would hold, without making the model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker

from fabric_core import cli

MODELS = """
from typing import NamedTuple

import torch
from torch import nn

def make(batch=64, width=256, depth=3):
    blocks = [nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(depth)]
    return nn.Sequential(*blocks, nn.Linear(width, width // 2)), torch.randn(batch, width)

def with_loss(batch=8):
    model, data = make(batch)
    return model, (data,), lambda output: output.square().sum()

def wide():
    return nn.Linear(1, 2**20, bias=False), torch.ones(1, 1), lambda output: output[0, 0]

def tied():
    model = nn.Sequential(nn.Embedding(2**14, 64), nn.Linear(64, 2**14, bias=False))
    model[1].weight = model[0].weight
    return model, torch.tensor([3])

def huge():
    return make(1, 2**17, 6)

def asks():
    class Asks(nn.Linear):
        def forward(self, x):
            return super().forward(x) * x.sum().item()
    return Asks(2, 2), torch.ones(1, 2)

class Says(nn.Linear):
    # Of the output only the loss can be differentiated.
    def __init__(self, make):
        super().__init__(64, 64)
        self.make = make

    def forward(self, x, y):
        output = super().forward(x)
        return self.make(output.detach(), (output - y).square().mean())

class Output(NamedTuple):
    logits: torch.Tensor
    loss: torch.Tensor

def listed():
    return Says(Output), [torch.randn(8, 64), torch.randn(8, 64)]

def named():
    batch = {"y": torch.randn(8, 64), "x": torch.randn(8, 64)}
    return Says(lambda logits, loss: {"logits": logits, "loss": loss}), batch

def other():
    return 3
"""


@pytest.fixture
def estimate(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Give a function that runs the command beside a module of models and returns exit code, output and errors."""
    (tmp_path / "estimated_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def run(function: str, *arguments: str) -> tuple[Any, str, str]:
        given = ["estimate", f"estimated_models:{function}", "--accelerator", "cpu", *arguments]
        monkeypatch.setattr("sys.argv", ["fabric-core", *given])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code, *capsys.readouterr()

    return run


def _peak(batch: int, optimizer: type[Any], *, autocast: bool) -> int:
    """Measure a real training by PyTorch's own tracker of tensors."""
    made: dict[str, Any] = {}
    exec(MODELS, made)  # noqa: S102 - the models above
    model, data = made["make"](batch)
    stepper = optimizer(model.parameters())
    tracker = MemTracker()
    tracker.track_external(model, stepper, data)
    with tracker:
        for step in range(2):
            if step:
                tracker.reset_mod_stats()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                output = model(data.to(torch.bfloat16) if autocast else data)
            output = output.float()
            output.mean().backward()
            stepper.step()
            stepper.zero_grad()
    peak: int = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    return peak


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("batch", [4, 2048])
def test_one_process_peaks_where_it_was_said(estimate: Any, optimizer: str, precision: str, batch: int) -> None:
    """Within 3 % of what PyTorch's tracker sees of a training; where weights prevail, and where activations do."""
    code, out, _ = estimate("make", "--batch", str(batch), "--precision", precision, "--optimizer", optimizer, "--json")
    assert code == 0
    said = json.loads(out)["ranks"][0]["peak"]
    real = _peak(batch, getattr(torch.optim, optimizer), autocast=precision != "32-true")
    assert said == pytest.approx(real, rel=0.03)


def test_who_converts_the_model_itself_is_given_converted_inputs_of_numbers(estimate: Any) -> None:
    """Under fsdp in bf16-mixed too; what the model computes takes half of what it takes in full precision."""
    found = {}
    for precision in ("32-true", "bf16-mixed"):
        asked = ("--batch", "4096", "--strategy", "fsdp", "--devices", "2", "--precision", precision)
        code, out, _ = estimate("make", *asked, "--json")
        assert code == 0
        found[precision] = json.loads(out)["activations"]
    assert found["bf16-mixed"] < 0.75 * found["32-true"]


def test_the_output_lives_while_the_optimizer_steps(estimate: Any) -> None:
    """What the model returned, in a variable of the loop, is not gone when AdamW takes most."""
    _, out, _ = estimate("wide", "--json")
    one = json.loads(out)["ranks"][0]
    output = 4 * 2**20
    largest = 4 * 2**20  # of the parameters: two more of it while it is stepped
    assert one["peak"] >= one["parameters"] + one["gradients"] + one["optimizer"] + 2 * largest + output


def test_the_two_gradients_of_a_shared_weight_are_added_as_the_engine_adds_them(estimate: Any) -> None:
    """In place where the first is no view of what a matrix product gave: two of its size at one time, or else three."""
    size = 4 * 64 * 2**14
    _, out, _ = estimate("tied", "--json")
    assert json.loads(out)["activations"] == pytest.approx(3 * size, rel=0.05)
    _, out, _ = estimate("tied", "--precision", "bf16-mixed", "--json")
    assert json.loads(out)["activations"] == pytest.approx(2 * size, rel=0.05)


def test_a_shared_weight_has_its_gradient_when_all_of_it_was_computed(estimate: Any) -> None:
    """Under fsdp it is in flight at the end, and not while its halves wait for each other."""
    _, out, _ = estimate("tied", "--strategy", "fsdp", "--devices", "2", "--json")
    one = json.loads(out)["ranks"][0]
    size = 4 * 64 * 2**14
    assert (one["in_flight"], one["in_flight_last"]) == (size, 2 * size)


def test_a_model_that_fits_nowhere(estimate: Any) -> None:
    """Hundreds of GiB are counted, and none of them made; ranks that hold the same are one row."""
    code, out, _ = estimate("huge", "--strategy", "fsdp", "--devices", "8", "--precision", "bf16-true", "--json")
    assert code == 0
    ranks = json.loads(out)["ranks"]
    parameters = 2 * (6 * (2**34 + 2**17) + 2**33 + 2**16)
    assert [one["parameters"] for one in ranks] == [parameters // 8] * 8
    assert ranks[0]["gradients"] == parameters // 8
    assert ranks[0]["optimizer"] == pytest.approx(2 * parameters / 8)
    last = 2 * (2**33 + 2**16)  # bytes of the layer that is no block: its gradients, and the copy of them
    assert ranks[0]["in_flight_last"] == 2 * last
    assert ranks[0]["in_flight"] == 2 * last + 4 * 2 * (2**34 + 2**17)
    code, out, _ = estimate("make", "--strategy", "ddp", "--devices", "4")
    assert code == 0
    assert "0-3" in out
    assert "ddp, 32-true, 4 processes" in out


def test_a_batch_is_a_model_s_arguments_and_a_loss_may_be_in_its_output(estimate: Any) -> None:
    """By position or by name; an output with a loss, as an attribute or under that key, needs no function for it."""
    found = [json.loads(estimate(function, "--json")[1]) for function in ("listed", "named")]
    assert found[0]["ranks"] == found[1]["ranks"]
    assert found[0]["ranks"][0]["gradients"] == found[0]["ranks"][0]["parameters"] > 0


def test_buckets_that_gradients_are_copied_to_come_on_top(estimate: Any) -> None:
    """None with views; an option of the strategy counts."""
    found = {}
    for views in ("true", "false"):
        strategy = f"ddp:gradient_as_bucket_view={views}"
        _, out, _ = estimate("with_loss", "--strategy", strategy, "--devices", "2", "--json")
        found[views] = json.loads(out)["ranks"][1]
    assert found["true"]["in_flight"] == 0
    assert found["false"]["in_flight"] == found["false"]["gradients"] > 0
    assert found["true"]["peak"] < found["false"]["peak"]


def test_gradients_that_are_views_are_there_during_forward(estimate: Any) -> None:
    """Buckets are never freed: where activations prevail, they come on top of them; alone, gradients come later."""
    peaks = []
    for arguments in (("--strategy", "single_device"), ("--strategy", "ddp", "--devices", "2")):
        _, out, _ = estimate("make", "--batch", "2048", *arguments, "--json")
        one = json.loads(out)["ranks"][0]
        peaks.append(one["peak"])
    assert 0.9 * one["gradients"] < peaks[1] - peaks[0] <= one["gradients"]


def test_optimizers_have_options(estimate: Any) -> None:
    """Momentum is state, plain SGD has none."""
    sizes = []
    for optimizer in ("sgd", "SGD:lr=0.1,momentum=0.9"):
        _, out, _ = estimate("with_loss", "--optimizer", optimizer, "--json")
        one = json.loads(out)["ranks"][0]
        sizes.append((one["optimizer"], one["parameters"]))
    assert sizes[0][0] == 0
    assert sizes[1][0] == sizes[1][1]


@pytest.mark.parametrize(
    ("function", "arguments", "what"),
    [
        ("", (), "the function can't be parsed"),
        ("absent", (), "the function can't be imported: AttributeError"),
        ("other", (), "the function returns something else"),
        ("asks", (), "a step can't be computed on tensors that have no memory"),
        ("other", ("--batch", "3"), "the function takes no batch"),
        ("make", ("--optimizer", "adem"), "torch.optim has no such optimizer"),
        ("make", ("--optimizer", "sgd:beta=1"), "the optimizer can't be made"),
        ("make", ("--wrapper", "compile"), "what a wrapper does to memory is not a part of the estimate"),
        ("make", ("--strategy", "fsdp_cpu_offload", "--devices", "2"), "cpu_offload is not a part of the estimate"),
        ("make", ("--strategy", "ddq"), "there is no strategy 'ddq'"),
    ],
)
def test_a_mistake_is_a_message(estimate: Any, function: str, arguments: tuple[str, ...], what: str) -> None:
    """Exit code 2, in words and as JSON, and no traceback."""
    code, out, err = estimate(function, *arguments)
    assert (code, out) == (2, "")
    assert what in " ".join(err.split())
    assert "Traceback" not in err
    code, out, _ = estimate(function, *arguments, "--json")
    assert code == 2
    assert json.loads(out)["error"]["what"].startswith(what)
