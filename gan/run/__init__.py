"""A run: the loop around the step, and the directory that it fills."""
