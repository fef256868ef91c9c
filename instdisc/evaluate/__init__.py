"""Evaluations of features: each a small function from features and labels to named numbers."""

from instdisc.evaluate.knn import knn_classify

__all__ = ["knn_classify"]
