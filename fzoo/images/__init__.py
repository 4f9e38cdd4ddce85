"""Pixels in, class names out."""
