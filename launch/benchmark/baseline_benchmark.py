"""Train a GAN and a VAE with the same decoder on the same data for the same time, and compare their samples."""
