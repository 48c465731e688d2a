"""Backends: kernels that compute the projection, behind one signature."""

from .backend import Backend

__all__ = ["Backend"]
