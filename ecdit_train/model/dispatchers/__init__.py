"""How rows are gathered and summed on one device, one file each with its configuration."""
