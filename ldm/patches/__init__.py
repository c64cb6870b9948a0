"""What changes a network's result: one function `network -> network` for each method."""
