"""One file for each family of networks; each reads like its paper."""
