"""A lock file is read or refused, never anything else; and it doesn't mind who installed a wheel, or where."""

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fabric_core import Fabric, Wrapper
from fabric_core.choosing.lock import Lock, Locked, lock_offers
from fabric_core.choosing.offers import Offer
from fabric_core.choosing.registry import Registry, registered
from fabric_core.cli._doctor import _judge
from fabric_core.errors import LockError, RequestError

OFFER = Offer("wrapper", "acme", "acme-thing", "1.0", "acme_thing:Acme")

METADATA = "Metadata-Version: 2.1\nName: acme-thing\nVersion: 1.0\n"


def _install(folder: Path, record: str = "", source: str = "") -> Path:
    import hashlib
    from base64 import urlsafe_b64encode

    info = folder / "acme_thing-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(METADATA)
    (folder / "acme_thing.py").write_text(source)
    rows = []
    for name in ("acme_thing.py", "acme_thing-1.0.dist-info/METADATA"):
        digest = hashlib.sha256((folder / name).read_bytes()).digest()
        rows.append(f"{name},sha256={urlsafe_b64encode(digest).rstrip(b'=').decode()},1\n")
    (info / "RECORD").write_text("".join(rows) + record)
    return folder


def test_what_was_written_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock of an installed distribution comes back as it was, and lets it run."""
    monkeypatch.syspath_prepend(_install(tmp_path / "site"))
    path = str(tmp_path / "fabric.lock")
    lock = lock_offers(path, [OFFER])
    lock.write()
    assert Lock.read(path).distributions == lock.distributions
    assert not lock.distributions[0].files
    Lock.read(path).refuse(OFFER)


def test_a_lock_holds_for_every_installation_of_a_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytecode, scripts, and what an installer notes of itself differ; they are not a part of it."""
    monkeypatch.syspath_prepend(_install(tmp_path / "one"))
    lock = lock_offers("fabric.lock", [OFFER])
    monkeypatch.undo()
    own = "".join(f"acme_thing-1.0.dist-info/{name},sha256=abc,1\n" for name in ("INSTALLER", "direct_url.json"))
    extra = f"{own}__pycache__/acme_thing.cpython-311.pyc,,\n../../../bin/acme,sha256=abc,1\n"
    monkeypatch.syspath_prepend(_install(tmp_path / "other", extra))
    assert lock_offers("fabric.lock", [OFFER]).distributions == lock.distributions
    monkeypatch.undo()
    monkeypatch.syspath_prepend(_install(tmp_path / "changed", source="# another wheel of the same version\n"))
    with pytest.raises(LockError, match="its RECORD names other files or hashes than the lock's"):
        lock.refuse(OFFER)


def test_nothing_is_locked_that_differs_from_what_was_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that was changed since is named, and how to get it back."""
    monkeypatch.syspath_prepend(_install(tmp_path))
    (tmp_path / "acme_thing.py").write_text("changed = True\n")
    with pytest.raises(LockError, match="is not as its installer wrote it") as caught:
        lock_offers("fabric.lock", [OFFER])
    assert caught.value.got == "acme_thing.py was changed"
    assert "--force-reinstall" in str(caught.value.instead)


def test_another_place_of_the_same_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an offer names is a part of the lock, also where no RECORD vouches for it."""
    monkeypatch.syspath_prepend(_install(tmp_path))
    lock = lock_offers("fabric.lock", [OFFER])
    for other, message in (
        (Offer("wrapper", "acme", "acme-thing", "1.0", "acme_thing:Other"), "it lies at acme_thing:Other"),
        (Offer("logger", "acme", "acme-thing", "1.0", "acme_thing:Acme"), "the lock has no logger 'acme' of it"),
    ):
        with pytest.raises(LockError, match=message):
            lock.refuse(other)


