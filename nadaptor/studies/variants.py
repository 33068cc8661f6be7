"""The methods of a study: activations to train with, and variants that set more of a config."""

from collections.abc import Mapping
from typing import Any, Literal

from nadaptor.models.config import ACTIVATIONS, Spiking

Variant = Literal[
    "lsq_unscaled",
    "noise_adaptor_exact",
    "noise_adaptor_scaled",
    "noise_adaptor_unscaled",
    "noise_adaptor_half",
    "noise_adaptor_relu_start",
    "noise_adaptor_relu_start_unscaled",
    "any_level_1_2",
    "any_level_1_2_scaled",
]
# The activations of the table that become spikes, and variants of them.
Method = Literal[Spiking, Variant]
# What a method sets in a config beside p, where that is more than the activation of its name:
# Eq. 7's own gradient in place of Eq. 10, LSQ's factor on the gradient of the scale, noise of half
# the width, scales that are measured on the parent's network with ReLUs, and those without the
# factor; each step's levels drawn from 1 and 2 alone, without the factor and with it.
METHODS: Mapping[Method, Mapping[str, Any]] = {
    "lsq_unscaled": {"activation": "lsq", "scale_gradient": False},
    "noise_adaptor_exact": {"activation": "noise_adaptor", "gradient": "exact"},
    "noise_adaptor_scaled": {"activation": "noise_adaptor", "scale_gradient": True},
    "noise_adaptor_unscaled": {"activation": "noise_adaptor", "scale_gradient": False},
    "noise_adaptor_half": {"activation": "noise_adaptor", "noise_amplitude": 0.25},
    "noise_adaptor_relu_start": {"activation": "noise_adaptor", "scale_init": "mmse_relu"},
    "noise_adaptor_relu_start_unscaled": {
        "activation": "noise_adaptor",
        "scale_init": "mmse_relu",
        "scale_gradient": False,
    },
    "any_level": {"gradient": "exact", "scale_gradient": False},
    "any_level_1_2": {
        "activation": "any_level",
        "drawn_levels": (1, 2),
        "scale_gradient": False,
    },
    "any_level_1_2_scaled": {
        "activation": "any_level",
        "drawn_levels": (1, 2),
        "scale_gradient": True,
    },
}
# Methods whose levels are not a choice: one network serves every p of the study.
FIXED_LEVELS: Mapping[str, int] = {
    name: entry.fixed_levels for name, entry in ACTIVATIONS.items() if entry.fixed_levels
}
# Each method with noise, and what it is compared with: LSQ with its factor on the scales' gradient
# or, where the method goes without, without. "any_level" is held against plain LSQ.
PAIRS: Mapping[Method, Method] = {
    "noise_adaptor": "lsq",
    "noise_adaptor_exact": "lsq",
    "noise_adaptor_unscaled": "lsq_unscaled",
    "noise_adaptor_half": "lsq",
    "noise_adaptor_relu_start": "lsq",
    "noise_adaptor_relu_start_unscaled": "lsq_unscaled",
    "any_level": "lsq",
    "any_level_1_2": "lsq_unscaled",
    "any_level_1_2_scaled": "lsq",
}
