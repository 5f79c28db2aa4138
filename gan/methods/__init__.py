"""What D and G are trained by: objectives, regularizers and divergences, as rows of pure functions."""
