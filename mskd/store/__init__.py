"""The store on disk: what a run leaves there, and how it stays whole."""
