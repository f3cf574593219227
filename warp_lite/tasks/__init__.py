"""The worlds that policies are trained in."""
