"""What shows trainings that have ended: a page, a picture of their curves."""
