"""A model's folder on disk: what it declares, how its weights are stored, how one is written."""
