"""From raw text to corpora: parallel, resumable, the same bytes for any number of workers."""
