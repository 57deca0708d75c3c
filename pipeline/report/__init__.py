"""Tables and a plot of many runs, read from MLflow alone: ``python -m pipeline.report``."""
