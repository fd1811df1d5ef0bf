"""Plans: chains proposed, costed and tried before anything is trained."""
