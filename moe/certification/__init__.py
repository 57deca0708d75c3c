"""Certified robustness: Lipschitz bounds, certified radii, radii of stable routes, smoothing."""
