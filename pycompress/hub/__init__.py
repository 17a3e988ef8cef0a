"""Saving and loading: teaches transformers the quantization method `pycompress`.

After this package is imported, `save_pretrained` writes a compressed model and `AutoModelForCausalLM.from_pretrained`
restores it. `config.json` lists the spec of each compressed module and, where they differ, the sizes of each block; the
tensors lie in the usual safetensors files.
"""

from pycompress.hub.code import add_loading_code
from pycompress.hub.config import PycompressConfig
from pycompress.hub.quantizer import PycompressQuantizer, register
from pycompress.hub.record import compressed_modules

__all__ = ["PycompressConfig", "PycompressQuantizer", "add_loading_code", "compressed_modules", "register"]

register()
