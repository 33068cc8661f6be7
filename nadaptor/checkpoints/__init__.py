"""Trained and converted networks on disk, networks of one's own, and the snapshots of a run."""

from nadaptor.checkpoints.network import SavedNetwork, load_network, save_network

__all__ = ["SavedNetwork", "load_network", "save_network"]
