"""TEM-simulator v1.3's model, without the program."""
