"""``python -m fabric_core`` is ``fabric``."""

from fabric_core.cli import main

main()
