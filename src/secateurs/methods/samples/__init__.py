"""Methods that choose which samples of a data set to keep."""
