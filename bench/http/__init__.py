"""What HTTP adds to an answer, and what slow clients take from others: ``python -m bench.http NAME.json``."""
