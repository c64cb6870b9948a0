"""The networks, in plain torch: one file for each network; attribute names are the released state-dict keys."""
