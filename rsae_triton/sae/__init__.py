"""The SAEs: their base class, the rational gate, sparse codes, rounds, files on disk and shards."""
