"""A process that serves a language model and proves its compute: engine, OpenAI routes, rounds, callbacks, metrics."""
