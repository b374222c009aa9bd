"""The roof: the `lmscale` console script. Sees the ground and floor 1 only, so it never loads torch."""
