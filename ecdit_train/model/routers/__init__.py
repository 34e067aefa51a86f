"""Routers, one file each with its configuration."""
