"""Records -> Batch: objectives, the loader of training steps with its trace, held-out batches, n-grams."""
