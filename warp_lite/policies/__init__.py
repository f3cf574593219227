"""Policies: load them, encode prompts, sample completions, score them.

Everything carries a leading axis E, the number of policies. Weights are mappings from the names of
`model.named_parameters()` to tensors (E, …); `forward.py` turns them into logits.
"""
