"""Methods that remove ranks: singular directions of kernels and matrices."""
