"""FedTiny as a Flower app."""
