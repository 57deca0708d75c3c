"""Export of a trained model to a folder that stands alone."""
