"""A module that draws a random number, prints and imports something heavy when it is imported: a mutant's home."""

import torch
import torch.distributed.fsdp

from fabric_core.conformance.references import Remembering

print("loud")  # noqa: T201 - the mutation
torch.rand(1)


class Loud(Remembering):
    """Does on import what belongs into a method."""
