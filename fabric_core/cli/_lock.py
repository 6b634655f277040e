"""``fabric-core plugins lock``: which code may run, written down and compared."""

from pathlib import Path
from typing import Annotated

import typer

from fabric_core.assembly import make_registry
from fabric_core.choosing.lock import Lock, lock_offers
from fabric_core.cli._output import AsJson, Exit, print_json, print_text
from fabric_core.errors import LockError
from fabric_core.kinds import groups
from fabric_core.running.launching import environment

__all__ = ["lock_plugins"]


def lock_plugins(
    file: Annotated[Path, typer.Argument(help="The lock file.")] = Path("fabric.lock"),
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; say what differs, exit code 1 if anything.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write which plugins and extensions may run: all that are installed and not switched off; imports none of them."""
    registry = make_registry(environment(), None)
    offers = [one for kind in groups() for one in registry.offers(kind) if not registry.is_disabled(one)]
    differences: list[str] = []
    if check:
        lock = Lock.read(str(file))
        for offer in offers:
            try:
                lock.refuse(offer)
            except LockError as error:
                differences += [
                    f"{offer.kind} {offer.name} of {offer.owner}: {one}" for one in error.fields["differences"]
                ]
    else:
        lock = lock_offers(str(file), offers)
        lock.write()
    if as_json:
        print_json(
            {
                "file": str(file),
                "distributions": [one.model_dump() for one in lock.distributions],
                "differences": differences,
            }
        )
    elif check:
        print_text("\n".join(dict.fromkeys(differences)) or f"{file}: nothing differs")
    else:
        print_text(f"{file}: {len(offers)} plugins and extensions")
        for one in lock.distributions:
            beside = f", {len(one.files)} files that RECORD doesn't vouch for" if one.files else ""
            print_text(f"  {one.name} {one.version}: {len(one.plugins)}{beside}")
    if differences:
        raise typer.Exit(Exit.NO)
