"""The run file as frozen values: decode, override, check, resolve, fingerprint."""
