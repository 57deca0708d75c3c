"""Channel pruning: groups of coupled channels, and importance scores as HYDRA learns them."""
