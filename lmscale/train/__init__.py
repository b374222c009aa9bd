"""The loop and everything around it that a run needs: the composition roots of the verbs that train or use a model."""