def test_the_doctor_of_plugins_says_that_one_is_locked_out() -> None:
    """And doesn't import it."""
    status, note = _judge(replace(OFFER, lock=Lock("fabric.lock", ())))
    assert status == "locked out"
    assert "the lock has no distribution acme-thing" in note


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200))
def test_no_bytes_make_reading_fail_in_another_way(tmp_path: Path, data: bytes) -> None:
    """A lock, or a ``LockError``."""
    path = tmp_path / "fabric.lock"
    path.write_bytes(data)
    with suppress(LockError):
        Lock.read(str(path))


_TEXT = st.text(max_size=8)
_HASHES = st.dictionaries(_TEXT, _TEXT, max_size=2)
_LOCKED = st.builds(Locked, name=_TEXT, version=_TEXT, record=st.none() | _TEXT, plugins=_HASHES, files=_HASHES)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | _TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3),
    max_leaves=6,
)
_WRONG = st.fixed_dictionaries(
    {}, optional={"lock": st.just(1) | _JSON, "distributions": st.lists(_JSON) | _JSON, "more": _JSON}
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=_WRONG | _JSON)
def test_no_content_makes_reading_fail_in_another_way(tmp_path: Path, content: Any) -> None:
    """JSON of any form: a lock, or a ``LockError``."""
    path = tmp_path / "fabric.lock"
    path.write_text(json.dumps(content), encoding="utf-8", errors="surrogatepass")
    with suppress(LockError):
        Lock.read(str(path))


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(locked=st.lists(_LOCKED, max_size=3, unique_by=lambda one: one.name))
def test_any_lock_comes_back_or_has_a_distribution_twice(tmp_path: Path, locked: list[Locked]) -> None:
    """And what it has lets nothing run that isn't installed."""
    path = str(tmp_path / "fabric.lock")
    Lock(path, tuple(locked)).write()
    try:
        lock = Lock.read(path)
    except LockError as error:
        assert "twice" in error.what  # noqa: PT017 - or it comes back
        return
    assert list(lock.distributions) == locked
    with pytest.raises(LockError):
        lock.refuse(OFFER)


_ROWS = st.lists(
    st.tuples(_TEXT | st.sampled_from(["acme_thing.py", ".", "/", "a\0b", "../x"]), _TEXT, _TEXT), max_size=3
).map(lambda rows: "\n".join(map(",".join, rows)).encode(errors="surrogatepass"))


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(record=_ROWS | st.binary(max_size=40), value=_TEXT | st.sampled_from([":", ".", "acme_thing:Acme", "a..b:c"]))
def test_no_record_makes_locking_fail_in_another_way(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, record: bytes, value: str
) -> None:
    """Whatever an installer, or somebody else, wrote there: a lock, or a ``LockError``."""
    folder = _install(tmp_path_factory.mktemp("site"))
    (folder / "acme_thing-1.0.dist-info" / "RECORD").write_bytes(record)
    with monkeypatch.context() as patched, suppress(LockError):
        patched.syspath_prepend(folder)
        lock_offers("fabric.lock", [Offer("wrapper", "acme", "acme-thing", "1.0", value)]).refuse(OFFER)


@pytest.mark.parametrize(("given", "error"), [(3, RequestError), (b"lock", RequestError), ("absent.lock", LockError),
                                              ("null\0byte", LockError)])  # fmt: skip
def test_what_is_no_lock_file_is_refused(given: Any, error: type[Exception]) -> None:
    """When the ``Fabric`` is made."""
    with pytest.raises(error):
        Fabric(accelerator="cpu", devices=1, lock=given)


def test_what_this_process_registered_runs_under_any_lock() -> None:
    """It is the script's own code; a lock is about what is installed."""

    class Own(Wrapper):
        pass

    registry = Registry([OFFER], lock=Lock("fabric.lock", ()))
    with pytest.raises(LockError, match="the lock has no distribution acme-thing"):
        registry.find("wrapper", "acme")
    with registered("wrapper", "acme", Own):
        assert registry.find("wrapper", "acme").load().plugin is Own
