"""What is known exactly of methods, and small experiments that show it, through the same rows that images train by."""
