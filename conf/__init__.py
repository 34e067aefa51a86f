"""Hydra groups of ecdit, shipped as package data so that they are found from any working directory."""
