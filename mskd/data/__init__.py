"""Data: files and hub ids -> rows, prompts and responses as token ids, splits, batches."""
