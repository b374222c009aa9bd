"""Cluster kinds: how a job is started, observed and ended, behind one protocol."""
