"""`lmscale doctor`: what this machine and this cluster can run, and what every node must be before the first step."""
