"""A run: configuration -> nodes in order -> models on disk."""
