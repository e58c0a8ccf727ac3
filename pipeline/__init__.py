"""Turn image collections into labels and embeddings with residual networks."""
