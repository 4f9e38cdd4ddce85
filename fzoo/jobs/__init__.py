"""Batch jobs: images in, files of results out."""
