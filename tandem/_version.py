"""The version of the distribution, read by hatch."""

__version__ = "0.1.0"
