"""How good generated pictures are, in figures with their intervals, and whether one model is better than another."""
