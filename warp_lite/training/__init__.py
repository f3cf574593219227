"""Stage 1: the equations of one RL step, and the machinery that takes M runs through it."""
