"""What `fzoo bench` does: fzoo beside other engines, each in a process of its own, taking turns."""

from fzoo.bench.runner import bench

__all__ = ["bench"]
