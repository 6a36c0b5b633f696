"""What is imaged: atoms, maps and volumes, and how they deform."""
