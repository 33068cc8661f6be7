"""Trained and converted networks on disk, and the snapshots of a run."""
