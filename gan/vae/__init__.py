"""Variational autoencoders: the likelihood models that GANs are compared with."""
