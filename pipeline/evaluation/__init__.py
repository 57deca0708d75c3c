"""Evaluation of a trained model: plan, outcomes, model card, plots."""
