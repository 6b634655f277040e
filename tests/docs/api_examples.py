"""A block of code for each public name, which runs with the page of public names, from top to bottom."""

from collections.abc import Mapping
from typing import Final

__all__ = ["EXAMPLES"]

EXAMPLES: Final[Mapping[str, Mapping[str, str]]] = {
    "fabric_core": {
        "Accelerator": 'assert issubclass(type(Fabric(accelerator="cpu").accelerator), Accelerator)',
        "Checkpoint": "assert not Checkpoint.capabilities.sharded",
        "Fabric": ('with Fabric(accelerator="cpu", devices=1) as fabric:\n    fabric.launch()\n    print(fabric.plan)'),
        "FabricDataLoader": (
            "from torch.utils.data import DataLoader\n"
            "\n"
            "loader = fabric.setup_dataloaders(DataLoader(list(range(4)), batch_size=2))\n"
            "assert isinstance(loader, FabricDataLoader)"
        ),
        "FabricModule": ("model = fabric.setup(torch.nn.Linear(2, 1))\nassert isinstance(model, FabricModule)"),
        "FabricOptimizer": (
            "bare = torch.nn.Linear(2, 1)\n"
            "model, optimizer = fabric.setup(bare, torch.optim.SGD(bare.parameters(), lr=0.1))\n"
            "assert isinstance(optimizer, FabricOptimizer)"
        ),
        "Launcher": "assert not Launcher.capabilities.multi_node",
        "Logger": (
            "class Quiet(Logger):\n"
            '    """Drops all metrics."""\n'
            "\n"
            "    def log_metrics(self, metrics, step):\n"
            "        pass\n"
            "\n"
            "\n"
            'fabric_with_logger = Fabric(accelerator="cpu", devices=1, loggers=[Quiet()])'
        ),
        "Precision": 'assert isinstance(Fabric(accelerator="cpu", precision="bf16-mixed").precision, Precision)',
        "Strategy": "assert isinstance(fabric.strategy, Strategy)",
        "Wrapper": (
            "class Nothing(Wrapper):\n"
            '    """Leaves a model as it is."""\n'
            "\n"
            "\n"
            'assert list(Fabric(accelerator="cpu", devices=1, wrappers=[Nothing()]).wrappers) == ["Nothing"]'
        ),
        "around": (
            "class Loud:\n"
            "    @around.strategy\n"
            "    def optimizer_step(self, optimizer):\n"
            "        print(optimizer)\n"
            "        return (yield)"
        ),
        "hookimpl": ("class Counted:\n    @hookimpl\n    def module_set_up(self, module):\n        print(module)"),
        "is_wrapped": "assert is_wrapped(fabric.setup(torch.nn.Linear(2, 1)))",
        "register": (
            'register("wrapper", "nothing", Nothing)\n'
            'assert "nothing" in Fabric(accelerator="cpu", devices=1, wrappers=["nothing"]).wrappers'
        ),
        "seed_everything": "seed_everything(1)",
        "unwrap": ("bare = torch.nn.Linear(2, 1)\nassert unwrap(fabric.setup(bare)) is bare"),
    },
    "fabric_core.collectives": {
        "Collectives": "assert issubclass(ProcessGroup, Collectives)",
        "ProcessGroup": "def connect(self, world, policy):  # of a strategy\n    return ProcessGroup(world)",
        "ProcessInfo": "assert ProcessInfo(global_rank=1, local_rank=1, world_size=2, local_world_size=2).global_rank",
        "SingleProcess": 'assert SingleProcess().all_reduce(torch.ones(1), None, "sum").item() == 1',
        "World": ("fabric.launch()\nassert isinstance(fabric.world, World)\nassert fabric.world.is_global_zero"),
        "check_reduction": 'assert check_reduction("AVG") == "mean"',
        "check_source": "check_source(0, 2)",
    },
    "fabric_core.contracts": {
        "ABOUT": "assert ABOUT  # the entry of a checkpoint's tree that tells of itself",
        "API_VERSION": "assert Strategy.api_version == API_VERSION",
        "API_WINDOW": "assert API_VERSION in API_WINDOW  # the versions that this core loads",
        "AcceleratorCapabilities": 'assert "spawn" in AcceleratorCapabilities().start_methods',
        "Agreement": (
            'agreement = Agreement(SingleProcess())\nassert agreement.on_zero(lambda: 3, where="an example") == 3'
        ),
        "CheckpointCapabilities": 'CheckpointCapabilities(sharded=True, suffixes=(".box",))',
        "DefaultDtype": ("with DefaultDtype(torch.float64):\n    assert torch.zeros(1).dtype == torch.float64"),
        "DeviceSpec": (
            "def parse_devices(spec: DeviceSpec) -> list[int]:\n"
            '    return parse_device_indices(spec, 8, where="devices")'
        ),
        "FabricActs": (
            "class Timed:\n"
            "    @around.fabric\n"
            "    def optimizer_step(self, optimizer, closure):\n"
            "        return (yield)"
        ),
        "LaunchOrder": "LaunchOrder(processes=2, nodes=1)",
        "LauncherCapabilities": "LauncherCapabilities(multi_node=True)",
        "LifeCycle": (
            "class Told:\n    @hookimpl\n    def launched(self, fabric, world):\n        print(world.world_size)"
        ),
        "MemoryEstimate": (
            "model = torch.nn.Linear(2, 1)\n"
            "optimizer = torch.optim.SGD(model.parameters())\n"
            "assert MemoryEstimate.of(model, optimizer).parameters == 3 * 4"
        ),
        "Plugin": "assert issubclass(Strategy, Plugin)",
        "PluginOptions": ('class Options(PluginOptions):\n    every: int = 1\n    """After how many steps."""'),
        "PrecisionCapabilities": 'PrecisionCapabilities(device_types=frozenset({"cpu"}))',
        "PrecisionPolicy": "PrecisionPolicy(compute_dtype=torch.bfloat16, autocast=True)",
        "Preset": (
            'from fabric_plugins.strategies import DDPStrategy\n\nstatic = Preset(DDPStrategy, {"static_graph": True})'
        ),
        "StrategyCapabilities": "StrategyCapabilities(distributed=True, synchronous=False)",
        "WrapperCapabilities": 'WrapperCapabilities(stage="after_strategy")',
        "behaviour": ("class Contract:\n    @behaviour\n    def act(self): ..."),
        "convert_tensors": "assert convert_tensors([torch.ones(1)], torch.bfloat16)[0].dtype == torch.bfloat16",
        "converter": ("to_half = converter(torch.float16)\nassert to_half(torch.ones(1)).dtype == torch.float16"),
        "event": ("class Hooks:\n    @event\n    def stepped(self, fabric, optimizer): ..."),
        "map_tensors": 'assert map_tensors({"a": torch.ones(1)}, lambda one: one + 1)["a"].item() == 2',
        "parse_device_indices": 'assert parse_device_indices("0, 2", 4, where="devices") == [0, 2]',
        "repeated_blocks": (
            "def block():\n"
            "    return torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())\n"
            "\n"
            "\n"
            "assert len(repeated_blocks(torch.nn.Sequential(block(), block()))) == 2"
        ),
        "replace_parameters": (
            "old, new = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1))\n"
            "optimizer = replace_parameters(torch.optim.SGD([old], lr=0.1), {old: new})\n"
            'assert optimizer.param_groups[0]["params"][0] is new'
        ),
        "walk_tensors": 'assert [path for path, _ in walk_tensors({"a": [torch.ones(1)]})] == [("a", 0)]',
    },
    "fabric_core.conformance": {
        "RankPool": (
            "def rank_of(factor):\n"
            "    import os\n"
            "\n"
            '    return factor * int(os.environ["RANK"])\n'
            "\n"
            "\n"
            "assert callable(RankPool.run)  # RankPool(2).run(rank_of, 10) gives [0, 10]; the function lies in a module"
        ),
        "Report": (
            'report = run_rules(Subject.of("precision", "32-true"), only={"PRE-201"}, world_sizes=(1,))\n'
            "assert isinstance(report, Report)"
        ),
        "Subject": 'subject = Subject.of("strategy", "ddp", {"static_graph": True})',
        "replay": "assert callable(replay)  # a failure's message shows the call that repeats it",
        "run_rules": "assert report.passed",
        "suite": 'test_rules = suite("precision", "32-true")  # in a test file; pytest finds one test for each rule',
    },
    "fabric_core.utilities": {
        "AttributeDict": "assert AttributeDict(lr=0.1).lr == 0.1",
        "Collective": "assert issubclass(TorchCollective, Collective)",
        "SingleDeviceCollective": "assert SingleDeviceCollective().world_size == 1",
        "Throughput": (
            "throughput = Throughput(window_size=2)\n"
            "for step in range(3):\n"
            "    throughput.update(time=float(step), batches=step, samples=8 * step)\n"
            'assert throughput.compute()["device/samples_per_sec"] == 8'
        ),
        "ThroughputMonitor": (
            "monitor = ThroughputMonitor(fabric, window_size=10)\nmonitor.update(time=1.0, batches=1, samples=8)"
        ),
        "TorchCollective": "assert TorchCollective.is_available()",
        "is_shared_filesystem": "assert is_shared_filesystem(fabric.strategy)",
        "measure_flops": (
            'with torch.device("meta"):\n'
            "    large = torch.nn.Linear(1000, 1000)\n"
            "    batch = torch.ones(1, 1000)\n"
            "assert measure_flops(large, lambda: large(batch)) == 2_000_000"
        ),
        "move_data_to_device": 'assert move_data_to_device([torch.ones(1)], "cpu")[0].device.type == "cpu"',
        "rank_zero_deprecation": "assert callable(rank_zero_deprecation)  # warns on rank 0",
        "rank_zero_info": 'rank_zero_info("logged on rank 0")',
        "rank_zero_only": ('@rank_zero_only\ndef report_once():\n    print("on rank 0")'),
        "rank_zero_warn": 'assert callable(rank_zero_warn)  # rank_zero_warn("lr is 0") warns on rank 0',
        "suggested_max_num_workers": "assert suggested_max_num_workers(1) >= 1",
        "track": "assert list(track(range(3))) == [0, 1, 2]",
    },
}
"""By module and name. A name of several modules has its example at the first."""
