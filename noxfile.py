"""The tests under several Pythons and releases of PyTorch; `make test` is the whole check under one of each.

    pip install 'fabric-registry[nox]'
    nox --list
    nox -s "tests-3.12(torch='2.13.0')"
    nox -s "tests-3.12(torch='2.13.0')" -- tests/core -k registry

A Python that isn't on this machine is skipped. Which build of PyTorch a session gets, pip's indexes decide: PyPI's is
the CUDA build on Linux, and PIP_EXTRA_INDEX_URL names the index of another (README.md). Each session prints which it
got. docs/reference/support.md keeps what was run.
"""

import re
from pathlib import Path

import nox

nox.options.error_on_missing_interpreters = False
nox.options.reuse_existing_virtualenvs = True

PYTHONS = ["/usr/bin/python3", "3.11", "3.12", "3.13", "3.14"]
"""The system's own, and the newest patch of each version that there is here."""

LOWEST, PINNED, NEWEST = "2.12.0", "2.13.0", "2.14.1"
"""Releases of PyTorch: the lowest that pyproject.toml allows, the one of constraints.txt, the newest that was tried."""

TESTS = ["tests/core", "tests/plugins", "tests/distributed", "tests/docs/test_scripts_as_typed.py"]
DEPENDENT = re.compile(r"(torch|setuptools)==")
"""What may not be pinned beside another PyTorch: itself, and setuptools, which some releases of it limit."""

_WHICH = "import platform, torch; print('Python', platform.python_version(), 'PyTorch', torch.__version__)"


@nox.session(python=PYTHONS)
@nox.parametrize("torch", [LOWEST, PINNED, NEWEST])
def tests(session: nox.Session, torch: str) -> None:
    """Run the tests of the core, the plugins, several processes and the documentation's scripts."""
    pins = Path("constraints.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    constraints = Path(session.create_tmp()) / "constraints.txt"
    constraints.write_text("".join(pin for pin in pins if not DEPENDENT.match(pin)), encoding="utf-8")
    session.install("-c", str(constraints), f"torch=={torch}", "setuptools>=77", "wheel")
    session.install("-c", str(constraints), f"torch=={torch}", "--no-build-isolation", "-e", ".[test,examples]")
    session.run("python", "-c", _WHICH)
    session.run("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", *(session.posargs or TESTS))
