"""Latent stores as datasets for diffusion training."""
