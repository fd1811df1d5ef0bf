"""Evaluation: the figures of a loaded model, one line an item and seed, and their statistics."""
