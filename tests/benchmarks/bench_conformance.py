"""How long a plugin's full run takes, at world sizes 1 and 2, in a new process each."""

import subprocess
import sys
import time

PLUGINS = (
    ("strategy", "single_device"),
    ("strategy", "ddp"),
    ("strategy", "fsdp"),
    ("precision", "32-true"),
    ("precision", "16-mixed"),
    ("accelerator", "cpu"),
)
LIMITS = {"strategy": 60, "precision": 20, "accelerator": 20}


def main() -> None:
    """Print a table."""
    print("| plugin | rules | seconds | at most |\n|---|---|---|---|")
    for kind, name in PLUGINS:
        begin = time.perf_counter()
        command = [sys.executable, "-m", "fabric_core", "conformance", f"{kind}:{name}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - begin
        last = done.stdout.strip().splitlines()[-1].partition(": ")[2]
        print(f"| {kind} {name} | {last} | {seconds:.1f} | {LIMITS[kind]} |")


if __name__ == "__main__":
    main()
