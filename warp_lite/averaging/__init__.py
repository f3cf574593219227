"""Averaging weights: the anchor (ema), the merge (slerp, merging), the interpolation (liti); in memory and on disk."""
