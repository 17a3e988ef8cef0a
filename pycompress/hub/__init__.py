"""Saving and loading: teaches transformers the quantization method `pycompress`."""

from pycompress.hub.quantizer import (
    PycompressConfig,
    PycompressQuantizer,
    add_loading_code,
    compressed_modules,
    register,
)

__all__ = ["PycompressConfig", "PycompressQuantizer", "add_loading_code", "compressed_modules", "register"]
