"""The SAEs themselves: their base, the rational gate, files on disk, sparse codes, shards."""
