"""Accuracy of trained and spiking networks on a data set."""
