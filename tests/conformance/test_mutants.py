"""The kit catches what is wrong, says what to change, and raises no false alarm."""

import os
import random

import pytest
from proof.matrix import MUTANTS, failing
from proof.mutants import Mutant

from fabric_core.conformance import Subject, run_rules
from fabric_core.conformance.bench import Bench
from fabric_core.conformance.rule import Rule
from fabric_core.conformance.rules import rules_for
from fabric_core.conformance.runner import judge

pytestmark = pytest.mark.sampled(0.3)

SEEDS = range(1, 1 + int(os.environ.get("FABRIC_CONFORMANCE_SEEDS", "1")))
"""`make seeds` asks for twenty."""

SAMPLE = [
    mutant
    for mutant in MUTANTS
    if mutant.subject.value.rpartition(".")[2]
    in {"registration:Loose", "accelerator:Sorting", "precision:Unequal", "strategy:Summing", "others:Direct"}
]


@pytest.mark.parametrize("mutant", SAMPLE, ids=lambda mutant: mutant.name)
def test_a_mutant_fails_exactly_its_rules(mutant: Mutant) -> None:
    """A wrong plugin fails the rules that are written at it and no other, each with its number and an advice."""
    got = failing(mutant.subject)
    assert set(got) == mutant.fails
    for rule, message in got.items():
        assert message.startswith(f"{rule} (")
        assert "\n  instead: " in message or "; see there" in message  # what one error breaks is told once


VARIANTS: list[tuple[str, str, dict[str, object]]] = [
    ("strategy", "ddp", {}),
    ("strategy", "ddp", {"bucket_cap_mb": 0.0001}),
    ("strategy", "ddp", {"bucket_cap_mb": 1.0}),
    ("strategy", "ddp", {"gradient_as_bucket_view": False}),
    ("strategy", "ddp", {"find_unused_parameters": True}),
    ("strategy", "fsdp", {}),
    ("strategy", "fsdp", {"reshard_after_forward": False}),
    ("strategy", "fsdp", {"reshard_after_forward": True}),
    ("strategy", "fsdp", {"auto_wrap_policy": None}),
    ("strategy", "fsdp", {"auto_wrap_policy": ["Linear"]}),
    ("strategy", "single_device", {}),
    ("strategy", "fabric_core.conformance.references:Averaging", {}),
    ("strategy", "fabric_core.conformance.references:Routed", {}),
    ("strategy", "fabric_core.conformance.references:Sharding", {}),
    ("precision", "32-true", {}),
    ("precision", "64-true", {}),
    ("precision", "bf16-mixed", {}),
    ("precision", "16-mixed", {"init_scale": 256.0}),
    ("precision", "16-mixed", {"init_scale": 65536.0, "growth_interval": 1}),
    ("precision", "fabric_core.conformance.references:Scaled", {"scale": 3.0}),
    ("accelerator", "cpu", {}),
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_right_variants_raise_no_false_alarm(variant: tuple[str, str, dict[str, object]]) -> None:
    """Other buckets, meshes, units, scales and types: whatever examples are drawn, no rule is broken."""
    kind, name, options = variant
    bench = Bench(Subject.of(kind, name, options))
    try:
        found = [judge(rule, bench, seed=seed, shrink=False) for seed, rule in _drawn(variant)]
    finally:
        bench.close()
    assert [verdict.message for verdict in found if verdict.failed] == []


def _drawn(variant: tuple[str, str, dict[str, object]]) -> list[tuple[int, Rule]]:
    """Deal the rules with examples among the seeds: each rule at least once, each seed at least one."""
    rules = [rule for rule in rules_for(variant[0]) if rule.examples is not None]
    if len(SEEDS) == 1:
        rules = random.Random(str(variant)).sample(rules, 3)  # noqa: S311 - a choice of tests
    count = max(len(SEEDS), len(rules))
    return [(SEEDS[index % len(SEEDS)], rules[index % len(rules)]) for index in range(count)]


def _pairs(count: int) -> list[tuple[Mutant, Mutant]]:
    """Pair mutants of one reference that override different things."""
    from importlib import import_module

    chance = random.Random(7)  # noqa: S311 - a choice of tests
    pairs: list[tuple[Mutant, Mutant]] = []
    candidates = [
        one for one in MUTANTS if one.subject.value.rpartition(".")[2].partition(":")[0] in {"precision", "strategy"}
    ]
    while len(pairs) < count:
        one, other = chance.sample(candidates, 2)
        home, _, first = one.subject.value.partition(":")
        there, _, second = other.subject.value.partition(":")
        if home != there:
            continue
        classes = [getattr(import_module(home), name) for name in (first, second)]
        own = [{name for name in vars(cls) if not name.startswith("_")} for cls in classes]
        if classes[0].__bases__ == classes[1].__bases__ and not own[0] & own[1]:
            pairs.append((one, other))
    return pairs


@pytest.mark.parametrize(
    "pair", _pairs(4 if len(SEEDS) == 1 else 30), ids=lambda pair: f"{pair[0].name}-{pair[1].name}"
)
def test_pairs_of_mutants_are_caught(pair: tuple[Mutant, Mutant]) -> None:
    """Two faults don't hide each other: a plugin with both still fails a rule that one of them fails."""
    one, other = pair
    value = f"proof.mutants.pairs:{one.subject.kind}__{one.name}__{other.name}"
    subject = Subject(one.subject.kind, "pair", value)
    report = run_rules(subject, only=sorted(one.fails | other.fails), shrink=False, timeout=15)
    assert report.failures
