"""One run: train it, score it, let it answer."""
