"""The autoencoder: presets, networks, posterior, latent scaling, and the class that diffusers pipelines take."""
