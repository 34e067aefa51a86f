"""Offline preparation: pictures of any form to shards of ours, latents, filters, duplicates. One output file is one task
(`work`), made from its inputs alone, wherever it runs (`local`, `on_ray`, a part of a Slurm array)."""
