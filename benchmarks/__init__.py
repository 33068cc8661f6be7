"""Benchmarks: speed and memory beside the peers, in pairs within one run."""
