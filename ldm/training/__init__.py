"""Training: losses, their parts, and the measures of how well an autoencoder reconstructs."""
