"""The front rooms: one file per published method, in folders by the unit that is removed."""
