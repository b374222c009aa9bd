"""Tokenizers: load, train, encode without loss, decode, fingerprint."""
