"""One update: state, losses, averaged weights, perturbed weights, bounded norms."""
