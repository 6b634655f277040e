"""The conformance kit: whether a plugin keeps the contract of its kind, rule by rule."""
