"""Saving and loading, whole: every rank succeeds, or every rank fails and nothing has changed."""

import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

import torch

from fabric_core.collectives import Collectives
from fabric_core.contracts import ABOUT, Agreement, Checkpoint, Precision, Strategy, Wrapper
from fabric_core.errors import CheckpointError, CheckpointTypeError, CheckpointValueError
from fabric_core.running.asynchronous import Background, SaveHandle
from fabric_core.running.collecting import collect
from fabric_core.running.fits import check_fits
from fabric_core.running.paths import as_path
from fabric_core.running.recognising import reaches, recognise
from fabric_core.running.restoring import Undo, in_place, restore, restore_modules, template
from fabric_core.running.retention import check_keep, latest, prune
from fabric_core.running.state import Part, named, parts_of

__all__ = ["Checkpointing", "numbered"]

PRECISION: Final = "fabric.precision"
"""The entry of a tree with the precision's own state, where it has one, such as the loss scale."""
STRATEGY: Final = "fabric.strategy"
"""Likewise the strategy's."""
WRAPPERS: Final = "fabric.wrappers"
"""Likewise the wrappers', by their names."""
_OWN: Final = frozenset({ABOUT, PRECISION, STRATEGY, WRAPPERS})

Filter = Mapping[str, Callable[[str, Any], bool]]


