"""Semi-supervised fine-grained sketch-based image retrieval on Ray."""

__version__ = "0.1.0"
