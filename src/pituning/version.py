"""The version, in one place: read by the build backend, the command line and every saved expert."""

__version__ = "0.1.0"
