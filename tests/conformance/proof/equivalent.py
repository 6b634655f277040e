"""Changes that no rule can notice, each with the reason: what they change makes no difference that anybody sees."""

from collections.abc import Mapping
from typing import Final

__all__ = ["EQUIVALENT"]

_MIXED: Final = "fabric_plugins.precisions.mixed."
_SCALER: Final = f"{_MIXED}_Scaler."
_SCALED: Final = f"{_MIXED}Float16MixedPrecision."
_HOST: Final = "fabric_core.conformance.references.Host."
_ELASTIC: Final = "fabric_plugins.launchers.elastic."
_LAUNCHER: Final = f"{_ELASTIC}ElasticLauncher."
_TRUE: Final = "fabric_plugins.precisions.true."
_REFERENCES: Final = "fabric_core.conformance.references."
_CHECKPOINTING: Final = "fabric_plugins.wrappers.activation_checkpointing.ActivationCheckpointing"
_AVERAGING: Final = "fabric_core.conformance.reference_strategies."
_FSDP: Final = "fabric_plugins.strategies.fsdp.FSDPStrategy."
_CPU: Final = "fabric_plugins.accelerators.cpu.CPUAccelerator."

_REASONS: Final[Mapping[str, tuple[str, ...]]] = {
    "another default of an option, or another bound, is as right": (
        "fabric_core.conformance.references.ScaledOptions: 1024.0 -> 2048.0",
        f"{_MIXED}Float16MixedOptions: 2000 -> 2001",
        f"{_MIXED}Float16MixedOptions: Field(default=0.5, gt=0, lt=1) -> Field(default=0.5, lt=1)",
        f"{_MIXED}Float16MixedOptions: Field(default=2.0, gt=1) -> Field(default=2.0)",
        f"{_MIXED}Float16MixedOptions: 16 -> 17",
        f"{_MIXED}Float16MixedOptions: 1 -> 2 #3",
        f"{_MIXED}Float16MixedOptions: Field(default=2000, ge=1) -> Field(default=2000)",
        f"{_MIXED}Float16MixedOptions: Field(default=2.0 ** 16, gt=0) -> Field(default=2.0 ** 16)",
        f"{_MIXED}Float16MixedOptions: Field(default=2000, ge=1) -> Field(ge=1)",
        f"{_MIXED}Float16MixedOptions: Field(default=0.5, gt=0, lt=1) -> Field(default=0.5, gt=0)",
        f"{_MIXED}Float16MixedOptions: 2.0 -> 4.0",
        f"{_MIXED}Float16MixedOptions: 2.0 -> 4.0 #2",
        f"{_MIXED}MixedOptions: True -> False",
        f"{_TRUE}TrueOptions: False -> True",
        (
            f"{_TRUE}_TruePrecision.forward_context: DefaultDtype(self.dtype) if self.options.default_dtype_in_fo ... "
            "heOption(self.dtype) -> DefaultDtype(self.dtype) if not self.options.default_dtype_i ... "
            "heOption(self.dtype)"
        ),
        f"{_CHECKPOINTING}Options: Field(default=1, ge=1) -> Field(default=1)",
        f"{_CHECKPOINTING}Options: False -> True",
        f"{_CHECKPOINTING}Options: 1 -> 2",
        (
            f"{_CHECKPOINTING}Wrapper.wrap_module: {{'context_fn': _selective()}} if self.options.selective else {{}} "
            "-> {'context_fn': _selective()} if not self.options.selective else {}"
        ),
        "fabric_plugins.wrappers.compile.CompileOptions: False -> True",
        f"{_ELASTIC}ElasticOptions: 10 -> 11",
    ),
    "when a scale grows or shrinks is the precision's own; one that stays is right too": (
        f"{_SCALED}_end_iteration: not overflowed -> overflowed",
        (
            f"{_SCALED}_end_iteration: not overflowed and self._scaler.skips_update() -> not overflowed or "
            "self._scaler.skips_update()"
        ),
        f"{_SCALED}_end_iteration: self._rescale(lambda: self._scaler.update_scale(overflowed=overflowed)) -> pass",
        f"{_SCALED}optimizer_step.evaluated: self._overflowed = None -> pass",
        f"{_SCALED}_may_step: self._overflowed = bool(self._overflowed) or verdict >= _OVERFLOW -> pass",
        f"{_SCALED}_rescale: change() -> pass",
        f"{_SCALER}_count: tracker.add_(self._uncounted) -> pass",
        f"{_SCALER}skips_update: False -> True",
        f"{_SCALER}skips_update: True -> False",
        f"{_SCALED}optimizer_step: self._overflowed = None -> pass",
        f"{_SCALED}optimizer_step: self._overflowed = bool(self._overflowed) -> pass",
        (
            f"{_SCALED}optimizer_step: try: return step(evaluated) finally: self._overflowed = bool(self._overflowed) "
            "-> try: return step(evaluated) finally: pass"
        ),
        f"{_SCALER}skips_update: self._before_growth <= 1 -> self._before_growth < 1",
        f"{_SCALER}skips_update: self._before_growth -= 1 -> pass",
        f"{_SCALER}skips_update: self._before_growth -= 1 -> self._before_growth += 1",
        f"{_SCALER}skips_update: self._uncounted += 1 -> self._uncounted -= 1",
        (
            f"{_SCALER}_count: if tracker is not None: tracker.add_(self._uncounted) -> if not tracker is not None: "
            "tracker.add_(self._uncounted)"
        ),
        f"{_MIXED}_Scaler: 0 -> 1",
        f"{_SCALER}skips_update: 1 -> 2",
        f"{_SCALER}skips_update: 1 -> 2 #2",
        (
            f"{_SCALER}skips_update: if self._before_growth <= 1: return False -> if not self._before_growth <= 1: "
            "return False"
        ),
        f"{_SCALER}skips_update: self._uncounted += 1 -> pass",
        f"{_SCALER}update_scale: self.update() -> pass",
        f"{_REFERENCES}Scaled.update: self.scale /= 2 -> pass",
        f"{_REFERENCES}Scaled.update: 2 -> 3",
        f"{_REFERENCES}Scaled.optimizer_step: self.overflown = True -> pass",
        f"{_REFERENCES}Scaled.optimizer_step: True -> False",
    ),
    "a precision may refuse optimizers that evaluate a closure again within a step": (
        (
            f"{_SCALED}optimizer_step.evaluated: if not self._may_step(optimizer): raise MisuseError('gradien ... "
            "smaller init_scale') -> if not not self._may_step(optimizer): raise MisuseError('gra ... smaller "
            "init_scale')"
        ),
        f"{_SCALED}optimizer_step.evaluated: not self._may_step(optimizer) -> self._may_step(optimizer)",
    ),
    "it is an invariant that holds, and the error that would say otherwise never comes": (
        f"{_SCALED}_may_step: raise AssertionError('gradients were unscaled, and nobody looked at them') -> pass",
        f"{_SCALER}_scale_tensor: raise AssertionError('no loss was scaled yet') -> pass",
    ),
    "PyTorch's scaler takes what it knows from a state, and leaves the rest": (
        (
            f"{_SCALED}load_state_dict: self.options.model_dump(include={{'growth_factor', 'backoff_factor', "
            "'growth_interval'}) -> self.options.model_dump()"
        ),
    ),
    "what does not pass through the gate the core itself refuses to step on": (
        (
            f"{_AVERAGING}Routed.gradients_averaged: known and isinstance(module, _Gate) and module.averaged -> known "
            "or isinstance(module, _Gate) or module.averaged"
        ),
        f"{_AVERAGING}_Gate.__init__: False -> True",
    ),
    "there is a scale wherever gradients wait that were scaled by it": (
        f"{_SCALED}_rescale: before is not None and after is not None -> before is not None or after is not None",
    ),
    "a policy is the same for the life of the object, so that asking once is asking always": (
        (
            f"{_TRUE}_TruePrecision.policy: return PrecisionPolicy(param_dtype=self.dtype, compute_dtype ... "
            "dtype=torch.float32) -> return self.__dict__.setdefault('_stale_policy', PrecisionPo ... "
            "type=torch.float32))"
        ),
        (
            f"{_REFERENCES}Doubled.policy: return PrecisionPolicy(param_dtype=torch.float64, compute_dt ... "
            "dtype=torch.float32) -> return self.__dict__.setdefault('_stale_policy', PrecisionPo ... "
            "type=torch.float32))"
        ),
        (
            f"{_REFERENCES}Full.policy: return PrecisionPolicy() -> return self.__dict__.setdefault('_stale_policy', "
            "PrecisionPolicy())"
        ),
        (
            f"{_REFERENCES}Scaled.policy: return PrecisionPolicy(loss_scaling=True) -> return "
            "self.__dict__.setdefault('_stale_policy', PrecisionPolicy(loss_scaling=True))"
        ),
        (
            f"{_REFERENCES}Mixed.policy: return PrecisionPolicy(compute_dtype=torch.bfloat16, input_d ... at32, "
            "autocast=True) -> return self.__dict__.setdefault('_stale_policy', PrecisionPo ... t32, autocast=True))"
        ),
    ),
    "what this reference counts nobody reads: it is there to be a hook": (
        f"{_REFERENCES}_count: module.__dict__['runs'] = module.__dict__.get('runs', 0) + 1 -> pass",
        f"{_REFERENCES}_count: module.__dict__.get('runs', 0) + 1 -> module.__dict__.get('runs', 0) - 1",
        f"{_REFERENCES}_count: 1 -> 2",
        f"{_REFERENCES}_count: 0 -> 1",
        f"{_REFERENCES}Tagging.wrap_module: module.register_forward_pre_hook(_count) -> pass",
    ),
    "of the two wrappers the other one declares the same order": (
        (
            f"{_CHECKPOINTING}Wrapper: WrapperCapabilities(before=frozenset({{'compile_blocks'}})) -> "
            "WrapperCapabilities()"
        ),
        (
            "fabric_plugins.wrappers.compile.CompileBlocksWrapper: "
            "WrapperCapabilities(after=frozenset({'activation_checkpointing'})) -> WrapperCapabilities()"
        ),
    ),
    "losses are counted to be compared with each other, and their count has no other use": (
        f"{_SCALED}__init__: 0 -> 1",
        f"{_SCALED}scale_loss: 1 -> 2",
    ),
    "one process reduces over itself": (
        (
            f"{_SCALED}_may_step: self._collectives is not None and self._collectives.world_size > 1 -> "
            "self._collectives is not None or self._collectives.world_size > 1"
        ),
        f"{_SCALED}_may_step: self._collectives.world_size > 1 -> self._collectives.world_size >= 1",
    ),
    "the largest of one number is the number": (f"{_SCALER}unscale_and_check: 1 -> 2",),
    "a policy that asks for less is right, where what it says happens": (
        (
            "fabric_core.conformance.references.Doubled.policy: PrecisionPolicy(param_dtype=torch.float64, "
            "compute_dtype=tor ... dtype=torch.float32) -> PrecisionPolicy(param_dtype=torch.float64, "
            "input_dtype=torch ... dtype=torch.float32)"
        ),
        (
            f"{_REFERENCES}Doubled.policy: PrecisionPolicy(param_dtype=torch.float64, compute_dtype=tor ... "
            "dtype=torch.float32) -> PrecisionPolicy(param_dtype=torch.float64, compute_dtype=tor ... "
            "dtype=torch.float64)"
        ),
        (
            f"{_REFERENCES}Mixed.policy: PrecisionPolicy(compute_dtype=torch.bfloat16, input_dtype=to ... at32, "
            "autocast=True) -> PrecisionPolicy(compute_dtype=torch.bfloat16, output_dtype=torch.float32, "
            "autocast=True)"
        ),
        (
            f"{_REFERENCES}Mixed.policy: PrecisionPolicy(compute_dtype=torch.bfloat16, input_dtype=to ... at32, "
            "autocast=True) -> PrecisionPolicy(compute_dtype=torch.bfloat16, input_dtype=torch.float32, "
            "autocast=True)"
        ),
        (
            f"{_MIXED}_MixedPrecision.policy: PrecisionPolicy(compute_dtype=self.dtype, reduce_dtype=torch ... "
            "g=self.loss_scaling) -> PrecisionPolicy(compute_dtype=self.dtype, "
            "input_dtype=self.d ... g=self.loss_scaling)"
        ),
        (
            f"{_MIXED}_MixedPrecision.policy: self.dtype if self.options.cast_inputs else None -> self.dtype if not "
            "self.options.cast_inputs else None"
        ),
        (
            f"{_TRUE}_TruePrecision.policy: PrecisionPolicy(param_dtype=self.dtype, compute_dtype=self.d ... "
            "dtype=torch.float32) -> PrecisionPolicy(param_dtype=self.dtype, compute_dtype=self.dtype, "
            "input_dtype=self.dtype)"
        ),
        (
            f"{_TRUE}_TruePrecision.policy: PrecisionPolicy(param_dtype=self.dtype, compute_dtype=self.d ... "
            "dtype=torch.float32) -> PrecisionPolicy(param_dtype=self.dtype, input_dtype=self.dty ... "
            "dtype=torch.float32)"
        ),
    ),
    "the memory of a machine stays what it is": (
        (
            f"{_HOST}memory_stats: return {{'total': os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')}} -> "
            "return self.__dict__.setdefault('_stale_memory_stats', {'tot ... f('SC_PHYS_PAGES')})"
        ),
    ),
    "for how many processes the host is enough is the accelerator's own": (
        f"{_CPU}parse_devices: True -> False",
        (
            f"{_CPU}parse_devices: parse_device_indices(spec, 1, where='devices of the accelerator cpu', "
            "unbounded=True) -> parse_device_indices(spec, 1, where='devices of the accelerator cpu')"
        ),
        f"{_HOST}parse_devices: True -> False",
        (
            f"{_HOST}parse_devices: parse_device_indices(spec, 1, where='devices', unbounded=True) -> "
            "parse_device_indices(spec, 1, where='devices')"
        ),
    ),
    "it is PyTorch's default": (
        ("fabric_plugins.checkpoints._plain._comes_back: torch.load(memory, weights_only=True) -> torch.load(memory)"),
        ("fabric_core.conformance.references._comes_back: torch.load(memory, weights_only=True) -> torch.load(memory)"),
        (
            "fabric_plugins.checkpoints.distributed._load_outline: torch.load(io.BytesIO(data), weights_only=True) -> "
            "torch.load(io.BytesIO(data))"
        ),
        (
            "fabric_plugins.checkpoints.single_file._read: torch.load(local, map_location='cpu', "
            "weights_only=weights_only, mmap=True) -> torch.load(local, map_location='cpu', mmap=True)"
        ),
    ),
    "where there is no device but the host, what was saved lies on the host": (
        "fabric_core.conformance.reference_strategies._whole: whole().cpu() -> whole()",
        (
            f"{_REFERENCES}_loaded: torch.load(path, map_location='cpu', weights_only=weights_only) "
            "-> torch.load(path, weights_only=weights_only)"
        ),
        (
            "fabric_plugins.checkpoints.distributed._room_for: torch.empty_like(shown, device='cpu') -> "
            "torch.empty_like(shown)"
        ),
        (
            "fabric_plugins.checkpoints.single_file._read: torch.load(local, map_location='cpu', "
            "weights_only=weights_only, mmap=True) -> torch.load(local, weights_only=weights_only, mmap=True)"
        ),
    ),
    "in a manifest that somebody forged, a truth value in the place of a number is a number": (
        "fabric_plugins.checkpoints._manifest.field: kind is int -> kind is not int",
    ),
    "what is filled is detached where it is filled": (
        "fabric_plugins.checkpoints.distributed._Opened.targets: own.detach() -> own",
    ),
    "it costs time or memory, and changes no result": (
        "fabric_plugins.checkpoints.single_file.SingleFileCheckpoint.outline: False -> True",
        "fabric_plugins.checkpoints.single_file.SingleFileCheckpoint.read_trusted: False -> True #2",
        (
            "fabric_plugins.checkpoints.single_file._read: torch.load(local, map_location='cpu', "
            "weights_only=weights_only, mmap=True) -> torch.load(local, map_location='cpu', "
            "weights_only=weights_only)"
        ),
        "fabric_plugins.checkpoints.single_file._read: True -> False",
        f"{_LAUNCHER}_start_command: gc.freeze() -> pass",
        f"{_ELASTIC}_run_rank: gc.freeze() -> pass",
        f"{_ELASTIC}_preloaded: multiprocessing.set_forkserver_preload([*before, *_PRELOADED]) -> pass",
        (
            f"{_LAUNCHER}_run: _preloaded() if start_method == 'forkserver' else contextlib.nullcontext() -> "
            "_preloaded() if not start_method == 'forkserver' else contextlib.nullcontext()"
        ),
        f"{_SCALER}update_scale: self._before_growth = None -> pass",
        f"{_SCALED}_rescale: False -> True #3",
        f"{_SCALED}_rescale: self._unscaled = False -> pass",
        "fabric_plugins.strategies._sharding.units._stands_alone: 1 -> 2",
        (
            "fabric_plugins.strategies._sharding.units.choose_modules: users.get(parameter, 0) + 1 -> "
            "users.get(parameter, 0) - 1"
        ),
        (
            f"{_FSDP}setup_module: for block in choose_modules(user, self.options.auto_wrap_pol ... xed(None), "
            "**shared) -> pass"
        ),
        (
            f"{_FSDP}connect: self._mesh = init_device_mesh(world.device.type, (replicate, ... eplicate', 'shard')) "
            "-> pass"
        ),
        f"{_FSDP}_sizes: info.world_size -> info.local_world_size",
        f"{_LAUNCHER}_run: start_method == 'forkserver' -> start_method != 'forkserver'",
        (
            f"{_LAUNCHER}setup_process: torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // "
            "info.local_world_size)) -> pass"
        ),
        (
            f"{_LAUNCHER}setup_process: len(os.sched_getaffinity(0)) // info.local_world_size -> "
            "len(os.sched_getaffinity(0)) * info.local_world_size"
        ),
        f"{_LAUNCHER}setup_process: 0 -> 1",
        f"{_LAUNCHER}setup_process: 1 -> 2",
        f"{_LAUNCHER}setup_process: info.local_world_size -> info.world_size",
        (
            "fabric_plugins.wrappers._blocks.find_blocks: [one for one in module.modules() if type(one).__name__ in "
            "names] -> [one for one in module.modules()]"
        ),
    ),
    "white space in a file that only this format reads": (
        (
            "fabric_plugins.checkpoints._manifest.encode: json.dumps({'checksum': checksum(text), 'manifest': body}, "
            "indent=1) -> json.dumps({'checksum': checksum(text), 'manifest': body})"
        ),
    ),
    "a format may keep the entry ABOUT in its tree, and its manifest too": (
        (
            "fabric_plugins.checkpoints.distributed._finish: {name: value for name, value in outline.items() if name "
            "!= ABOUT} -> {name: value for name, value in outline.items()}"
        ),
        (
            "fabric_plugins.checkpoints.single_file.SingleFileCheckpoint.write: {name: value for name, value in "
            "tree.items() if name != ABOUT} -> {name: value for name, value in tree.items()}"
        ),
    ),
    "PyTorch's planner makes no use of it": (
        "fabric_plugins.checkpoints.distributed._prepared: 0 -> 1",
        "fabric_plugins.checkpoints.distributed._prepared: rank == 0 -> rank != 0",
    ),
    "the keys of an object of JSON are text": (
        (
            "fabric_plugins.checkpoints._manifest.read_names: {name.partition('/')[0] for name in body['files'] if "
            "isinstance(name, str)} -> {name.partition('/')[0] for name in body['files']}"
        ),
    ),
    "the checksum of the one file lies in the other, so that they differ where somebody forged them alone": (
        (
            "fabric_plugins.checkpoints.distributed._Opened.__init__: known is None or known[:2] != "
            "(tensors[at].dtype, tensors[at].shape) -> known is None and known[:2] != (tensors[at].dtype, "
            "tensors[at].shape)"
        ),
        (
            "fabric_plugins.checkpoints.distributed._Opened.__init__: raise CheckpointError('the index and "
            "the outline of the chec ... here=where, got=key) -> pass"
        ),
        (
            "fabric_plugins.checkpoints.distributed._Opened.__init__: for at, key in self.keys.items(): known = "
            "self.index.entries ... here=where, got=key) -> pass"
        ),
    ),
    "a format or a launcher may declare less than it can": (
        (
            "fabric_plugins.checkpoints.distributed.DistributedCheckpoint: "
            "CheckpointCapabilities(sharded=True, remote=True) -> CheckpointCapabilities(sharded=True)"
        ),
        (
            "fabric_plugins.checkpoints.single_file.SingleFileCheckpoint: "
            "CheckpointCapabilities(remote=True) -> CheckpointCapabilities()"
        ),
        "fabric_plugins.checkpoints.single_file.SingleFileCheckpoint: True -> False",
        f"{_REFERENCES}Surroundings: True -> False",
        f"{_REFERENCES}Surroundings: LauncherCapabilities(multi_node=True) -> LauncherCapabilities()",
        (
            "fabric_plugins.checkpoints.distributed.DistributedCheckpoint: CheckpointCapabilities(sharded=True, "
            "remote=True) -> CheckpointCapabilities(remote=True)"
        ),
        "fabric_plugins.checkpoints.distributed.DistributedCheckpoint: True -> False",
        "fabric_plugins.checkpoints.distributed.DistributedCheckpoint: True -> False #2",
        f"{_ELASTIC}ElasticLauncher: LauncherCapabilities(multi_node=True) -> LauncherCapabilities()",
        f"{_ELASTIC}ElasticLauncher: True -> False",
    ),
    "what never returns is never given again": (
        (
            f"{_LAUNCHER}start: return self._start_command(order) -> "
            "return self.__dict__.setdefault('_stale_start', self._start_command(order))"
        ),
    ),
    "a rank fails once": (
        (
            f"{_LAUNCHER}report_failure: return write_report(error, rank) -> "
            "return self.__dict__.setdefault('_stale_report_failure', write_report(error, rank))"
        ),
    ),
    "in between, no variable is changed that was there before": (
        f"{_ELASTIC}_restored: os.environ.update(environment) -> pass",
    ),
    "another error is raised in its place": (
        (
            "fabric_plugins.checkpoints._manifest.field: not isinstance(value, kind) or (isinstance(value, bool) and "
            "kind is int) -> not isinstance(value, kind) and (isinstance(value, bool) and kind is int)"
        ),
        (
            "fabric_plugins.checkpoints._manifest.field: raise CheckpointError('the manifest is damaged', where=f'{wh "
            "... ot=repr(value)[:80]) -> pass"
        ),
        (
            "fabric_plugins.checkpoints._manifest.decode: raise CheckpointError('the checkpoint is of another format', "
            "... mat'], instead=kind) -> pass"
        ),
        (
            'fabric_plugins.checkpoints.distributed.DistributedCheckpoint.write_sharded: with reported("the checkpoint '
            "can't be written\", path, 'a pa ...  place.abort() raise -> if True: place: Writing | None = None try: "
            "writer, keys, out ...  place.abort() raise"
        ),
        f"{_AVERAGING}Averaging.world: raise MisuseError('not connected') -> pass",
        f"{_FSDP}setup_module: self._check_undivided(user) -> pass",
    ),
    "after a teardown the core calls the strategy no more": (
        "fabric_plugins.strategies.ddp.DDPStrategy.teardown: super().teardown() -> pass",
    ),
    "what is frozen, a whole model or a parameter, has no gradients to average or to ask for": (
        "fabric_plugins.strategies.ddp._always: True -> False",
        (
            f"{_AVERAGING}Averaging.backward: [parameter for parameter in one.parameters() if parameter.requires_grad] "
            "-> [parameter for parameter in one.parameters()]"
        ),
    ),
    "keys were compared before, and of a whole state PyTorch takes what is missing from the model itself": (
        f"{_AVERAGING}Sharding.load_module_state: False -> True",
        (
            f"{_AVERAGING}Sharding.load_module_state: StateDictOptions(full_state_dict=True, strict=False) -> "
            "StateDictOptions(full_state_dict=True)"
        ),
    ),
    "a thousandth of a number that no two measurements agree in": (f"{_CPU}memory_stats: 1024 -> 1025",),
    "the words of an error": (
        (
            "fabric_plugins.checkpoints.distributed._check_same: other.get(key) != one[key] -> "
            "other.get(key) == one[key]"
        ),
        (
            "fabric_plugins.checkpoints.distributed._check_same: sorted({key for one in every for key in one"
            " if any((other.ge ... r other in every))}) -> list({key for one in every for key in one if "
            "any((other.get( ... r other in every))})"
        ),
        (
            "fabric_plugins.checkpoints.distributed._check_same: {key for one in every for key in one if "
            "any((other.get(key)  ... or other in every))} -> {key for one in every for key in one}"
        ),
        "fabric_plugins.checkpoints._manifest._line: 200 -> 201",
        (
            f"{_LAUNCHER}_run: 'command' if order.function is None else 'function' -> "
            "'command' if not order.function is None else 'function'"
        ),
        f"{_LAUNCHER}_run: order.function is None -> order.function is not None",
        (
            "fabric_plugins.wrappers._blocks.find_blocks: '' if found else 'repeated blocks' -> '' if not found else "
            "'repeated blocks'"
        ),
        (
            "fabric_plugins.wrappers._blocks.find_blocks: sorted(names - {type(one).__name__ for one in found}) -> "
            "list(names - {type(one).__name__ for one in found})"
        ),
    ),
    "an archive is flushed as it is closed": (
        "fabric_plugins.checkpoints.single_file.SingleFileCheckpoint.write: there.flush() -> pass",
        "fabric_plugins.checkpoints.single_file.SingleFileCheckpoint.write: file.flush() -> pass",
    ),
    "`check` is asked of formats alone that declare sharded": (
        "fabric_plugins.checkpoints.single_file.SingleFileCheckpoint.check: _archive.check(local) -> pass",
    ),
    "how many bytes are looked at is the format's own": ("fabric_plugins.checkpoints.single_file._START: 64 -> 65",),
    "a limit that no checkpoint comes near": (
        "fabric_plugins.checkpoints._manifest._LIMIT: 1 -> 2",
        "fabric_plugins.checkpoints._manifest._LIMIT: 30 -> 31",
    ),
    "the name of a file that is gone at once": (
        (
            "fabric_plugins.checkpoints.single_file.SingleFileCheckpoint.write: "
            "tempfile.NamedTemporaryFile(prefix='fabric-') -> tempfile.NamedTemporaryFile()"
        ),
    ),
    "in which order and form a manifest has what it says is the format's own": (
        "fabric_plugins.checkpoints.single_file._write: sorted(map(str, tree)) -> list(map(str, tree))",
        (
            "fabric_plugins.checkpoints.distributed._finish: sorted({one[2] for entry in index.values() for "
            "one in entry['records']}) -> list({one[2] for entry in index.values() for one in "
            "entry['records']})"
        ),
        "fabric_plugins.checkpoints._manifest._canonical: True -> False",
        (
            "fabric_plugins.checkpoints._manifest._canonical: json.dumps(body, sort_keys=True, "
            "separators=(',', ':')) -> json.dumps(body, separators=(',', ':'))"
        ),
        (
            "fabric_plugins.checkpoints._manifest._canonical: json.dumps(body, sort_keys=True, "
            "separators=(',', ':')) -> json.dumps(body, sort_keys=True)"
        ),
        "fabric_plugins.checkpoints._manifest.VERSION: 1 -> 2",
        "fabric_plugins.checkpoints._manifest.encode: 1 -> 2",
    ),
    "a group's size doesn't change while it lives": (
        (
            "fabric_core.collectives.process_group.ProcessGroup.world_size: return dist.get_world_size(self.group) -> "
            "return self.__dict__.setdefault('_stale_world_size', dist.get_world_size(self.group))"
        ),
    ),
    "bytes carry no gradients": (
        "fabric_core.collectives.process_group.ProcessGroup.all_gather: tensor.detach() -> tensor",
    ),
    "an error has a type just where it has a value": (
        "fabric_core.collectives.process_group.ProcessGroup.close: 0 -> 1",
    ),
    "what is sorted comes in that order already": (
        "fabric_plugins.checkpoints.distributed._check_same: sorted(own.items()) -> list(own.items())",
    ),
}

EQUIVALENT: Final[Mapping[str, str]] = {key: reason for reason, keys in _REASONS.items() for key in keys}
