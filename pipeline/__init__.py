"""Training, evaluation and tracking of robust mixtures of experts."""
