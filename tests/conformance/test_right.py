"""Right plugins of unlike construction are not accused, whatever examples are drawn."""

import os
import random

import pytest

from fabric_core.conformance import Subject, references
from fabric_core.conformance.bench import Bench
from fabric_core.conformance.rule import Rule
from fabric_core.conformance.rules import rules_for
from fabric_core.conformance.runner import judge

pytestmark = pytest.mark.sampled(0.4)

SEEDS = int(os.environ.get("FABRIC_CONFORMANCE_SEEDS", "1"))
"""`make seeds` asks for twenty: then all rules are judged, each by one of twenty seeds."""

HOME = "proof.right"
RIGHT: list[tuple[str, str, dict[str, object]]] = [
    *(
        ("strategy", f"{HOME}:{name}", {})
        for name in (
            "FlatBuckets",
            "AtTheStep",
            "ParameterServer",
            "GatheredMean",
            "Parting",
            "Swapping",
            "OwnGroup",
            "Announcing",
            "Precise",
            "Refusing",
            "OfSingles",
        )
    ),
    *(("precision", f"{HOME}:{name}", {}) for name in ("StaticScale", "ByPolicyAlone", "Halved", "Tripling", "Plain")),
    *(("checkpoint", f"{HOME}:{name}", {}) for name in ("Npz", "LikeSafetensors", "Compressed")),
    ("launcher", "proof.forking:Forking", {}),
    *(("wrapper", f"{HOME}:{name}", {}) for name in ("Quiet", "Hooking")),
    ("logger", f"{HOME}:Lines", {}),
    ("accelerator", f"{HOME}:ManyHosts", {}),
    ("strategy", "ddp", {"bucket_cap_mb": 0.0001, "find_unused_parameters": True}),
    ("strategy", "ddp", {"gradient_as_bucket_view": False}),
    ("strategy", "ddp", {"static_graph": False, "bucket_cap_mb": 1.0}),
    ("strategy", "fsdp", {"reshard_after_forward": False}),
    ("strategy", "fsdp", {"auto_wrap_policy": ["Linear"]}),
    ("strategy", "single_device", {}),
    ("precision", "16-mixed", {"init_scale": 65536.0, "growth_interval": 1}),
    ("precision", "16-mixed", {"init_scale": 256.0, "growth_factor": 3.0, "backoff_factor": 0.25}),
    ("precision", "64-true", {}),
    *((kind, f"{references.__name__}:{name}", {}) for kind, name in (("strategy", "Routed"), ("strategy", "Sharding"))),
    ("precision", f"{references.__name__}:Scaled", {"scale": 3.0}),
]


def test_there_are_enough_of_them() -> None:
    """At least 30."""
    assert len(RIGHT) >= 30


@pytest.mark.parametrize("right", RIGHT, ids=str)
def test_a_right_plugin_is_not_accused(right: tuple[str, str, dict[str, object]]) -> None:
    """No rule is broken: a few of them in each run of the tests, all of them by `make seeds`."""
    kind, name, options = right
    bench = Bench(Subject.of(kind, name, options))
    try:
        found = [judge(rule, bench, seed=seed, shrink=False) for seed, rule in _dealt(right)]
    finally:
        bench.close()
    assert [verdict.message for verdict in found if verdict.failed] == []


def _dealt(right: tuple[str, str, dict[str, object]]) -> list[tuple[int, Rule]]:
    rules = [rule for rule in rules_for(right[0]) if rule.check is not None and rule.kind != "any"]
    if SEEDS == 1:
        cheap = [rule for rule in rules if not rule.id.startswith("LAU") or rule.inside]
        rules = random.Random(str(right)).sample(cheap, 3)  # noqa: S311 - a choice of tests
    return [(1 + index % SEEDS, rule) for index, rule in enumerate(rules)]
