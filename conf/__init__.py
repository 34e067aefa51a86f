"""Hydra groups: the presets of every run, installed as data of the package (`pkg://ecdit_train.conf`)."""
