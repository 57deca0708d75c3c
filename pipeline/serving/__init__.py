"""Serving of a trained model over HTTP, by Ray Serve."""
