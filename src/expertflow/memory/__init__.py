"""Where expert weights are: records in host memory, slots on the device, and the copies between them."""
