"""What PyTorch calls at the end of `import torch`, once it has found the folder's entry point."""

import importlib


def load() -> None:
    """Make the device, unless its module is what imports PyTorch: it then does so at its end."""
    importlib.import_module("pretend_device")
