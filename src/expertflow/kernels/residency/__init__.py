"""The cache's decisions on the device."""
