"""What each optimizer step of a phase trains on."""
