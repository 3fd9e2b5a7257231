"""What uses a trained network."""
