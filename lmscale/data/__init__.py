"""Records -> Batch: objectives, the loader of training steps, held-out batches, the trace, counted baselines."""
