"""Find the sub-layers of a recorded forward, their norms, names and weights."""
