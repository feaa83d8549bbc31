"""What makes answers of outputs, a module an API: frames of streams and whole bodies, from one state."""
