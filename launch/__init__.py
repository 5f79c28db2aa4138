"""The commands, thin: each joins data and gan, and prints."""
