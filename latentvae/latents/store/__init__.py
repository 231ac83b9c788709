"""The format of a latent store: its records, files, plan, leases and buckets."""
