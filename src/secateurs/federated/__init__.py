"""Training where the data cannot move: partitions, messages, clients and a server, on Flower."""
