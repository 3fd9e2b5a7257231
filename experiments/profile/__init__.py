"""Where a training step's time goes, by part, and how far each part is from its floor."""
