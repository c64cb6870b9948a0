"""The networks, in torch alone: one file for each, attribute names are the released state-dict keys."""
