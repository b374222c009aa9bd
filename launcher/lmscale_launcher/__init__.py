"""Start, supervise, plan and observe jobs. Imports the torch-free packages only."""
