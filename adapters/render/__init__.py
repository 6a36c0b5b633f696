"""Renderers as simulators: images of meshes, cameras, and how wrong a pose is."""
