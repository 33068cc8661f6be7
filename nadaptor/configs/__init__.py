"""What a run is asked for: the config, the named ones, and what they build."""
