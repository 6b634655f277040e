"""The kit's own references keep every rule of their kind."""

from fabric_core.conformance import references, suite

test_host = suite("accelerator", references.Host)
test_full = suite("precision", references.Full)
test_doubled = suite("precision", references.Doubled)
test_mixed = suite("precision", references.Mixed)
test_scaled = suite("precision", references.Scaled)
test_alone = suite("strategy", references.Alone)
test_averaging = suite("strategy", references.Averaging)
test_routed = suite("strategy", references.Routed)
test_sharding = suite("strategy", references.Sharding)
