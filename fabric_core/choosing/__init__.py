"""From what was asked for to a plan: parsing, offers, the registry, and the choice itself."""
