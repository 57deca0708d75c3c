"""Dual models of two trained runs: attack at each alpha, accuracy against robustness."""
