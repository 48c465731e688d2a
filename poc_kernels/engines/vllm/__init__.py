"""Rounds on the model that a stock vLLM server serves."""
