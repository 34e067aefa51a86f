"""Shards and streams: from images and captions on disk to batches whose order is arithmetic.

Shards are WebDataset tars, read and written by our own code: an order that can be resumed exactly needs an index, and our
files need one member order. Of the `webdataset` package only tests make use: it reads our tars, we read its writers'.

The room stands alone: numpy only, no torch, nothing of the trainer. `contract.py` is all that the trainer sees. `shapes/` is a
data set made with it, and the core does not know it.
"""
