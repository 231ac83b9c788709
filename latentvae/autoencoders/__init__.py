"""Image autoencoders of diffusers under one interface: moments, decode, and the latent scaling of their pipelines."""
