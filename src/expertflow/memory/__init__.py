"""Where expert weights are: rows in host memory, slots on the device, and the copies between them."""