class Checkpointing:
    """Saves and loads for one ``Fabric``.

    Args:
        strategy: The bound strategy.
        precision: The bound precision.
        wrappers: The bound wrappers by their names.
        formats: The bound formats with their names, in the order in which they are asked.
        plan: The plan as plain values.
        own: Takes off what ``setup`` put round an object.
    """

    def __init__(
        self,
        *,
        strategy: Strategy,
        precision: Precision,
        wrappers: Mapping[str, Wrapper],
        formats: Iterable[tuple[str, Checkpoint]],
        plan: Mapping[str, Any],
        own: Callable[[Any], Any],
    ) -> None:
        self._strategy = strategy
        self._precision = precision
        self._wrappers = wrappers
        self._offered = formats
        self._plan = plan
        self._own = own
        self._background = Background()
        self._behind: Collectives | None = None
        """What the background's thread uses: its messages must not meet those of the main thread."""

    @cached_property
    def _formats(self) -> list[tuple[str, Checkpoint]]:
        """The formats, loaded at the first save or load."""
        return list(self._offered)

    # Saving

    def save(
        self,
        path: str | os.PathLike[str],
        state: Mapping[str, Any],
        collectives: Collectives,
        saved: Callable[[Any], None],
        *,
        filter: Filter | None = None,  # noqa: A002 - as fabric.save has it
        asynchronous: bool | str = False,
        format: str | None = None,  # noqa: A002 - likewise
        keep: int | None = None,
        score: float | None = None,
    ) -> SaveHandle | None:
        """Save, as ``fabric.save`` says; ``saved`` is called on every rank once the checkpoint is there."""
        agree = Agreement(collectives)
        queued = asynchronous == "queued"
        where = agree.each(lambda: as_path(path), where=path)
        self._background.collect(agree, wait=not queued)
        parts = agree.each(
            lambda: self._asked(state, {} if filter is None else filter, asynchronous, "fabric.save"), where=path
        )
        agree.each(lambda: check_keep(keep, score, where), where=path)
        checkpoint = agree.each(lambda: self._chosen(where, format), where=path)
        full = not checkpoint.capabilities.sharded
        tree = collect(state, parts, self._strategy, agree, full=full, where=path)
        tree = agree.each(lambda: _filtered(tree, filter or {}), where=path)
        self._add_own(tree, checkpoint, agree, where, score)

        def write(agree: Agreement, tree: dict[str, Any], used: Collectives) -> None:
            if full:
                agree.on_zero(lambda: checkpoint.write(where, tree), where=path)
            else:
                agree.each(lambda: checkpoint.write_sharded(where, tree, used), where=path)
            if keep is not None:
                agree.on_zero(lambda: prune(where, keep, score, [one for _, one in self._formats]), where=path)
            saved(where)

        if not asynchronous:
            write(agree, tree, collectives)
            return None
        if self._behind is None:
            self._behind = collectives.fork()
        behind = self._behind
        staged = agree.each(
            lambda: self._background.stage(tree, reuse=not queued) if agree.rank == 0 or not full else {}, where=path
        )
        return self._background.submit(lambda: write(Agreement(behind), staged, behind), where)

    def _asked(self, state: Any, filters: Filter, asynchronous: bool | str, where: str) -> list[Part]:
        """Find the objects in a state, and refuse what can't be meant."""
        if not isinstance(state, Mapping):
            raise CheckpointTypeError(
                "the state is a dict of names", where=where, got=type(state).__name__, instead='{"model": model}'
            )
        reserved = sorted(_OWN & set(state))
        if reserved:
            raise CheckpointError(f"the name {reserved[0]!r} is reserved", where=where, instead="another name")
        if asynchronous not in {False, True, "queued"}:
            raise CheckpointError(
                "there is no such way to save", where=f"{where}(asynchronous=)", got=repr(asynchronous),
                instead='False, True (one at a time) or "queued"',
            )  # fmt: skip
        if not isinstance(filters, Mapping):
            raise CheckpointTypeError(
                "the filter is no dict of functions", where=f"{where}(filter=)", got=repr(filters),
                instead='{"model": lambda name, value: ...}',
            )  # fmt: skip
        unknown = sorted(str(name) for name in filters if name not in state)
        if unknown:
            raise CheckpointValueError(
                f"the filter is for {', '.join(map(repr, unknown))}, which the state doesn't have",
                where=f"{where}(filter=)",
                got=", ".join(map(repr, state)),
            )
        for name, function in filters.items():
            if not callable(function):
                raise CheckpointTypeError(
                    f"the filter for {name!r} can't be called", where=f"{where}(filter=)", got=repr(function),
                    instead="a function of an entry's name and value that says whether to save it",
                )  # fmt: skip
        return list(parts_of(state, self._own))

    def _chosen(self, path: Any, name: str | None) -> Checkpoint:
        """Choose the format to write: by name, by the path's ending, or by what the strategy's state is."""
        chosen = self._by_name(name) if name is not None else None
        if chosen is None:
            fitting = [one for _, one in self._formats if str(path).endswith(one.capabilities.suffixes or ("\0",))]
            sharded = self._strategy.saves_sharded
            plain = [one for _, one in self._formats if one.capabilities.plain_values]
            fitting += [one for one in plain if one.capabilities.sharded == sharded] or plain
            # The only one there is was given by the user.
            chosen = next(iter(fitting), self._formats[0][1] if self._formats else None)
        if chosen is None:
            raise CheckpointError("no checkpoint format is installed that fits", where="fabric.save")
        if not reaches(chosen, path):
            raise CheckpointError("this format writes local files alone", where=path, got=type(chosen).__name__)
        return chosen

    def _by_name(self, name: str) -> Checkpoint:
        found = next((one for known, one in self._formats if known == name), None)
        if found is None:
            raise CheckpointError(
                "there is no such checkpoint format",
                where="fabric.save(format=)",
                got=repr(name),
                instead=", ".join(repr(known) for known, _ in self._formats),
            )
        return found

    def _add_own(
        self, tree: dict[str, Any], checkpoint: Checkpoint, agree: Agreement, where: Any, score: float | None
    ) -> None:
        """Add what travels with every checkpoint unasked."""
        states = agree.each(self._own_states, where=where)
        if checkpoint.capabilities.plain_values:
            tree.update({name: one for name, one in states.items() if one})
        # One moment for all ranks, so that they write the same.
        now = agree.on_zero(time.time_ns, where=where)
        about = {
            "plan": self._plan,
            "world_size": agree.world_size,
            "saved_at_ns": now,
            "versions": {
                "fabric-registry": _version("fabric-registry"),
                "torch": str(torch.__version__),
                "python": ".".join(map(str, sys.version_info[:3])),
            },
        }
        tree[ABOUT] = about if score is None else {**about, "score": score}

    def _own_states(self) -> dict[str, Any]:
        wrappers = {name: one.state_dict() for name, one in self._wrappers.items()}
        return {
            PRECISION: self._precision.state_dict(),
            STRATEGY: self._strategy.state_dict(),
            WRAPPERS: {name: state for name, state in wrappers.items() if state},
        }

    # Loading

    def load(
        self,
        path: str | os.PathLike[str],
        state: dict[str, Any] | None,
        collectives: Collectives,
        *,
        strict: bool,
        weights_only: bool | None,
    ) -> tuple[Any, dict[str, Any]]:
        """Load, as ``fabric.load`` says; gives where from, and what the checkpoint has beyond the state."""
        agree = Agreement(collectives)
        self._background.collect(agree, wait=True)
        formats = [one for _, one in self._formats]
        where = agree.on_zero(lambda: latest(as_path(path), formats), where=path)
        checkpoint = agree.each(lambda: recognise(where, self._formats)[1], where=path)
        read_all = state is None or weights_only is False or not checkpoint.capabilities.sharded
        read = checkpoint.read_trusted if weights_only is False else lambda at: checkpoint.read(at, None)
        tree = agree.each(lambda: read(where) if read_all else checkpoint.outline(where), where=path)
        if state is None:
            return where, {name: entry for name, entry in tree.items() if name != ABOUT}
        parts = agree.each(lambda: self._asked(state, {}, False, "fabric.load"), where=path)
        agree.each(lambda: check_fits(state, parts, tree, self._strategy, strict=strict, path=where), where=path)
        tree = self._apply(agree, parts, tree, None if read_all else checkpoint, strict=strict, path=where)
        in_place(state, {name: tree[name] for name in state if name in tree}, parts)
        return where, {name: entry for name, entry in tree.items() if name not in {*state, *_OWN}}

    def load_raw(
        self,
        path: str | os.PathLike[str],
        obj: Any,
        collectives: Collectives,
        *,
        strict: bool,
        weights_only: bool | None,
    ) -> None:
        """Load a bare state, as ``fabric.load_raw`` says."""
        agree = Agreement(collectives)
        self._background.collect(agree, wait=True)
        where = agree.each(lambda: as_path(path), where=path)
        checkpoint = agree.each(lambda: recognise(where, self._formats)[1], where=path)
        read = checkpoint.read_trusted if weights_only is False else lambda at: checkpoint.read(at, None)
        bare = agree.each(lambda: read(where), where=path)
        state, tree = {"obj": obj}, {"obj": {name: one for name, one in bare.items() if name != ABOUT}}
        parts = agree.each(lambda: self._asked(state, {}, False, "fabric.load_raw"), where=path)
        agree.each(lambda: _check_object(parts, obj), where=path)
        agree.each(lambda: check_fits(state, parts, tree, self._strategy, strict=strict, path=where), where=path)
        self._apply(agree, parts, tree, None, strict=strict, path=where)

    def _apply(
        self, agree: Agreement, parts: list[Part], tree: dict[str, Any], sharded: Checkpoint | None,
        *, strict: bool, path: Any,
    ) -> dict[str, Any]:  # fmt: skip
        """Fill all objects, and give what was read; where one can't be, on any rank, those before are brought back.

        Args:
            agree: Lets a failure on one rank be every rank's.
            parts: The objects.
            tree: What the checkpoint holds; its outline, where it is sharded.
            sharded: The format, where each rank reads its own parts.
            strict: As for ``fabric.load``.
            path: Where the checkpoint lies.
        """
        into: dict[bool, dict[str, Any]] = {}
        models = tree
        if sharded is not None:

            def prepare() -> None:
                for modules in (True, False):
                    into[modules] = template(parts, models, self._strategy, modules=modules)
                    sharded.check(path, into[modules])

            # Models are filled in place: every rank must know before that every rank's part is whole.
            agree.each(prepare, where=path)
            tree = agree.each(lambda: sharded.read(path, into[False]), where=path)
        undo = Undo()

        def fill() -> None:
            self._restore_own(tree, undo, path)
            restore(parts, tree, self._strategy, undo, full=sharded is None)

        def fill_models() -> None:
            read = models if sharded is None else sharded.read(path, into[True])
            restore_modules(parts, read, self._strategy, undo, full=sharded is None, strict=strict)

        try:
            agree.each(fill, where=path)
            agree.each(fill_models, where=path)
        except BaseException as error:
            undo.run(error)
            raise
        return tree

    def _restore_own(self, tree: Mapping[str, Any], undo: Undo, path: Any) -> None:
        owners: list[tuple[str, str, Any, Any]] = [
            (PRECISION, "the precision", self._precision, tree.get(PRECISION)),
            (STRATEGY, "the strategy", self._strategy, tree.get(STRATEGY)),
        ]
        saved = tree.get(WRAPPERS)
        if isinstance(saved, Mapping):
            owners += [(WRAPPERS, f"the wrapper {name}", one, saved.get(name)) for name, one in self._wrappers.items()]
        for entry, what, owner, state in owners:
            before = owner.state_dict()
            if state is None or not before:
                continue  # a checkpoint without one, or a plugin without one, is none the worse
            undo.add(owner.load_state_dict, before)
            try:
                owner.load_state_dict(state)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise CheckpointError(
                    f"the state of {what} is not of {what} that is used now",
                    where=f"{path}, entry {entry!r}",
                    got=f"{state!r:.200}",
                    instead=f"{what} that the checkpoint was saved with",
                ) from error

    # The end

    def close(self) -> None:
        """Wait for what is written in the background.

        Raises:
            CheckpointError: It failed, and nobody was told yet.
        """
        failures = self._background.close()
        self._behind = None
        if failures:
            raise failures[0]


