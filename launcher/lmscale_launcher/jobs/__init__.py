"""Jobs: what is to be started, what was, and the verbs around them; the same for every kind of cluster."""
