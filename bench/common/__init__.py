"""What several suites share: models, memory, and what their results and reports have in common."""
