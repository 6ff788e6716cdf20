"""What is trained and what trains it: networks, autoencoders, losses."""
