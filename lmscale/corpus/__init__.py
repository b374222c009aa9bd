"""Corpora on disk: shards, manifest, order, who reads what. numpy only."""
