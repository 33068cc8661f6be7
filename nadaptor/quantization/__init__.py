"""Any function with quantizers in the place of its ReLUs, and the rules that start their scales."""

from nadaptor.quantization.quantized import Quantized, project_scales, quantize

__all__ = ["Quantized", "project_scales", "quantize"]
