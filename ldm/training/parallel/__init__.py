"""Several processes: agreement, sums over ranks, sharded weights."""
