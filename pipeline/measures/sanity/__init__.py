"""Sanity checks of an evaluation, and the verdict that follows from them."""
