"""Training: the loop of a hop, its objective and its optimizer."""
