"""TEM-simulator, by the user's own binary, as a simulator."""
