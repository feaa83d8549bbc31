"""How the expert kernels read weights that are stored in blocks with scales inside."""
