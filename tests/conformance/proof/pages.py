"""The pages of the documentation that are made from the kit's own tables.

``python -m proof.pages docs`` writes them; a test fails where they are stale.
"""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from fabric_core.conformance.report import profile_of
from fabric_core.conformance.rule import Level, Rule
from fabric_core.conformance.rules import RULES
from proof.equivalent import EQUIVALENT
from proof.generated import population, record
from proof.matrix import MUTANTS, REFERENCES, unproven
from proof.own import population as own_population
from proof.own import record as own_record
from proof.own_equivalent import EQUIVALENT as OWN_EQUIVALENT
from proof.record import Record

__all__ = ["matrix_page", "pages", "specification_page"]

_KINDS: Final[Mapping[str, str]] = {
    "any": "Plugins of every kind",
    "accelerator": "Accelerators",
    "precision": "Precisions",
    "strategy": "Strategies",
    "wrapper": "Wrappers",
    "launcher": "Launchers",
    "checkpoint": "Checkpoint formats",
    "logger": "Loggers",
}


def specification_page() -> str:
    """Give the page with every rule."""
    lines = [
        "# The rules",
        "",
        "This page is made from the conformance kit's table. How to use the kit, and what the levels and profiles",
        "mean, is told in [Check a plugin](../how-to/check-a-plugin.md); which mutant each rule catches, in",
        "[The kit's proof](conformance-matrix.md).",
        "",
        f"There are {len(RULES)} rules.",
    ]
    for kind, title in _KINDS.items():
        lines += ["", f"## {title}"]
        for rule in RULES:
            if rule.kind == kind:
                lines += ["", *_described(rule)]
    return "\n".join(lines) + "\n"


def _described(rule: Rule) -> list[str]:
    conditions = [f"with `{need}`" for need in rule.needs] + [f"without `{lack}`" for lack in rule.lacks]
    where = " and ".join(map(str, rule.world_sizes))
    facts = [f"{rule.level}", f"profile {profile_of(rule)}", f"{where} process{'es' if where != '1' else ''}"]
    return [
        f"### {rule.id}",
        "",
        rule.sentence,
        "",
        f"- {', '.join([*facts, *conditions])}",
        f"- Why: {rule.reason}",
        f"- If it fails: {rule.advice}.",
    ]


def matrix_page() -> str:
    """Give the page with every mutant, and the rules that it fails."""
    lines = [
        "# The kit's proof",
        "",
        "A kit that accepts everything would pass every plugin. So the kit ships with small right plugins, and with",
        "mutants: each changes one thing of a right one. `make mutants` judges them all by all rules of their kind and",
        "fails unless each mutant fails exactly the rules in its row, and each right one none.",
        "",
        f"There are {len(MUTANTS)} mutants of {len(REFERENCES)} right plugins, and {len(RULES)} rules.",
        "",
        "![Mutants (rows) against rules (columns)](conformance-matrix.png)",
        "",
        "## UNPROVEN",
        "",
        "No mutant fails these rules of the level MUST, so that nothing shows that they catch anything:",
        "",
        *(f"- {one.id}: {one.sentence}" for one in RULES if one.id in unproven()),
    ]
    for kind, title in _KINDS.items():
        of_kind = [mutant for mutant in MUTANTS if mutant.subject.kind == kind]
        if of_kind:
            lines += ["", f"## {title}", "", "| mutant | what is wrong | fails |", "|---|---|---|"]
            lines += [f"| {one.name} | {one.what} | {_linked(one.fails)} |" for one in of_kind]
    return "\n".join(lines) + "\n"


def _linked(rules: frozenset[str]) -> str:
    return ", ".join(f"[{rule}](conformance-rules.md#{rule.lower()})" for rule in sorted(rules))


def survivors_page() -> str:
    """Give the page about changes that nobody chose, and which of them no rule notices."""
    kept, everyone = record(), population()
    lines = [
        "# What the kit does not notice",
        "",
        "The [mutants](conformance-matrix.md) are mistakes that somebody thought of. Here are mistakes that nobody",
        "chose: operators change one place of a right plugin's source, as mutation testing does (drop a statement,",
        "negate a condition, swap sum and mean, reuse a stale value, forget an undo, ignore an argument, off by one),",
        "and the kit judges each result until a rule is broken. `make generated` judges a sample, another each time;",
        "`python -m proof.generated --new --record`, with `tests/conformance` on the path, adds to the record from",
        "which this page is made.",
        "",
        f"Of some {round(len(everyone), -2):,} changes {len(kept.seen)} were judged: {kept.noticed} were noticed,",
        f"{len(kept.equivalent)} make no difference that anybody could see, and {len(kept.survivors)} survive:",
        f"{kept.score:.1%} of those that are not equivalent were noticed.",
        "",
        "| changed module | judged | noticed |",
        "|---|---|---|",
    ]
    modules = {one.key: one.module for one in everyone}
    lines += _rows(kept, modules)
    lines += ["", "## Survivors", "", "Each is a gap of the rules, or was not looked at yet.", ""]
    lines += [f"- `{_code(key)}`" for key in kept.survivors] or ["None."]
    lines += ["", "## Equivalent", ""]
    lines += [f"- `{_code(key)}`: {EQUIVALENT[key]}" for key in kept.equivalent] or ["None was listed yet."]
    return "\n".join(lines) + "\n"


