"""A package of one's own: parts that chattrain builds by name."""
