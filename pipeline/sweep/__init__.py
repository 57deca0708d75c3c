"""What a sweep answers, read from MLflow alone: front, importance, ablations, the best to keep."""

from pipeline.sweep.answer import write_answer

__all__ = ["write_answer"]
