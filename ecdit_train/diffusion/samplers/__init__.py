"""Samplers, one file each: integrators of dx = v(x, t) dt from noise to data."""
