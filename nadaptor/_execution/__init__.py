"""How a simulation is run: tiles, devices, convolutions. No result depends on it."""