def _check_object(parts: list[Part], obj: Any) -> None:
    if [part.path for part in parts] != [("obj",)]:
        raise CheckpointError(
            "a bare state is loaded into one object",
            where="fabric.load_raw",
            got=type(obj).__name__,
            instead="a model or an optimizer; fabric.load for several",
        )


def _filtered(tree: dict[str, Any], filters: Filter) -> dict[str, Any]:
    """Leave out what the filters don't want.

    Raises:
        CheckpointError: A filter is for a value that has no named entries.
    """
    result = dict(tree)
    for name, keep in filters.items():
        if not isinstance(result[name], Mapping):
            raise CheckpointError(
                f"the entry {named((name,))} has no named entries to filter",
                where="fabric.save(filter=)",
                got=type(result[name]).__name__,
                instead="leave it out of the filter, or out of the state",
            )
        result[name] = {key: value for key, value in result[name].items() if keep(key, value)}
    return result


def numbered(wrappers: Sequence[tuple[str, Wrapper]]) -> dict[str, Wrapper]:
    """Name wrappers; of several of one name, the later ones by their number too."""
    result: dict[str, Wrapper] = {}
    for name, wrapper in wrappers:
        count = sum(known.partition("#")[0] == name for known in result)
        result[f"{name}#{count + 1}" if count else name] = wrapper
    return result


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"
