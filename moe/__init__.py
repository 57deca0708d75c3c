"""Mixture-of-experts layers, routers and backbones in plain PyTorch."""
