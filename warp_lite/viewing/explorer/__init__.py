"""The explorer of a result's fronts."""
