"""Adapters: external codes as simulators."""
