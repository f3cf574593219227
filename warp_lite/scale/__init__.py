"""More than one machine, and models that do not fit one: each module needs an extra of its own."""
