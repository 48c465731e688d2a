"""Models of Hugging Face transformers: served behind OpenAI's routes, and proving on the same weights."""
