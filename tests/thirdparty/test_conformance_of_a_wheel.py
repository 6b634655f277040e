"""A third party checks its plugin with two lines, in its own project and environment."""

import json
from collections.abc import Callable
from typing import Any

import pytest

RIGHT = '''
"""A strategy of a third party."""
from fabric_core.conformance.references import Averaging

class Mean(Averaging):
    """Averages gradients."""
'''

WRONG = RIGHT.replace('"""Averages gradients."""', '''"""Sums gradients, and doesn't divide."""

    def average(self, parameters):
        super().average(parameters)
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(self.world.world_size)
''')  # fmt: skip

BESIDE = """
from fabric_core import around
class Breaking:
    @around.fabric
    def setup(self):
        raise AssertionError("an extension that is installed beside a plugin acts on its rules")
        yield
"""

TEST = """
from fabric_core.conformance import suite

test_rules = suite("strategy", {name!r}, report="report.json")
"""


@pytest.fixture(scope="module")
def environment(
    make_environment: Callable[[str], Any], distribution: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """Give an environment with a right and a wrong strategy, and an extension that must not act on them."""
    environment = make_environment("conformance")
    folder = tmp_path_factory.mktemp("conformance-wheels")
    wheels = [
        distribution(f"acme-{name}", source, points={"fabric.strategies": {f"acme_{name}": f"acme_{name}:Mean"}}).write(
            folder
        )
        for name, source in (("right", RIGHT), ("wrong", WRONG))
    ]
    wheels.append(
        distribution(
            "acme-beside",
            BESIDE,
            points={
                "fabric.extensions": {"beside": "acme_beside:Breaking"},
                "fabric.auto": {"extension/0/beside": "acme_beside:Breaking"},
            },
        ).write(folder)
    )
    environment.install(wheels)
    return environment


def _check(environment: Any, name: str, *more: str) -> Any:
    (environment.folder / "test_mine.py").write_text(TEST.format(name=name))
    return environment.run("-m", "pytest", "-q", "-p", "no:cacheprovider", "test_mine.py", *more)


def test_a_right_wheel_passes(environment: Any) -> None:
    """All rules are kept, and the report says for which distribution."""
    done = _check(environment, "acme_right")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((environment.folder / "report.json").read_text())
    assert (report["plugin"]["distribution"], report["plugin"]["version"]) == ("acme-right", "1.0")
    assert report["passed"]
    assert report["profiles"] == {"Core": True, "Distributed": True}


def test_a_wrong_wheel_is_told_what_to_change(environment: Any) -> None:
    """The failure names the rule, what was seen, and what to change."""
    done = _check(environment, "acme_wrong", "-k", "STR-301 or STR-302", "--junit-xml=junit.xml")
    assert done.returncode == 1
    assert "STR-301 (MUST): Training on the parts of each batch ends where one process ends" in done.stdout
    assert "instead: average gradients over the ranks, each once, before the optimizer steps" in done.stdout
    assert "replay('strategy', 'acme-wrong/acme_wrong', 'STR-301'" in done.stdout
    assert "1 failed, 1 passed" in done.stdout
    assert 'name="test_rules[STR-301]"' in (environment.folder / "junit.xml").read_text()
