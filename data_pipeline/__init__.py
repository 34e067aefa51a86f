"""Shards and streams: from images and captions on disk to batches whose order is arithmetic.

The room stands alone: numpy only, no torch, nothing of the trainer. `contract.py` is all that the trainer sees.
"""
