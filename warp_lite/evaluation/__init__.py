"""Metrics of a policy, fronts, the limit, statistics."""
