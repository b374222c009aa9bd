"""`lmscale plan`: what a run will be, as far as it can be known without torch and without its cluster."""
