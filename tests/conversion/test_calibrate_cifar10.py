"""A pre-trained ResNet-20 on real images; its compilation is not shortened, for its run is long."""

import os
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks.calibrated_resnet20 import load_images, load_network, measure
from nadaptor.conversion.calibrate import CalibrationOptions, calibrate_model

pytestmark = pytest.mark.usefixtures("optimized")

DATA_DIR = os.environ.get("NADAPTOR_DATA_DIR")
WEIGHTS = "weights/resnet20-12fca82f.th"


@pytest.mark.skipif(
    not (DATA_DIR and Path(DATA_DIR, WEIGHTS).is_file()), reason="needs the weights and CIFAR-10"
)
def test_resnet20_calibrated_on_cifar10_comes_within_4_points_of_its_accuracy():
    """Of 100 test images; the figures on 2,000 are in RESULTS.md."""
    model, variables = load_network(Path(DATA_DIR))
    images, labels = load_images(Path(DATA_DIR), "test", 100)
    right = np.asarray(jax.jit(model.apply)(variables, images)).argmax(-1) == labels
    calibration = load_images(Path(DATA_DIR), "train", 64)[0]
    found = calibrate_model(model, variables, calibration, CalibrationOptions("percentile"))
    accuracy = measure(model, found, images, labels, 64)
    assert right.mean() > 0.85
    assert abs(accuracy[63] - right.mean()) <= 0.04
    assert accuracy[7] < accuracy[31]
