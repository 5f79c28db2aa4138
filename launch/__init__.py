"""The commands. They are thin: each connects data and gan, and prints results."""
