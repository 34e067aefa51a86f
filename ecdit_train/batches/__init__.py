"""Samples on their way to the trainer: the loader of a run, and its batches encoded on the device."""
