"""Checking, measuring, tidying, decoding and exporting a latent store."""
