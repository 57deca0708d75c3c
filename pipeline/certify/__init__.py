"""Certified robustness of trained models."""
