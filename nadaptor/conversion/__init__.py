"""From a trained checkpoint to a spiking network, with its checks."""
