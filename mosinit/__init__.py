"""The `mosinit` command: builds, signs, publishes, boots and inspects what `mosinit.py` brings up."""

__version__ = "0.1.0"
