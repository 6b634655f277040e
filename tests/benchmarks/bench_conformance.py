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
EVERY = ("strategy", "launcher", "wrapper", "precision", "checkpoint", "logger", "accelerator")


def measure(*plugins: str) -> tuple[float, list[str]]:
    """Give how many seconds one call takes, and its last lines: one for each plugin."""
    begin = time.perf_counter()
    command = [sys.executable, "-m", "fabric_core", "conformance", *plugins]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - begin
    return seconds, [line for line in done.stdout.splitlines() if line.partition(" ")[0] in EVERY]


def main() -> None:
    """Print a table."""
    print("| plugin | rules | seconds | at most |\n|---|---|---|---|")
    for kind, name in PLUGINS:
        seconds, (line,) = measure(f"{kind}:{name}")
        print(f"| {kind} {name} | {line.partition(': ')[2]} | {seconds:.1f} | {LIMITS[kind]} |")
    seconds, lines = measure(*(f"{kind}:*" for kind in EVERY))
    print(f"| all {len(lines)} built-in plugins in one call | | {seconds:.1f} | 180 |")


if __name__ == "__main__":
    main()
