"""What only a GPU can show: `make gpu-check`. docs/how-to/first-hour-on-a-gpu.md says what its figures mean.

Each check is a function of a `Device` in a file of its own kind, runs in a process of its own and is saved as it ends. With
`--device cpu` every one of them runs on small shapes: what is here can only break on a GPU where the GPU itself is asked
(`device.py`, the one seam).
"""
