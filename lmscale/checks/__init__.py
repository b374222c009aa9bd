"""Checks that need the run file together with a corpus, a tokenizer or a run folder; without torch."""
