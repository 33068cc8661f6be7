"""Train networks with noisy quantized activations and run them as spiking networks, in JAX."""

from nadaptor._execution.conv_gradient import conv_general_dilated
from nadaptor.corrections import OffsetSpikes, Srp
from nadaptor.neurons import IntegrateAndFire, SignedIntegrateAndFire, StBif
from nadaptor.operations import energy
from nadaptor.quantization import quantize
from nadaptor.quantizers import clipped_relu, lsq, noise_adaptor, qcfs, slip_relu
from nadaptor.recording import record
from nadaptor.simulation import Simulation, simulate
from nadaptor.simulation.deployment import export
from nadaptor.transformation import SpikingNetwork, spiking

__all__ = [
    "IntegrateAndFire",
    "OffsetSpikes",
    "SignedIntegrateAndFire",
    "Simulation",
    "SpikingNetwork",
    "Srp",
    "StBif",
    "clipped_relu",
    "conv_general_dilated",
    "energy",
    "export",
    "lsq",
    "noise_adaptor",
    "qcfs",
    "quantize",
    "record",
    "simulate",
    "slip_relu",
    "spiking",
]
