"""One optimizer step: FSDP2, DDP or DeepSpeed ZeRO behind one narrow protocol."""
