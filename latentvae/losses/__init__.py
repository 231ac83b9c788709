"""The loss terms and the objective that composes them."""
