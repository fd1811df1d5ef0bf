"""The report of a run: stored files -> Markdown, one HTML page, pictures. Reads files only, never a model."""