def own_page() -> str:
    """Give the page about changes of the project's own code, and which of them its tests don't notice."""
    kept, everyone = own_record(), own_population()
    lines = [
        "# What our tests do not notice",
        "",
        "The same operators as those that try [the kit](conformance-survivors.md) change one place of the project's",
        "own code, drawn by chance, and the tests that come by that place are run until one fails. `make mutations`",
        "finds out which tests come by which lines and judges a sample, another each time; `python -m proof.own --new",
        "--record --sample N`, with `tests/conformance` on the path, adds to the record from which this page is made.",
        "The kit itself is left out: its proof is [the matrix](conformance-matrix.md).",
        "",
        f"Of some {round(len(everyone), -2):,} changes {len(kept.seen)} were judged: {kept.noticed} were noticed,",
        f"{len(kept.equivalent)} make no difference that a test could see, and {len(kept.survivors)} survive:",
        f"{kept.score:.1%} of those that are not equivalent were noticed. Most survivors of the first run were given",
        "tests afterwards (it noticed 132 of 215), so of changes that were not judged yet fewer are noticed.",
        "",
        "| package | judged | noticed |",
        "|---|---|---|",
    ]
    packages = {one.key: str(Path(one.path).parent).replace("/", ".") for one in everyone}
    lines += _rows(kept, packages)
    lines += ["", "## Survivors", ""]
    lines += [f"- `{_code(key)}`" for key in kept.survivors] or ["None."]
    lines += ["", "## Equivalent", ""]
    lines += [f"- `{_code(key)}`: {OWN_EQUIVALENT[key]}" for key in kept.equivalent] or ["None was listed yet."]
    return "\n".join(lines) + "\n"


def _rows(kept: Record, places: Mapping[str, str]) -> Iterator[str]:
    """Give a table's rows: of each place how many changes were judged, and how many noticed."""
    for place in dict.fromkeys(places.values()):
        own = [noticed for key, noticed in kept.seen.items() if places[key] == place]
        if own:
            yield f"| `{place}` | {len(own)} | {sum(noticed is not None for noticed in own)} |"


def _code(text: str) -> str:
    return text.replace("`", "'").replace("|", "\\|")


def pages() -> dict[str, str]:
    """Give every page, by its place below the documentation's folder."""
    return {
        "reference/conformance-rules.md": specification_page(),
        "reference/conformance-matrix.md": matrix_page(),
        "reference/conformance-survivors.md": survivors_page(),
        "reference/test-survivors.md": own_page(),
    }


def draw(path: Path) -> None:
    """Draw the matrix: a dot for each rule that a mutant fails."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rules = [rule for rule in RULES if rule.level != Level.UNTESTED]
    columns = {rule.id: index for index, rule in enumerate(rules)}
    points = [(columns[rule], row) for row, mutant in enumerate(MUTANTS) for rule in mutant.fails]
    figure, axes = plt.subplots(figsize=(16, 14), layout="constrained")
    axes.scatter([x for x, _ in points], [y for _, y in points], s=9, color="black", marker="s")
    bare = [columns[rule] for rule in unproven()]
    for column in bare:
        axes.axvspan(column - 0.5, column + 0.5, color="orange", alpha=0.5, linewidth=0)
    starts = [index for index, rule in enumerate(rules) if index == 0 or rules[index - 1].kind != rule.kind]
    for start in starts:
        axes.axvline(start - 0.5, color="grey", linewidth=0.5)
        axes.text(start, -3, _KINDS[rules[start].kind], rotation=30, fontsize=8)
    axes.set_xlim(-1, len(rules))
    axes.set_ylim(len(MUTANTS), -1)
    axes.set_xticks(range(len(rules)), [rule.id for rule in rules], rotation=90, fontsize=4)
    axes.set_yticks(range(len(MUTANTS)), [f"{one.subject.kind} {one.name}" for one in MUTANTS], fontsize=4)
    axes.set_xlabel(f"{len(rules)} rules; orange: no mutant fails this MUST")
    axes.set_ylabel(f"{len(MUTANTS)} mutants; a square: the mutant fails the rule")
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for place, text in pages().items():
        (folder / place).write_text(text, encoding="utf-8")
    draw(folder / "reference" / "conformance-matrix.png")
