"""The arithmetic of experts, one file each with its configuration."""
