"""The kit's own references keep every rule of their kind; `make mutants` judges all of them."""

import pytest

from fabric_core.conformance import references, suite

pytestmark = pytest.mark.sampled(0.2)

test_host = suite("accelerator", references.Host)
test_scaled = suite("precision", references.Scaled)
test_averaging = suite("strategy", references.Averaging)
test_tagging = suite("wrapper", references.Tagging)
test_surroundings = suite("launcher", references.Surroundings)
test_one_file = suite("checkpoint", references.OneFile)
test_remembering = suite("logger", references.Remembering)
