"""A spiking network over time: as one scan, and as an artefact that runs without the library."""

from nadaptor.simulation.scan import (
    Correction,
    Simulation,
    Sizes,
    check_independent,
    check_no_mesh,
    run_in_tiles,
    run_network,
    simulate,
    start_carry,
)

__all__ = [
    "Correction",
    "Simulation",
    "Sizes",
    "check_independent",
    "check_no_mesh",
    "run_in_tiles",
    "run_network",
    "simulate",
    "start_carry",
]
