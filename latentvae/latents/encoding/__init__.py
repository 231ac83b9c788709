"""Images to a latent store, by any number of processes."""
