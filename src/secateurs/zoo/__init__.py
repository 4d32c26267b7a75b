"""Small reference networks and real data sets that ship with ordinary packages."""
