"""Policies: load them, encode prompts, sample completions, score them.

Everything carries a leading axis E, the number of policies. Weights are mappings from the names of
`model.named_parameters()` to tensors (E, …); a forward turns them into logits, and `Policies` holds both.
"""

from .ends import end_ids
from .forward import Forward, make_forward
from .loading import load_policy, save_policy
from .prompts import Prompts, encode_prompts, encode_texts
from .sampling import Policies, Rollout, completion_ids, completions_text

__all__ = ["Forward", "Policies", "Prompts", "Rollout", "completion_ids", "completions_text", "encode_prompts",
           "encode_texts", "end_ids", "load_policy", "make_forward", "save_policy"]
