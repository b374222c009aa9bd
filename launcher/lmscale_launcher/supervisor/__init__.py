"""Starts the ranks of a host, watches them and starts them again; across nodes, with its peers."""
