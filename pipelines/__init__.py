"""Ray flows built from the core: train, embed, index, evaluate, serve."""
