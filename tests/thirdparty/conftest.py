"""Distributions of third parties: built, installed into an environment of their own, and run there."""

import hashlib
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from base64 import urlsafe_b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

PROJECTS = Path(__file__).parent / "projects"


@dataclass(frozen=True)
class Environment:
    """A virtual environment that sees what the tests' own has installed, and has room for more."""

    python: Path
    folder: Path

    def pip(self, *arguments: str) -> None:
        """Run pip for it, without an index."""
        command = [sys.executable, "-m", "pip", "--python", str(self.python), "--disable-pip-version-check", "--quiet"]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, timeout=100)
        assert done.returncode == 0, done.stdout + done.stderr

    def install(self, wheels: Sequence[Path]) -> None:
        """Install wheels."""
        self.pip("install", "--no-deps", "--no-index", "--no-compile", *map(str, wheels))

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run its interpreter in its folder."""
        return subprocess.run(
            [str(self.python), *arguments],
            cwd=self.folder,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "300", **variables},
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )


@dataclass(frozen=True)
class Distribution:
    """What a wheel made by hand holds: one module or files, entry points, requirements."""

    name: str
    source: str = ""
    version: str = "1.0"
    files: Mapping[str, str] = field(default_factory=dict)
    points: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    requires: Sequence[str] = ()
    extras: Sequence[str] = ()

    @property
    def module(self) -> str:
        """The name of its module."""
        return self.name.replace("-", "_")

    def write(self, folder: Path) -> Path:
        """Write it as a wheel."""
        info = f"{self.module}-{self.version}.dist-info"
        metadata = ["Metadata-Version: 2.1", f"Name: {self.name}", f"Version: {self.version}"]
        metadata += [f"Provides-Extra: {extra}" for extra in self.extras]
        metadata += [f"Requires-Dist: {need}" for need in self.requires]
        points = [
            line
            for group, names in self.points.items()
            for line in (f"[{group}]", *(f"{name} = {value}" for name, value in names.items()))
        ]
        files = {
            **(self.files or {f"{self.module}.py": self.source}),
            f"{info}/METADATA": "\n".join(metadata) + "\n",
            f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            f"{info}/entry_points.txt": "\n".join(points) + "\n",
        }
        hashes = {name: urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
                  for name, text in files.items()}  # fmt: skip
        record = [f"{name},sha256={one},{len(files[name].encode())}" for name, one in hashes.items()]
        files[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,"]) + "\n"
        wheel = folder / f"{self.module}-{self.version}-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, text in files.items():
                archive.writestr(name, text)
        return wheel


@pytest.fixture(scope="session")
def make_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Environment]]:
    """Give a function that makes an environment; all are removed at the end."""
    made: list[Path] = []

    def make(name: str) -> Environment:
        folder = tmp_path_factory.mktemp(name)
        made.append(folder)
        home = folder / "venv"
        venv.create(home, with_pip=False, symlinks=True)
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        places = [path for path in sys.path if Path(path).name in {"site-packages", "dist-packages"}]
        # Not plain paths: an editable install is itself a .pth file, which only `addsitedir` reads.
        lines = [f"import site; site.addsitedir({path!r})" for path in places]
        (home / "lib" / version / "site-packages" / "shared.pth").write_text("\n".join(lines) + "\n")
        return Environment(home / "bin" / "python", folder)

    yield make
    for folder in made:
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def built_wheels(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Build the wheels of the projects that lie beside this file, with their own build backend."""
    folder = tmp_path_factory.mktemp("wheels")
    sources = folder / "sources"  # builds write beside the source
    shutil.copytree(PROJECTS, sources)
    projects = sorted(str(path) for path in sources.iterdir())
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "wheel"]
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(folder)]
    done = subprocess.run([*command, *options, *projects], capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    return sorted(folder.glob("*.whl"))


@pytest.fixture(scope="session")
def distribution() -> type[Distribution]:
    """Give the class of distributions that are in plain PyTorch."""
    return Distribution
