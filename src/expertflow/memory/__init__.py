"""Expert weights in memory: records on the host, slots on the device, and the copies between them."""
