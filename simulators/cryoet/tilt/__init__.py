"""Tilt series: the images, and the files of other programs."""
