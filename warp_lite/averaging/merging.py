"""Stage 2 by the name of its method."""

from __future__ import annotations

from collections.abc import Sequence

from .slerp import lerp, slerp
from .state_dicts import Weights


def merge(init: Weights, policies: Sequence[Weights], method: str) -> Weights:
    """Stage 2: the merge of an iteration's policies; a single one is taken as it is."""
    if len(policies) == 1:
        return dict(policies[0])
    return {"slerp": slerp, "lerp": lerp}[method](init, policies)
