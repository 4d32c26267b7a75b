"""One-shot pruning by statistics of a layer's inputs: second moments and the OBS solver."""
