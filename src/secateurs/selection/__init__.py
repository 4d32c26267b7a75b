"""Which samples to keep: embeddings read in shards, k-means, streaming scores, the answer."""
