"""r1ray: from a checkpoint and reasoning data to a small model answering over HTTP, on Ray."""

__version__ = "0.1.0"
